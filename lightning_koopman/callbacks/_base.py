"""What all Koopman callbacks share: a snapshot each epoch, kept through checkpoints, never failing a run."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_koopman.callbacks._loss import LossMeter
from lightning_koopman.callbacks._recorder import Recorder, SnapshotSettings
from lightning_koopman.callbacks._roots import LightningCallback
from lightning_koopman.callbacks._schedule import current_rates
from lightning_koopman.parameters import as_patterns, flatten, select_parameters
from lightning_koopman.trajectory import STORAGES, is_finite

if TYPE_CHECKING:  # never at run time: the user may use the other import root
    import pytorch_lightning as pl

WEIGHTS, TRAIN_LOSS = "weights", "train_loss"
HISTORY = "history.csv"
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


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
        dirpath: Folder below which everything is written to disk (default: the run's log folder).
    """

    folder = "koopman"  # name of the folder made there
    prefix = "koopman"  # first part of the logged names
    columns: tuple[str, ...] = ()  # of the history; without any, none is kept
    enough: float = math.inf  # snapshots after a resume; with fewer than were saved, and than this, it warns
    storable = False  # whether the user chooses what is recorded and where: for messages
    any_window = False  # whether a trajectory longer than the window asked for does as well

    def __init__(
        self,
        *,
        observable: str = WEIGHTS,
        parameters: str | Sequence[str] | None = None,
        every_n_epochs: int = 1,
        window: int | None,
        storage: str = "ram",
        dirpath: str | os.PathLike[str] | None,
    ) -> None:
        super().__init__()
        if not isinstance(observable, str) or not observable:
            raise ValueError(
                f"observable must be 'weights', 'train_loss' or the name of a logged metric, got {observable!r}."
            )
        if parameters is not None and observable != WEIGHTS:
            raise ValueError(f"parameters goes with observable='weights', got observable={observable!r}: drop it.")
        check_count("every_n_epochs", every_n_epochs, 1)
        if window is not None and (not _is_integer(window) or window < 3):
            raise ValueError(f"window must be at least 3 snapshots and whole, got {window}: pass None to keep all.")
        if dirpath is not None and "://" in os.fspath(dirpath):
            raise ValueError(
                f"dirpath must be a local folder, got {os.fspath(dirpath)!r}: snapshots are mapped from it."
            )
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {list(STORAGES)}, got {storage!r}.")
        self.settings = SnapshotSettings(observable, as_patterns(parameters), every_n_epochs, window, storage)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self._own_recorder = Recorder(self.settings)
        self.recorder = self._own_recorder  # or that of another callback, if it records what this one needs
        self.history: list[dict[str, Any]] = []
        self._watched = "" if observable == WEIGHTS else observable  # the metric read from what the module logs
        self._active = True
        self._directory: Path | None = None
        self._pending: dict[str, Any] | None = None
        self._anew = True  # this fit continues neither a checkpoint nor an earlier fit
        self._alone = True  # nobody shares the recorder
        self._resumed = False  # from a checkpoint that holds this callback's state
        self._record_seconds = 0.0
        self._warned: set[str] = set()
        self._names: tuple[str, ...] = ()
        self._base: Path | None = None
        self._seen: object = None  # the observed metric as it was when the epoch began: what is logged anew differs
        self._validated: float | None = None  # the observed metric as the last validation logged it, until recorded
        self._has_validated = False
        self._losses = LossMeter()
        self.train_loss: float | None = None
        self.rates: list[float] = []  # learning rates when the epoch began
        self.finite = True  # what was read last, if it could be read

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._pending, self._anew, self.rates = None, True, []
        if stage != "fit":
            return
        self._active = not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._warned.clear()
        self._seen, self._validated, self._has_validated = None, None, False
        self._share_recorder(trainer)
        if self._active:
            self._check_strategy(trainer)
            self._resolve_directory(trainer)
            self._own_recorder.prepare(self._directory)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not earlier: layers may be built in `setup` or `configure_model`, which come after our own `setup`
        if self._active and self.settings.observable == WEIGHTS:
            self._names = tuple(self._check_parameters(trainer, pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._active:
            return
        self._losses.restore(0.0, 0)
        self._alone = len(self._sharing(trainer)) == 1
        resumed = self._resumed = self._restore(trainer)
        epoch, recorder = trainer.current_epoch, self.recorder
        self._anew = not resumed and (epoch == 0 or trainer.ckpt_path is not None)
        if self._anew:
            self.history = []
            if not recorder.restored:
                recorder.interrupt()  # the callback may have served another fit
        if trainer.is_global_zero:
            self._write_history(anew=True)
        if not self._keeps_weights(trainer, epoch):
            return
        with self._guard("recording the initial weights"):
            values = self._read_weights(pl_module)
            recorded = recorder.epochs[-1:] == [epoch]
            # a resumed epoch may have begun, so its weights differ; otherwise this is a further fit from other weights
            if recorded and not resumed and not torch.equal(values, recorder.last()):
                recorder.interrupt()
            self._append(epoch, values)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = trainer.callback_metrics.get(self._watched)
        self.rates = current_rates(trainer)
        self._losses.restore(0.0, 0)  # what a checkpoint after an epoch's last batch left

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        try:  # not `_guard`, which costs more than the rest: this runs after every batch
            self._losses.add(outputs)
        except Exception as error:
            self._warn("loss", f"averaging the training loss failed, training goes on without it: {error!r}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._active and not trainer.sanity_checking:
            self._has_validated = True
            with self._guard("reading the observed metric"):
                value = self._logged_anew(trainer)
                self._validated = self._validated if value is None else value

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._active:
            return
        epoch = trainer.current_epoch + 1
        self.train_loss = self._mean_train_loss(trainer)
        self.rates = self.rates or current_rates(trainer)  # a resumed epoch does not begin
        if not self._due_at(epoch):
            return
        started, self.finite = time.perf_counter(), True
        with self._guard("recording a snapshot"):
            self._record(trainer, pl_module, epoch)
        self._record_seconds = time.perf_counter() - started
        recorded = self.recorder.epochs[-1:] == [epoch]
        self.on_snapshot(trainer, pl_module, epoch, recorded)

    def on_snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        """Called on all ranks after each epoch with a snapshot due; the trajectory exists on global rank zero only."""

    def weights_replaced(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the weights were not trained but set, before anything records them."""

    def start_segment(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a new trajectory from the present weights, which were not trained from those recorded last."""
        self.rates = current_rates(trainer)
        self.recorder.interrupt()
        if self._active and self._keeps_weights(trainer, trainer.current_epoch):
            with self._guard("recording the weights anew"):
                self._append(trainer.current_epoch, self._read_weights(pl_module))

    # -- what ---------------------------------------------------------------------------------------------------------

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        observable = self.settings.observable
        if not trainer.is_global_zero:
            return
        if observable == WEIGHTS:
            self._append(epoch, self._read_weights(pl_module))
            return
        value = self._scalar(trainer)
        if value is not None:
            self._append(epoch, torch.tensor([value], dtype=torch.float64))

    def _scalar(self, trainer: pl.Trainer) -> float | None:
        """The epoch's value of the watched loss or metric, if there is one."""
        use_loss = self._watched == TRAIN_LOSS and self.train_loss is not None
        return self.train_loss if use_loss else self._metric(trainer)

    def _append(self, epoch: int, values: Tensor) -> None:
        self.finite = is_finite(values)
        if not self.finite:
            self.recorder.interrupt()
            self._warn(
                "finite",
                f"the observable {self.settings.observable!r} holds NaN or infinite values after epoch {epoch}: it is "
                "not recorded, and a new trajectory starts once it is finite again.",
            )
            return
        trajectory = self.recorder.trajectory
        if trajectory is not None and trajectory.n != values.numel() and not self.recorder.interrupted:
            self._warn(
                "count",
                f"the number of observed weights changed from {trajectory.n} to {values.numel()} at epoch {epoch}: "
                "a new trajectory starts here.",
            )
        self.recorder.record(epoch, values)

    def _keeps_weights(self, trainer: pl.Trainer, epoch: int) -> bool:
        """Whether this process records the weights after so many completed epochs."""
        return self.settings.observable == WEIGHTS and trainer.is_global_zero and self._due_at(epoch)

    def _due_at(self, epoch: int) -> bool:
        """Whether a snapshot is to be taken after so many completed epochs."""
        return epoch % self.settings.every_n_epochs == 0 and not (self._finished and self._alone)

    @property
    def _finished(self) -> bool:
        """Whether this callback needs no more snapshots."""
        return False

    def _read_weights(self, pl_module: pl.LightningModule) -> Tensor:
        named = dict(pl_module.named_parameters())
        if not all(name in named for name in self._names):  # layers were replaced since training began
            self._names = tuple(select_parameters(pl_module, self.settings.parameters))
        return flatten({name: named[name] for name in self._names})

    def _metric(self, trainer: pl.Trainer) -> float | None:
        """The observed metric as logged in this epoch, or by a validation since the last snapshot."""
        name, metrics = self._watched, trainer.callback_metrics
        value = self._logged_anew(trainer)
        value, self._validated = self._validated if value is None else value, None
        still_to_come = trainer.enable_validation and not self._has_validated
        if value is None and name not in metrics and not still_to_come:
            known = ", ".join(sorted(key for key in metrics if not key.startswith(f"{self.folder}/"))) or "none"
            self._warn(
                "metric",
                f"observable={name!r} was not logged by the end of epoch {trainer.current_epoch}, so nothing is "
                f"recorded; logged so far: {known}. Log it with `self.log({name!r}, ...)` in a training or validation "
                "step (what `LightningModule.on_train_epoch_end` logs comes too late).",
            )
        return value

    def _logged_anew(self, trainer: pl.Trainer) -> float | None:
        """The observed metric if logged since the epoch began; Lightning keeps old values as the same objects."""
        value = trainer.callback_metrics.get(self._watched)
        return None if value is None or value is self._seen else float(value)

    def _mean_train_loss(self, trainer: pl.Trainer) -> float | None:
        """Mean over the epoch's batches and over the ranks of the loss that `training_step` returned, if it did."""
        total, count = 0.0, 0
        with self._guard("averaging the training loss"):
            total, count = self._losses.take()
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            wide = torch.float32 if device.type == "mps" else torch.float64
            both = torch.tensor([total, count], device=device, dtype=wide)
            total, count = trainer.strategy.reduce(both, reduce_op="sum").tolist()
        # Lightning hands over the loss divided by the number of accumulated batches
        return total / count * trainer.accumulate_grad_batches if count else None

    # -- checks before training ---------------------------------------------------------------------------------------

    def _check_prefix(self, trainer: pl.Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is not self and isinstance(other, type(self)) and other.prefix == self.prefix:
                raise ValueError(
                    f"prefix={self.prefix!r} is used by two callbacks of type {type(self).__name__}, whose scalars "
                    "would overwrite each other: give one of them another `prefix`."
                )

    def _check_strategy(self, trainer: pl.Trainer) -> None:
        names = {base.__name__ for base in type(trainer.strategy).__mro__}
        if self.settings.observable == WEIGHTS and names & set(SHARDED):
            raise ValueError(
                f"strategy {type(trainer.strategy).__name__} shards the weights, which is not supported yet: use a "
                f"replicated strategy such as 'ddp'{', or observable=' + repr(TRAIN_LOSS) if self.storable else ''}."
            )

    def _check_parameters(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
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
        in_memory = self.settings.storage == "ram"
        if trainer.is_global_zero and self._directory is not None:
            free = _available_memory() if in_memory else shutil.disk_usage(self._directory).free
            if free is not None and needed > free:
                raise ValueError(
                    f"window={self.settings.window} keeps {rows} snapshots of {needed / (rows or 1) / 2**30:.2f} GiB, "
                    f"{needed / 2**30:.1f} GiB in all, but {free / 2**30:.1f} GiB of "
                    f"{'memory' if in_memory else 'disk'} are free: {self._mend(in_memory)}."
                )
        return list(chosen)

    def _mend(self, in_memory: bool) -> str:
        """What the user can do where memory, or the disk, is too small for the snapshots."""
        return "free some"

    def _resolve_directory(self, trainer: pl.Trainer) -> None:
        """Make the output folder and prove that it can be written, before any work starts."""
        parent = self.dirpath if self.dirpath is not None else trainer.log_dir or trainer.default_root_dir
        if not trainer.is_global_zero:
            return
        # a remote log folder cannot be mapped: write below the working directory
        base = (Path() if "://" in str(parent) else Path(parent)).absolute() / self.folder
        goes_on = trainer.current_epoch > 0 and base == self._base and self._directory is not None
        self._base = base
        directory = self._directory if goes_on and self._directory is not None else _unused(base)
        probe = directory / f".probe-{uuid.uuid4().hex}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"dirpath={str(parent)!r} cannot be written ({error.strerror}): pass another `dirpath`."
            ) from error
        self._directory = directory

    def _share_recorder(self, trainer: pl.Trainer) -> None:
        """Share one trajectory with the first callback that records the same, or the longest one that will do."""
        found = _koopman_callbacks(trainer)
        alike = [other for other in found if other.settings == self.settings]
        if self.any_window:
            alike += [other for other in found if other.settings.covers(self.settings)]
        self.recorder = max(alike, key=lambda other: other.settings.length)._own_recorder

    def _sharing(self, trainer: pl.Trainer) -> list[TrajectoryCallback]:
        """All callbacks that share the recorder, this one included."""
        return [each for each in _koopman_callbacks(trainer) if each.recorder is self.recorder]

    # -- a table of all epochs ----------------------------------------------------------------------------------------

    @property
    def history_path(self) -> Path | None:
        """The table that :attr:`history` is written to, once training has started."""
        return None if self._directory is None else self._directory / HISTORY

    def _write_history(self, *, anew: bool = False) -> None:
        """Append the last row to the table, or write it all anew."""
        if self.history_path is None or not self.columns:
            return
        with self._guard("writing the history"), open(self.history_path, "w" if anew else "a", newline="") as f:
            writer = csv.DictWriter(f, self.columns)
            if anew:
                writer.writeheader()
            for row in self.history if anew else self.history[-1:]:
                writer.writerow({key: "" if value != value else value for key, value in row.items()})  # NaN: unknown

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._pending is not None:  # loaded, but no training has begun since
            return self._pending
        if self._directory is None:
            return {}
        state: dict[str, Any] = {"loss_total": 0.0, "loss_count": 0}
        with self._guard("averaging the training loss"):
            self._losses.fold()
            state = {"loss_total": self._losses.total, "loss_count": self._losses.count}
        state |= {"validated": self._validated, "has_validated": self._has_validated}
        state["history"] = {key: [row[key] for row in self.history] for key in self.columns}
        with self._guard("saving the snapshots beside the checkpoint"):
            state["recorder"] = self.recorder.save()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict

    def _restore(self, trainer: pl.Trainer) -> bool:
        """Go on where the checkpoint left off, if there is one; a lost sidecar costs the window, nothing else."""
        state, self._pending = self._pending, None
        if state is None:
            sharing = self._sharing(trainer)  # if one of them has a state, nothing is lost; else the first one tells
            known = sharing[0] is not self or any(other._pending is not None for other in sharing)
            if trainer.ckpt_path is not None and trainer.is_global_zero and not known:
                self._warn(
                    "resume",
                    f"the checkpoint {str(trainer.ckpt_path)!r} holds no snapshots for this callback with these "
                    "settings: its trajectory starts anew.",
                )
            return False
        self._validated, self._has_validated = state["validated"], bool(state["has_validated"])
        if not trainer.is_global_zero:
            return True
        self._losses.restore(float(state["loss_total"]), int(state["loss_count"]))
        with self._guard("restoring the snapshots"):
            self._restore_state(state)
            saved = state.get("recorder")
            if self.recorder.restored:  # another callback that shares the recorder was first
                return True
            self.recorder.clear()
            if not saved:
                return True
            sidecar = self._find_sidecar(Path(saved["sidecar"]), trainer.ckpt_path)
            lost = len(saved["epochs"]) if sidecar is None else self.recorder.load(saved, sidecar)
            self.recorder.restored = True
            if lost and len(self.recorder) < self.enough:
                self._warn(
                    "sidecar",
                    f"{lost} of the checkpoint's {len(saved['epochs'])} snapshots are no longer in "
                    f"{sidecar or saved['sidecar']}: the trajectory goes on with the {len(self.recorder)} left.",
                )
        return True

    def _restore_state(self, state: dict[str, Any]) -> None:
        """Take up what the callback itself keeps, besides the trajectory; on global rank zero only."""
        columns: Mapping[str, list[Any]] = state["history"]
        self.history = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _find_sidecar(self, written: Path, ckpt_path: object) -> Path | None:
        """The sidecar where it was written, or in a folder of the same name near the checkpoint (the run was moved)."""
        candidates = [written]
        if isinstance(ckpt_path, (str, os.PathLike)):
            near = list(Path(ckpt_path).absolute().parents)[:3]
            # the folder's own name, and with a parent for prefixes such as "koopman/head"
            candidates += [folder / Path(*written.parts[-depth:]) for folder in near for depth in (2, 3)]
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


def start_segments(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let every Koopman callback begin a new trajectory from the present weights."""
    for callback in _koopman_callbacks(trainer):
        callback.weights_replaced(trainer, pl_module)
    for callback in _koopman_callbacks(trainer):
        callback.start_segment(trainer, pl_module)


def _koopman_callbacks(trainer: pl.Trainer) -> list[TrajectoryCallback]:
    return [each for each in trainer.callbacks if isinstance(each, TrajectoryCallback)]  # type: ignore[attr-defined]


def _unused(directory: Path) -> Path:
    """The folder itself while it is empty, else ``name-v1``, ``name-v2``, …: an earlier run's files stay."""
    candidate, version = directory, 0
    while candidate.is_dir() and any(candidate.glob("*.*")):
        version += 1
        candidate = directory.with_name(f"{directory.name}-v{version}")
    return candidate


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: object, least: int) -> None:
    """Raise ValueError unless a count is whole and large enough."""
    if not _is_integer(value) or value < least:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least {least} and whole, got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless a number is positive and finite."""
    if not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}.")


def _available_memory() -> int | None:
    """Memory in bytes that can be had without swapping, or None where the system does not tell."""
    known = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        # a container's limit ("max" where there is none); what it uses counts caches too, so it says little
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(known) if known else None


def checked_prefix(prefix: str) -> str:
    """The first part of logged names, or ValueError if it will not do."""
    if not prefix.strip("/"):
        raise ValueError(f"prefix must not be empty, got {prefix!r}: logged names begin with it.")
    if "/dataloader_idx_" in prefix:
        raise ValueError(f"prefix must not hold '/dataloader_idx_', got {prefix!r}: Lightning keeps that for itself.")
    return prefix.strip("/")
