import pytest
import sidetask_datasets  # noqa: F401 -- before any test module imports torchmetrics, which imports torchvision
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are small: a second thread costs more than it does where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Whatever a test decodes is its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SIDETASK_CACHE", str(folder))
    return folder
