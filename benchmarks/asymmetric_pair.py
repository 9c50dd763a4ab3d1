"""The made-up pair of which one task helps and the other hurts, for five seeds: what is found, and who is better off.

    python benchmarks/asymmetric_pair.py [labels=60] [noise=1.1] [own=1.0]

The pair and its trainings are those of `packages/saal/tests/test_asymmetric_pair.py`, which asserts one seed where who
hurts is beyond chance. Writes `results/asymmetric_pair.md` with the default options, else prints alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
SEEDS = range(10, 15)
WAYS = {"nothing": "each alone", "everything": "all layers shared", "half": "half-shared", "saal-e": "`saal-e`"}


def main() -> None:
    """Train and write."""
    sys.path.insert(0, str(HERE.parent / "packages/saal/tests"))
    from test_asymmetric_pair import outcome

    options = {key: float(value) for key, value in (word.split("=") for word in sys.argv[1:])}
    found = [outcome(seed, **options) for seed in SEEDS]
    lines = ["| | " + " | ".join(f"{task}, seed {seed}" for task in "ab" for seed in SEEDS) + " |"]
    lines += ["|---|" + "---:|" * 2 * len(SEEDS)]
    for way, name in WAYS.items():
        lines.append(f"| {name} | " + " | ".join(f"{by[way][task]:.3f}" for task in "ab" for _, by in found) + " |")
    for (source, target), name in (((0, 1), "a→b"), ((1, 0), "b→a")):
        gains = ", ".join(f"{relations.improvement[source, target]:+.1f}" for relations, _ in found)
        lines += ["", f"Enumerated improvement by {name}, %: {gains}"]
    better = {
        way: [sum(by["saal-e"][task] < by[way][task] for _, by in found) for task in "ab"]
        for way in ("nothing", "everything", "half")
    }
    lines += [""] + [
        f"`saal-e` is better than {WAYS[way]} for {a} of {len(found)} seeds on a, {b} on b."
        for way, (a, b) in better.items()
    ]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if not options:
        (HERE / "results/asymmetric_pair.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
