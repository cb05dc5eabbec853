"""The state of a Koopman callback in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl

from lightning_koopman.callbacks.clock import Rows
from lightning_koopman.callbacks.events import Events

VERSION = 6  # of the state


def saved_state(callback: Events) -> dict[str, Any]:
    """Return the state for a checkpoint, and write the snapshots that it refers to."""
    if callback.run_folder.path is None:
        return {}
    state: dict[str, Any] = {}
    with callback.guard("saving the callback's state"):
        history = {key: [row[key] for row in callback.history] for key in callback.columns}
        own = callback.own_state()
        state = {"version": VERSION, "rounds": callback.clock.rounds, "history": history, "own": own}
        state |= callback.recording.state_dict()
    if state:
        with callback.guard("saving the snapshots for the checkpoint"):
            state["recorder"] = callback.recording.recorder.save()
    return state


def take_up(callback: Events, state: dict[str, Any]) -> None:
    """Restore the history and the callback's own state. Any error means a fresh start."""
    if state.get("version") != VERSION:
        raise ValueError(f"the state is of version {state.get('version')!r}, but this library reads {VERSION}")
    columns, own = state["history"], state["own"]
    if set(columns) != set(callback.columns) or not isinstance(own, dict):
        raise ValueError("the state does not have the entries that this callback saves")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    callback.restore_own(own)
    callback.history = Rows(rows, callback.clock.every_n_steps)


def resume(
    callback: Events,
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    sharing: Sequence[Events],
) -> bool:
    """Restore the state that a checkpoint holds; return whether there is one that this version can read.

    Of the callbacks that are ``sharing`` a recorder only the first warns, and only if none has a state.
    """
    state, callback.pending = callback.pending, None
    if state is None:
        known = sharing[0] is not callback or any(other.pending is not None for other in sharing)
        if trainer.ckpt_path is not None and not known:
            callback.guard.warn(
                "resume",
                f"the checkpoint {str(trainer.ckpt_path)!r} holds no snapshots for this callback with these settings: "
                "a new trajectory starts.",
            )
        return False
    saved: dict[str, Any] | None = {}
    known = False
    with callback.guard("going on from the checkpoint's state"):
        take_up(callback, state)
        callback.recording.load_state_dict(state)
        callback.clock.rounds, saved, known = int(state["rounds"]), state.get("recorder"), True
    callback.recording.restore(trainer, pl_module, saved)
    return known
