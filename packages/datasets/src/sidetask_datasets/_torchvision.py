"""The door to torchvision: makes its wheel importable beside a torch it was not compiled for.

A torchvision wheel whose compiled part does not load (built for CUDA, say, beside a CPU-only torch) stops at import,
because it attaches shape rules to two operators, ``torchvision::nms`` and ``torchvision::qnms``, that the compiled part
would have declared. torchmetrics imports torchvision, so this package could not even be imported there. Declaring the
two is enough: everything in torchvision that is plain Python then works, and calling the operators themselves is an
error that names the missing kernel. Nothing is touched where torchvision imports as it is, or is not installed.
"""

from __future__ import annotations

import importlib
import sys

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # a declaration lives as long as its Library object


def open_torchvision() -> tuple[str, ...]:
    """Import torchvision, declaring the operators its wheel misses; their names (none where nothing was missing).

    Raises:
        RuntimeError: torchvision's own, when its import fails for any other reason.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return ()
    except RuntimeError as error:
        missing = tuple(name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name))
        if "torchvision::" not in str(error) or not missing:
            raise
        for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "FRAGMENT")
        _declared.append(library)
        for name in missing:
            library.define(name + _SIGNATURE)
        importlib.import_module("torchvision")
        return missing
    return ()


declared_operators = open_torchvision()
