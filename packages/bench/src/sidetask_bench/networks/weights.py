"""Weights that others have trained: from a local file, or torchvision's by their name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def load_weights(net: nn.Module, weights: str | Path, model: str, *, but: str) -> None:
    """Put the weights of one of torchvision's models into a network that has its layers by its names.

    Args:
        net: the network, which may lack layers of the model.
        weights: a name of torchvision's (``DEFAULT``, ``IMAGENET1K_V1``, ``ResNet18_Weights.IMAGENET1K_V1``), whose
            file is downloaded once and kept where `torch.hub` keeps files; or a local file, see `read_weights`.
        model: torchvision's name of the model.
        but: how the names of layers begin that are not wanted (its classifier).

    Raises:
        ValueError: if there is no such name and no such file, a download fails, a file holds no weights, or they do
            not fit: the error names what is missing, unknown, or of another shape.
    """
    source, state = _read(weights, model)
    own = net.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith(but)}
    # Files that are older than this count of batches go without it, and so does `load_state_dict`.
    needed = [name for name in own if not name.startswith(but) and not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in state]
    unknown = [name for name in state if name not in own]
    misfits = [
        f"{name} {list(value.shape)} instead of {list(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    found = {"missing": missing, "unknown": unknown, "of another shape": misfits}
    wrong = [f"{len(keys)} {what} ({_few(keys)})" for what, keys in found.items() if keys]
    if wrong:
        raise ValueError(f"{source}: the weights do not fit this {model}: {'; '.join(wrong)}")
    net.load_state_dict(state, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A `state_dict` from a file of `torch.save`, which is read without running what it holds, or of safetensors.

    Raises:
        ValueError: if there is no such file, or something else in it.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise what they like about a file that is none of theirs
        raise ValueError(f"{path}: cannot be read as weights: {_said(error)}") from error
    return _checked(state, str(path))


def _read(weights: str | Path, model: str) -> tuple[str, dict[str, Tensor]]:
    """What to call them in errors, and the weights."""
    from torchvision.models import get_model_weights

    there = get_model_weights(model)
    name = str(weights).removeprefix(f"{there.__name__}.")
    if name not in there.__members__:
        path = Path(weights)
        if not path.exists():
            names = ", ".join(there.__members__)
            raise ValueError(f"{weights}: no such file, and no name of torchvision's weights of {model}: {names}")
        return str(path), read_weights(path)
    chosen = there[name]
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(chosen.url).name
    try:
        state = chosen.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # of the connection, or of a file that was kept
        raise ValueError(
            f"torchvision's {chosen}: neither {kept} nor {chosen.url} can be read as weights: {_said(error)}"
        ) from error
    return str(kept), _checked(state, str(kept))


def _said(error: Exception) -> str:
    if isinstance(error, (OSError, ImportError, RuntimeError)):
        return f"{type(error).__name__}: {error}"
    # What the others say is where a reader stood, or how to run what the file holds.
    return f"it is not, or not only, tensors as torch.save or safetensors write them ({type(error).__name__})"


def _checked(state: object, source: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{source}: expected a state_dict (names to tensors), found {type(state).__name__}")
    return dict(state)


def _few(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
