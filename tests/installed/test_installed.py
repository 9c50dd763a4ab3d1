"""An installed package is what the tree declares. The environment variable SIDETASK_PACKAGE names its folder."""

import os
import sys
from importlib import import_module
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def project(package):
    return tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text("utf-8"))["project"]


def siblings(package):
    names = (Requirement(text).name for text in project(package).get("dependencies", []))
    direct = {name.removeprefix("sidetask-") for name in names if name.startswith("sidetask-")}
    return direct.union(*map(siblings, direct))


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
