"""Rounds of removing channels from the module of a run."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lightning_koopman.callbacks.averages import averaging_callbacks
from lightning_koopman.callbacks.dry_run import can_rehearse, quiet_copy, rehearsal
from lightning_koopman.pruning.channel_graph import Structure, agrees, torch_pruning
from lightning_koopman.pruning.channel_removal import ChannelRemoval, resize_like

if TYPE_CHECKING:
    import pytorch_lightning as pl


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
        self.shapes: dict[str, list[int]] = {}  # of tensors that changed, by name, as they were
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
        for other in averaging_callbacks(trainer):
            raise ValueError(
                f"structured=True cannot give other sizes to the average that {type(other).__name__} keeps: "
                "leave that callback out, or prune with structured=False."
            )
        kept = [value for other in trainer.callbacks for value in vars(other).values()]  # type: ignore[attr-defined]
        if any(isinstance(each, AveragedModel) for each in (*module.modules(), *kept)):
            raise ValueError(
                "structured=True cannot give other sizes to an AveragedModel, which the module or a callback keeps: "
                "leave it out, or prune with structured=False."
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
            structure = self._structure(module, run, self._uses(trainer, module, batch, batch_idx))
            self.refused = structure.unfit()
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
            known = [name for name in structure.channels if name in self.originals]  # others were not tried out
            chosen, plain = (
                {
                    name: gone
                    for name, gone in structure.choose(sparsity, by, self.scope, self.originals).items()
                    if name in known
                }
                for by in (scores, None)
            )
            removal = structure.remove(chosen)
            twin: Any = quiet_copy
            if not agrees(module, run, removal, twin):
                raise ValueError("removing the chosen channels is not the same as setting them to zero")
        shapes = {name: list(value.shape) for name, value in module.state_dict().items() if name in removal.kept}
        removal.apply(module, trainer.optimizers)
        self.shapes = {**shapes, **self.shapes}
        self.last = removal
        self.removed += sum(map(len, removal.removed.values()))
        self.note(removal.changes)
        differ = sum(len(set(chosen[name]) ^ set(plain[name])) for name in chosen)
        return 1 - differ / max(1, sum(structure.channels[name] for name in known))

    def note(self, changes: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> None:
        """Add changed constructor arguments to those of earlier rounds."""
        for path, arguments in changes.items():
            known = self.changes.setdefault(path, {})
            for key, (old, now) in arguments.items():
                known[key] = (known.get(key, (old, now))[0], now)
                if known[key][0] == now:  # a checkpoint from before the removal was loaded
                    del known[key]
            if not known:
                del self.changes[path]

    def load_smaller(self, module: pl.LightningModule) -> Any:
        """Let the module take a state dict with fewer channels; returns a handle to remove that again."""

        def resize(_: Any, state_dict: Mapping[str, Tensor], *__: Any) -> None:
            own = module.state_dict()
            shapes = [
                (self.shapes.get(name, own[name].shape), value.shape)
                for name, value in state_dict.items()
                if name in own
            ]
            if all(len(a) == len(b) and all(x >= y for x, y in zip(a, b, strict=True)) for a, b in shapes):
                before = {name: list(value.shape) for name, value in own.items()}
                self.note(resize_like(module, state_dict))  # else it is another network: PyTorch tells how they differ
                after = {name: list(value.shape) for name, value in module.state_dict().items()}
                changed = {name: shape for name, shape in before.items() if after.get(name) != shape}
                self.shapes = {**changed, **self.shapes}

        register: Any = module._register_load_state_dict_pre_hook
        return register(resize, with_module=True)

    def state_dict(self) -> dict[str, Any]:
        return {"originals": dict(self.originals), "removed": self.removed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.originals, self.removed = dict(state["originals"]), state["removed"]

    def _structure(
        self, module: pl.LightningModule, run: Callable[[Any], Any], also: Sequence[Callable[[Any], Any]] = ()
    ) -> Structure:
        twin: Any = quiet_copy
        return Structure(
            module, run, layers=self.layers, copy=twin, refused=self.refused, also=also, argument="parameters"
        )

    @staticmethod
    def _uses(
        trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> list[Callable[[Any], Any]]:
        """What else the module is used for, besides what is traced; validation is tried with a training batch."""
        uses: list[Callable[[Any], Any]] = []
        if type(module).validation_step.__qualname__ != "LightningModule.validation_step":  # under either root
            arguments = (batch, batch_idx)[: len(inspect.signature(module.validation_step).parameters)]
            uses.append(lambda network: network.eval().validation_step(*copy.deepcopy(arguments)))
        if module.example_input_array is not None:
            uses.append(lambda network: _forward(trainer, network))
        return uses

    @contextlib.contextmanager
    def _tracing(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> Iterator[Callable[[Any], Any]]:
        """Context that gives a function which runs copies of the module on an example, in full precision."""
        device = module.device.type
        with rehearsal(trainer, module, batch, batch_idx) as loss:

            def run(network: pl.LightningModule) -> Any:
                with torch.autocast(device, enabled=False):
                    if not can_rehearse(module):
                        return _forward(trainer, network)
                    network.on_train_batch_start(batch, batch_idx)  # Lightning calls the module's after ours
                    return loss(network)

            yield run


def _forward(trainer: pl.Trainer, network: pl.LightningModule) -> Any:
    """What ``forward`` makes of the module's own example."""
    example = network.example_input_array
    given = (
        tuple(example) if isinstance(example, (tuple, list)) else example if isinstance(example, dict) else (example,)
    )
    moved = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(given))
    return network(**moved) if isinstance(moved, dict) else network(*moved)
