"""What all Koopman callbacks share: a snapshot each epoch, kept through checkpoints, never failing a run."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_koopman.callbacks._recorder import Recorder, SnapshotSettings
from lightning_koopman.callbacks._roots import LightningCallback
from lightning_koopman.parameters import flatten, select_parameters
from lightning_koopman.trajectory import STORAGES, is_finite

if TYPE_CHECKING:  # never at run time: the user may use the other import root
    import pytorch_lightning as pl

WEIGHTS, TRAIN_LOSS = "weights", "train_loss"
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
SIDECAR = "snapshots.bin"
LOSSES = 512  # batch losses held before they are summed: bounds memory in epochs of a million batches


class KoopmanWarning(UserWarning):
    """Something about the Koopman analysis went wrong or means less than it seems; the training itself goes on.

    Example:
        >>> import warnings
        >>> from lightning_koopman import KoopmanWarning
        >>> warnings.simplefilter("ignore", KoopmanWarning)
    """


class TrajectoryCallback(LightningCallback):
    """Base of the Koopman callbacks: records the trajectory of an observable.

    Args:
        observable: ``"weights"``, ``"train_loss"`` (epoch mean of what ``training_step`` returns) or the name of a
            logged metric.
        parameters: Name patterns of the parameters in the weights' trajectory.
        every_n_epochs: Epochs between two snapshots, ≥ 1.
        window: Snapshots kept and analysed, ≥ 3, or None for all.
        storage: ``"ram"``, or ``"disk"`` for a memory-mapped file in the folder below.
        dirpath: Folder for everything written to disk (default: ``koopman`` in the run's log folder).
    """

    def __init__(
        self,
        *,
        observable: str,
        parameters: str | Sequence[str] | None,
        every_n_epochs: int,
        window: int | None,
        storage: str,
        dirpath: str | os.PathLike[str] | None,
    ) -> None:
        super().__init__()
        if not isinstance(observable, str) or not observable:
            raise ValueError(
                f"observable must be 'weights', 'train_loss' or the name of a logged metric, got {observable!r}."
            )
        if parameters is not None and observable != WEIGHTS:
            raise ValueError(f"parameters goes with observable='weights', got observable={observable!r}: drop it.")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}.")
        if window is not None and window < 3:
            raise ValueError(f"window must be at least 3 snapshots, got {window}: pass None to keep all.")
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {list(STORAGES)}, got {storage!r}.")
        patterns = (parameters,) if isinstance(parameters, str) else None if parameters is None else tuple(parameters)
        self.settings = SnapshotSettings(observable, patterns, every_n_epochs, window, storage)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.recorder = Recorder(self.settings)
        self._active = True
        self._directory: Path | None = None
        self._pending: dict[str, Any] | None = None
        self._resumed = False
        self._record_seconds = 0.0
        self._restored_loss = (0.0, 0)
        self._warned: set[str] = set()
        self._names: tuple[str, ...] = ()
        self._before_validation: Tensor | None = None
        self._validated: Tensor | None = None  # the observable as the last validation logged it
        self._from_validation = self._has_validated = False
        self._losses: list[Tensor] = []  # of the last batches, not yet in the sum
        self._loss_sum = 0.0
        self._loss_count = 0
        self.train_loss: float | None = None

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._pending = None
        if stage != "fit":
            return
        self._active = not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._warned.clear()
        self._validated, self._from_validation, self._has_validated = None, False, False
        self._adopt_recorder(trainer)
        if not self._active:
            return
        self._check_strategy(trainer)
        if next(pl_module.parameters(), None) is not None:  # else `configure_model` has yet to build them
            self._check_parameters(trainer, pl_module)
        self._resolve_directory(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._active and self.settings.observable == WEIGHTS:
            self._names = tuple(self._check_parameters(trainer, pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._active:
            return
        resumed = self._resumed = self._restore(trainer)
        self._losses.clear()
        self._loss_sum, self._loss_count = self._restored_loss if resumed else (0.0, 0)
        epoch, recorder = trainer.current_epoch, self.recorder
        if not resumed and epoch == 0:
            recorder.interrupt()  # the callback may have served another fit
        if self.settings.observable != WEIGHTS or not trainer.is_global_zero or not self._due(epoch):
            return
        with self._guard("recording the initial weights"):
            values = self._read_weights(pl_module)
            recorded = bool(recorder.epochs) and recorder.epochs[-1] == epoch
            # a resumed epoch may have begun, so its weights differ; otherwise this is a further fit from other weights
            if recorded and not resumed and not torch.equal(values, recorder.last()):
                recorder.interrupt()
            self._append(epoch, values)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())  # nothing more: this runs after every batch
            if len(self._losses) == LOSSES:
                self._fold_losses()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before_validation = trainer.callback_metrics.get(self.settings.observable)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        observed = trainer.callback_metrics.get(self.settings.observable)
        if observed is not self._before_validation and not trainer.sanity_checking:
            self._validated, self._from_validation = observed, True
        self._has_validated |= not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._active:
            return
        epoch = trainer.current_epoch + 1
        self.train_loss = self._mean_train_loss(trainer)
        if not self._due(epoch):
            return
        started = time.perf_counter()
        with self._guard("recording a snapshot"):
            self._record(trainer, pl_module, epoch)
        self._record_seconds = time.perf_counter() - started
        recorded = self.recorder.epochs[-1:] == [epoch]
        self.on_snapshot(trainer, pl_module, epoch, recorded)

    def on_snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        """Called on all ranks after each epoch with a snapshot due; the trajectory exists on global rank zero only."""

    # -- what ---------------------------------------------------------------------------------------------------------

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        observable = self.settings.observable
        if not trainer.is_global_zero:
            return
        values: Tensor | None
        if observable == WEIGHTS:
            values = self._read_weights(pl_module)
        elif observable == TRAIN_LOSS and self.train_loss is not None:
            values = torch.tensor([self.train_loss], dtype=torch.float64)
        else:
            values = self._read_metric(trainer)
        if values is not None:
            self._append(epoch, values)

    def _append(self, epoch: int, values: Tensor) -> None:
        if not is_finite(values):
            self.recorder.interrupt()
            self._warn(
                "finite",
                f"the observable {self.settings.observable!r} holds NaN or infinite values after epoch {epoch}: it is "
                "not recorded, and a new trajectory starts once it is finite again.",
            )
            return
        trajectory = self.recorder.trajectory
        if trajectory is not None and trajectory.n != values.numel():
            self._warn(
                "count",
                f"the number of observed weights changed from {trajectory.n} to {values.numel()} at epoch {epoch}: "
                "a new trajectory starts here.",
            )
        self.recorder.record(epoch, values)

    def _due(self, epoch: int) -> bool:
        """Whether a snapshot is to be taken after so many completed epochs."""
        return epoch % self.settings.every_n_epochs == 0

    def _read_weights(self, pl_module: pl.LightningModule) -> Tensor:
        named = dict(pl_module.named_parameters())
        if not all(name in named for name in self._names):  # layers were replaced since training began
            self._names = tuple(select_parameters(pl_module, self.settings.parameters))
        return flatten({name: named[name] for name in self._names})

    def _read_metric(self, trainer: pl.Trainer) -> Tensor | None:
        name = self.settings.observable
        metrics = trainer.callback_metrics
        value = self._validated if self._from_validation else metrics.get(name)
        self._validated = None
        if value is not None:
            return torch.as_tensor(value).detach().reshape(-1)[:1].to(device="cpu", dtype=torch.float64)
        still_to_come = trainer.enable_validation and not self._has_validated
        if not self._from_validation and not still_to_come:
            known = ", ".join(sorted(map(str, metrics))) or "none"
            self._warn(
                "metric",
                f"observable={name!r} was not logged in epoch {trainer.current_epoch}, so there is nothing to record; "
                f"logged so far: {known}. Log it with `self.log({name!r}, ...)` in a training or validation step.",
            )
        return None

    def _mean_train_loss(self, trainer: pl.Trainer) -> float | None:
        """Mean over the epoch's batches and over the ranks of the loss that `training_step` returned, if it did."""
        self._fold_losses()
        if not self._loss_count:
            return None
        # Lightning hands over the loss divided by the number of accumulated batches
        mean = self._loss_sum / self._loss_count * trainer.accumulate_grad_batches
        self._loss_sum, self._loss_count = 0.0, 0
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            wide = torch.float32 if device.type == "mps" else torch.float64
            mean = float(trainer.strategy.reduce(torch.tensor(mean, device=device, dtype=wide), reduce_op="mean"))
        return mean

    def _fold_losses(self) -> None:
        """Add the pending losses to the sum: one operation and one transfer for all of them."""
        if self._losses:
            self._loss_sum += sum(torch.stack([loss.detach().reshape(()) for loss in self._losses]).tolist())
            self._loss_count += len(self._losses)
            self._losses.clear()

    # -- checks before training ---------------------------------------------------------------------------------------

    def _check_strategy(self, trainer: pl.Trainer) -> None:
        names = {base.__name__ for base in type(trainer.strategy).__mro__}
        if self.settings.observable == WEIGHTS and names & set(SHARDED):
            raise ValueError(
                f"strategy {type(trainer.strategy).__name__} shards the weights, which is not supported yet: use a "
                "replicated strategy such as 'ddp', or observable='train_loss'."
            )

    def _check_parameters(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        if self.settings.observable != WEIGHTS:
            return []
        chosen = select_parameters(pl_module, self.settings.parameters)
        halves = [name for name, parameter in chosen.items() if parameter.dtype.itemsize < 4]
        if halves and trainer.is_global_zero:
            self._warn(
                "half",
                f"{len(halves)} observed parameters such as {halves[0]!r} are stored in {chosen[halves[0]].dtype}, "
                "which rounds late updates away and fakes eigenvalues at 1: train with precision='bf16-mixed' or 32.",
            )
        rows = self.settings.window
        if rows is None and trainer.max_epochs is not None and trainer.max_epochs > 0:
            rows = trainer.max_epochs // self.settings.every_n_epochs + 1
        needed = 4 * sum(parameter.numel() for parameter in chosen.values()) * (rows or 0)
        available = _available_memory()
        if self.settings.storage == "ram" and trainer.is_global_zero and available is not None and needed > available:
            raise ValueError(
                f"window={self.settings.window} keeps {rows} snapshots of {needed / (rows or 1) / 2**30:.2f} GiB, "
                f"{needed / 2**30:.1f} GiB in all, but {available / 2**30:.1f} GiB of memory are free: take a smaller "
                "window, observe fewer `parameters`, or set storage='disk'."
            )
        return list(chosen)

    def _resolve_directory(self, trainer: pl.Trainer) -> None:
        """Make the output folder and prove that it can be written, before any work starts."""
        if self.dirpath is not None:
            directory = self.dirpath
        else:
            directory = Path(trainer.log_dir or trainer.default_root_dir) / self._folder()
        if not trainer.is_global_zero:
            return
        continues = trainer.ckpt_path is not None or trainer.current_epoch > 0
        self._directory = directory.absolute() if continues else _unused(directory.absolute())
        self.recorder.folder = self._directory
        probe = self._directory / f".probe-{uuid.uuid4().hex}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"dirpath={str(self._directory)!r} cannot be written ({error.strerror}): pass another `dirpath`."
            ) from error

    def _folder(self) -> str:
        return "koopman"

    def _adopt_recorder(self, trainer: pl.Trainer) -> None:
        """Share the trajectory of an earlier callback that records the same."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self:
                return
            if isinstance(other, TrajectoryCallback) and other.settings == self.settings:
                self.recorder = other.recorder
                return

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._directory is None or self.recorder.trajectory is None:
            return {}
        self._fold_losses()
        state: dict[str, Any] = {"loss_sum": self._loss_sum, "loss_count": self._loss_count}
        with self._guard("saving the snapshots beside the checkpoint"):
            state["recorder"] = self.recorder.save(self._directory / SIDECAR)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict

    def _restore(self, trainer: pl.Trainer) -> bool:
        """Go on where the checkpoint left off, if there is one; a lost sidecar costs the window, nothing else."""
        state, self._pending = self._pending, None
        if state is None:
            if trainer.ckpt_path is not None and trainer.is_global_zero:
                self._warn(
                    "resume",
                    f"the checkpoint {str(trainer.ckpt_path)!r} holds no snapshots for this callback with these "
                    "settings: its trajectory starts anew.",
                )
            return False
        self._restored_loss = float(state["loss_sum"]), int(state["loss_count"])
        if not trainer.is_global_zero:
            return True
        with self._guard("restoring the snapshots"):
            self._restore_state(state)
            saved = state.get("recorder")
            if not saved or self.recorder.epochs == saved["epochs"].tolist():
                return True  # nothing saved, or another callback that shares the recorder was first
            sidecar = self._find_sidecar(Path(saved["sidecar"]), trainer.ckpt_path)
            lost = len(saved["epochs"]) if sidecar is None else self.recorder.load(saved, sidecar)
            if lost:
                self._warn(
                    "sidecar",
                    f"{lost} of the checkpoint's {len(saved['epochs'])} snapshots are no longer in "
                    f"{sidecar or saved['sidecar']}: the trajectory goes on with the {len(self.recorder)} left.",
                )
        return True

    def _restore_state(self, state: dict[str, Any]) -> None:
        """Take up what the callback itself keeps, besides the trajectory."""

    def _find_sidecar(self, written: Path, ckpt_path: object) -> Path | None:
        """The sidecar where it was written, or in a folder of the same name near the checkpoint (the run was moved)."""
        candidates = [written]
        if self._directory is not None:
            candidates.append(self._directory / written.name)
        if isinstance(ckpt_path, (str, os.PathLike)):
            near = list(Path(ckpt_path).absolute().parents)[:3]
            candidates += [folder / written.parent.name / written.name for folder in near]
        return next((path for path in candidates if path.is_file()), None)

    # -- never in the way ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """Turn any failure of ours into one warning: the user's training goes on."""
        try:
            yield
        except Exception as error:
            self._warn(doing, f"{doing} failed, training goes on without it: {type(error).__name__}: {error}")

    def _warn(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(f"{type(self).__name__}: {message}", KoopmanWarning, stacklevel=2)


def _unused(directory: Path) -> Path:
    """The folder itself while it is empty, else ``name-v1``, ``name-v2``, …: an earlier run's files stay."""
    candidate, version = directory, 0
    while candidate.is_dir() and any(candidate.glob("*.*")):
        version += 1
        candidate = directory.with_name(f"{directory.name}-v{version}")
    return candidate


def _available_memory() -> int | None:
    """Memory in bytes that can be had without swapping, or None where the system does not tell."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
