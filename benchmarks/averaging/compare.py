"""Score averages of the recorded weights at each tenth of a training, and find where the stop would end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.averaging.judge import N_TEST, Judge
from benchmarks.averaging.record import DECAYS, tenths
from benchmarks.reading import problems
from benchmarks.reading.problems import Setting
from benchmarks.reading.record import COSTS
from lightning_koopman import EarlyStopOnUnitEigenvalues, Phase, StoppingReason, Trajectory, read_training
from lightning_koopman.averaging.average import averaged_weights
from lightning_koopman.callbacks.training_batches import SCORED
from lightning_koopman.demo.experiments.cache import read, save
from lightning_koopman.demo.experiments.runner import Progress, Task
from lightning_koopman.stopping.evidence import Baseline
from lightning_koopman.stopping.judge import StopJudge

WINDOW = 30  # snapshots that KoopmanWeightAveraging keeps
LAST_FEW, QUARTER, FIFTH = 5, 0.25, 0.2  # the newest five; shares averaged by torch's example and Lightning's SWA
MEANS = "mean of the last 5", "torch swa_utils (from 75 %)", "Lightning SWA (from 80 %)"
VARIANTS = (
    "last weights", "last weights, new statistics", "**KoopmanWeightAveraging**", "best length by validation",
    *MEANS, *(f"EMA {decay:g}" for decay in DECAYS), "best length in hindsight",
)  # fmt: skip
POINTS, LOSS = 3, 2  # columns of the scores


def compare(setting: Setting, root: Path | None, recorded: Path, folder: Path, reached: Progress) -> None:
    """Score the averages of one training."""
    stored = read(recorded / f"{setting.name}.npz")
    judge = Judge(setting, problems.parts_of(setting.problem, root, n_scored=N_TEST))
    snapshots, rows = torch.from_numpy(stored["snapshots"]), stored["rows"]
    if not len(rows):  # the first epoch ended in NaN
        save(folder / f"{setting.name}.npz", rows=rows)
        return
    found: list[list[list[float]]] = []
    lengths: list[int] = []
    times = [epoch for epoch in tenths(setting) if epoch < len(snapshots)]
    for index, epoch in enumerate(times):
        judged: dict[str, list[float]] = {"last weights": list(rows[epoch - 1, 2:6])}
        auto, others = average_at(setting, judge, snapshots, epoch)
        lengths.append(auto)
        judged |= {"last weights, new statistics": others[1], "**KoopmanWeightAveraging**": others[auto]}
        judged["best length by validation"] = min(others.values(), key=lambda each: each[0])
        judged["best length in hindsight"] = min(others.values(), key=lambda each: each[LOSS])
        newest = LAST_FEW, max(1, round(QUARTER * epoch)), max(1, round(FIFTH * epoch))
        for name, count in zip(MEANS, newest, strict=True):
            judged[name] = others.get(count) or judge.of(mean(snapshots, epoch, min(count, epoch)))
        for decay, weights in zip(DECAYS, torch.from_numpy(stored["emas"][index]), strict=True):
            judged[f"EMA {decay:g}"] = judge.of(weights)
        found.append([judged[name] for name in VARIANTS])
        reached(epoch)
    stopped, reason = stop_of(setting, snapshots, rows)
    at_stop = next(iter(average_at(setting, judge, snapshots, stopped, only=True)[1].values()))
    arrays: dict[str, Any] = {"times": times, "judged": np.array(found), "lengths": lengths, "rows": rows}
    save(folder / f"{setting.name}.npz", stopped=stopped, reason=reason.value, at_stop=at_stop, **arrays)


def mean(snapshots: Tensor, epoch: int, count: int) -> Tensor:
    """Return the mean of the newest ``count`` snapshots after an epoch."""
    return snapshots[epoch + 1 - count : epoch + 1].double().mean(0).float()


def average_at(
    setting: Setting, judge: Judge, snapshots: Tensor, epoch: int, *, only: bool = False
) -> tuple[int, dict[int, list[float]]]:
    """Return the length that the library chooses after an epoch, and the scores of all it tried (or only of that)."""
    trajectory = Trajectory(snapshots.shape[1])
    since = jumped(setting, epoch)
    for weights in snapshots[max(since, epoch + 1 - WINDOW) : epoch + 1]:
        trajectory.append(weights)
    scale = setting.baseline
    chosen = averaged_weights(trajectory, loss=lambda weights: judge.on_batches(weights, SCORED), scale=scale)
    if only:
        return chosen.length, {chosen.length: judge.of(chosen.values)}
    return chosen.length, {each: judge.of(mean(snapshots, epoch, each)) for each in chosen.tried}


def jumped(setting: Setting, epoch: int) -> int:
    """Return the number of epochs before the newest jump of the learning rate (0 if there is none)."""
    if setting.schedule != "step":
        return 0
    factors = [problems.factor(setting, each) for each in range(epoch)]
    return next((each for each in range(epoch - 1, 0, -1) if factors[each] != factors[each - 1]), 0)


def stop_of(
    setting: Setting, snapshots: Tensor, rows: npt.NDArray[np.float64], **options: Any
) -> tuple[int, StoppingReason]:
    """Return the epoch after which the stop ends a training (the last if it does not), and the reason."""
    stop = EarlyStopOnUnitEigenvalues(**options)
    judge = StopJudge(stop.rule, stop.patience, hovering_counts=stop.restore == "average")
    trajectory, reading = Trajectory(snapshots.shape[1], capacity=WINDOW), None
    trajectory.append(snapshots[0])
    baseline = Baseline(setting.baseline)
    for epoch in range(1, len(snapshots)):
        trajectory.append(snapshots[epoch])
        losses = rows[:epoch, 0]
        reading = read_training(trajectory, losses, baseline_loss=baseline.loss, before=reading)
        ahead = [[problems.factor(setting, each)] for each in range(epoch, setting.epochs)]
        _, reason = judge.judge(
            float(losses[-1]),
            trajectory.factor(last=stop.rule.horizon + 1),
            baseline,
            hovers=reading.phase is Phase.HOVERING,
            rates=[float(rows[epoch - 1, 1])],
            planned=lambda ahead=ahead: ahead,
        )
        if reason is not StoppingReason.NOT_STOPPED:
            return epoch, reason
    return len(snapshots) - 1, StoppingReason.NOT_STOPPED


def tasks(chosen: list[Setting], root: Path | None, recorded: Path) -> list[Task]:
    """Return one comparison for each recorded training."""
    known = [each for each in chosen if (recorded / f"{each.name}.npz").exists()]
    given = root, recorded, recorded / "compared"
    return [Task(each.name, compare, (each, *given), each.epochs, COSTS[each.problem]) for each in known]
