"""The trainings that the figures need, as tasks for the runner."""

from __future__ import annotations

from pathlib import Path

from lightning_koopman.demo.experiments.cache import missing, save
from lightning_koopman.demo.experiments.runner import Progress, Task
from lightning_koopman.demo.experiments.signals import CHIRP, learn
from lightning_koopman.demo.reproduce import images
from lightning_koopman.demo.reproduce.plan import Branch, Noisy, Plan

NOISY = 0.003  # cost of an epoch on a signal, relative to one on 10,000 images


def learn_chirp(plan: Plan, run: Noisy, folder: Path, device: str, reached: Progress) -> None:
    """Learn the paper's signal from noisy samples (section 6 and Figure 5)."""
    found = learn(CHIRP, run.loss, run.noise, run.seed, plan.noise_epochs, reached, device)
    save(folder / f"{run.name}.npz", **{**found, "fit": found["fit"][:, 0]})


def tasks(
    plan: Plan, root: Path | None, folder: Path, device: str, wanted: tuple[list[str], list[Branch], list[Noisy]]
) -> list[Task]:
    """Return the tasks whose results are still missing."""
    starts, branches, noisy = wanted
    places = (root, folder, device)
    found = [Task(f"trained-{each}", images.train, (plan, each, *places), plan.epochs_of(each)) for each in starts]
    found += [
        Task(each.name, images.prune, (plan, each, *places), plan.further, needs=f"trained-{each.start}")
        for each in branches
    ]
    found += [Task(each.name, learn_chirp, (plan, each, folder, device), plan.noise_epochs, NOISY) for each in noisy]
    return missing(found, folder)
