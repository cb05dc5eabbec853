"""When to prune a network, and how much."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_koopman._checks import check_count, check_positive, check_share
from lightning_koopman.callbacks.baseline_loss import known_baseline
from lightning_koopman.callbacks.clock import Clock
from lightning_koopman.callbacks.kept import kept, set_back
from lightning_koopman.callbacks.lr_schedule import warming_up
from lightning_koopman.callbacks.recording import Recording
from lightning_koopman.reading.phase import Phase
from lightning_koopman.stopping.forecast import relative_changes

SETTLED = "settled"
HORIZON = 10  # intervals to look ahead and back to see whether the weights have settled
LOST = Phase.DIVERGING, Phase.STUCK, Phase.OSCILLATING  # phases in which small movement does not mean settled
LEAST = 3  # snapshots needed for a spectrum
KEPT = "attempted", "last", "settled_at", "highest_rate"


class PruningSchedule:
    """Schedule of prunings, with the criterion for settled weights; the arguments are those of the callback."""

    def __init__(
        self,
        sparsity: float | None,
        threshold: float | None,
        epoch: int | str,
        rounds: int,
        round_epochs: int,
        settled_change: float,
    ) -> None:
        self.sparsity = None if sparsity is None else check_share("sparsity", sparsity, "it is the share to prune")
        self.threshold = None if threshold is None else check_positive("threshold", threshold)
        if isinstance(epoch, str) and epoch != SETTLED:
            raise ValueError(f"epoch must be a number of completed epochs or 'settled', got {epoch!r}.")
        self.first = None if isinstance(epoch, str) else check_count("epoch", epoch, 1)
        self.rounds = check_count("rounds", rounds, 1)
        self.interval = check_count("round_epochs", round_epochs, LEAST)
        self.settled_change = check_positive("settled_change", settled_change)
        self.forget()

    def forget(self) -> None:
        """Reset to the state before a first fit."""
        self.attempted = 0  # prunings, including failed ones
        self.last: int | None = None  # completed epochs at the last pruning
        self.settled_at: int | None = None  # completed epochs when the weights had settled
        self.changes = (math.nan, math.nan)  # predicted and past
        self.highest_rate, self.phase = 0.0, Phase.WARMING_UP

    @property
    def finished(self) -> bool:
        """Whether no prunings remain."""
        return self.attempted >= self.rounds

    @property
    def next_due(self) -> int | None:
        """Completed epochs after which the next pruning is due, or None if unknown."""
        if self.finished:
            return None
        if self.last is not None:
            return self.last + self.interval
        return self.settled_at if self.first is None else self.first

    def is_due(self, epoch: int) -> bool:
        """Return whether a pruning is due after ``epoch`` completed epochs."""
        return self.next_due is not None and epoch >= self.next_due

    @property
    def waits(self) -> bool:
        """Whether pruning still waits for the weights to settle."""
        return self.first is None and self.settled_at is None

    @property
    def target(self) -> float:
        """Sparsity or threshold of the next pruning."""
        done = (self.attempted + 1) / self.rounds
        if self.threshold is not None:
            return self.threshold * done
        assert self.sparsity is not None
        return self.sparsity * (1 - (1 - done) ** 3)

    @property
    def final(self) -> float:
        """Sparsity or threshold of the last pruning."""
        return self.threshold or self.sparsity or 0.0

    def tried(self, epoch: int) -> None:
        """Count a pruning, successful or not."""
        self.attempted += 1
        self.last = epoch

    def has_settled(
        self, trainer: pl.Trainer, recording: Recording, epoch: int, recorded: bool, rates: list[float]
    ) -> bool:
        """Return whether the weights moved, and are predicted to move, by at most ``settled_change``.

        The phase must not be one of ``LOST``, and the learning rate must not be warming up.
        """
        self.highest_rate = max([self.highest_rate, *rates])
        self.phase = recording.read(epoch, known_baseline(trainer)).phase
        trajectory = recording.recorder.trajectory if recorded else None
        if trajectory is None or len(trajectory) <= HORIZON:
            return False
        self.changes = relative_changes(trajectory.factor(last=HORIZON + 1), HORIZON)
        still = max(self.changes) <= self.settled_change and self.phase not in LOST
        return still and not warming_up(trainer, [self.highest_rate], recording.settings.every_n_steps)

    def tell_if_early(self, owner: str) -> None:
        """Log a note if the first pruning is due before there is a spectrum."""
        if self.first is not None and self.first < LEAST - 1 and not self.attempted:
            rank_zero_info(
                f"{owner}: epoch={self.first} is before the first spectrum, which needs {LEAST} snapshots, so weights "
                f"are pruned by magnitude: set `epoch` to {LEAST - 1} or later."
            )

    def check_end(self, trainer: pl.Trainer, clock: Clock) -> None:
        """Raise ValueError if training ends before the last pruning."""
        every = clock.every_n_steps
        end, name = trainer.max_epochs, "max_epochs"
        if every is not None:
            end, name = trainer.max_steps // every if trainer.max_steps > 0 else None, f"max_steps/{every}"
        if trainer.fast_dev_run or end is None or end < 0:  # type: ignore[attr-defined]
            return
        rest = (self.rounds - 1) * self.interval
        if self.first is None:
            if end <= HORIZON + rest:
                raise ValueError(
                    f"epoch='settled' looks {HORIZON} epochs back, but {name}={end}"
                    f"{f' with rounds={self.rounds}' if self.rounds > 1 else ''}: pass a number, or train longer."
                )
        elif self.first + rest >= end:
            rounds = f" with rounds={self.rounds}, the last after epoch {self.first + rest}," if self.rounds > 1 else ""
            raise ValueError(f"epoch={self.first}{rounds} must be below {name}={end}: prune earlier or train longer.")

    def why_unfinished(self, clock: Clock) -> str:
        """Explain why prunings remain when training has ended."""
        if self.next_due is not None:
            return f"round {self.attempted + 1} of {self.rounds} was due after {clock.when(self.next_due)}"
        ahead, past = self.changes
        if math.isnan(ahead):
            return f"epoch='settled' looks {HORIZON} intervals back, but there were too few snapshots"
        return (
            f"epoch='settled' waited for changes of at most {self.settled_change:.1%} within {clock.span(HORIZON)}; "
            f"the last were {ahead:.1%} (predicted) and {past:.1%} (past), and the phase was {self.phase.value!r}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return kept(self, KEPT)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        set_back(self, state, KEPT)
