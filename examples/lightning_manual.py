"""Lightning with manual optimisation: Auto-λ looks ahead on batches of a second loader.

python examples/lightning_manual.py
"""

from __future__ import annotations

import itertools

import lightning
import torch
from sidetask_autolambda import AutoLambda
from sidetask_core import Batch, Method, SplitModel, Step, Task
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Regression(lightning.LightningModule):
    """One wanted task, one that helps it, one that is noise."""

    # The step fills gradients of encoder and heads by different weights; there is no one loss for Lightning to take.
    automatic_optimization = False

    def __init__(self, probes: DataLoader) -> None:
        super().__init__()
        squares = nn.MSELoss(reduction="none")
        tasks = [Task("wanted", squares), *(Task(name, squares, primary=False) for name in ("related", "noise"))]
        encoder = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU())
        model = SplitModel(encoder, {task.name: nn.Linear(16, 1) for task in tasks})
        # A module inside the module: Lightning moves it and puts it into checkpoints, λ and its moments with it.
        self.step = Step(model, tasks, Method(encoder=AutoLambda(tasks, lr=1e-2, constraint="softmax")))
        self.probes = itertools.cycle(probes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.step.parameters(), lr=0.02, momentum=0.9)

    def training_step(self, rows: tuple[Tensor, ...], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        probe = as_batch(next(self.probes)).to(self.device)
        # The optimizer inside Lightning's wrapper is the one whose step the method foresees.
        report = self.step.backward(as_batch(rows), validation=probe, optimizer=optimizer.optimizer)
        optimizer.step()
        self.log_dict({f"lambda/{name}": weight for name, weight in report.encoder_weights.items()}, prog_bar=True)
        self.log_dict({f"loss/{name}": loss for name, loss in report.losses.items()})


def as_batch(rows: tuple[Tensor, ...]) -> Batch:
    """Columns of a loader as a batch."""
    inputs, wanted, related, noise = rows
    return Batch(inputs, {"wanted": wanted, "related": related, "noise": noise})


def table(count: int, generator: torch.Generator) -> TensorDataset:
    """Made-up rows: what is wanted is measured with an error, what is related is measured without one."""
    x = torch.randn(count, 12, generator=generator)
    truth = torch.sin(2 * x[:, :1]) * x[:, 1:2]
    errors = torch.randn(count, 2, generator=generator)
    return TensorDataset(x, truth + 0.3 * errors[:, :1], truth, errors[:, 1:])


def main() -> dict[str, float]:
    """Train for some epochs; the weights that λ ended at."""
    lightning.seed_everything(0, verbose=False)
    generator = torch.Generator().manual_seed(0)
    train, probes = table(512, generator), table(512, generator)
    module = Regression(DataLoader(probes, 64, shuffle=True))
    trainer = lightning.Trainer(
        max_epochs=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, 64, shuffle=True))
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    weights = {name.removeprefix("lambda/"): value for name, value in logged.items() if name.startswith("lambda/")}
    print("λ:", {name: round(value, 3) for name, value in weights.items()})
    return weights


if __name__ == "__main__":
    main()
