"""Time of a training step with each loss against the same step with the squared error."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from lightning_koopman import SobolevLoss
from lightning_koopman.demo.experiments.signals import RATE, loss_value
from lightning_koopman.demo.experiments.tables import show
from lightning_koopman.demo.sine import LAYERS, sine_network

N_SAMPLES, HIGHEST, ROUNDS, STEPS = 3000, 64, 15, 20
BOXES = ((1, 64), (2, 40), (3, 20), (3, 32), (4, 16))  # inputs and highest mode


def step_of(method: str) -> Callable[[], None]:
    """Return one training step of a new network on 3000 samples."""
    torch.manual_seed(0)
    x, y, net = torch.rand(N_SAMPLES, 1), torch.randn(N_SAMPLES, 1), sine_network(1, 1)
    loss: nn.Module = nn.MSELoss()
    if method != "L2":
        heads = {"network": net, "layers": LAYERS, "example": x} if method == "Sobolev 1" else {}
        loss = SobolevLoss(HIGHEST, domain=(0, 1), **heads)
    optimizer = torch.optim.Adam([*net.parameters(), *loss.parameters()], lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        loss_value(loss, net(x), y, x).backward()
        optimizer.step()

    return step


def milliseconds(act: Callable[[], object], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        act()
    return (time.perf_counter() - started) / times * 1e3


def run(threads: int) -> None:
    """Print both tables."""
    torch.set_num_threads(threads)
    steps = {method: step_of(method) for method in ("L2", "Sobolev 2", "Sobolev 1")}
    for step in steps.values():
        step()
    rounds = [{method: milliseconds(step, STEPS) for method, step in steps.items()} for _ in range(ROUNDS)]
    print(f"\nA training step, N = {N_SAMPLES}, K = {HIGHEST}, nine layers, {threads} thread(s), median of {ROUNDS}")
    ratios = {method: median(each[method] / each["L2"] for each in rounds) for method in steps}
    spent = {method: median(each[method] for each in rounds) for method in steps}
    show(("loss", "ms", "times L2"), [(name, f"{spent[name]:.2f}", f"{ratios[name]:.2f}") for name in steps])
    print(
        f"\nLoss and gradient alone, N = {N_SAMPLES}: a basis of more than 256 MiB is made piece by piece in each step"
    )
    show(("inputs", "K", "modes", "whole basis, MiB", "kept", "ms"), (basis_row(*box) for box in BOXES), left=(4,))


def basis_row(dim: int, highest: int) -> tuple[object, ...]:
    """Return the row for ``dim`` inputs: the size of the basis, and the time of the loss and its gradient."""
    loss = SobolevLoss(highest, domain=(0, 1))
    x, y = torch.rand(N_SAMPLES, dim), torch.randn(N_SAMPLES, 1)
    outputs = torch.zeros_like(y).requires_grad_()

    def act() -> None:
        loss(outputs, y, x).backward()

    loss.eval()  # suppresses the warning of more modes than samples
    act()
    modes = len(loss.rule.bands(1, dim).modes)
    spent = median(milliseconds(act, 1) for _ in range(5))
    kept = "yes" if loss._cache.n_bytes else "no"
    return dim, highest, f"{modes:,}", f"{modes * 2 * N_SAMPLES * 4 / 2**20:,.0f}", kept, f"{spent:.1f}"
