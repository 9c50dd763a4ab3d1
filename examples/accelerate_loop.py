"""Accelerate for devices, precision and launching; sidetask for gradients.

python examples/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sidetask_core import Batch, Method, SplitModel, Step, Task, Uncertainty
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> tuple[float, float]:
    """Train two regressions of different size; the losses of the first and the last step."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    tasks = [Task("metres", nn.L1Loss(reduction="none")), Task("angle", nn.MSELoss(reduction="none"))]
    model = SplitModel(nn.Sequential(nn.Linear(8, 32), nn.ReLU()), {task.name: nn.Linear(32, 1) for task in tasks})
    step = Step(model, tasks, Method(encoder=Uncertainty(tasks)))

    x = torch.randn(1024, 8)
    rows = TensorDataset(x, 10.0 * x[:, :1], x[:, 1:2].tanh())
    optimizer = torch.optim.Adam(step.parameters(), lr=1e-2)
    # The step is moved, not prepared: prepare() would wrap it in DistributedDataParallel, whose sums it makes itself.
    step.to(accelerator.device)
    loader, optimizer = accelerator.prepare(DataLoader(rows, 64, shuffle=True), optimizer)

    totals = []
    for _ in range(5):
        for inputs, metres, angle in loader:
            optimizer.zero_grad()
            with accelerator.autocast():
                report = step.backward(Batch(inputs, {"metres": metres, "angle": angle}))
            optimizer.step()
            totals.append(sum(report.losses.values()).item())  # means over the batches of all processes
    accelerator.print(f"loss {totals[0]:.2f} -> {totals[-1]:.2f} on {accelerator.num_processes} process(es)")
    return totals[0], totals[-1]


if __name__ == "__main__":
    main()
