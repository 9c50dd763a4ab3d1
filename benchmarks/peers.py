"""Steps of the same methods by TorchJD and LibMTL, each used the way its documentation says, and some as published.

    python -m pip install --requirement benchmarks/requirements.txt

All get the model, the batches and the losses that ours get.

TorchJD: ``mtl_backward`` puts every task's gradient of the shared parameters into `.jac`, ``jac_to_grad`` aggregates
them; its scalarizers are followed by ``backward()``. At features, ``mtl_backward`` stops at a detached copy of them,
and one pass over the encoder takes up what the aggregator made of the gradients there.

LibMTL: hard parameter sharing and a weighting class, joined and called as its Trainer does, with ``rep_grad`` at
features.

Auto-λ as published (Liu et al. 2022) is written down here, in plain PyTorch: a copy of the network takes the virtual
step, the validation gradient v is taken there, λ learns from the training losses of the network displaced by v times
0.01 / ‖v‖, forth and back, and then the network takes its real step.

SAAL as published (Graffeuille et al. 2024) is that procedure for the coefficients of all tasks and transfers, without
their normalisation, on the network with all clones, of which the virtual step has copies too.

Pareto MTL as published (Lin et al. 2019): a forward and a backward pass of the whole network for every task, then the
weights, then one more forward pass for every task and a backward pass of their weighted sum.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import sys
import types
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], None]
# Our rows, and what each library has beside them: name, place and options.
TORCHJD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "equal": ("Sum", "losses", {}),
    "uncertainty": ("UW", "losses", {}),
    "dwa": ("DWA", "losses", {}),
    "rlw": ("Random", "losses", {}),
    "imtl-l": ("IMTLL", "losses", {}),
    "famo": ("FAMO", "losses", {}),
    "graddrop at features": ("GradDrop", "features", {}),
    "pcgrad at features": ("PCGrad", "features", {}),
    "cagrad at features": ("CAGrad", "features", {"c": 0.4}),
    "mgda at features": ("MGDA", "features", {}),
    "imtl-g at features": ("IMTLG", "features", {}),
    "nash-mtl at features": ("NashMTL", "features", {}),
    "aligned-mtl at features": ("AlignedMTL", "features", {}),
    "graddrop over parameters": ("GradDrop", "parameters", {}),
    "pcgrad over parameters": ("PCGrad", "parameters", {}),
    "cagrad over parameters": ("CAGrad", "parameters", {"c": 0.4}),
    "mgda over parameters": ("MGDA", "parameters", {}),
    "imtl-g over parameters": ("IMTLG", "parameters", {}),
    "nash-mtl over parameters": ("NashMTL", "parameters", {}),
    "aligned-mtl over parameters": ("AlignedMTL", "parameters", {}),
    "upgrad, adapted, over parameters": ("UPGrad", "parameters", {}),
    "upgrad, adapted, at features": ("UPGrad", "features", {}),
}
LIBMTL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "equal": ("EW", "parameters", {}),
    "uncertainty": ("UW", "parameters", {}),
    "dwa": ("DWA", "parameters", {"T": 2.0}),
    "rlw": ("RLW", "parameters", {"dist": "Normal"}),
    "graddrop at features": ("GradDrop", "features", {"leak": 0.0}),
    "mgda at features": ("MGDA", "features", {"mgda_gn": "none"}),
    "imtl at features": ("IMTL", "features", {}),
    "gradnorm at features": ("GradNorm", "features", {"alpha": 1.5}),
    "pcgrad over parameters": ("PCGrad", "parameters", {}),
    "cagrad over parameters": ("CAGrad", "parameters", {"calpha": 0.4, "rescale": 0}),
    "mgda over parameters": ("MGDA", "parameters", {"mgda_gn": "none"}),
    "imtl over parameters": ("IMTL", "parameters", {}),
    "gradnorm over parameters": ("GradNorm", "parameters", {"alpha": 1.5}),
}


@functools.cache
def installed(library: str) -> bool:
    """Whether there is such a distribution; one that is missing is named on stderr, once."""
    try:
        version(library)
    except PackageNotFoundError:
        print(f"no {library}: python -m pip install --requirement benchmarks/requirements.txt", file=sys.stderr)
        return False
    return True


def peers(setting: Any) -> dict[tuple[str, str], Callable[[], Run]]:
    """What builds a step, by our row and the library, for libraries that are installed and what is written here."""
    found: dict[tuple[str, str], Callable[[], Run]] = {
        ("autolambda before", "as published"): lambda: _published_autolambda(setting),
        ("saal-w before", "as published"): lambda: _published_saal_w(setting),
        ("pareto-mtl over parameters", "as published"): lambda: _published_pareto_mtl(setting),
    }
    for library, entries, build in (("TorchJD", TORCHJD, _torchjd), ("LibMTL", LIBMTL, _libmtl)):
        if not installed(library):
            continue
        for row, entry in entries.items():
            found[row, library] = lambda build=build, entry=entry: build(setting, *entry)
    return found


def versions() -> str:
    """The installed versions of both, for the foot of a table."""
    return "; ".join(f"{library} {version(library)}" for library in ("TorchJD", "LibMTL") if installed(library))


def losses_of(setting: Any, predictions: dict[str, Tensor]) -> list[Tensor]:
    """The tasks' losses, as they are in every step here."""
    return [task.mean(predictions[task.name], setting.batch.target_of(task))[0] for task in setting.tasks]


def _torchjd(setting: Any, name: str, at: str, options: dict[str, Any]) -> Run:
    from torchjd import aggregation, scalarization
    from torchjd.autojac import jac_to_grad, mtl_backward

    # NashMTL states its problem in a form that cvxpy warns about.
    warnings.filterwarnings("ignore", module="torchjd")
    model, batch, count = setting.model, setting.batch, len(setting.tasks)
    kind = getattr(scalarization if at == "losses" else aggregation, name)
    sized = {"n_tasks": count, "shape": count}
    options = options | {key: value for key, value in sized.items() if key in inspect.signature(kind).parameters}
    rule = kind(**options).to(batch.inputs.device)

    def by_losses() -> None:
        model.zero_grad()
        rule(torch.stack(losses_of(setting, model(batch.inputs)))).backward()
        if name == "FAMO":
            # Its weights learn from the losses after the optimizer's step, by another forward pass.
            with torch.no_grad():
                rule.update(torch.stack(losses_of(setting, model(batch.inputs))))

    def over_parameters() -> None:
        model.zero_grad()
        features = model.encode(batch.inputs)
        mtl_backward(losses_of(setting, model.decode(features)), features=features)
        jac_to_grad(model.shared_parameters(), rule)

    def at_features() -> None:
        model.zero_grad()
        features = model.encode(batch.inputs)
        leaf = features.detach().requires_grad_()
        copy = leaf.view_as(leaf)
        mtl_backward(losses_of(setting, model.decode(copy)), features=copy)
        jac_to_grad([leaf], rule)
        features.backward(leaf.grad)

    if name == "DWA":
        for _ in range(2):
            with torch.no_grad():
                rule(torch.stack(losses_of(setting, model(batch.inputs))))
            rule.step()
    return {"losses": by_losses, "parameters": over_parameters, "features": at_features}[at]


def _libmtl(setting: Any, name: str, at: str, options: dict[str, Any]) -> Run:
    # LibMTL 1.1.5 imports a name from where torchvision once had it.
    moved = types.ModuleType("torchvision.models.utils")
    moved.load_state_dict_from_url = torch.hub.load_state_dict_from_url  # type: ignore[attr-defined]
    sys.modules.setdefault(moved.__name__, moved)
    with contextlib.redirect_stdout(io.StringIO()):
        from LibMTL import weighting
        from LibMTL.architecture import HPS

    model, batch, tasks = setting.model, setting.batch, setting.tasks

    class Joined(HPS, getattr(weighting, name)):  # type: ignore[misc]
        def zero_grad_share_params(self) -> None:
            # LibMTL 1.1.5 writes to `.grad` afterwards, which torch now sets to None unless told otherwise.
            self.encoder.zero_grad(set_to_none=False)

    device = batch.inputs.device
    joined = Joined([task.name for task in tasks], lambda: model.shared, model.heads, at == "features", False, device)
    joined.init_param()
    joined.to(device)
    joined.epoch = 2
    joined.train_loss_buffer = torch.ones(len(tasks), 3).numpy()

    def run() -> None:
        joined.zero_grad()
        losses = torch.zeros(len(tasks)).to(device)
        for t, loss in enumerate(losses_of(setting, joined(batch.inputs))):
            losses[t] = loss
        joined.backward(losses, **options)

    return run


def _published_autolambda(setting: Any) -> Run:
    return _published_lookahead(setting, setting.model, setting.tasks, setting.tasks, setting.optimizer)


def _published_saal_w(setting: Any) -> Run:
    """Auto-λ's procedure for all coefficients, on the network with all transfers; the primary tasks are judged."""
    from sidetask_core import Step, plugins

    step = Step(setting.model, setting.tasks, plugins.make_method("saal-w", setting.tasks))
    # Of the clones, too, the step is one with momentum.
    options = {key: setting.optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(step.model.parameters(), **options)
    for parameter in step.model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return _published_lookahead(setting, step.model, step.tasks, setting.tasks, optimizer)


def _published_lookahead(setting: Any, model: Any, tasks: Any, judged: Any, optimizer: torch.optim.SGD) -> Run:
    virtual = copy.deepcopy(model)
    weights = torch.full((len(tasks),), 0.1, device=setting.batch.inputs.device, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=1e-4)
    parameters, ahead = list(model.parameters()), list(virtual.parameters())
    group = optimizer.param_groups[0]

    def losses(network: torch.nn.Module, batch: Any, wanted: Any = tasks) -> Tensor:
        predictions = network(batch.inputs, [task.name for task in wanted])
        return torch.stack([task.mean(predictions[task.name], batch.target_of(task))[0] for task in wanted])

    def displace(vector: list[Tensor], by: Tensor) -> None:
        for parameter, v in zip(parameters, vector, strict=True):
            parameter += by * v

    def run() -> None:
        model.zero_grad()
        slope = torch.autograd.grad(weights.detach() @ losses(model, setting.batch), parameters)
        with torch.no_grad():
            for there, here, g in zip(ahead, parameters, slope, strict=True):
                velocity = group["momentum"] * optimizer.state[here]["momentum_buffer"]
                there.copy_(here - group["lr"] * (velocity + g + group["weight_decay"] * here))
        found = torch.autograd.grad(losses(virtual, setting.validation, judged).sum(), ahead, allow_unused=True)
        v = [torch.zeros_like(p) if x is None else x for p, x in zip(parameters, found, strict=True)]
        with torch.no_grad():
            epsilon = 0.01 / torch.cat([x.flatten() for x in v]).norm()
            # λ is linear in the weighted loss, so that its gradient there is the losses.
            displace(v, epsilon)
            forth = losses(model, setting.batch)
            displace(v, -2 * epsilon)
            back = losses(model, setting.batch)
            displace(v, epsilon)
            weights.grad = -group["lr"] * (forth - back) / (2 * epsilon)
        adam.step()
        (weights.detach() @ losses(model, setting.batch)).backward()

    return run


def _published_pareto_mtl(setting: Any) -> Run:
    from sidetask_baselines.pareto_mtl import constraints, preference_vectors, restricted

    model, batch, count = setting.model, setting.batch, len(setting.tasks)
    regions = constraints(preference_vectors(count, count + 1), count)

    def run() -> None:
        gradients, values = [], []
        for t in range(count):
            model.zero_grad()
            loss = losses_of(setting, model(batch.inputs))[t]
            loss.backward()
            values.append(loss.detach())
            there = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            gradients.append(torch.cat([gradient.flatten() for gradient in there]))
        matrix = torch.stack(gradients)
        active = regions[regions @ torch.stack(values).double().cpu().numpy() > 0]
        weights = restricted((matrix @ matrix.T).double().cpu().numpy(), active, tasks=True)
        model.zero_grad()
        total = torch.zeros_like(values[0])
        for t, weight in enumerate(weights):
            total = total + float(weight) * losses_of(setting, model(batch.inputs))[t]
        total.backward()

    return run
