"""Runs several trainings at a time, and shows the time left."""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from tqdm import tqdm

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Task:
    """One training: a function of its arguments and a :data:`Progress`, whose result file has the task's name.

    ``cost`` is the cost of an epoch relative to other tasks.  ``needs`` names the task that must finish first, if any.
    """

    name: str
    act: Callable[..., None]
    arguments: tuple[Any, ...]
    epochs: int = 1
    cost: float = 1.0
    needs: str | None = None


@dataclass
class Reporter:
    """Reports completed epochs to the parent process, each one once."""

    channel: Any
    name: str
    told: int = 0

    def __call__(self, epochs: int) -> None:
        """Report that this many epochs are done."""
        if epochs > self.told:
            self.channel.put((self.name, epochs - self.told))
            self.told = epochs


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def silence() -> None:
    """Silence logs and warnings, so that only the progress bar is printed."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning_utilities").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def work(task: Task, channel: Any) -> None:
    """Run a task in a worker process."""
    silence()
    torch.set_num_threads(1)
    reporter = Reporter(channel, task.name)
    task.act(*task.arguments, reporter)
    reporter(task.epochs)


def end_with_parent() -> None:
    """End this worker with its parent: it must not write to files of the next run."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(tasks: list[Task], jobs: int) -> None:
    """Run the tasks, each after the one it needs."""
    if not tasks:
        return
    costs = {task.name: task.cost for task in tasks}
    waiting, running = list(tasks), dict[Future[None], str]()
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # as on Windows
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["lightning_koopman.demo"])  # imported once, not by each worker; no effect on spawn
    manager = SyncManager(ctx=context)
    manager.start(initializer=end_with_parent)
    with (
        manager,
        ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with_parent) as pool,
        tqdm(
            total=sum(task.epochs * task.cost for task in tasks),
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
                    for child in multiprocessing.active_children():  # the others resume in the next run
                        child.terminate()
                future.result()
                bar.set_postfix_str(running.pop(future))
            while True:
                try:
                    name, epochs = channel.get_nowait()
                except queue.Empty:
                    break
                bar.update(min(epochs * costs[name], bar.total - bar.n))  # rounding may exceed the total
