"""The pages of docs/api show every public name; what the site makes of them needs no list of names but in one case."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir() if (path / "pyproject.toml").exists())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_page_shows_the_package_and_the_names_that_its_modules_hide(package):
    name = f"sidetask_{package}"
    page = (ROOT / f"docs/api/{package}.md").read_text(encoding="utf-8").splitlines()
    module = importlib.import_module(name)
    # A function in a module of its own name is hidden by it from whoever only reads the sources.
    folder = Path(module.__file__).parent
    hidden = [n for n in module.__all__ if (folder / f"{n}.py").exists() or (folder / n / "__init__.py").exists()]
    homes = {n: getattr(getattr(module, n), "__module__", name) for n in module.__all__}
    elsewhere = [n for n, home in homes.items() if home.startswith("sidetask_") and not home.startswith(name)]
    assert f"::: {name}" in page
    for n in hidden:
        assert not isinstance(getattr(module, n), ModuleType)
        assert f"::: {name}.{n}.{n}" in page, n
    for n in elsewhere:
        assert any(f"`{n}`" in line for line in page), n
