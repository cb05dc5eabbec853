"""The trainings that the figures need, as tasks for the runner."""

from __future__ import annotations

from pathlib import Path

from lightning_koopman.demo.experiments.cache import missing
from lightning_koopman.demo.experiments.runner import Task
from lightning_koopman.demo.reproduce import images, noise
from lightning_koopman.demo.reproduce.plan import Branch, Noisy, Plan

NOISY = 0.003  # cost of an epoch on a signal, in epochs of 10,000 images


def tasks(
    plan: Plan, root: Path | None, folder: Path, device: str, wanted: tuple[list[str], list[Branch], list[Noisy]]
) -> list[Task]:
    """All tasks whose results are not there yet."""
    starts, branches, noisy = wanted
    found = [
        Task(f"trained-{start}", images.train, (plan, start, root, folder, device), plan.epochs_of(start))
        for start in starts
    ]
    found += [
        Task(
            branch.name,
            images.prune,
            (plan, branch, root, folder, device),
            plan.further,
            needs=f"trained-{branch.start}",
        )
        for branch in branches
    ]
    found += [Task(run.name, noise.learn, (plan, run, folder, device), plan.noise_epochs, NOISY) for run in noisy]
    return missing(found, folder)
