"""Says in words who won a comparison, and whether the seeds allow saying so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from sidetask_bench.records import Comparison, RowRecord

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; with more it falls to 1.96 and 30 stays cautious.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """The difference of two means and what the seeds say about it.

    Args:
        mean: of the first minus of the second.
        error: its standard error; None if a side has one value only.
        margin: half the 95 % interval (Welch's t); None with `error`.
    """

    mean: float
    error: float | None
    margin: float | None

    @property
    def is_noise(self) -> bool | None:
        """Whether the interval contains zero; None if one cannot know."""
        return None if self.margin is None else abs(self.mean) <= self.margin


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two sets of runs that need not vary alike (Welch 1947).

    >>> d = difference([3.0, 3.5, 4.0], [1.0, 2.0, 3.0])
    >>> round(d.mean, 2), round(d.error, 2), d.is_noise
    (1.5, 0.65, True)
    >>> difference([3.0], [1.0, 2.0]).is_noise is None
    True
    """
    mean = fmean(first) - fmean(second)
    if min(len(first), len(second)) < 2:
        return Difference(mean, None, None)
    parts = [variance(side) / len(side) for side in (first, second)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Difference(mean, 0.0, 0.0)
    dof = error**4 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (first, second), strict=True))
    return Difference(mean, error, error * _T95[min(int(dof), len(_T95)) - 1])


def verdict(comparison: Comparison) -> list[str]:
    """A few sentences: the best row, its gain on the baseline, its lead on the next, and what is within noise.

    A row with a seed whose improvement is undefined is passed over: the other seeds are a selection.
    """
    baseline = next((row for row in comparison.rows if row.name == comparison.baseline), None)
    others = sorted(
        (row for row in comparison.rows if row is not baseline and row.is_complete),
        key=lambda row: fmean(_gains(comparison, row)),
        reverse=True,
    )
    if not others:
        return [f"There is nothing to compare {comparison.baseline} with."]
    best = others[0]
    gains = _gains(comparison, best)
    gain = fmean(gains)
    if gain > 0:
        first = f"{best.name} comes out best, {_percent(gain)} better than {comparison.baseline}"
    else:
        first = f"No row beats {comparison.baseline}; the closest is {best.name}, {_percent(gain)} worse"
    sentences = [f"{first} ({_basis(comparison, best)})."]
    if baseline is not None and baseline.is_complete:
        word = "gain" if gain > 0 else "loss"
        found = difference(gains, _gains(comparison, baseline))
        sentences.append(_judged(f"This {word}", found, comparison.baseline))
    if len(others) > 1:
        lead = difference(gains, _gains(comparison, others[1]))
        sentences.append(_judged(f"Its lead of {_points(lead.mean)} on {others[1].name}, the next row,", lead))
    if comparison.seeds < 2:
        return [
            sentences[0],
            "One seed per row says nothing about chance: repeat with three or more.",
        ]
    return sentences


def _gains(comparison: Comparison, row: RowRecord) -> list[float]:
    """The improvement of every seed, turned so that more is better."""
    return row.values if comparison.higher_is_better else [-value for value in row.values]


def _basis(comparison: Comparison, row: RowRecord) -> str:
    count = sum(task.primary for task in comparison.tasks)
    tasks = f"{count} primary task{'s' * (count != 1)}"
    seeds = len(row.values)
    if seeds < 2:
        return f"{tasks}, one seed"
    error = math.sqrt(variance(row.values) / seeds)
    return f"{tasks}, {seeds} seeds, standard error {_points(error)}"


def _judged(subject: str, found: Difference, against: str | None = None) -> str:
    on = f" on {against}" if against else ""
    if found.margin is None:
        return f"{subject}{on} cannot be told from chance: a side has one seed only."
    interval = f"95 % interval {found.mean - found.margin:+.1f} to {found.mean + found.margin:+.1f} points"
    if found.is_noise:
        return f"{subject}{on} is within noise ({interval.replace('-', '−')})."
    return f"{subject}{on} is more than chance explains ({interval.replace('-', '−')})."


def _percent(value: float) -> str:
    return f"{abs(value):.1f} %"


def _points(value: float) -> str:
    return f"{abs(value):.2g} points" if abs(value) < 0.095 else f"{abs(value):.1f} points"
