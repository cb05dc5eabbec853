"""Rounds of structured pruning, which remove channels from a run's module."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_koopman.callbacks.averages import averaging_callbacks
from lightning_koopman.callbacks.dry_run import bare_trainer, can_dry_run, dry_run, quiet_copy
from lightning_koopman.callbacks.kept import kept, set_back
from lightning_koopman.callbacks.mask_rounds import Pruned, PruningMethod
from lightning_koopman.parameters.sharded_modules import clean_name, named_parts
from lightning_koopman.parameters.shards import Shards
from lightning_koopman.pruning.channel_graph import Structure
from lightning_koopman.pruning.channel_removal import ChannelRemoval, changes_table, left_alone_table, resize_like
from lightning_koopman.pruning.channel_tracing import Run, torch_pruning
from lightning_koopman.pruning.channel_trial import agrees
from lightning_koopman.pruning.optimizer_state import check_replacement

KEPT = "originals", "removed"


class ChannelRounds(PruningMethod):
    """Prunes by removing channels, in rounds. The removable channels are determined at the first batch.

    ``layers`` are patterns of the names of layer weights, or None for all; ``owner`` is the callback, for messages.
    Raises ValueError if an option is given that only masks support.
    """

    unit = "channels"
    needs_batch = True  # for tracing the module

    def __init__(
        self, layers: Sequence[str] | None, scope: str, owner: str, *, by_threshold: bool, allow_empty: bool
    ) -> None:
        if by_threshold:
            raise ValueError("threshold is for masks: with structured=True give the share of channels as `sparsity`.")
        if allow_empty:
            raise ValueError("allow_empty=True is for masks: with structured=True each layer keeps a channel.")
        self.layers, self.scope, self.owner = layers, scope, owner
        self._loading: Any = None
        self._names: list[str] = []
        self.forget()

    def __getstate__(self) -> dict[str, Any]:  # the hook's handle belongs to this module
        return {**vars(self), "_loading": None}

    def forget(self) -> None:
        self.refused: dict[str, str] | None = None  # by layer, why it must keep its channels; None: not yet tried
        self.originals: dict[str, int] = {}  # by layer, its original number of channels
        self.removed = 0  # number of channels
        self.changes: dict[str, dict[str, tuple[Any, Any]]] = {}
        self.shapes: dict[str, list[int]] = {}  # by name, the original shapes of changed tensors

    @property
    def share(self) -> float:
        """Share of the removable channels that has been removed, in [0, 1)."""
        return self.removed / max(1, sum(self.originals.values()))

    def table(self, module: nn.Module | None) -> str:
        return changes_table(self.changes) if self.changes else "nothing has been pruned yet"

    def check_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise an error if the run's module cannot be resized, or the tracer is not installed."""
        torch_pruning()
        if trainer.world_size > 1:
            raise ValueError(
                f"structured=True works in a single process so far, but the run has {trainer.world_size}: use one "
                "device, or structured=False."
            )
        for other in averaging_callbacks(trainer):
            raise ValueError(
                f"structured=True cannot resize the average that {type(other).__name__} keeps: remove that callback, "
                "or prune with structured=False."
            )
        kept = [value for other in trainer.callbacks for value in vars(other).values()]  # type: ignore[attr-defined]
        if any(isinstance(each, AveragedModel) for each in (*pl_module.modules(), *kept)):
            raise ValueError(
                "structured=True cannot resize the AveragedModel that the module or a callback keeps: remove it, or "
                "prune with structured=False."
            )
        if pl_module.example_input_array is None and not can_dry_run(pl_module):
            raise ValueError(
                "structured=True cannot trace `training_step` with manual optimization or a `dataloader_iter`: set "
                "the module's `example_input_array` to trace `forward` instead."
            )

    def check_selected(self, root: nn.Module, names: Sequence[str], sparsity: float | None) -> None:
        self._names = list(names)
        self.release()  # Lightning has loaded any checkpoint by now

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Determine at the first batch which layers can lose channels, and report it."""
        if self.refused is not None:
            return
        check_replacement(trainer.optimizers)
        with self._tracing(trainer, pl_module, batch, batch_idx) as run:
            structure = self._try(pl_module, run, self._uses(trainer, pl_module, batch, batch_idx))
        rank_zero_info(
            f"{self.owner}: {sum(self.originals.values()):,} channels and neurons of {len(self.originals)} independent "
            f"groups can be removed.\n{left_alone_table(structure.left_alone, most=4)}"
        )

    def prune(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, shards: Shards, scores: dict[str, Tensor],
        target: float, batch: Any, batch_idx: int,
    ) -> Pruned:  # fmt: skip
        chunks = shards.chunks
        shaped = {
            name: value.reshape(chunks[name].shape)
            for name, value in scores.items()
            if not chunks[name].parameter.is_complex()  # scored by their own magnitude
        }
        with self._tracing(trainer, pl_module, batch, batch_idx) as run:
            structure = self._structure(pl_module, run, self.refused)
            if not self.originals.keys() >= structure.channels.keys():  # some were frozen at the first try
                structure = self._try(pl_module, run, self._uses(trainer, pl_module, batch, batch_idx))
            chosen, plain = (structure.choose(target, by, self.scope, self.originals) for by in (shaped, None))
            removal = structure.remove(chosen)
            if not agrees(pl_module, run, removal, quiet_copy):
                raise ValueError("removing the chosen channels is not the same as setting them to zero")
        shapes = {name: list(value.shape) for name, value in _plain_state(pl_module).items() if name in removal.kept}
        removal.apply(pl_module, trainer.optimizers)
        self.shapes = {**shapes, **self.shapes}
        self.removed += sum(map(len, removal.removed.values()))
        self.note(removal.changes)
        differ = sum(len(set(chosen[name]) ^ set(plain[name])) for name in chosen)
        agreement = 1 - differ / max(1, sum(structure.channels.values()))
        values = {name: removal.left_of(name, shaped[name]).reshape(-1) for name in self._names}
        left = sum(parameter.numel() for parameter in pl_module.parameters())
        return Pruned(self.removed, sum(self.originals.values()), left, agreement, values, removal=removal)

    def preview(
        self, pl_module: pl.LightningModule, batch: Any, parameters: Sequence[str] | None, target: float
    ) -> ChannelRemoval:
        with bare_trainer(pl_module) as trainer:
            moved = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
            with self._tracing(trainer, pl_module, moved, 0) as run:
                first, refused = self._safe(pl_module, run, self._uses(trainer, pl_module, moved, 0))
                structure = self._structure(pl_module, run, {**refused, **first.unfit()})
                return structure.remove(structure.choose(target, None, self.scope))

    def _try(self, module: pl.LightningModule, run: Run, uses: Sequence[Run]) -> Structure:
        """Return the removable channels, and record why the others were refused."""
        first, refused = self._safe(module, run, uses)
        self.refused = {**refused, **first.unfit(thaw=True)}
        structure = self._structure(module, run, self.refused) if first.groups.keys() & self.refused.keys() else first
        for name, count in structure.channels.items():
            self.originals.setdefault(name, count)
        return structure

    def _safe(self, module: pl.LightningModule, run: Run, uses: Sequence[Run]) -> tuple[Structure, dict[str, str]]:
        """Return the channels that no other part of the module may follow or read, and why layers were refused."""
        refused = {**(self.refused or {}), **_copies_kept(module)}
        first = self._structure(module, run, refused, uses)
        elsewhere = first.read_elsewhere()
        if elsewhere:
            refused |= elsewhere
            first = self._structure(module, run, refused, uses)
        return first, refused

    def note(self, changes: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> None:
        """Merge changed constructor arguments into those of earlier rounds."""
        for path, arguments in changes.items():
            known = self.changes.setdefault(path, {})
            for key, (old, now) in arguments.items():
                known[key] = (known.get(key, (old, now))[0], now)
                if known[key][0] == now:  # a checkpoint from before the removal was loaded
                    del known[key]
            if not known:
                del self.changes[path]

    def prepare(self, pl_module: pl.LightningModule) -> None:
        """Let the module load state dicts with fewer channels, until training starts."""

        def resize(_: Any, state_dict: Mapping[str, Tensor], *__: Any) -> None:
            own = _plain_state(pl_module)
            shapes = [
                (self.shapes.get(name, own[name].shape), value.shape)
                for name, value in ((clean_name(path), value) for path, value in state_dict.items())
                if name in own
            ]
            # else it is another network, and PyTorch reports the differences
            if all(len(a) == len(b) and all(x >= y for x, y in zip(a, b, strict=True)) for a, b in shapes):
                before = {name: list(value.shape) for name, value in own.items()}
                self.note(resize_like(pl_module, state_dict))
                after = {name: list(value.shape) for name, value in _plain_state(pl_module).items()}
                changed = {name: shape for name, shape in before.items() if after.get(name) != shape}
                self.shapes = {**changed, **self.shapes}

        self.release()
        register: Any = pl_module._register_load_state_dict_pre_hook
        self._loading = register(resize, with_module=True)

    def release(self) -> None:
        if self._loading is not None:
            self._loading.remove()
            self._loading = None

    def state_dict(self) -> dict[str, Any] | None:
        return kept(self, KEPT)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            set_back(self, state, KEPT)

    def _structure(
        self, module: pl.LightningModule, run: Run, refused: Mapping[str, str] | None, also: Sequence[Run] = ()
    ) -> Structure:
        return Structure(
            module, run, layers=self.layers, copy=quiet_copy, refused=refused, also=also, argument="parameters"
        )

    @staticmethod
    def _uses(
        trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> list[Callable[[Any], Any]]:
        """Return the module's other uses besides the traced step. Validation is tried with a training batch."""
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
        """Context manager that yields a function to run copies of the module on a batch, in full precision."""
        device = module.device.type
        with dry_run(trainer, module, batch, batch_idx) as loss:

            def run(network: pl.LightningModule) -> Any:
                with torch.autocast(device, enabled=False):
                    if not can_dry_run(module):
                        return _forward(trainer, network)
                    network.on_train_batch_start(batch, batch_idx)  # Lightning calls the module's hook after ours
                    return loss(network)

            yield run


def _copies_kept(module: nn.Module) -> dict[str, str]:
    """Return the layers of which the module keeps a frozen copy, such as a teacher that follows, with the reason."""
    known: dict[tuple[Any, ...], list[tuple[str, nn.Module]]] = {}
    for name, part in named_parts(module).items():
        own = dict(part.named_parameters())
        if own:
            known.setdefault((type(part), *((key, each.shape) for key, each in own.items())), []).append((name, part))
    found: dict[str, str] = {}
    for alike in known.values():
        frozen = [(name, part) for name, part in alike if not any(each.requires_grad for each in part.parameters())]
        for name, part in alike:
            for other, copied in frozen:
                if part is not copied and all(map(torch.equal, part.parameters(), copied.parameters())):
                    reason = f"{other!r} is a frozen copy of it, and may follow its weights"
                    found |= {f"{name}.{leaf}".strip("."): reason for leaf in named_parts(part)}
    return found


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict, with wrappers removed from the names."""
    return {clean_name(name): value for name, value in module.state_dict().items()}


def _forward(trainer: pl.Trainer, network: pl.LightningModule) -> Any:
    """Return the output of ``forward`` for the module's ``example_input_array``."""
    example = network.example_input_array
    given = (
        tuple(example) if isinstance(example, (tuple, list)) else example if isinstance(example, dict) else (example,)
    )
    moved = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(given))
    return network(**moved) if isinstance(moved, dict) else network(*moved)
