"""Multi-target regression on a table: blood measurements as tasks that help a prognosis.

    python examples/tabular_targets.py

The diabetes data of scikit-learn (442 patients; Efron et al. 2004): age, sex, body mass index and blood pressure are
the inputs, the disease's progression after a year is wanted, and six blood measurements are targets beside it. They are
there in training only: a patient's prognosis then needs no blood sample.
"""

from __future__ import annotations

import torch
from sidetask_autolambda import AutoLambda
from sidetask_core import Batch, Equal, Fixed, Method, SplitModel, Step, Task
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

NAMES = ["progression", *(f"s{i}" for i in range(1, 7))]


def load() -> tuple[Tensor, Tensor]:
    """Standardised inputs ``[442, 4]`` and targets ``[442, 7]``, in an order that is shuffled once."""
    table, progression = load_diabetes(return_X_y=True)
    rows = torch.as_tensor(table, dtype=torch.float32)
    rows = torch.cat([rows, torch.as_tensor(progression, dtype=torch.float32)[:, None]], dim=1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    rows = (rows - rows[:300].mean(0)) / rows[:300].std(0)
    return rows[:, :4], rows[:, [10, 4, 5, 6, 7, 8, 9]]


def batch(x: Tensor, y: Tensor, rows: Tensor) -> Batch:
    """Some patients; every target is a task."""
    return Batch(x[rows], {name: y[rows, i : i + 1] for i, name in enumerate(NAMES)})


def train(kind: str, seed: int) -> tuple[float, dict[str, float]]:
    """Error of the prognosis on held-out patients, in standard deviations squared, and the last weights."""
    torch.manual_seed(seed)
    x, y = load()
    tasks = [Task(name, nn.MSELoss(reduction="none"), primary=name == "progression") for name in NAMES]
    alone = dict.fromkeys(NAMES, 0.0) | {"progression": 1.0}
    encoder = {
        "alone": Fixed(tasks, alone),
        "equal": Equal(tasks),
        "Auto-λ": AutoLambda(tasks, lr=1e-2, constraint="softmax"),
    }[kind]
    model = SplitModel(nn.Sequential(nn.Linear(4, 32), nn.ReLU()), {name: nn.Linear(32, 1) for name in NAMES})
    step = Step(model, tasks, Method(encoder=encoder))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    fit, probe, test = torch.arange(240), torch.arange(240, 300), torch.arange(300, len(x))
    for _ in range(30):
        for rows in fit[torch.randperm(len(fit))].split(40):
            optimizer.zero_grad()
            report = step.backward(batch(x, y, rows), validation=batch(x, y, probe), optimizer=optimizer)
            optimizer.step()
    with torch.no_grad():
        error = (step.export()(x[test])["progression"] - y[test, :1]).square().mean().item()
    return error, {name: weight.item() for name, weight in report.encoder_weights.items()}


def main() -> dict[str, float]:
    """Three ways, five seeds."""
    errors = {}
    for kind in ("alone", "equal", "Auto-λ"):
        runs = [train(kind, seed) for seed in range(5)]
        values = torch.tensor([error for error, _ in runs])
        errors[kind] = values.mean().item()
        print(f"{kind:8s} {values.mean():.3f} ± {values.std():.3f}")
    print("λ of the last run:", {name: round(weight, 2) for name, weight in runs[-1][1].items()})
    return errors


if __name__ == "__main__":
    main()
