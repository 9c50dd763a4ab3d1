"""Pareto MTL: Lin, Zhen, Li, Zhang, Kwong, "Pareto multi-task learning", NeurIPS 2019."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from sidetask_core import Equal, Method, MissingKey, Place, Task

from sidetask_baselines.gramian import Fetched, GramianWeighting
from sidetask_baselines.scale import check_scale, total_weight
from sidetask_baselines.simplex import SolverFailure, min_norm_weights, vectors

Preferences = int | Sequence[Sequence[float] | Mapping[str, float]] | None
# Unit vectors that are as near to each other as this are one.
SAME = 1e-9


class ParetoMTL(GramianWeighting):
    """Descend on every task while the losses keep to one of several directions: one trade-off per run.

    Unit vectors u_1 … u_K cut the space of losses into regions Ω_k = {L : G_j = (u_j − u_k)·L ≤ 0 for all j}, the
    losses whose direction is nearest to u_k. The run of preference k first looks for a point of Ω_k: it follows the
    shortest convex combination of the gradients of violated constraints, G_j > 0. From the first step in which none is
    violated on, for good, it follows the shortest convex combination of the gradients of all tasks and of the
    constraints that are violated then. As ∇G_j = Σ_i (u_j − u_k)_i g_i, either is a sum of task gradients, with weights
    λ_i + Σ_j β_j (u_j − u_k)_i, which may be negative. With one vector the rule is MGDA.

    **u_k is a direction of losses**: a large entry leaves its task a large loss, and (1, 0) is the run that favours the
    second task. Losses are compared as they are, so that scaling one moves its points to another region. A run whose
    region has no point of the Pareto front ends at the region's border, off the front.

    A task without a label is left out, also of the vectors, which are cut to the other tasks and normalised again; only
    a step in which all tasks have labels ends the first phase before its time. Where a convex combination of the
    gradients is zero (one of them is, or they oppose each other) the weights are those of that combination, and
    shared parameters rest.

    Args:
        tasks: the tasks, two or more.
        at: ``"parameters"`` (the paper) or ``"features"``.
        preferences: the vectors: their number, see `preference_vectors`; or each of them, as a list in the order of the
            tasks or a mapping from task names (0 for those left out), nonnegative and of any length. Default is 5 for
            two tasks (the released code); for more, one for each task and the diagonal.
        preference: which of them this run is for, counted from 0; default is the (first) one nearest to the diagonal.
        feasibility_steps: the first phase takes no more steps than this, and none at 0; default is no more than the
            first two epochs (the released code), read from ``step.epoch``, which the training loop sets.
        epsilon: in the second phase a constraint counts as violated from G_j > −ε‖L‖ on; 0 (the released code).
        scale: absolute weights sum to the number of tasks that have labels (``"sum"``), or the λ and β to 1
            (``"paper"``). The released code does the former in the second phase only.

    Raises:
        ValueError: for vectors that are zero, negative somewhere, not of the tasks' number, or of one direction; a
            preference that is not among them; or another option out of its range.
        MissingKey: for a vector that names an unknown task.
        SolverFailure: in a step whose losses or gradients are not finite or whose solution misses its KKT conditions.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        at: Place = "parameters",
        preferences: Preferences = None,
        preference: int | None = None,
        feasibility_steps: int | None = None,
        epsilon: float = 0.0,
        scale: str = "sum",
    ) -> None:
        super().__init__(tasks, at=at)
        self.preferences = checked_preferences(preferences, self.tasks)
        if preference is None:
            # Rounded, so that the first of several is the same on every machine.
            preference = int(self.preferences.sum(axis=1).round(9).argmax())
        if not isinstance(preference, int) or preference not in range(len(self.preferences)):
            raise ValueError(f"preference must be one of 0 … {len(self.preferences) - 1}, not {preference!r}")
        if feasibility_steps is not None and feasibility_steps < 0:
            raise ValueError(f"feasibility_steps must be at least 0, not {feasibility_steps}")
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"epsilon must be at least 0, not {epsilon}")
        self.preference = preference
        self.feasibility_steps = feasibility_steps
        self.epsilon = epsilon
        self.scale = check_scale(scale)
        self.searching = True

    def weigh(self, fetched: Fetched) -> np.ndarray:
        """Weights ``[P]``, of either sign."""
        differences = constraints(self.preferences[:, fetched.present], self.preference)
        size = np.linalg.norm(fetched.losses)
        if not np.isfinite(size):
            raise SolverFailure("the losses are not finite", fetched.gramian)
        excess = differences @ (fetched.losses / size) if size > 0 else np.zeros(len(differences))
        violated = excess > 0
        search = self.searching and self._may_search(fetched) and bool(violated.any())
        if not search and fetched.present.all():
            self.searching = False
        active = differences[violated if search else excess > -self.epsilon]
        weights = restricted(fetched.gramian, active, tasks=not search)
        if self.scale == "paper":
            return weights
        total = np.abs(weights).sum()
        # Weights of tasks and constraints, which sum to 1, can cancel only up to rounding.
        return weights * (total_weight("sum", len(weights)) / total if total > 1e-9 else 0.0)

    def _may_search(self, fetched: Fetched) -> bool:
        if self.feasibility_steps is None:
            return fetched.epoch < 2
        return fetched.iteration < self.feasibility_steps

    def get_extra_state(self) -> dict[str, Any]:
        """Whether the rule is in its first phase, besides what every rule saves."""
        return super().get_extra_state() | {"searching": self.searching}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on in the phase in which a saved rule was."""
        super().set_extra_state(state)
        self.searching = state["searching"]


def constraints(directions: np.ndarray, chosen: int) -> np.ndarray:
    """The rows u_j − u_chosen, j ≠ chosen, of the directions ``[K, P]`` at unit length.

    Directions that have no length are left out, as are those that equal the chosen one: cut to some of the tasks, they
    say nothing about these. All are left out if it is the chosen one that has no length.
    """
    lengths = np.linalg.norm(directions, axis=1)
    if lengths[chosen] == 0:
        return np.zeros((0, directions.shape[1]))
    differences = directions[lengths > 0] / lengths[lengths > 0, None] - directions[chosen] / lengths[chosen]
    return differences[np.linalg.norm(differences, axis=1) > SAME]


def restricted(gramian: np.ndarray, differences: np.ndarray, *, tasks: bool) -> np.ndarray:
    """Weights of the tasks in the shortest convex combination of constraint gradients, and of their own if `tasks`.

    Args:
        gramian: inner products of the task gradients ``[P, P]``.
        differences: each constraint's gradient in terms of theirs ``[J, P]``, J > 0 unless `tasks`.
        tasks: whether the task gradients take part.
    """
    rows = np.vstack([np.eye(len(gramian)), differences]) if tasks else differences
    return min_norm_weights(vectors(gramian) @ rows.T) @ rows


def preference_vectors(tasks: int, count: int) -> np.ndarray:
    """Evenly spread unit vectors without negative entries ``[count, tasks]``, always the same.

    For two tasks their angles go evenly from 0 to π/2 (the released code). For more they are the points, brought to
    unit length, of a regular lattice on the simplex (Das, Dennis 1998), where one has just as many; else the diagonal
    and points of the next larger lattice, each the farthest from those before it. The axes come first. A single vector
    is the diagonal.

    Args:
        tasks: their number, two or more.
        count: how many vectors: 1, or at least the number of tasks.

    Raises:
        ValueError: for fewer tasks, or another count.

    >>> preference_vectors(2, 3).round(3).tolist()
    [[1.0, 0.0], [0.707, 0.707], [0.0, 1.0]]
    >>> preference_vectors(3, 5).round(3).tolist()[3:]
    [[0.577, 0.577, 0.577], [0.707, 0.707, 0.0]]
    """
    if tasks < 2:
        raise ValueError(f"preferences are between two tasks or more, not {tasks}")
    if count != 1 and count < tasks:
        raise ValueError(f"preferences must be 1, at least the number of tasks, {tasks}, or given vectors, not {count}")
    if tasks == 2 and count > 1:
        angles = np.linspace(0, math.pi / 2, count)
        # Exact zeros, and the two halves mirror images.
        return np.stack([np.sin(angles[::-1]), np.sin(angles)], axis=1)
    diagonal = np.full((1, tasks), 1 / math.sqrt(tasks))
    divisions = 0
    candidates = diagonal
    while len(candidates) < count:
        divisions += 1
        lattice = _lattice(tasks, divisions)
        if count == len(lattice):
            return lattice
        candidates = lattice if divisions % tasks == 0 else np.vstack([diagonal, lattice])
    if count == 1:
        return diagonal
    found = [*np.eye(tasks)]
    nearest = (candidates @ np.stack(found).T).max(axis=1)
    while len(found) < count:
        # Rounded, so that the first of equally far ones is the same on every machine.
        found.append(candidates[nearest.round(9).argmin()])
        nearest = np.maximum(nearest, candidates @ found[-1])
    return np.stack(found)


def _lattice(tasks: int, divisions: int) -> np.ndarray:
    """Unit vectors towards the points of the simplex whose entries are multiples of a fraction, the axes first."""
    size = divisions + tasks - 1
    bars = combinations(range(size), tasks - 1)
    points = np.array([[b - a - 1 for a, b in pairwise((-1, *between, size))] for between in bars], dtype=float)
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    # By length, and equal lengths from the first task on.
    order = np.lexsort([*points.T[::-1], lengths[:, 0].round(9)])[::-1]
    return (points / lengths)[order]


def checked_preferences(preferences: Preferences, tasks: Sequence[str]) -> np.ndarray:
    """The preference vectors ``[K, T]`` at unit length."""
    count = len(tasks)
    if preferences is None:
        preferences = 5 if count == 2 else count + 1
    if isinstance(preferences, int):
        return preference_vectors(count, preferences)
    if not preferences:
        raise ValueError(f"preferences must be vectors or their number, not {preferences!r}")
    found = np.zeros((len(preferences), count))
    for row, given in zip(found, preferences, strict=True):
        if isinstance(given, Mapping):
            for name in given:
                if name not in tasks:
                    raise MissingKey(f"there is a preference for {name!r}, but the tasks are: {', '.join(tasks)}")
            row[:] = [given.get(name, 0.0) for name in tasks]
        elif len(given) != count:
            raise ValueError(f"a preference must have one number for each of the {count} tasks, not {given!r}")
        else:
            row[:] = given
        if not (np.isfinite(row).all() and (row >= 0).all() and row.any()):
            raise ValueError(f"a preference must be at least 0 for every task and positive for one, not {given!r}")
    found /= found.max(axis=1, keepdims=True)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    for i, j in combinations(range(len(found)), 2):
        if np.linalg.norm(found[i] - found[j]) <= SAME:
            raise ValueError(f"preferences {preferences[i]!r} and {preferences[j]!r} are the same direction")
    return found


def pareto_mtl(
    tasks: Sequence[Task],
    *,
    at: Place = "parameters",
    preferences: Preferences = None,
    preference: int | None = None,
    feasibility_steps: int | None = None,
    epsilon: float = 0.0,
    scale: str = "sum",
    decoder: str = "equal",
) -> Method:
    """Pareto MTL for one preference; `pareto_front` makes the methods for all.

    In an experiment's YAML a front is a row per preference, each with ``method: {name: pareto-mtl, preferences: 5,
    preference: 0}`` and the next `preference`.

    Args:
        tasks: the tasks, two or more.
        at: see `ParetoMTL`, as for all options but the last.
        preferences: how many vectors, or which.
        preference: which of them this run is for.
        feasibility_steps: the most that the first phase takes.
        epsilon: from where on a constraint counts as violated.
        scale: ``"sum"`` or ``"paper"``.
        decoder: task-specific parameters keep their own gradients (``"equal"``) or are weighted as the shared ones are
            (``"same"``: paper and released code, which raise the loss of a task with negative weight there too).
    """
    if decoder not in ("equal", "same"):
        raise ValueError(f"decoder must be 'equal' or 'same', not {decoder!r}")
    rule = ParetoMTL(
        tasks,
        at=at,
        preferences=preferences,
        preference=preference,
        feasibility_steps=feasibility_steps,
        epsilon=epsilon,
        scale=scale,
    )
    return Method(encoder=rule, decoder=rule if decoder == "same" else Equal(tasks))


def pareto_front(tasks: Sequence[Task], preferences: Preferences = None, **options: Any) -> list[Method]:
    """One method for each preference vector, in their order; a new network trained with each traces a Pareto front.

    Args:
        tasks: the tasks, two or more.
        preferences: how many vectors, or which; see `ParetoMTL`.
        options: the other options of `pareto_mtl`, but `preference`.

    >>> tasks = [Task("seg", loss=abs), Task("depth", loss=abs)]
    >>> [method.encoder.preferences[k].round(2).tolist() for k, method in enumerate(pareto_front(tasks, 3))]
    [[1.0, 0.0], [0.71, 0.71], [0.0, 1.0]]
    """
    count = len(checked_preferences(preferences, [task.name for task in tasks]))
    return [pareto_mtl(tasks, preferences=preferences, preference=k, **options) for k in range(count)]
