"""Runs what is missing, several trainings at a time, with the time left; what was cut off goes on where it was."""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lightning_koopman.demo.reproduce import images, noise
from lightning_koopman.demo.reproduce.plan import Branch, Noisy, Plan

NOISY = 0.003  # cost of an epoch on a signal, in epochs of 10,000 images


@dataclass(frozen=True)
class Task:
    """One training: a function of a progress reporter, its size in epochs, and the task that must come before it."""

    name: str
    act: Callable[..., None]
    arguments: tuple[Any, ...]
    epochs: int
    cost: float
    needs: str | None = None


@dataclass
class Reporter:
    """Sends epochs, each once, to the parent process."""

    channel: Any
    name: str
    told: int = field(default=0)

    def __call__(self, epochs: int) -> None:
        """So many epochs are done."""
        if epochs > self.told:
            self.channel.put((self.name, epochs - self.told))
            self.told = epochs


def tasks(
    plan: Plan, root: Path | None, folder: Path, device: str, wanted: tuple[list[str], list[Branch], list[Noisy]]
) -> list[Task]:
    """All tasks whose results are not there yet."""
    starts, branches, noisy = wanted
    found = [
        Task(f"trained-{start}", images.train, (plan, start, root, folder, device), plan.epochs_of(start), 1.0)
        for start in starts
    ]
    found += [
        Task(
            branch.name,
            images.prune,
            (plan, branch, root, folder, device),
            plan.further,
            1.0,
            needs=f"trained-{branch.start}",
        )
        for branch in branches
    ]
    found += [Task(run.name, noise.learn, (plan, run, folder, device), plan.noise_epochs, NOISY) for run in noisy]
    return [task for task in found if not (folder / f"{task.name}.npz").exists()]


def work(task: Task, channel: Any) -> None:
    """In a process of its own, which leaves the output to the progress bar."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning_utilities").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    reporter = Reporter(channel, task.name)
    task.act(*task.arguments, reporter)
    reporter(task.epochs)


def end_with_parent() -> None:
    """A killed parent must not leave workers that write where its successor does."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(found: list[Task], jobs: int) -> None:
    """Run the tasks, each after the one it needs."""
    if not found:
        return
    costs = {task.name: task.cost for task in found}
    waiting, running = list(found), dict[Future[None], str]()
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(initializer=end_with_parent)
    with (
        manager,
        ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with_parent) as pool,
        tqdm(
            total=sum(task.epochs * task.cost for task in found),
            unit="epoch",
            bar_format="{percentage:3.0f} % |{bar}| {elapsed} so far, {remaining} left{postfix}",
            smoothing=0.05,
        ) as bar,
    ):
        channel = manager.Queue()
        while waiting or running:
            unfinished = {task.name for task in waiting} | set(running.values())
            ready = [task for task in waiting if task.needs not in unfinished]
            for task in ready[: jobs - len(running)]:
                running[pool.submit(work, task, channel)] = task.name
                waiting.remove(task)
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                if future.exception() is not None:
                    for child in multiprocessing.active_children():  # the others go on next time
                        child.terminate()
                future.result()
                bar.set_postfix_str(running.pop(future))
            while True:
                try:
                    name, epochs = channel.get_nowait()
                except queue.Empty:
                    break
                bar.update(epochs * costs[name])
