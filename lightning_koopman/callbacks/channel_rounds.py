"""Rounds of removing channels from the module of a run."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_koopman.callbacks.averages import averaging_callbacks
from lightning_koopman.callbacks.dry_run import bare_trainer, can_dry_run, dry_run, quiet_copy
from lightning_koopman.callbacks.mask_rounds import Pruned
from lightning_koopman.parameters.sharded_modules import clean_name
from lightning_koopman.parameters.shards import Shards
from lightning_koopman.pruning.channel_graph import Structure
from lightning_koopman.pruning.channel_removal import ChannelRemoval, changes_table, left_alone_table, resize_like
from lightning_koopman.pruning.channel_tracing import Run, torch_pruning
from lightning_koopman.pruning.channel_trial import agrees
from lightning_koopman.pruning.optimizer_state import check_replacement

if TYPE_CHECKING:
    import pytorch_lightning as pl


class ChannelRounds:
    """Prunes by removing channels, in rounds; knows of a module's channels what was found out at the first batch.

    Args:
        layers: Shell-style patterns of the names of the layers' weights, or None for all.
        scope: ``"global"`` or ``"tensor"``.
        owner: Name of the callback, for messages.
        by_threshold: Whether a threshold was given, which is for weights.
        allow_empty: Whether a layer may lose all its channels, which none may.

    Raises:
        ValueError: If what is only for masks is asked for.
    """

    unit = "channels"
    needs_batch = True  # to trace the module with

    def __init__(
        self, layers: Sequence[str] | None, scope: str, owner: str, *, by_threshold: bool, allow_empty: bool
    ) -> None:
        if by_threshold:
            raise ValueError("threshold is for weights: with structured=True give the share of channels as `sparsity`.")
        if allow_empty:
            raise ValueError("allow_empty=True is for masks: with structured=True each layer keeps a channel.")
        self.layers, self.scope, self.owner = layers, scope, owner
        self._loading: Any = None
        self._names: list[str] = []
        self.forget()

    def __getstate__(self) -> dict[str, Any]:  # the handle belongs to this module
        return {**vars(self), "_loading": None}

    def forget(self) -> None:
        self.refused: dict[str, str] | None = None  # by layer, why it must not lose channels; None: not yet tried
        self.originals: dict[str, int] = {}  # by layer, the channels it began with
        self.removed = 0  # channels
        self.changes: dict[str, dict[str, tuple[Any, Any]]] = {}
        self.shapes: dict[str, list[int]] = {}  # of tensors that changed, by name, as they were

    @property
    def share(self) -> float:
        """Share of the removable channels that is gone, in [0, 1)."""
        return self.removed / max(1, sum(self.originals.values()))

    def table(self, module: nn.Module | None) -> str:
        return changes_table(self.changes) if self.changes else "nothing has been pruned yet"

    def log(self, trainer: pl.Trainer, prefix: str) -> None:
        """The table of the history says it all."""

    def check_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
        if any(isinstance(each, AveragedModel) for each in (*pl_module.modules(), *kept)):
            raise ValueError(
                "structured=True cannot give other sizes to an AveragedModel, which the module or a callback keeps: "
                "leave it out, or prune with structured=False."
            )
        if pl_module.example_input_array is None and not can_dry_run(pl_module):
            raise ValueError(
                "structured=True traces `training_step`, which under manual optimization steps the optimizers: set "
                "the module's `example_input_array`, and `forward` is traced instead."
            )

    def check_selected(self, root: nn.Module, names: Sequence[str], sparsity: float | None) -> None:
        self._names = list(names)
        self._stop_loading()  # Lightning has loaded what there was to load

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Find out which layers can lose channels, and say so, once."""
        if self.refused is not None:
            return
        check_replacement(trainer.optimizers)
        structure = self.try_out(trainer, pl_module, batch, batch_idx)
        rank_zero_info(
            f"{self.owner}: {sum(self.originals.values()):,} channels and neurons of {len(self.originals)} independent "
            f"groups can be removed.\n{left_alone_table(structure.left_alone, most=4)}"
        )

    def prune(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, shards: Shards, scores: dict[str, Tensor],
        target: float, batch: Any, batch_idx: int,
    ) -> Pruned:  # fmt: skip
        shaped = {name: value.reshape(shards.chunks[name].shape) for name, value in scores.items()}
        agreement, removal = self.remove(trainer, pl_module, batch, batch_idx, scores=shaped, sparsity=target)
        values = {name: removal.left_of(name, shaped[name]).reshape(-1) for name in self._names}
        left = sum(parameter.numel() for parameter in pl_module.parameters())
        return Pruned(self.removed, sum(self.originals.values()), left, agreement, values, removal=removal)

    def accept(self, pruned: Pruned) -> None:
        """The module has been changed already: there is one process."""

    def hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removed channels stay away by themselves."""

    def again(self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str) -> None:
        """As for :meth:`hold`."""

    def release(self) -> None:
        self._stop_loading()

    def follow(self, removal: ChannelRemoval) -> None:
        """The next round traces the module anew."""

    def preview(
        self, pl_module: pl.LightningModule, batch: Any, parameters: Sequence[str] | None, target: float
    ) -> ChannelRemoval:
        with bare_trainer(pl_module) as trainer:
            moved = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
            with self._tracing(trainer, pl_module, moved, 0) as run:
                structure = self._structure(pl_module, run, self._uses(trainer, pl_module, moved, 0)).without_unfit()
                return structure.remove(structure.choose(target, None, self.scope))

    def try_out(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> Structure:
        """Find out on copies which layers can lose channels.

        Raises:
            ValueError: If there are none, or the module cannot be traced.
        """
        with self._tracing(trainer, module, batch, batch_idx) as run:
            return self._try(module, run, self._uses(trainer, module, batch, batch_idx))

    def _try(self, module: pl.LightningModule, run: Run, uses: Sequence[Run]) -> Structure:
        """The channels that can be removed, once the others are known."""
        first = self._structure(module, run, uses)
        self.refused = {**(self.refused or {}), **first.unfit(thaw=True)}
        structure = self._structure(module, run, uses) if first.groups.keys() & self.refused.keys() else first
        for name, count in structure.channels.items():
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
    ) -> tuple[float, ChannelRemoval]:
        """Remove channels up to a share of the original ones.

        Returns:
            On how many of them magnitudes would agree, in [0, 1], and what was removed.
        """
        with self._tracing(trainer, module, batch, batch_idx) as run:
            structure = self._structure(module, run)
            if not self.originals.keys() >= structure.channels.keys():  # some were frozen when that was tried out
                structure = self._try(module, run, self._uses(trainer, module, batch, batch_idx))
            chosen, plain = (structure.choose(sparsity, by, self.scope, self.originals) for by in (scores, None))
            removal = structure.remove(chosen)
            twin: Any = quiet_copy
            if not agrees(module, run, removal, twin):
                raise ValueError("removing the chosen channels is not the same as setting them to zero")
        shapes = {name: list(value.shape) for name, value in _plain_state(module).items() if name in removal.kept}
        removal.apply(module, trainer.optimizers)
        self.shapes = {**shapes, **self.shapes}
        self.removed += sum(map(len, removal.removed.values()))
        self.note(removal.changes)
        differ = sum(len(set(chosen[name]) ^ set(plain[name])) for name in chosen)
        return 1 - differ / max(1, sum(structure.channels.values())), removal

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

    def prepare(self, pl_module: pl.LightningModule) -> None:
        """Let the module take a state dict with fewer channels, until training starts."""

        def resize(_: Any, state_dict: Mapping[str, Tensor], *__: Any) -> None:
            own = _plain_state(pl_module)
            shapes = [
                (self.shapes.get(name, own[name].shape), value.shape)
                for name, value in ((clean_name(path), value) for path, value in state_dict.items())
                if name in own
            ]
            if all(len(a) == len(b) and all(x >= y for x, y in zip(a, b, strict=True)) for a, b in shapes):
                before = {name: list(value.shape) for name, value in own.items()}
                self.note(
                    resize_like(pl_module, state_dict)
                )  # else it is another network: PyTorch tells how they differ
                after = {name: list(value.shape) for name, value in _plain_state(pl_module).items()}
                changed = {name: shape for name, shape in before.items() if after.get(name) != shape}
                self.shapes = {**changed, **self.shapes}

        self._stop_loading()
        register: Any = pl_module._register_load_state_dict_pre_hook
        self._loading = register(resize, with_module=True)

    def _stop_loading(self) -> None:
        if self._loading is not None:
            self._loading.remove()
            self._loading = None

    def state_dict(self) -> dict[str, Any] | None:
        return {"originals": dict(self.originals), "removed": self.removed}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.originals = {str(name): int(count) for name, count in state["originals"].items()}
            self.removed = int(state["removed"])

    def _structure(self, module: pl.LightningModule, run: Run, also: Sequence[Run] = ()) -> Structure:
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
        step: Any = getattr(type(module), "validation_step", None)
        if step is not None and step.__qualname__ != "LightningModule.validation_step":  # under either root
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
        with dry_run(trainer, module, batch, batch_idx) as loss:

            def run(network: pl.LightningModule) -> Any:
                with torch.autocast(device, enabled=False):
                    if not can_dry_run(module):
                        return _forward(trainer, network)
                    network.on_train_batch_start(batch, batch_idx)  # Lightning calls the module's after ours
                    return loss(network)

            yield run


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict by names without wrappers."""
    return {clean_name(name): value for name, value in module.state_dict().items()}


def _forward(trainer: pl.Trainer, network: pl.LightningModule) -> Any:
    """What ``forward`` makes of the module's own example."""
    example = network.example_input_array
    given = (
        tuple(example) if isinstance(example, (tuple, list)) else example if isinstance(example, dict) else (example,)
    )
    moved = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(given))
    return network(**moved) if isinstance(moved, dict) else network(*moved)
