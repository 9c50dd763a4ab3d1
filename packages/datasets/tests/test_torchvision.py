import subprocess
import sys
import types

import pytest
import torch
from sidetask_datasets import _torchvision


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_torchvision_and_torchmetrics_import_behind_the_door():
    done = run(
        "import sidetask_datasets, torchvision, torchmetrics\n"
        "from torchvision.models import resnet18\n"
        "import torch\n"
        "resnet18().eval()(torch.zeros(1, 3, 32, 32))\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def broken(monkeypatch):
    """A stand-in for torchvision whose import fails until both operators are declared."""
    declared = []

    class Library:
        def __init__(self, name, kind):
            assert (name, kind) == ("torchvision", "FRAGMENT")

        def define(self, schema):
            declared.append(schema.split("(")[0])

    def imported(name):
        if len(declared) < 2:
            sys.modules["torchvision"] = types.ModuleType("torchvision")
            raise RuntimeError("operator torchvision::nms does not exist")
        return sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))

    monkeypatch.setattr(_torchvision.importlib, "import_module", imported)
    monkeypatch.setattr(torch.library, "Library", Library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    return declared


def test_missing_operators_are_declared_and_the_import_repeated(broken, monkeypatch):
    monkeypatch.setattr(torch.ops, "torchvision", types.SimpleNamespace(), raising=False)
    assert _torchvision.open_torchvision() == ("nms", "qnms")
    assert broken == ["nms", "qnms"]


def test_nothing_is_declared_where_operators_are_there(broken, monkeypatch):
    monkeypatch.setattr(torch.ops, "torchvision", types.SimpleNamespace(nms=1, qnms=1), raising=False)
    with pytest.raises(RuntimeError, match="does not exist"):
        _torchvision.open_torchvision()
    assert broken == []


def test_nothing_is_declared_where_torchvision_imports(monkeypatch):
    monkeypatch.setattr(_torchvision.importlib, "import_module", types.ModuleType)
    monkeypatch.setattr(torch.library, "Library", None)
    assert _torchvision.open_torchvision() == ()


def test_another_failure_of_torchvision_is_not_hidden(monkeypatch):
    def imported(name):
        raise RuntimeError("something else")

    monkeypatch.setattr(_torchvision.importlib, "import_module", imported)
    with pytest.raises(RuntimeError, match="something else"):
        _torchvision.open_torchvision()
