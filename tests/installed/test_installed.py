"""An installed package is what the tree declares. The environment variable SIDETASK_PACKAGE names its folder."""

import ast
import os
import sys
from importlib import import_module
from importlib.metadata import distribution, distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def project(package):
    return tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text("utf-8"))["project"]


def declared(package, extras):
    texts = list(project(package).get("dependencies", []))
    for optional in project(package).get("optional-dependencies", {}).values() if extras else ():
        texts += optional
    return {canonicalize_name(Requirement(text).name) for text in texts}


def siblings(package):
    direct = {name.removeprefix("sidetask-") for name in declared(package, extras=True) if name.startswith("sidetask-")}
    return direct.union(*map(siblings, direct))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


@pytest.fixture
def package():
    return os.environ["SIDETASK_PACKAGE"]


@pytest.fixture
def installed(package):
    return distribution(f"sidetask-{package}")


def test_version(package, installed):
    assert installed.version == project(package)["version"]


def test_only_declared_siblings_are_there(package):
    names = {found.name for found in distributions() if found.name.startswith("sidetask-")}
    assert names == {f"sidetask-{name}" for name in {package, *siblings(package)}}


def test_code_comes_from_the_installed_wheel(package, installed):
    if not (ROOT / "packages" / package / "src").exists():
        assert not any(file.suffix == ".py" for file in installed.files)
        return
    found = Path(import_module(f"sidetask_{package}").__file__)
    assert found == Path(installed.locate_file(f"sidetask_{package}/__init__.py"))
    assert ROOT / "packages" not in found.parents


def test_entry_points_load(package, installed):
    declared = sum(len(group) for group in project(package).get("entry-points", {}).values())
    assert len(installed.entry_points) == declared + len(project(package).get("scripts", {}))
    for entry_point in installed.entry_points:
        assert callable(entry_point.load()), entry_point


def test_everything_imported_is_declared(package, installed):
    found = {name for file in installed.files if file.suffix == ".py" for name in imported(Path(file.locate()))}
    found -= {f"sidetask_{package}", *sys.stdlib_module_names}
    homes = packages_distributions()
    needed = {canonicalize_name(homes[name][0]) for name in found}
    # Packages of the repository meet through entry points where they are optional. Only the bench also has commands for
    # what one of them can do beside being a method (the relations of sidetask-saal), where that is installed.
    assert {name for name in needed if name.startswith("sidetask-")} <= declared(package, extras=package == "bench")
    assert needed <= declared(package, extras=True)
