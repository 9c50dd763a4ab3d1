"""Class-wise reweighting of an auxiliary task: Yim, Kim, 2020 (arXiv 2008.02043)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, get_args

import torch
from sidetask_core import Method, MissingKey, Shaper, Signals, Task, parallel
from sidetask_core.adam import Adam
from sidetask_core.signals import Mode
from torch import Tensor, nn

from sidetask_classwise.bins import Bins

Estimator = Literal["difference", "lookahead"]
Probe = Literal["validation", "next"]
Classes = int | Sequence[str] | Sequence[float] | Mapping[str, Any] | Bins


class ClassWise(Shaper):
    """Give every class of an auxiliary task a weight of its own, and learn which classes help the main task.

    The auxiliary loss is (1/N) Σ_i w_{c(i)} d_i over the N labelled elements, so that ones give its plain mean. After
    each step, Adam moves every w_c against an estimate of how the main loss depends on it, and cuts off at 0. With
    L^c = (1/N) Σ_{i: c(i)=c} d_i the share of class c in the auxiliary loss L_aux, which is ∂L_aux/∂w_c, the estimates
    are

    - ``"difference"``, the paper: [ΔL_main^c / (ΔL_aux + ε)] · L^c, where L_main^c is the mean of the main loss over
      the points whose *auxiliary* label is c, and Δ is the change from one batch (or window) to the next;
    - ``"lookahead"``: −α ⟨∇L_main(θ'), ∇L^c⟩ with θ' the parameters after the step and α the learning rate: the slope
      itself, of all classes from one derivative (`Signals.lookahead_elements`). L_main is the loss on a validation
      batch, or with ``probe="next"`` on the next training batch (`Signals.hindsight_elements`).

    New weights hold from the next step on. An element without a label, which negative labels, 255 and a continuous NaN
    say too, belongs to no class: it has weight 1 and teaches nothing. A class keeps weight and moments if it is absent
    from the batch (for a difference: from one of the two, among the labelled points of either task), and where its
    estimate is zero or not finite.

    Args:
        main: the task that is to profit.
        auxiliary: the task whose classes are weighed; its loss is one tensor of element losses.
        classes: of the auxiliary's labels. Their number or their names, for whole numbers from 0; a `Bins`, its edges,
            or ``{"by": "uniform" | "log", "low": ..., "high": ..., "bins": ...}``, for a continuous label.
        estimator: see above; ``"difference"`` (the paper).
        probe: what a lookahead wants to do well on, a ``"validation"`` batch or the ``"next"`` training batch.
        every: look ahead in each n-th step only, counted by `Signals.iteration`; the others cost what fixed weights
            cost. A difference looks at every step.
        mode: how a lookahead differentiates, see `Signals.lookahead`.
        lr: Adam's step size; 2e-4 (the paper).
        warmup: first epoch, as the training loop counts them in `Step.epoch`, in which weights learn; 20 (the paper on
            VKITTI and NYUv2; 12 on Cityscapes). Until then all are 1.
        window: how many batches that are looked at make one update; 1 (the paper). With ``probe="next"`` a look is at
            the step before, so that the first one finds nothing; means are over those that find labels.
        eps: added to ΔL_aux; 1e-8.

    Raises:
        ValueError: for an option that is out of its range or belongs to the other estimator. From the first step with
            labels of both tasks, during the warm-up too: if there is no main loss for each class, which a difference
            wants, or if a lookahead is given no validation batch or optimizer. From that step, and on the CPU from
            every other: for a label beyond the classes.
        TypeError: from the step, for labels that are not of the classes' kind.
        NoForwardDerivative: from the first step likewise, for an operator that a lookahead cannot differentiate.

    A state of other classes, or of another order, is taken over by name: a class that is new starts at 1.

    >>> ClassWise("depth", "segmentation", ["wall", "floor"]).named_weights()["floor"].item()
    1.0
    """

    weights: Tensor
    sums: Tensor
    before: Tensor
    loss_before: Tensor
    edges: Tensor

    def __init__(
        self,
        main: str,
        auxiliary: str,
        classes: Classes,
        *,
        estimator: Estimator = "difference",
        probe: Probe = "validation",
        every: int = 1,
        mode: Mode = "exact",
        lr: float = 2e-4,
        warmup: int = 20,
        window: int = 1,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        if main == auxiliary:
            raise ValueError(f"task {main!r} cannot be the main task and its own auxiliary")
        for option, value, known in (
            ("estimator", estimator, get_args(Estimator)),
            ("probe", probe, get_args(Probe)),
            ("mode", mode, get_args(Mode)),
        ):
            if value not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}; not {value!r}")
        for option, count, least in (("every", every, 1), ("window", window, 1), ("warmup", warmup, 0)):
            if not isinstance(count, int) or count < least:
                raise ValueError(f"{option} must be a whole number of at least {least}, not {count!r}")
        if estimator == "difference" and (probe, every, mode) != ("validation", 1, "exact"):
            raise ValueError("probe, every and mode belong to estimator 'lookahead'")
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0, not {eps}")
        self.main = main
        self.task = self.auxiliary = auxiliary
        self.classes, edges = _named(classes)
        self.estimator, self.probe, self.every, self.mode = estimator, probe, every, mode
        self.warmup, self.window, self.eps = warmup, window, eps
        count = len(self.classes)
        self.adam = Adam(count, lr=lr)
        self.binned = edges is not None
        self.register_buffer("edges", torch.tensor(edges or (), dtype=torch.float64), persistent=False)
        self.register_buffer("weights", torch.ones(count, dtype=torch.float64))
        # Over the window, by class, with a column for what has none before the first, and for labels beyond the last
        # after it: of a difference main loss, main points, auxiliary loss, auxiliary points; of a lookahead slopes,
        # batches with labels, points.
        rows = 4 if estimator == "difference" else 3
        self.register_buffer("sums", torch.zeros(rows, count + 2, dtype=torch.float64))
        # The window before: L_main^c and L_aux, infinite where there were no points.
        self.register_buffer("before", torch.full((count,), torch.inf, dtype=torch.float64))
        self.register_buffer("loss_before", torch.full((), torch.inf, dtype=torch.float64))
        self.batches = 0
        self.checked = False
        self.register_load_state_dict_pre_hook(_by_name)

    def forward(self, losses: Any, target: Any) -> Tensor:
        """The weight of each element's class ``[N, *]``, 1 without a class."""
        if isinstance(losses, Mapping):
            raise TypeError(
                f"task {self.auxiliary!r} has several objectives; class-wise weights need one loss per element"
            )
        weights = self._padded().to(losses)
        found = self._fitted(self._columns(target), losses, self.auxiliary)
        return weights.index_select(0, found.flatten()).view(found.shape)

    def named_weights(self) -> Mapping[str, Tensor]:
        """The weights by class."""
        return dict(zip(self.classes, self.weights.unbind(), strict=True))

    def update(self, signals: Signals) -> None:
        """Learn from a step; before the epoch `warmup`, and between every n-th step, only look for mistakes.

        The first look, at labels of both tasks, is one that learns or not: what it objects to shows at once.
        """
        signals.target(self.main)
        if self.estimator == "lookahead":
            signals.expect(validation=self.probe == "validation")
        learns = signals.epoch >= self.warmup and signals.iteration % self.every == 0
        looks = learns or not self.checked
        # On a device every further check would be waited for.
        watches = not self.checked or signals.losses.device.type == "cpu"
        found = None
        if self.estimator == "lookahead" and looks:
            found = self._slopes(signals)
        if self.estimator == "difference" and (looks or watches):
            found = self._class_losses(signals)
        if watches:
            self._refuse(self._points(signals) if self.estimator == "lookahead" or found is None else found[-1])
        if found is None or not looks:
            return
        if not self.checked:
            self.checked = bool(found.any(dim=1).all())
        if learns:
            self._learn(found)

    def _learn(self, found: Tensor) -> None:
        """Add what was found to the window, and move the weights at its end."""
        self.sums = self.sums + found.to(self.sums)
        self.batches += 1
        if self.batches == self.window:
            estimate, present = self._differences() if self.estimator == "difference" else self._derivatives()
            present = present & estimate.isfinite() & (estimate != 0)
            moved = self.adam(self.weights, torch.where(present, estimate, 0.0), present)
            self.weights = moved.clamp(min=0)
            self.sums, self.batches = torch.zeros_like(self.sums), 0

    def _refuse(self, elements: Tensor) -> None:
        """Refuse labels beyond the classes, of which `elements` has the number last."""
        if elements[-1] > 0:
            raise ValueError(
                f"task {self.auxiliary!r} has labels beyond its {len(self.classes)} classes, "
                f"{self.classes[0]} to {self.classes[-1]}; negative labels and 255 say that there is none"
            )

    def _points(self, signals: Signals) -> Tensor:
        """The number of the auxiliary's labelled elements in every column, over all processes ``[C + 2]``."""
        return parallel.add(self._of_auxiliary(signals)[0][1])

    def _class_losses(self, signals: Signals) -> Tensor:
        """Sum and number of both tasks' element losses by class of the auxiliary, over all processes ``[4, C + 2]``."""
        of_auxiliary, columns = self._of_auxiliary(signals)
        total = torch.cat([torch.zeros_like(of_auxiliary), of_auxiliary])
        if columns is not None and signals.target(self.main) is not None:
            try:
                losses, mask = signals.elements(self.main)
                total[:2] = self._by_class(losses, mask, self._fitted(columns, losses, self.main))
            except (MissingKey, ValueError) as error:
                raise type(error)(
                    f"{error}; a difference wants the main loss by class, which estimator 'lookahead' does not"
                ) from error
        return parallel.add(total)

    def _of_auxiliary(self, signals: Signals) -> tuple[Tensor, Tensor | None]:
        """Sum and number of the auxiliary's element losses in every column ``[2, C + 2]``; the columns if it has any.

        Of this process. Where the auxiliary is not labelled, no class is known.
        """
        labels = signals.target(self.auxiliary)
        if labels is None:
            return torch.zeros_like(self.sums[:2]), None
        losses, mask = signals.elements(self.auxiliary)
        columns = torch.where(mask, self._fitted(self._columns(labels), losses, self.auxiliary), 0)
        return self._by_class(losses, mask, columns), columns

    def _differences(self) -> tuple[Tensor, Tensor]:
        """[ΔL_main^c / (ΔL_aux + ε)] · L^c of every class, and which classes were in both windows."""
        main, points, auxiliary, elements = self.sums
        number = elements.sum()
        loss = (self._padded() * auxiliary).sum() / number
        of_class = (main / points)[1:-1]
        change = (of_class - self.before) / (loss - self.loss_before + self.eps)
        present = (points > 0)[1:-1] & (elements > 0)[1:-1]
        self.before = torch.where(present, of_class, torch.inf)
        self.loss_before = torch.where(number > 0, loss, torch.inf)
        return change * (auxiliary / number)[1:-1], present

    def _slopes(self, signals: Signals) -> Tensor:
        """By class −α ⟨∇L_main, ∇L^c⟩, one if there are labels, and the number of elements ``[3, C + 2]``.

        Over all processes.
        """
        ask = signals.lookahead_elements if self.probe == "validation" else signals.hindsight_elements
        found = ask(self.auxiliary, of=[self.main], mode=self.mode)
        total = torch.zeros_like(self.sums[:2])
        if found is not None:
            columns = self._fitted(self._columns(found.target), found.slopes, self.auxiliary)
            total += self._by_class(found.slopes, found.mask, columns)
        slopes, elements = parallel.add(total)
        number = elements.sum()
        return torch.stack([slopes / number.clamp(min=1), (number > 0).to(slopes).expand_as(slopes), elements])

    def _derivatives(self) -> tuple[Tensor, Tensor]:
        """The mean of −α ⟨∇L_main, ∇L^c⟩ over the batches of the window with labels, and which classes were in it."""
        slopes, looks, elements = self.sums[:, 1:-1]
        return slopes / looks.clamp(min=1), elements > 0

    def _by_class(self, losses: Tensor, mask: Tensor, columns: Tensor) -> Tensor:
        """Sum and number of labelled elements in every column ``[2, C + 2]``."""
        values = torch.stack([torch.where(mask, losses, 0.0).flatten(), mask.flatten().to(losses)]).to(self.sums)
        return torch.zeros_like(self.sums[:2]).scatter_add_(1, columns.flatten().expand_as(values), values)

    def _padded(self) -> Tensor:
        """A weight for every column ``[C + 2]``."""
        return torch.nn.functional.pad(self.weights, (1, 1), value=1.0)

    def _columns(self, labels: Any) -> Tensor:
        """The class of every label counted from 1; 0 for those that have none, C + 1 for those beyond the last."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"the labels of task {self.auxiliary!r} must be a tensor, found {type(labels).__name__}")
        count = len(self.classes)
        if self.binned:
            if not labels.is_floating_point():
                raise TypeError(
                    f"task {self.auxiliary!r}: bins, or the edges between them, need continuous labels, found "
                    f"{labels.dtype}; give the number of the classes or their names, or labels of floating point"
                )
            values = labels.detach().contiguous()
            bins = torch.bucketize(values, self.edges.to(values), right=True)
            return torch.where(values.isnan(), 0, bins + 1)
        if labels.is_floating_point():
            raise TypeError(
                f"task {self.auxiliary!r}: classes need labels of whole numbers, found {labels.dtype}; give bins for "
                "continuous labels: classes={'by': 'uniform', 'low': 0, 'high': 10, 'bins': 5}"
            )
        places = labels.long()
        return torch.where((places == 255) & (count <= 255), -1, places).clamp(-1, count) + 1

    def _fitted(self, columns: Tensor, losses: Tensor, task: str) -> Tensor:
        """The same in the shape of element losses: classes of samples or pixels hold for all that belongs to them."""
        more = losses.ndim - columns.ndim
        forms = [columns]
        if more > 0:
            forms = [columns.unsqueeze(1)] if more == 1 and columns.ndim else []
            forms.append(columns.reshape(columns.shape + (1,) * more))
        elif more == -1 and columns.shape[1] == 1:
            forms = [columns.squeeze(1)]
        for form in forms:
            if form.ndim == losses.ndim and all(a in (1, b) for a, b in zip(form.shape, losses.shape, strict=True)):
                return form.expand_as(losses)
        raise ValueError(
            f"the labels of task {self.auxiliary!r} {list(columns.shape)} say no class for each of the element losses "
            f"of task {task!r} {list(losses.shape)}"
        )

    def get_extra_state(self) -> dict[str, Any]:
        """The classes, in the order of the weights, batches of the window, and whether there was a first look."""
        return {"classes": list(self.classes), "batches": self.batches, "checked": self.checked}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on within the window; whatever goes by class has been put into order before."""
        self.batches = int(state["batches"])
        self.checked = bool(state["checked"]) and tuple(state["classes"]) == self.classes


def _named(classes: Classes) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """The names of the classes, and the edges between those of a continuous label."""
    if isinstance(classes, Mapping):
        if classes.get("by") == "quantile":
            raise ValueError(
                "quantiles are fitted on labels: give Bins.quantile(labels, bins), or labels to the method"
            )
        kinds = {"uniform": Bins.uniform, "log": Bins.log}
        if set(classes) != {"by", "low", "high", "bins"} or classes["by"] not in kinds:
            raise ValueError(
                "bins are given as by (uniform or log), low, high and bins, or as by (quantile) and bins; not as "
                f"{dict(classes)}"
            )
        classes = kinds[classes["by"]](classes["low"], classes["high"], classes["bins"])
    if isinstance(classes, Bins):
        return classes.names, classes.edges
    if isinstance(classes, int) and not isinstance(classes, bool):
        if classes < 1:
            raise ValueError(f"at least one class is needed, not {classes}")
        return tuple(map(str, range(classes))), None
    if isinstance(classes, Sequence) and not isinstance(classes, str) and classes:
        if all(isinstance(name, str) for name in classes):
            names = tuple(str(name) for name in classes)
            if len(set(names)) < len(names):
                raise ValueError(f"the names of classes are distinct, not {', '.join(names)}")
            return names, None
        if all(isinstance(edge, (int, float)) and not isinstance(edge, bool) for edge in classes):
            bins = Bins([float(edge) for edge in classes])
            return bins.names, bins.edges
    raise ValueError(f"classes are a number, names or bins; not {classes!r}")


def _with_quantiles(
    classes: Classes,
    task: str,
    valid: Callable[[Any], Tensor] | None,
    labels: Callable[[str], Iterable[Any]] | None,
) -> Classes:
    """The classes, with bins in place of quantiles that are to be fitted."""
    if not isinstance(classes, Mapping) or classes.get("by") != "quantile" or labels is None:
        return classes
    if set(classes) != {"by", "bins"}:
        raise ValueError(f"quantiles are given as by and bins, not as {dict(classes)}")
    return Bins.quantile((y for y in labels(task) if y is not None), classes["bins"], valid=valid)


def _by_name(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: object) -> None:
    """Put the entries of a state that is about to be loaded into the order of the classes."""
    assert isinstance(module, ClassWise)
    extra = state.get(f"{prefix}_extra_state")
    if extra is None or tuple(extra["classes"]) == module.classes:
        return
    kept = [name for name in module.classes if name in extra["classes"]]
    here, there = [module.classes.index(name) for name in kept], [extra["classes"].index(name) for name in kept]
    starts = {"weights": 1.0, "before": torch.inf, "adam.first": 0.0, "adam.second": 0.0, "adam.updates": 0.0}
    for name, start in starts.items():
        if f"{prefix}{name}" in state:
            saved = state[f"{prefix}{name}"]
            entries = saved.new_full((len(module.classes),), start)
            entries[here] = saved[there]
            state[f"{prefix}{name}"] = entries
    if f"{prefix}sums" in state:
        saved = state[f"{prefix}sums"]
        entries = saved.new_zeros(len(saved), len(module.classes) + 2)
        for ours, theirs in ((0, 0), (-1, -1), *((i + 1, j + 1) for i, j in zip(here, there, strict=True))):
            entries[:, ours] = saved[:, theirs]
        state[f"{prefix}sums"] = entries


def classwise(
    tasks: Sequence[Task],
    *,
    classes: Classes,
    main: str | None = None,
    auxiliary: str | Sequence[str] | None = None,
    estimator: Estimator = "difference",
    probe: Probe = "validation",
    every: int = 1,
    mode: Mode = "exact",
    lr: float = 2e-4,
    warmup: int = 20,
    window: int = 1,
    eps: float = 1e-8,
    labels: Callable[[str], Iterable[Any]] | None = None,
) -> Method:
    """Class-wise reweighting of one or several auxiliaries that have the same classes; all tasks weigh 1.

    Args:
        tasks: the tasks.
        classes: of the auxiliary's labels, see `ClassWise`, as are the other options; or
            ``{"by": "quantile", "bins": ...}``, for bins that hold equally many of each auxiliary's training labels.
        main: the main task; the only primary one if None.
        auxiliary: the auxiliary, or several; all other tasks if None.
        estimator: see `ClassWise`.
        probe: see `ClassWise`.
        every: see `ClassWise`.
        mode: see `ClassWise`.
        lr: see `ClassWise`.
        warmup: see `ClassWise`.
        window: see `ClassWise`.
        eps: see `ClassWise`.
        labels: gives the training labels of a task, batch by batch, which quantiles are fitted on.

    Raises:
        MissingKey: for a task that does not exist.
        ValueError: if `main` is not given and there is not just one primary task, if there is no auxiliary, for an
            option out of its range, or for quantiles without labels.
    """
    names = [task.name for task in tasks]
    if main is None:
        primary = [task.name for task in tasks if task.primary]
        if len(primary) != 1:
            raise ValueError(f"main must say which task is to profit; primary are: {', '.join(primary) or 'none'}")
        main = primary[0]
    if auxiliary is None:
        auxiliary = [name for name in names if name != main]
    auxiliaries = [auxiliary] if isinstance(auxiliary, str) else list(auxiliary)
    if not auxiliaries:
        raise ValueError(f"there is no auxiliary beside {main!r}; the tasks are: {', '.join(names)}")
    for name in (main, *auxiliaries):
        if name not in names:
            raise MissingKey(f"there is no task {name!r}; the tasks are: {', '.join(names)}")
    valid = {task.name: task.valid for task in tasks}
    return Method(
        shapers={
            name: ClassWise(
                main,
                name,
                _with_quantiles(classes, name, valid[name], labels),
                estimator=estimator,
                probe=probe,
                every=every,
                mode=mode,
                lr=lr,
                warmup=warmup,
                window=window,
                eps=eps,
            )
            for name in auxiliaries
        }
    )
