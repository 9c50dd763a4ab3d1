"""Sessions of the whole repository. The packages and what they need of each other are read from the tree."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename
from packaging.version import Version

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"
# What is run if no session is named: what looks at the tree, and what looks at installed wheels.
nox.options.tags = ["tree", "wheels"]

ROOT = Path(__file__).parent
PROJECTS = {
    path.parent.name: nox.project.load_toml(path)["project"] for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
METHODS = [name for name, project in PROJECTS.items() if "sidetask.methods" in project.get("entry-points", {})]
WHEELS: dict[str, str] = {}

PREFIX = "sidetask-"
# Compiling all of torch takes longer than its installation; what is imported is compiled then, and kept for the many
# processes that tests start.
UNCOMPILED = "--no-compile"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
PINNED = (UNCOMPILED, "-c", "constraints.txt")
PYTEST = ("pytest", "pytest-xdist")
# Most tests are too small for a second thread, so two processes of one thread each use two cores better.
WORKERS = ("-n", "2")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def extras(package: str) -> dict[str, list[str]]:
    """What a package can use beyond what it needs, by the name of the extra."""
    return PROJECTS[package].get("optional-dependencies", {})


def requirements(package: str) -> list[Requirement]:
    """What a package declares, with its extras: there is no other way to test those."""
    return [Requirement(text) for text in sum(extras(package).values(), PROJECTS[package].get("dependencies", []))]


def with_siblings(*packages: str) -> list[str]:
    """The packages and all that they declare of this repository, directly or through one another."""
    found: list[str] = []
    queue = list(packages)
    while queue:
        package = queue.pop()
        if package not in found:
            found.append(package)
            queue += [r.name.removeprefix(PREFIX) for r in requirements(package) if r.name.startswith(PREFIX)]
    return sorted(found)


def with_extras(package: str, where: str) -> str:
    """What makes pip install a package, from wherever, with its extras."""
    return f"{where}[{','.join(extras(package))}]" if extras(package) else where


def editable(packages: list[str]) -> list[str]:
    """What makes pip install packages from the tree."""
    return [argument for package in packages for argument in ("-e", with_extras(package, f"packages/{package}"))]


def wheels(session: nox.Session, packages: list[str]) -> list[str]:
    """The packages' wheels. The first session that asks builds them all, the others of this run reuse them."""
    if not WHEELS:
        folder = session.cache_dir / "wheels"
        shutil.rmtree(folder, ignore_errors=True)
        sources = [f"./packages/{package}" for package in PROJECTS]
        session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), *sources)
        for wheel in folder.glob("*.whl"):
            WHEELS[parse_wheel_filename(wheel.name)[0].removeprefix(PREFIX)] = str(wheel)
    return [with_extras(package, WHEELS[package]) for package in packages]


def lowest(packages: list[str]) -> list[str]:
    """Pins at the lower bounds that the packages declare; the highest of them where several declare one."""
    bounds: dict[str, Version] = {}
    for requirement in (r for package in packages for r in requirements(package) if not r.name.startswith(PREFIX)):
        bound = max(Version(part.version) for part in requirement.specifier if part.operator == ">=")
        bounds[requirement.name] = max(bound, bounds.get(requirement.name, bound))
    return [f"{name}=={bound}" for name, bound in bounds.items()]


def check_installed(session: nox.Session, package: str, *options: str) -> None:
    """Run the tests and the doctests of an installed package, and compare its metadata with the tree."""
    targets = ["tests/installed"]
    if (ROOT / f"packages/{package}/src").exists():
        targets += ["--pyargs", f"sidetask_{package}"]
    if (ROOT / f"packages/{package}/tests").exists():
        targets.append(f"packages/{package}/tests")
    session.run("pip", "check")
    arguments = (*WORKERS, *options, *targets, *session.posargs)
    session.run("pytest", *arguments, env={**ONE_THREAD, "SIDETASK_PACKAGE": package})


@nox.session
def demo(session: nox.Session) -> None:
    """Compare methods on generated data, and say where the report is."""
    session.install(*PINNED, *editable(with_siblings("bench", *METHODS)))
    session.run("python", "-m", "sidetask_bench", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests and the doctests of all packages in one environment."""
    session.install(*PINNED, *editable(list(PROJECTS)), *PYTEST)
    session.run("pytest", *WORKERS, *session.posargs, env=ONE_THREAD)


def sessions_of(package: str) -> None:
    """Add the sessions that each package has of its own."""

    @nox.session(name=f"test-{package}", tags=["wheels"])
    def test(session: nox.Session) -> None:
        """Test one package's wheel beside its declared siblings only."""
        session.install(*PINNED, *wheels(session, with_siblings(package)), *PYTEST)
        check_installed(session, package)

    @nox.session(name=f"lowest-{package}")
    def lowest_bounds(session: nox.Session) -> None:
        """Test one package's wheel at the lower bounds that it and its siblings declare."""
        packages = with_siblings(package)
        session.install(UNCOMPILED, *wheels(session, packages), *lowest(packages), *PYTEST)
        # Old releases warn about what newer Pythons and requirements of theirs deprecate.
        check_installed(session, package, "-W", "default")


for name in PROJECTS:
    sessions_of(name)


@nox.session(tags=["wheels"])
def compose(session: nox.Session) -> None:
    """Train with the methods of any two packages in the slots of one, from the wheels of these two alone."""
    packages = with_siblings(*METHODS)
    session.install(*PINNED, *wheels(session, packages), "pytest")
    # What they require of others stays; of the repository, only what the two declare may be there.
    session.run("python", "-m", "pip", "uninstall", "-q", "-y", *[PREFIX + package for package in packages])
    alone = {package: Path(session.create_tmp()) / package for package in packages}
    for package, folder in alone.items():
        shutil.rmtree(folder, ignore_errors=True)
        session.install("-q", "--no-deps", "--target", str(folder), *wheels(session, [package]))
    for pair in itertools.combinations_with_replacement(METHODS, 2):
        path = os.pathsep.join(str(alone[package]) for package in with_siblings(*pair))
        env = {**ONE_THREAD, "PYTHONPATH": path, "SIDETASK_PACKAGES": " ".join(pair)}
        session.run("pytest", "tests/compose", *session.posargs, env=env)


@nox.session(tags=["tree"])
def examples(session: nox.Session) -> None:
    """Run every example."""
    # Without torchvision, which Lightning and others would import, and which may not go with the torch that is there.
    session.install(*PINNED, *editable(with_siblings("core", "autolambda", "ial")), "-e", "packages/baselines")
    session.install(*PINNED, "-r", "examples/requirements.txt", "pytest")
    session.run("pytest", "tests/examples", *session.posargs, env=ONE_THREAD)


@nox.session(tags=["tree"])
def lint(session: nox.Session) -> None:
    """Check style and layout."""
    session.install(*PINNED, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(tags=["tree"])
def types(session: nox.Session) -> None:
    """Check the types of every package's source."""
    session.install(*PINNED, *editable(list(PROJECTS)), "mypy")
    session.run("mypy", *[str(path) for path in sorted(ROOT.glob("packages/*/src"))])


@nox.session(tags=["tree"])
def docs(session: nox.Session) -> None:
    """Build the site of docs/ into site/; a link that leads nowhere is an error."""
    session.install(*PINNED, "-r", "docs/_site/requirements.txt")
    session.run("mkdocs", "build", "--strict")


@nox.session(tags=["tree"])
def build(session: nox.Session) -> None:
    """Build every package's wheel and source distribution into dist/, and check what they hold."""
    session.install(*PINNED, "build", "hatchling", "pytest", "twine")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for package in PROJECTS:
        session.run("python", "-m", "build", "--no-isolation", "-o", "dist", f"packages/{package}", silent=True)
    session.run("twine", "check", "--strict", *[str(path) for path in sorted(ROOT.glob("dist/*"))])
    session.run("pytest", "tests/distributions", *session.posargs)
