"""The wheels and source distributions in dist/ hold what the tree declares."""

import sys
import tarfile
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECTS = {
    path.parent.name: tomllib.loads(path.read_text("utf-8"))["project"]
    for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}


@pytest.fixture(params=PROJECTS)
def package(request):
    return request.param


@pytest.fixture
def project(package):
    return PROJECTS[package]


@pytest.fixture
def wheel(package, project):
    return ROOT / "dist" / f"sidetask_{package}-{project['version']}-py3-none-any.whl"


@pytest.fixture
def info(wheel):
    (found,) = distributions(path=[str(wheel)])
    return found


def sources(package, folder):
    return {
        path.relative_to(ROOT / "packages" / package / folder).as_posix()
        for path in (ROOT / "packages" / package / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_dist_holds_two_files_for_each_package_and_nothing_else():
    names = {f"sidetask_{package}-{project['version']}" for package, project in PROJECTS.items()}
    expected = {f"{name}-py3-none-any.whl" for name in names} | {f"{name}.tar.gz" for name in names}
    assert {path.name for path in (ROOT / "dist").iterdir()} - {".gitignore"} == expected


def test_identity(package, project, info):
    assert info.metadata["Name"] == project["name"] == f"sidetask-{package}"
    assert info.metadata["Version"] == project["version"]
    assert info.metadata["Requires-Python"] == project["requires-python"]
    assert info.metadata["License-Expression"] == "MIT"


def test_requirements(project, info):
    declared = {Requirement(text) for text in project.get("dependencies", [])}
    for extra, texts in project.get("optional-dependencies", {}).items():
        declared |= {Requirement(f"{text}; extra == '{extra}'") for text in texts}
    assert {Requirement(text) for text in info.requires or []} == declared


def test_siblings_are_bounded_on_both_sides(project):
    for requirement in map(Requirement, project.get("dependencies", [])):
        if requirement.name.startswith("sidetask-"):
            assert {part.operator for part in requirement.specifier} == {">=", "<"}, requirement


def test_entry_points(project, info):
    declared = {**project.get("entry-points", {}), "console_scripts": project.get("scripts", {})}
    expected = {(group, name, value) for group, names in declared.items() for name, value in names.items()}
    assert {(point.group, point.name, point.value) for point in info.entry_points} == expected


def test_wheel_holds_the_whole_source_and_its_type_marker(package, wheel):
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == sources(package, "src")
    assert not held or f"sidetask_{package}/py.typed" in held


def test_licence(package, project, info):
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert (ROOT / "packages" / package / "LICENSE").read_text("utf-8") == text
    assert info.read_text("licenses/LICENSE") == text


def test_source_distribution_holds_source_tests_and_documents(package, project):
    top = f"sidetask_{package}-{project['version']}"
    with tarfile.open(ROOT / "dist" / f"{top}.tar.gz") as archive:
        held = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO"}
    for folder in ("src", "tests"):
        wanted |= {f"{folder}/{name}" for name in sources(package, folder)}
    assert held >= wanted
