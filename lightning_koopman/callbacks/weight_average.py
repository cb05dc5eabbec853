"""The weight average of a callback: chosen on request, swapped into the module and out again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsFloat

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_koopman._types import Array
from lightning_koopman.averaging.average import choose, coefficients, combined, lengths_to_try
from lightning_koopman.averaging.profiles import place
from lightning_koopman.callbacks.clock import steps_done
from lightning_koopman.callbacks.exchange import Exchange
from lightning_koopman.callbacks.guard import Guard
from lightning_koopman.callbacks.kept import kept, set_back
from lightning_koopman.callbacks.observables import outermost
from lightning_koopman.callbacks.recording import Recording
from lightning_koopman.callbacks.training_batches import TrainingBatches, Trial
from lightning_koopman.parameters.sharded_modules import local_chunks, named_tensors
from lightning_koopman.trajectory.trajectory import Trajectory

JUMP = 0.25  # change of a rate, relative to its highest since the last start, that starts a new average
NO_LOSSES: Array = np.zeros((0, 0))
KEPT = "_since", "_rates", "_highest", "length", "tried", "_statistics", "chosen_after", "step", "kept"


class WeightAverage:
    """Average of the snapshots that a callback records.

    Its options are those of :class:`KoopmanWeightAveraging`.

    Attributes:
        parts: Array (k,): coefficients of the newest k snapshots, which sum to 1.
        length: Chosen number of snapshots.
        tried: The lengths that were compared.
        losses: Array (tried, batches): their losses; empty if they were not compared.
        chosen_after: Completed intervals at the newest snapshot when this was chosen, or None.
        step: Optimizer steps at the newest snapshot.
    """

    def __init__(
        self,
        recording: Recording,
        guard: Guard,
        *,
        profile: str = "auto",
        lengths: Sequence[int] | None = None,
        power: float = 1.0,
        n_batches: int = 16,
    ) -> None:
        self._recording, self._guard = recording, guard
        self._asked = profile, lengths, power
        self.batches = TrainingBatches(n_batches)
        self.forget()

    def forget(self) -> None:
        """Reset to the state before a first fit."""
        self.batches.clear()
        self.exchange = Exchange()
        self.kept = False  # the module was left with the average
        self._rates: list[float] = []
        self.step = -1
        self.start_at(0)

    def start_at(self, completed: int) -> None:
        """Start a new average at the snapshot after ``completed`` intervals; the last weights, until it is chosen."""
        self._since, self._highest = completed, list(self._rates)
        self._choose_last(None)

    def _choose_last(self, after: int | None) -> None:
        self.parts, self.length, self.losses = np.ones(1), 1, NO_LOSSES
        self.tried: tuple[int, ...] = (1,)
        self._statistics: dict[str, Tensor] = {}
        self._of: Trajectory | None = None  # the trajectory it was chosen from
        self.chosen_after = after

    def begin_round(self, rates: Sequence[float], completed: int) -> None:
        """Start an interval with the given learning rates; a jump in one starts a new average."""
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
        """Choose the average of the snapshots held, once per snapshot; call on all processes together."""
        newest, weights = self._recording.recorder.newest, self._recording.weights
        if newest is None or not self._is_current:
            self._choose_last(None)  # new trajectory, or weights that are not finite
        if newest is None or newest == self.chosen_after:
            return
        self._choose_last(newest)  # remains if the rest fails
        self._of = self._recording.recorder.trajectory
        for compare in (True, False):  # if lengths cannot be compared, the steps decide
            doing = "comparing averages" if compare else "averaging the weights"
            with self._guard.together(doing, weights.processes) as comparing:
                trial = self.batches.trial(trainer, module, weights.processes) if compare else None
                found = self._chosen(trial)
            if comparing.succeeded:
                self.parts, self.length, self.tried, self.losses, self._statistics = found
                return

    @property
    def _is_current(self) -> bool:
        """Whether the average was chosen from the current trajectory."""
        trajectory = self._recording.recorder.trajectory
        if self._of is None and trajectory is not None and len(self.parts) <= len(trajectory):
            self._of = trajectory  # both were restored from a checkpoint
        return self._of is trajectory

    def _chosen(self, trial: Trial | None) -> tuple[Array, int, tuple[int, ...], Array, dict[str, Tensor]]:
        """Return coefficients, length, tried lengths, their losses and the batch statistics of the best average."""
        trajectory, processes = self._recording.recorder.trajectory, self._recording.weights.processes
        assert trajectory is not None
        profile, asked, power = self._asked
        if trial is None and self.batches.norms:
            self._guard.warn(
                "statistics",
                f"the batch statistics of layers such as {self.batches.norms[0]!r} cannot be re-estimated for an "
                "average, as `training_step` cannot run on a copy of this module: using the last weights instead.",
            )
            return self.parts, self.length, self.tried, self.losses, self._statistics
        lengths = lengths_to_try(trajectory, profile, asked, held=self._count, compared=trial is not None)
        reading = self._recording.reader.reading
        scale = None if reading is None or not math.isfinite(reading.scale) else reading.scale
        loss = None if trial is None or len(lengths) == 1 else self._loss(trial, trajectory)
        parts, index, losses = choose(trajectory, profile, lengths, power=power, loss=loss, scale=scale)
        decided = np.append(parts, index) * (processes.rank == 0)  # others may round differently
        *shared, index = processes.all_sum(decided).tolist()
        chosen = np.trim_zeros(np.array(shared), "f")
        statistics = self._statistics_of(self._values(trajectory, chosen), trial) if self.batches.norms else {}
        return chosen, lengths[int(index)], tuple(lengths), losses, statistics

    @property
    def _count(self) -> int:
        """Number of snapshots that may be averaged."""
        since = sum(epoch >= self._since for epoch in self._recording.recorder.epochs)
        return max(1, min(since, self._recording.settings.window or since))

    def _statistics_of(self, values: Mapping[str, Tensor], trial: Trial | None) -> dict[str, Tensor]:
        """Return the batch statistics of the given weights, empty without a trial."""
        if trial is None:
            return {}
        trial.set(values)
        return trial.statistics(shown=self._guard.zero)

    def search(
        self, trainer: pl.Trainer, module: pl.LightningModule, lengths: Sequence[int], loss: Callable[[], float]
    ) -> None:
        """Choose the best of several lengths by the loss of the module, and leave that average in the module."""
        trajectory = self._trajectory_chosen_from()
        profile, _, power = self._asked
        tried = sorted({min(each, self._count) for each in lengths})
        trial = self.batches.trial(trainer, module, self._recording.weights.processes) if self.batches.norms else None
        before = self.length, self.parts, self._statistics
        found: list[tuple[float, int, Array, dict[str, Tensor]]] = []
        try:
            for length in tried:
                self.parts = np.trim_zeros(coefficients(trajectory, profile, length, power), "f")
                self._statistics = self._statistics_of(self._values(trajectory, self.parts), trial)
                self.copy_to(module)
                value = loss()
                if isinstance(value, bool) or not isinstance(value, SupportsFloat):
                    raise TypeError(f"loss must return a number, got {value!r:.60}.")
                value = float(value)
                found.append((math.inf if math.isnan(value) else value, length, self.parts, self._statistics))
            if all(each[0] == math.inf for each in found):
                raise ValueError(f"loss is NaN or infinite for all lengths {tried}: the weights are left as they were.")
            before = min(found, key=lambda each: each[:2])[1:]
            self.tried, self.losses = tuple(tried), np.array([[each[0]] for each in found])
        finally:
            self.length, self.parts, self._statistics = before
            self.copy_to(module)

    def _trajectory_chosen_from(self) -> Trajectory:
        trajectory = self._recording.recorder.trajectory
        if trajectory is None or self.chosen_after is None:
            raise ValueError("no average has been chosen yet: train first.")
        if self._recording.weights.shards is None:
            raise ValueError("this callback is a copy, and has lost the module it was trained with: use the original.")
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
        """Return this process's weights of an average, by parameter."""
        return self._completed(trajectory.combine(place(parts, len(trajectory))))

    def _completed(self, own: Tensor) -> dict[str, Tensor]:
        """Assemble the weights that this process holds, by parameter, from the own parts of all processes."""
        shards = self._recording.weights.shards
        assert shards is not None
        return {name: shards.complete(name, value) for name, value in shards.split(own).items()}

    def loss_of(self, length: int) -> float:
        """Return the mean loss of a length, or NaN if it was not compared."""
        if not self.losses.size or length not in self.tried:
            return math.nan
        row = self.losses[self.tried.index(length)]
        return float(row[~np.isnan(row)].mean()) if not np.isnan(row).all() else math.nan

    # -- in and out ---------------------------------------------------------------------------------------------------

    def put_in(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Replace the trained weights by the average; call on all processes together."""
        if self.exchange.held is None:
            with self._guard.together("averaging the weights", self._recording.weights.processes) as averaging:
                values = self._average(trainer, module)
                self.exchange.put_in(outermost(trainer, module), module, values)
            if not averaging.succeeded:
                self.take_out(trainer, module)

    def take_out(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Restore the trained weights, bit for bit."""
        self.exchange.take_out(outermost(trainer, module), module)

    def keep(self) -> None:
        """Leave the current weights in the module after a fit."""
        self.kept = self.kept or (self.exchange.inside and bool(self.exchange.held))
        self.exchange.keep()

    @contextlib.contextmanager
    def held(self, trainer: pl.Trainer, module: pl.LightningModule, *, average: bool) -> Iterator[None]:
        """Context in which the module holds the average, or the trained weights."""
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
        """Return weights and buffers of the average, except those equal to the trained ones."""
        trajectory, parts = self._recording.recorder.trajectory, self.parts
        if trajectory is None or self.chosen_after is None or not self._is_current:
            return {}
        if steps_done(trainer) == self.step:
            values = {} if len(parts) == 1 else self._values(trajectory, parts)
            return {**values, **self._statistics}
        if len(parts) == 1:
            return {}  # the last weights keep their own statistics
        # within an interval, the current weights stand in for the snapshot at its end
        older, chunks = self._values(trajectory, parts[:-1]), local_chunks(outermost(trainer, module))
        newest = {name: float(parts[-1]) * chunks[name].tensor.detach().cpu() for name in older}
        values = {name: value + newest[name] for name, value in older.items()}
        if not self.batches.norms:
            return values
        trial = self.batches.trial(trainer, module, self._recording.weights.processes)
        return {} if trial is None else {**values, **self._statistics_of(values, trial)}

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Copy the last chosen average into a module with the same parameter names and shapes."""
        trajectory, shards = self._trajectory_chosen_from(), self._recording.weights.shards
        known, values = named_tensors(module, module), {**self._values(trajectory, self.parts), **self._statistics}
        for name, value in values.items():
            shape = shards.chunks[name].tensor.shape if shards is not None and name in shards.chunks else value.shape
            found = tuple(known[name].shape) if name in known else "none"
            if found != tuple(shape):
                raise ValueError(f"module must have {name!r} of shape {tuple(shape)}, but has {found}: pass the "
                                 "trained module or a copy of it.")  # fmt: skip
        for name, value in values.items():
            tensor = known[name].detach()
            tensor.copy_(value.reshape(tensor.shape))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as tensors and primitives."""
        numbers = {"parts": torch.from_numpy(self.parts), "losses": torch.from_numpy(self.losses)}
        return {**kept(self, KEPT), **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.forget()
        set_back(self, state, KEPT)
        self.parts, self.losses = state["parts"].numpy().copy(), state["losses"].numpy().copy()
