"""A training loop of one's own: uncertainty weighs the heads, PCGrad the encoder; two handwritten digits side by side.

python examples/plain_loop.py
"""

from __future__ import annotations

import io

import torch
from sidetask_baselines import PCGrad
from sidetask_core import Batch, Method, SplitModel, Step, Task, Uncertainty
from sklearn.datasets import load_digits
from torch import Tensor, nn

TASKS = [Task(name, nn.CrossEntropyLoss(reduction="none")) for name in ("left", "right")]


def pairs(rows: slice, count: int) -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, 8, 16]`` of two scans each, and their digits ``[N, 2]``."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels[rows], dtype=torch.float32).view(-1, 8, 8) / 16.0
    picks = torch.randint(0, len(images), (count, 2), generator=torch.Generator().manual_seed(0))
    return torch.cat([images[picks[:, 0]], images[picks[:, 1]]], dim=2)[:, None], torch.as_tensor(digits[rows])[picks]


def build() -> tuple[Step, torch.optim.Optimizer]:
    """The same network, method and optimizer every time."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
    )
    model = SplitModel(encoder, {task.name: nn.Linear(32 * 4 * 8, 10) for task in TASKS})
    step = Step(model, TASKS, Method(encoder=PCGrad(TASKS), decoder=Uncertainty(TASKS)))
    return step, torch.optim.Adam(step.parameters(), lr=2e-3)


def train(step: Step, optimizer: torch.optim.Optimizer, images: Tensor, digits: Tensor, epochs: range) -> None:
    """Some epochs; everything but `step.backward` is as in any PyTorch loop."""
    for epoch in epochs:
        step.train()
        step.epoch = epoch
        for rows in torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).split(64):
            batch = Batch(images[rows], {"left": digits[rows, 0], "right": digits[rows, 1]})
            optimizer.zero_grad()
            report = step.backward(batch)  # in place of loss.backward()
            nn.utils.clip_grad_norm_(step.parameters(), 5.0)
            optimizer.step()
        losses = "  ".join(f"{name} {loss.item():.3f}" for name, loss in report.losses.items())
        print(f"epoch {epoch}: {losses}")


def main() -> dict[str, float]:
    """Train, stop, resume, deploy; accuracy on scans that were not seen."""
    images, digits = pairs(slice(0, 1200), 2000)
    step, optimizer = build()
    train(step, optimizer, images, digits, range(2))

    # A checkpoint: the step's state holds the network's and the method's.
    file = io.BytesIO()
    torch.save({"step": step.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    step, optimizer = build()
    step.load_state_dict(state["step"])
    optimizer.load_state_dict(state["optimizer"])
    train(step, optimizer, images, digits, range(2, 4))

    images, digits = pairs(slice(1200, None), 500)
    with torch.no_grad():
        logits = step.export().eval()(images)
    accuracy = {name: (logits[name].argmax(1) == digits[:, i]).float().mean().item() for i, name in enumerate(logits)}
    print("test accuracy:", {name: round(value, 3) for name, value in accuracy.items()})
    return accuracy


if __name__ == "__main__":
    main()
