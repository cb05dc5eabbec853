"""Run ``training_step`` on a copy of the module, without side effects on the run."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
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

CONNECTIONS = ("DeviceMesh", "ProcessGroup")  # connections to other processes, which cannot be copied
LARGE = 2**26  # bytes: copies share larger tensors that are kept on the module


class NoLossError(ValueError):
    """A step returned no loss, which Lightning allows."""


def can_dry_run(module: pl.LightningModule) -> bool:
    """Return whether ``training_step`` only computes a loss from a batch."""
    return module.automatic_optimization and "dataloader_iter" not in _parameters(module)


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
    network: pl.LightningModule = copy.deepcopy(module, known)
    for name in [name for name, value in vars(network).items() if callable(value) and hasattr(type(network), name)]:
        del vars(network)[name]  # such as compiled steps, which are bound to the original
    network.trainer = module.trainer
    network.log = lambda *_, **__: None  # type: ignore[method-assign]
    silent: dict[str, Any] = {"logger": property(lambda _: DummyLogger()), "loggers": property(lambda _: [])}
    silent["optimizers"] = lambda _, *args, **kwargs: _still(module.optimizers(*args, **kwargs))
    silent["lr_schedulers"] = lambda _: _still(module.lr_schedulers())
    network.__class__ = type(type(network).__name__, (type(network),), silent)
    return network


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
    parameters = _parameters(module)
    several = len(parameters) > 2 or any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    arguments = (batch, batch_idx) if several else (batch,)
    originals = {id(part) for part in module.modules()}

    def refuse(part: nn.Module, _: Any) -> None:
        if id(part) in originals:
            raise RuntimeError("the module keeps a function that is bound to itself, so it cannot be copied")

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
        with isolate_rng(), torch.enable_grad(), trainer.precision_plugin.train_step_context():
            yield loss
    finally:
        trainer.loggers = loggers
        hook.remove()


def _parameters(module: pl.LightningModule) -> Any:
    return inspect.signature(type(module).training_step).parameters


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
