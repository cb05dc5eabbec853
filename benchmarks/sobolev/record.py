"""The trainings with each loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.sobolev.runs import PROBLEMS, Run
from lightning_koopman import shrink_noise
from lightning_koopman.demo.experiments.cache import save
from lightning_koopman.demo.experiments.runner import Progress, Task
from lightning_koopman.demo.experiments.signals import Signal, loss_of, loss_value
from lightning_koopman.demo.experiments.training import BATCH
from lightning_koopman.demo.sine import sine_network
from lightning_koopman.sobolev.bands import SobolevNorm

RATE, EVERY = 2e-3, 25


def most_modes(n_samples: int, dim: int) -> int:
    """Highest mode with at most half as many cosines and sines as samples."""
    highest = 1
    while SobolevNorm((highest + 1,)).bands(1, dim).n_functions <= n_samples / 2:
        highest += 1
    return highest


def variant_of(method: str, signal: Signal, net: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """The loss of a method."""
    options: dict[str, Any] = {}
    if method.endswith("batches"):
        options["n_samples"] = len(x)
    if method.endswith("shrunk"):  # the noise is dealt with: all modes, none preferred
        options |= {"scales": most_modes(*x.shape), "exponent": 0.0}
    return loss_of(method, signal, net, x, y, **options)


def train(run: Run, folder: Path, reached: Progress) -> None:
    """Train one network and record its errors."""
    torch.manual_seed(run.seed)
    problem = PROBLEMS[run.problem]
    points, samples, n_train = problem.draw(run.noise, run.seed)
    x, y = (torch.as_tensor(values, dtype=torch.float32) for values in (points, samples))
    fine, clean = torch.as_tensor(problem.grid(), dtype=torch.float32), problem.clean()
    x, held_x, y, held_y = x[:n_train], x[n_train:], y[:n_train], y[n_train:]
    if run.method.endswith("shrunk"):
        y = shrink_noise(x, y, domain=problem.domain)
    net = sine_network(x.shape[1], y.shape[1])
    loss = variant_of(run.method, problem, net, x, y)
    decay = float(run.method.partition("decay ")[2] or 0)
    parameters = list(nn.ModuleList([net, loss]).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=decay)
    batch = BATCH if run.method.endswith("batches") else n_train
    steps = run.epochs * -(-n_train // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    errors, held = [], []
    for epoch in range(1, run.epochs + 1):
        order = torch.randperm(n_train) if batch < n_train else slice(None)
        for some_x, some_y in zip(x[order].split(batch), y[order].split(batch), strict=True):
            optimizer.zero_grad()
            loss_value(loss, net(some_x), some_y, some_x).backward()
            optimizer.step()
            schedule.step()
        if epoch % EVERY == 0:
            with torch.no_grad():
                fit = net(fine).numpy()
                errors.append(np.sqrt(((fit - clean) ** 2).mean()))
                held.append(float(((net(held_x) - held_y) ** 2).mean()))
            reached(epoch)
    save(folder / f"{run.name}.npz", errors=errors, held=held, fit=fit.astype(np.float32))


def tasks(runs: list[Run], folder: Path) -> list[Task]:
    """All trainings."""
    return [Task(run.name, train, (run, folder), run.epochs) for run in runs]
