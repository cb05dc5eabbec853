"""Run ``training_step`` on a copy of the module, without side effects on the run."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader, Dataset

from lightning_koopman.callbacks.observables import batch_loss
from lightning_koopman.parameters.sharded_modules import is_kind
from lightning_koopman.pruning.channel_tracing import eager

CONNECTIONS = ("DeviceMesh", "ProcessGroup")  # connections to other processes, which cannot be copied
LARGE = 2**26  # bytes: copies share larger tensors that are kept on the module


class NoLossError(ValueError):
    """A step returned no loss, which Lightning allows."""


def can_dry_run(module: pl.LightningModule) -> bool:
    """Return whether ``training_step`` only computes a loss from a batch."""
    return module.automatic_optimization and "dataloader_iter" not in inspect.signature(module.training_step).parameters


def quiet_copy(module: pl.LightningModule, memo: dict[int, Any] | None = None) -> pl.LightningModule:
    """Return a copy of a module that logs nothing and shares the user's data; ``memo`` is as for ``copy.deepcopy``."""
    known = dict(memo or {})
    for value in vars(module).values():  # data kept on the module may be large and is only read
        large = isinstance(value, Tensor) and value.numel() * value.element_size() > LARGE
        if large or isinstance(value, (Dataset, DataLoader)):
            known[id(value)] = value
    for part in module.modules():
        for value in vars(part).values():
            for left in _tensors_in(value):
                if left.grad_fn is not None:  # left by a forward pass; its graph cannot be copied
                    known[id(left)] = left.detach()
            if is_kind(value, *CONNECTIONS):
                known[id(value)] = value
    known[id(module.trainer)] = module.trainer
    _copy_without_fsdp(module, known)
    network = _copied(module, known)
    for name, value in list(vars(network).items()):
        step = getattr(value, "_torchdynamo_orig_callable", None)  # compiled steps stay bound to the original
        if getattr(step, "__self__", None) is module:
            vars(network)[name] = MethodType(step.__func__, network)  # type: ignore[union-attr]
    network.trainer = module.trainer
    network.log = lambda *_, **__: None  # type: ignore[method-assign]
    silent: dict[str, Any] = {"logger": property(lambda _: DummyLogger()), "loggers": property(lambda _: [])}
    silent["optimizers"] = lambda _, *args, **kwargs: _still(module.optimizers(*args, **kwargs))
    silent["lr_schedulers"] = lambda _: _still(module.lr_schedulers())
    network.__class__ = type(type(network).__name__, (type(network),), silent)
    return network


def _copied(module: pl.LightningModule, known: dict[int, Any]) -> pl.LightningModule:
    """Return a deep copy; raise TypeError with the name of an attribute that cannot be copied."""
    try:
        network: pl.LightningModule = copy.deepcopy(module, dict(known))
    except Exception as error:
        for path, part in module.named_modules():
            for name in [name for name, value in vars(part).items() if not _copies(value, known)]:
                if name != "_modules":
                    where = f"{path}.{name}".lstrip(".")
                    raise TypeError(f"{where!r} of the module cannot be copied: {error}") from error
        raise
    if network is module:
        raise TypeError("the module cannot be copied: its `__deepcopy__` returns the module itself")
    return network


def _copies(value: Any, known: dict[int, Any]) -> bool:
    """Return whether a value can be copied."""
    with contextlib.suppress(Exception):
        copy.deepcopy(value, dict(known))
        return True
    return False


def _copy_without_fsdp(module: nn.Module, known: dict[int, Any]) -> None:
    """Add copies of sharded layers to a memo as ordinary layers, because FSDP layers cannot be copied."""
    for part in reversed(list(module.modules())):  # children first
        if is_kind(part, "FullyShardedDataParallel"):
            known[id(part)] = copy.deepcopy(part._fsdp_wrapped_module, known)
        elif is_kind(part, "FSDPModule"):
            twin: Any = object.__new__(type(part).__bases__[1])
            known[id(part)] = twin
            state = {key: value for key, value in vars(part).items() if not key.startswith("__composable_api")}
            for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
                state[hooks] = type(state[hooks])(
                    (key, hook) for key, hook in state[hooks].items() if not _is_of_torch(hook)
                )
            vars(twin).update(copy.deepcopy(state, known))


def _is_of_torch(hook: Any) -> bool:
    """Return whether a hook was set by torch.distributed."""
    owner = type(getattr(hook, "__self__", None)).__module__
    return owner.startswith("torch.distributed") or getattr(hook, "__module__", "").startswith("torch.distributed")


@contextlib.contextmanager
def bare_trainer(module: pl.LightningModule) -> Iterator[pl.Trainer]:
    """Context manager that attaches an idle trainer to a module outside of a run."""
    from pytorch_lightning import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    before = module._trainer
    module.trainer = trainer
    try:
        yield trainer
    finally:
        module._trainer = before


@contextlib.contextmanager
def dry_run(
    trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
) -> Iterator[Callable[[pl.LightningModule], Tensor]]:
    """Context manager that yields a function which returns the loss of a copy of the module on a batch."""
    parameters = inspect.signature(module.training_step).parameters
    several = len(parameters) > 1 or any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    arguments = (batch, batch_idx) if several else (batch,)
    originals = {id(part) for part in module.modules()}

    def refuse(part: nn.Module, _: Any) -> None:
        if id(part) in originals:
            raise RuntimeError(
                "the module cannot be copied: it keeps a function that is bound to itself, or a part whose "
                "`__deepcopy__` returns the part itself"
            )

    def loss(network: pl.LightningModule) -> Tensor:
        try:
            given = copy.deepcopy(arguments)  # the step may modify the batch
        except Exception:  # it cannot be copied
            given = arguments
        value = batch_loss(network.training_step(*given))
        if value is None:
            raise NoLossError("training_step returned no loss")
        return value

    hook, loggers = register_module_forward_pre_hook(refuse), trainer.loggers
    try:
        trainer.loggers = [DummyLogger() for _ in loggers]  # the step may log through `self.trainer`
        step, quiet = trainer.precision_plugin.train_step_context(), eager()  # compiled, the hook would need new graphs
        with _unchanged(trainer), isolate_rng(), torch.enable_grad(), quiet, step:
            yield loss
    finally:
        trainer.loggers = loggers
        hook.remove()


@contextlib.contextmanager
def _unchanged(trainer: pl.Trainer) -> Iterator[None]:
    """Context in which changes of the options of optimizers, of a data module and of the wish to stop are undone."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    options = [(group, key, value) for group in groups for key, value in group.items() if key != "params"]
    values = [value.clone() if isinstance(value, Tensor) else value for *_, value in options]
    data, stops = getattr(trainer, "datamodule", None), trainer.should_stop
    kept = {} if data is None else dict(vars(data))
    try:
        yield
    finally:
        trainer.should_stop = stops
        for (group, key, own), value in zip(options, values, strict=True):
            group[key] = own.copy_(value) if isinstance(own, Tensor) else own
        if data is not None:
            vars(data).clear()
            vars(data).update(kept)


def _tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each, depth - 1)


class _Still:
    """Proxy of an optimizer or scheduler that can be read but does not step."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def step(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    zero_grad = toggle_model = step


def _still(own: Any) -> Any:
    return [_Still(each) for each in own] if isinstance(own, list) else None if own is None else _Still(own)
