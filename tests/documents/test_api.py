"""The pages of docs/api show every public name; what the site makes of them needs no list of names but in two cases."""

import ast
import importlib
import itertools
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path / "src" for path in sorted(ROOT.glob("packages/*")) if (path / "pyproject.toml").exists()]
# A package in a package has public names, too.
PACKAGES = {
    ".".join(path.parent.relative_to(source).parts): path.parent
    for source in SOURCES
    for path in sorted(source.rglob("__init__.py"))
    if "__all__" in path.read_text(encoding="utf-8")
}
PAGES = {path: path.read_text(encoding="utf-8").splitlines() for path in sorted((ROOT / "docs/api").glob("*.md"))}


def documented(folder: Path) -> set[str]:
    """The constants of a package that have a docstring."""
    found = set()
    for path in folder.rglob("*.py"):
        for one, after in itertools.pairwise(ast.parse(path.read_text(encoding="utf-8")).body):
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                targets = one.targets if isinstance(one, ast.Assign) else [getattr(one, "target", None)]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_every_distribution_has_public_names():
    assert {name.split(".")[0] for name in PACKAGES} == {f"sidetask_{source.parent.name}" for source in SOURCES}
    assert {"sidetask_core.testing", "sidetask_bench.networks"} <= set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_page_shows_the_package_and_the_names_that_its_sources_hide(name):
    (page,) = [lines for lines in PAGES.values() if f"::: {name}" in lines]
    module, folder = importlib.import_module(name), PACKAGES[name]
    constants = documented(folder)
    for n in module.__all__:
        value = getattr(module, n)
        assert not isinstance(value, types.ModuleType), n
        home = getattr(value, "__module__", None)
        # A function in a package with a module of its name is hidden by it from whoever only reads the sources.
        if (folder / f"{n}.py").exists() or (folder / n / "__init__.py").exists():
            assert f"::: {home}.{n}" in page, n
        elif not isinstance(value, (type, types.FunctionType)):
            assert n in constants, f"{n} has no docstring, and is not shown"
        elif home.startswith("sidetask_") and not home.startswith(name):
            assert any(f"`{n}`" in line for line in page), n
