"""Rounds of removing channels from the module of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_koopman.callbacks._rehearsal import can_rehearse, quiet_copy, rehearsal
from lightning_koopman.removal import ChannelRemoval, Structure, agrees, resize_like, torch_pruning

if TYPE_CHECKING:
    import pytorch_lightning as pl

AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class ChannelRounds:
    """What is known of a module's channels through several rounds.

    Args:
        layers: Shell-style patterns of the names of the layers' weights, or None for all.
        scope: ``"global"`` or ``"tensor"``.
    """

    def __init__(self, layers: Sequence[str] | None, scope: str) -> None:
        self.layers, self.scope = layers, scope
        self.restart()

    def restart(self) -> None:
        """Forget the module."""
        self.refused: dict[str, str] | None = None  # by layer, why it must not lose channels; None: not yet tried
        self.originals: dict[str, int] = {}  # by layer, the channels it began with
        self.removed = 0  # channels
        self.changes: dict[str, dict[str, tuple[Any, Any]]] = {}
        self.last: ChannelRemoval | None = None

    @property
    def share(self) -> float:
        """Share of the removable channels that is gone, in [0, 1)."""
        return self.removed / max(1, sum(self.originals.values()))

    @staticmethod
    def check_run(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise an error for runs whose module cannot be given other sizes, or without the tracer."""
        torch_pruning()
        if trainer.world_size > 1:
            raise ValueError(
                f"structured=True works in a single process so far, but the run has {trainer.world_size}: use one "
                "device, or structured=False."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if {base.__name__ for base in type(other).__mro__} & set(AVERAGING):
                raise ValueError(
                    f"structured=True cannot give other sizes to the average that {type(other).__name__} keeps: "
                    "leave that callback out, or prune with structured=False."
                )
        if module.example_input_array is None and not can_rehearse(module):
            raise ValueError(
                "structured=True traces `training_step`, which under manual optimization steps the optimizers: set "
                "the module's `example_input_array`, and `forward` is traced instead."
            )

    def try_out(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> Structure:
        """Find out on copies which layers can lose channels.

        Raises:
            ValueError: If there are none, or the module cannot be traced.
        """
        with self._tracing(trainer, module, batch, batch_idx) as run:
            structure = self._structure(module, run)
            self.refused = structure.unfit(module, run)
        for name, count in structure.channels.items():
            if name not in self.refused:
                self.originals.setdefault(name, count)
        return structure

    def remove(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        *,
        scores: Mapping[str, Tensor],
        sparsity: float,
    ) -> float:
        """Remove channels up to a share of the original ones; returns on how many magnitudes would agree, in [0, 1]."""
        with self._tracing(trainer, module, batch, batch_idx) as run:
            structure = self._structure(module, run)
            chosen = structure.choose(sparsity, scores, self.scope, self.originals)
            plain = structure.choose(sparsity, None, self.scope, self.originals)
            removal = structure.remove(chosen)
            if not agrees(module, run, removal, quiet_copy):  # type: ignore[arg-type]
                raise ValueError("removing the chosen channels is not the same as setting them to zero")
        removal.apply(module, trainer.optimizers)
        self.last = removal
        self.removed += sum(map(len, removal.removed.values()))
        self.note(removal.changes)
        differ = sum(len(set(chosen[name]) ^ set(plain[name])) for name in chosen)
        return 1 - differ / max(1, sum(structure.channels.values()))

    def note(self, changes: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> None:
        """Add changed constructor arguments to those of earlier rounds."""
        for path, arguments in changes.items():
            known = self.changes.setdefault(path, {})
            for key, (old, now) in arguments.items():
                known[key] = (known.get(key, (old, now))[0], now)

    def load_smaller(self, module: pl.LightningModule) -> Any:
        """Let the module take a state dict with fewer channels; returns a handle to remove that again."""

        def resize(_: Any, state_dict: Mapping[str, Tensor], *__: Any) -> None:
            own = module.state_dict()
            shapes = [(own[name].shape, value.shape) for name, value in state_dict.items() if name in own]
            if all(len(a) == len(b) and all(x >= y for x, y in zip(a, b, strict=True)) for a, b in shapes):
                self.changes = {}
                self.note(resize_like(module, state_dict))  # else it is another network: PyTorch tells how they differ

        register: Any = module._register_load_state_dict_pre_hook
        return register(resize, with_module=True)

    def state_dict(self) -> dict[str, Any]:
        return {"originals": dict(self.originals), "removed": self.removed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.originals, self.removed = dict(state["originals"]), state["removed"]

    def _structure(self, module: pl.LightningModule, run: Callable[[Any], Any]) -> Structure:
        copy: Any = quiet_copy
        return Structure(module, run, layers=self.layers, copy=copy, refused=self.refused)

    @contextlib.contextmanager
    def _tracing(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> Iterator[Callable[[Any], Any]]:
        """Context that gives a function which runs copies of the module on an example, in full precision."""
        example = module.example_input_array
        device = module.device.type
        with rehearsal(trainer, module, batch, batch_idx) as loss:

            def run(network: pl.LightningModule) -> Any:
                with torch.autocast(device, enabled=False):
                    if can_rehearse(module):
                        return loss(network)
                    given = example if isinstance(example, (tuple, dict)) else (example,)
                    moved = trainer.strategy.batch_to_device(given)
                    return network(**moved) if isinstance(moved, dict) else network(*moved)

            yield run
