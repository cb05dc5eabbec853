"""The persistent part of the weights at a pruning, and the treatment of the surviving weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import Tensor, nn

from lightning_koopman._checks import check_choice, check_count, check_positive
from lightning_koopman.averaging.persistent import persistent
from lightning_koopman.callbacks.averages import averages
from lightning_koopman.callbacks.guard import Guard
from lightning_koopman.callbacks.observables import Weights, outermost
from lightning_koopman.callbacks.pruning_schedule import LEAST
from lightning_koopman.callbacks.recording import Recording
from lightning_koopman.dmd.spectrum import PERSISTENT
from lightning_koopman.parameters.reinitialize import Scheme, check_scheme, reinitialize_by_name, select_modules
from lightning_koopman.parameters.sharded_modules import local_chunks, named_parts
from lightning_koopman.pruning.channel_removal import ChannelRemoval
from lightning_koopman.pruning.optimizer_state import forget
from lightning_koopman.pruning.prunable import prunable_parameters, underlying_parameters

Scores = tuple[dict[str, Tensor], dict[str, Any]]


class PersistentScores:
    """Koopman reconstruction of the weights, computed at a snapshot and used by the next pruning.

    Args:
        radius: Radius of the cluster at 1, > 0.
        rule: Which modes are persistent, see :meth:`Spectrum.persistent`.
    """

    def __init__(self, radius: float, rule: str) -> None:
        self._radius, self._rule = check_positive("radius", radius), check_choice("rule", rule, PERSISTENT)
        self._ready: Scores | None = None

    def prepare(self, recording: Recording, epoch: int) -> None:
        """Reconstruct the weights after ``epoch`` completed intervals; call on all processes together.

        Raises:
            ValueError: If there are too few snapshots, or none after ``epoch``.
        """
        trajectory, last, weights = recording.recorder.trajectory, recording.settings.window, recording.weights
        count = 0 if trajectory is None else min(len(trajectory), last or len(trajectory))
        if trajectory is None or count < LEAST or recording.recorder.newest != epoch:
            raise ValueError(f"{count} snapshots are too few, or not up to date: pruning by magnitude instead.")
        decided = np.zeros(3 + len(trajectory))
        if weights.processes.rank == 0:  # one process decides: others may round differently
            chosen, spectrum, modes = persistent(trajectory, length=last, radius=self._radius, rule=self._rule)
            decided[:3] = modes.sum(), spectrum.rank, spectrum.misfit
            decided[3:] = chosen
        decided = weights.processes.all_sum(decided)
        assert weights.shards is not None
        scores = weights.shards.split(trajectory.combine(decided[3:]))
        count_of_modes, rank, misfit = decided[:3]
        self._ready = (
            scores,
            {"modes": int(count_of_modes), "rank": int(rank), "misfit": float(misfit), "snapshots": count},
        )

    def take(self) -> Scores:
        """Return this process's scores and their description, once; empty scores mean pruning by magnitude."""
        ready, self._ready = self._ready, None
        return ready or ({}, {"modes": 0, "rank": 0, "misfit": math.nan, "snapshots": 0})

    def follow(self, removal: ChannelRemoval) -> None:
        """Discard scores of removed channels, whichever callback removed them."""
        if self._ready is not None:
            scores, about = self._ready
            self._ready = {name: removal.left_of(name, value).reshape(-1) for name, value in scores.items()}, about


def trained_parameters(trainer: pl.Trainer, root: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Return the parameters to prune, by name; by default only those that an optimizer steps (not a teacher's)."""
    chosen = prunable_parameters(root, patterns)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    known = {name: parameter for name, parameter in chosen.items() if id(parameter) in stepped}
    return chosen if patterns is not None else known or chosen


def tell_left_out(guard: Guard, root: nn.Module, patterns: Sequence[str] | None) -> None:
    """Warn of matrices that are not pruned by default, since other weights are computed from them."""
    computed = underlying_parameters(root)
    left = [name for name, each in local_chunks(root).items() if id(each.parameter) in computed and len(each.shape) > 1]
    if patterns is None and left:
        guard.warn(
            "left out",
            f"{len(left)} weights such as {left[0]!r} are not pruned, since others are computed from them, and zeros "
            "would not be zeros there: remove the parametrization (weight norm and the like) before training.",
        )


class Survivors:
    """Treatment of the weights that survive a pruning; the arguments are those of the callback."""

    def __init__(self, kind: str, scheme: Scheme, seed: int) -> None:
        self.kind = check_choice("survivors", kind, ("keep", "reconstruction", "reinit"))
        check_scheme(scheme)
        if scheme is not None and kind != "reinit":
            raise ValueError(f"scheme={scheme!r} is for survivors='reinit', got {kind!r}: omit `scheme`.")
        self._scheme, self._seed = scheme, check_count("seed", seed, 0)
        self._names: list[str] = []  # of the modules to reinitialize

    def select(self, pl_module: nn.Module, parameters: Iterable[nn.Parameter] | None) -> None:
        """Select the modules to reinitialize: those that own the parameters, or all trainable ones."""
        if self.kind != "reinit":
            return
        owners = None
        if parameters is not None:
            owned = {id(parameter) for parameter in parameters}
            owners = [
                name
                for name, module in named_parts(pl_module).items()
                if any(id(parameter) in owned for parameter in module.parameters(recurse=False))
            ]
        self._names = list(select_modules(pl_module, owners, self._scheme))

    def set(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        weights: Weights,
        values: Mapping[str, Tensor],
        number: int,
    ) -> None:
        """Set the survivors after a pruning; ``values`` is the reconstruction of this process's part."""
        root = outermost(trainer, pl_module)
        if self.kind == "reinit":
            seed = self._seed + number
            reinitialize_by_name(root, self._names, self._scheme, seed=seed, processes=weights.processes)
            modules = named_parts(pl_module)
            redrawn = [modules[name] for name in self._names]
            forget(trainer.optimizers, [each for module in redrawn for each in module.parameters(recurse=False)])
            for average in averages(trainer):  # it holds weights from before
                fresh = dict(pl_module.named_parameters())
                for name, parameter in getattr(average, "module", average).named_parameters():
                    parameter.data.copy_(fresh[name].data)
                counter = getattr(average, "n_averaged", None)
                if isinstance(counter, Tensor):
                    counter.zero_()
        elif self.kind == "reconstruction":
            shards = weights.read(root)
            for name, value in values.items():
                tensor = shards.chunks[name].tensor.detach()
                tensor.copy_(shards.complete(name, value).reshape(tensor.shape))
