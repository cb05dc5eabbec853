"""The average of the weights that a callback keeps: chosen when somebody looks at it, put in and taken out again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_koopman._checks import check_count
from lightning_koopman._types import Array
from lightning_koopman.averaging.average import choose, coefficients, combined, lengths_to_try
from lightning_koopman.averaging.profiles import place
from lightning_koopman.callbacks.clock import steps_done
from lightning_koopman.callbacks.exchange import Exchange
from lightning_koopman.callbacks.guard import Guard
from lightning_koopman.callbacks.observables import outermost
from lightning_koopman.callbacks.recording import Recording
from lightning_koopman.callbacks.training_batches import TrainingBatches, Trial
from lightning_koopman.parameters.sharded_modules import local_chunks, named_tensors
from lightning_koopman.trajectory.trajectory import Trajectory

if TYPE_CHECKING:
    import pytorch_lightning as pl

JUMP = 0.25  # change of a learning rate that starts a new average, relative to the highest since the last start
NO_LOSSES: Array = np.zeros((0, 0))


class WeightAverage:
    """An average along the trajectory that a callback records.

    Args:
        recording: The callback's.
        guard: The callback's.
        profile: As for :func:`averaged_weights`.
        length: As for it.
        power: As for it.
        n_batches: Training batches that batch statistics are re-estimated from, ≥ 1.

    Attributes:
        parts: Array (k,): shares of the newest k snapshots, which add up to 1.
        length: Snapshots that were chosen.
        tried: The lengths that were compared.
        losses: Array (tried, batches) of their losses; empty where they could not be compared.
        chosen_after: Round of the snapshot after which all of this was found out, or None.
        step: Optimizer steps at the newest snapshot.
    """

    def __init__(
        self,
        recording: Recording,
        guard: Guard,
        *,
        profile: str = "auto",
        length: int | Sequence[int] | None = None,
        power: float = 1.0,
        n_batches: int = 16,
    ) -> None:
        self._recording, self._guard = recording, guard
        self._asked = profile, length, power
        self.batches = TrainingBatches(n_batches)
        self.forget()

    def forget(self) -> None:
        """Begin as for a first fit."""
        self.batches.clear()
        self.exchange = Exchange()
        self.kept = False  # the module was left with the average
        self._rates: list[float] = []
        self.step = -1
        self.start_at(0)

    def start_at(self, completed: int) -> None:
        """A new average starts with the snapshot after so many rounds; until it is chosen it is the last weights."""
        self._since, self._highest = completed, list(self._rates)
        self._choose_last(None)

    def _choose_last(self, after: int | None) -> None:
        self.parts, self.length, self.losses = np.ones(1), 1, NO_LOSSES
        self.tried: tuple[int, ...] = (1,)
        self._statistics: dict[str, Tensor] = {}
        self._of: Trajectory | None = None  # whose snapshots it was chosen from
        self.chosen_after = after

    def begin_round(self, rates: Sequence[float], completed: int) -> None:
        """A round begins at some learning rates."""
        self.batches.begin()
        before, self._rates = self._rates, list(rates)
        if len(before) != len(rates):
            self.start_at(completed if before else self._since)
            return
        if any(abs(a - b) > JUMP * high for a, b, high in zip(rates, before, self._highest, strict=True)):
            self.start_at(completed)
        self._highest = [max(pair) for pair in zip(rates, self._highest, strict=True)]

    # -- choosing -----------------------------------------------------------------------------------------------------

    def choose(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Choose the average of the snapshots held, once a snapshot; all processes together."""
        newest, weights = self._recording.recorder.newest, self._recording.weights
        if newest is None or not self._is_current:
            self._choose_last(None)  # other weights, or ones that are not finite
        if newest is None or newest == self.chosen_after:
            return
        self._choose_last(newest)  # what remains where the rest fails
        self._of = self._recording.recorder.trajectory
        for compare in (True, False):  # where lengths cannot be compared the steps decide
            done = False
            doing = "comparing averages" if compare else "averaging the weights"
            with self._guard.together(doing, weights.processes):
                trial = self.batches.trial(trainer, module, weights.processes) if compare else None
                self._choose(trial)
                done = True
            if done:
                return

    @property
    def _is_current(self) -> bool:
        """Whether what was chosen is of the present trajectory."""
        trajectory = self._recording.recorder.trajectory
        if self._of is None and trajectory is not None and len(self.parts) <= len(trajectory):
            self._of = trajectory  # restored along with it
        return self._of is trajectory

    def _choose(self, trial: Trial | None) -> None:
        trajectory, processes = self._recording.recorder.trajectory, self._recording.weights.processes
        assert trajectory is not None
        profile, length, power = self._asked
        if trial is None and self.batches.norms:
            self._guard.warn(
                "statistics",
                f"the batch statistics of layers such as {self.batches.norms[0]!r} cannot be re-estimated for an "
                "average, as `training_step` cannot be run on a copy of this module: the last weights are used.",
            )
            return
        lengths = lengths_to_try(trajectory, profile, length, held=self._count, compared=trial is not None)
        reading = self._recording.reader.reading
        scale = None if reading is None or not math.isfinite(reading.scale) else reading.scale
        loss = None if trial is None or len(lengths) == 1 else self._loss(trial, trajectory)
        parts, index, losses = choose(trajectory, profile, lengths, power=power, loss=loss, scale=scale)
        decided = np.append(parts, index) * (processes.rank == 0)  # others' arithmetic may round otherwise
        *shared, index = processes.all_sum(decided).tolist()
        chosen = np.trim_zeros(np.array(shared), "f")
        statistics = self._statistics_of(self._values(trajectory, chosen), trial) if self.batches.norms else {}
        self.parts, self.length, self.tried, self.losses = chosen, lengths[int(index)], tuple(lengths), losses
        self._statistics = statistics

    @property
    def _count(self) -> int:
        """Snapshots that may be averaged."""
        since = sum(epoch >= self._since for epoch in self._recording.recorder.epochs)
        return max(1, min(since, self._recording.settings.window or since))

    def _statistics_of(self, values: Mapping[str, Tensor], trial: Trial | None) -> dict[str, Tensor]:
        """Batch statistics of weights."""
        if trial is None:
            return {}
        trial.set(values)
        return trial.statistics(shown=self._guard.zero)

    def search(
        self, trainer: pl.Trainer, module: pl.LightningModule, lengths: Sequence[int], loss: Callable[[], float]
    ) -> None:
        """Leave the best of several lengths in the module, by a loss of the module as it is."""
        trajectory = self._trajectory_chosen_from()
        profile, _, power = self._asked
        tried = sorted({min(check_count("lengths", each, 1), self._count) for each in lengths})
        trial = self.batches.trial(trainer, module, self._recording.weights.processes) if self.batches.norms else None
        before = self.length, self.parts, self._statistics
        found: list[tuple[float, int, Array, dict[str, Tensor]]] = []
        try:
            for length in tried:
                self.parts = np.trim_zeros(coefficients(trajectory, profile, length, power), "f")
                self._statistics = self._statistics_of(self._values(trajectory, self.parts), trial)
                self.copy_to(module)
                value = float(loss())
                found.append((math.inf if math.isnan(value) else value, length, self.parts, self._statistics))
            before = min(found, key=lambda each: each[:2])[1:]
            self.tried, self.losses = tuple(tried), np.array([[each[0]] for each in found])
        finally:
            self.length, self.parts, self._statistics = before
            self.copy_to(module)

    def _trajectory_chosen_from(self) -> Trajectory:
        trajectory = self._recording.recorder.trajectory
        if trajectory is None or self.chosen_after is None or self._recording.weights.shards is None:
            raise ValueError("no average has been chosen yet: train first.")
        return trajectory

    def _loss(self, trial: Trial, trajectory: Trajectory) -> Callable[[Array], list[Array]]:
        def loss(rows: Array) -> list[Array]:
            found = []
            for own in combined(trajectory, rows):
                trial.set(self._completed(own))
                found.append(trial.losses())
            return found

        return loss

    def _values(self, trajectory: Trajectory, parts: Array) -> dict[str, Tensor]:
        """What this process holds of an average, by parameter."""
        return self._completed(trajectory.combine(place(parts, len(trajectory))))

    def _completed(self, own: Tensor) -> dict[str, Tensor]:
        """What this process holds of weights, by parameter, from all processes' own parts."""
        shards = self._recording.weights.shards
        assert shards is not None
        return {name: shards.complete(name, value) for name, value in shards.split(own).items()}

    def loss_of(self, length: int) -> float:
        """Mean loss of a length that was compared, else NaN."""
        if not self.losses.size or length not in self.tried:
            return math.nan
        row = self.losses[self.tried.index(length)]
        return float(row[~np.isnan(row)].mean()) if not np.isnan(row).all() else math.nan

    # -- in and out ---------------------------------------------------------------------------------------------------

    def put_in(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Put the average in the place of the weights that are trained; all processes together."""
        if not self.exchange.ready:
            with self._guard.together("averaging the weights", self._recording.weights.processes):
                values = self._average(trainer, module)
                self.exchange.put_in(outermost(trainer, module), module, values)

    def take_out(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Put the weights that are trained back in their place, to the last bit."""
        self.exchange.take_out(outermost(trainer, module), module)

    def keep(self) -> None:
        """Leave in the module what it holds, once a fit has ended."""
        self.kept = self.kept or (self.exchange.inside and self.exchange.differs)
        self.exchange.keep()

    @contextlib.contextmanager
    def held(self, trainer: pl.Trainer, module: pl.LightningModule, *, average: bool) -> Iterator[None]:
        """Context in which the module holds the average, or else the weights that are trained."""
        before = self.exchange.inside
        if average and not before:
            self.put_in(trainer, module)
        elif before and not average:
            self.exchange.swap(outermost(trainer, module), module)
        try:
            yield
        finally:
            if not before:
                self.take_out(trainer, module)
            elif not average:
                self.exchange.swap(outermost(trainer, module), module)

    def _average(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
        """Weights and buffers of the average, but for those that are the trained ones."""
        trajectory, parts = self._recording.recorder.trajectory, self.parts
        if trajectory is None or self.chosen_after is None or not self._is_current:
            return {}
        if steps_done(trainer) == self.step:
            values = {} if len(parts) == 1 else self._values(trajectory, parts)
            return {**values, **self._statistics}
        if len(parts) == 1:
            return {}  # the last weights, with the statistics that they were trained with
        # within a round the weights as they are stand for its snapshot, which is still to come
        older, chunks = self._values(trajectory, parts[:-1]), local_chunks(outermost(trainer, module))
        newest = {name: float(parts[-1]) * chunks[name].tensor.detach().cpu() for name in older}
        values = {name: value + newest[name] for name, value in older.items()}
        if not self.batches.norms:
            return values
        trial = self.batches.trial(trainer, module, self._recording.weights.processes)
        return {} if trial is None else {**values, **self._statistics_of(values, trial)}

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Copy the average that was chosen last into a module with parameters of the same names."""
        trajectory = self._trajectory_chosen_from()
        known = named_tensors(module, module)
        for name, value in {**self._values(trajectory, self.parts), **self._statistics}.items():
            if name not in known:
                raise ValueError(f"module has no parameter {name!r}: give the module that was trained, or a copy.")
            tensor = known[name].detach()
            tensor.copy_(value.reshape(tensor.shape))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; tensors and primitives."""
        return {
            "since": self._since,
            "rates": list(self._rates),
            "highest": list(self._highest),
            "parts": torch.from_numpy(self.parts),
            "length": self.length,
            "tried": list(self.tried),
            "losses": torch.from_numpy(self.losses),
            "statistics": dict(self._statistics),
            "after": self.chosen_after,
            "step": self.step,
            "kept": self.kept,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.forget()
        self._since, self.step = int(state["since"]), int(state["step"])
        self._rates = [float(each) for each in state["rates"]]
        self._highest = [float(each) for each in state["highest"]]
        self.parts, self.losses = state["parts"].numpy().copy(), state["losses"].numpy().copy()
        self.length, self.tried = int(state["length"]), tuple(int(each) for each in state["tried"])
        self._statistics = dict(state["statistics"])
        self.chosen_after = None if state["after"] is None else int(state["after"])
        self.kept = bool(state["kept"])
