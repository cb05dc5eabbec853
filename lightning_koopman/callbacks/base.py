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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_koopman._checks import _is_integer, check_count
from lightning_koopman.callbacks.loss_meter import LossMeter
from lightning_koopman.callbacks.lr_schedule import current_rates
from lightning_koopman.callbacks.roots import LightningCallback
from lightning_koopman.parameters.process_group import Processes, ProcessLostError
from lightning_koopman.parameters.reinitialize import Scheme, reinitialize
from lightning_koopman.parameters.select import as_patterns, select_parameters
from lightning_koopman.parameters.sharded_modules import clean_name, is_kind, local_chunks
from lightning_koopman.parameters.shards import Chunk, Shards
from lightning_koopman.trajectory.recorder import Recorder, Snapshot, SnapshotSettings
from lightning_koopman.trajectory.rows import STORAGES
from lightning_koopman.trajectory.trajectory import SKETCH

if TYPE_CHECKING:  # never at run time: the user may use the other import root
    import pytorch_lightning as pl


WEIGHTS, TRAIN_LOSS = "weights", "train_loss"
HISTORY = "history.csv"
KINDS = ("float32", "bfloat16")  # of stored snapshots


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
        every_n_epochs: Epochs between two snapshots, ≥ 1; or
        every_n_steps: Optimizer steps between two snapshots, ≥ 1.  So many steps then take the place of an epoch.
        window: Snapshots kept and analysed, ≥ 3, or None for all.
        storage: ``"ram"``, ``"disk"`` for a memory-mapped file in the folder below, or ``"sketch"``.
        dtype: ``"float32"`` or ``"bfloat16"``: of what is stored.
        sketch: Numbers in a sketch.
        background: Whether the work on a snapshot is done while training goes on.
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
        every_n_steps: int | None = None,
        window: int | None,
        storage: str = "ram",
        dtype: str = "float32",
        sketch: int = SKETCH,
        background: bool = False,
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
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps, 1)
            if every_n_epochs != 1:
                raise ValueError(
                    f"every_n_epochs={every_n_epochs} and every_n_steps={every_n_steps} exclude each other: give one."
                )
        if window is not None and (not _is_integer(window) or window < 3):
            raise ValueError(f"window must be at least 3 snapshots and whole, got {window}: pass None to keep all.")
        if dirpath is not None and "://" in os.fspath(dirpath):
            raise ValueError(
                f"dirpath must be a local folder, got {os.fspath(dirpath)!r}: snapshots are mapped from it."
            )
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {list(STORAGES)}, got {storage!r}.")
        if dtype not in KINDS:
            raise ValueError(f"dtype must be one of {list(KINDS)}, got {dtype!r}.")
        check_count("sketch", sketch, 2)
        if dtype != "float32" and (storage == "sketch" or observable != WEIGHTS):
            raise ValueError(f"dtype={dtype!r} is for stored weights, got storage={storage!r}, {observable=}: drop it.")
        if storage == "sketch" and observable != WEIGHTS:
            raise ValueError(f"storage='sketch' goes with observable='weights', got {observable!r}: drop it.")
        self.settings = SnapshotSettings(
            observable, as_patterns(parameters), every_n_epochs, every_n_steps, window, storage, dtype, sketch
        )
        self._background = background and observable == WEIGHTS
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
        self._processes = Processes()
        self._shards: Shards | None = None  # where this process's part of the weights lies
        self._zero = True  # the process that logs, decides and writes
        self._rounds = 0  # completed epochs, or groups of so many steps
        self._begins = False  # the next batch is the first of a group
        self._base: Path | None = None
        self._seen: object = None  # the observed metric as it was when the epoch began: what is logged anew differs
        self._validated: float | None = None  # the observed metric as the last validation logged it, until recorded
        self._has_validated = False
        self._losses = LossMeter()
        self.train_loss: float | None = None
        self.rates: list[float] = []  # learning rates when the epoch began
        self.finite = True  # what was read last, if it could be read

    def __getstate__(self) -> dict[str, Any]:  # a copy for other processes begins alone
        return {**vars(self), "_processes": Processes(), "_shards": None}

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._pending, self._anew, self.rates, self._shards = None, True, [], None
        if stage != "fit":
            return
        self._active = not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._zero = trainer.is_global_zero
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
            self._check_parameters(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._active:
            return
        self._losses.restore(0.0, 0)
        self._alone = len(self._sharing(trainer)) == 1
        resumed = self._resumed = self._restore(trainer, pl_module)
        epoch, recorder = self._completed(trainer), self.recorder
        self._rounds, self._begins = epoch, not self._within(trainer)
        self._anew = not resumed and (trainer.current_epoch == 0 or trainer.ckpt_path is not None)
        if self._anew:
            self.history = []
            if not recorder.restored:
                recorder.interrupt()  # the callback may have served another fit
        if self._zero:
            self._write_history(anew=True)
        if not self._keeps_weights(epoch) or self._within(trainer):
            return
        with self._guard("recording the initial weights"):
            snapshot = self._read_weights(trainer, pl_module)
            # a resumed epoch may have begun, so its weights differ; otherwise this is a further fit from other weights
            if recorder.holds(epoch) and not resumed and not recorder.repeats(snapshot):
                recorder.interrupt()
            self._take(epoch, snapshot, background=False)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.settings.every_n_steps is None:
            self.on_round_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.settings.every_n_steps is not None and self._begins:
            self._begins = False
            self.on_round_start(trainer, pl_module)

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the first batch of an epoch, or of ``every_n_steps`` steps."""
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
        self.after_batch(trainer, pl_module, batch, batch_idx)
        if self.settings.every_n_steps is not None and self._active:
            completed = self._completed(trainer)
            if completed > self._rounds:
                self._begins = True
                self.on_round_end(trainer, pl_module, completed)

    def after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Called after each batch, before anything is decided."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._active and not trainer.sanity_checking:
            self._has_validated = True
            with self._guard("reading the observed metric"):
                value = self._logged_anew(trainer)
                self._validated = self._validated if value is None else value

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._active and self.settings.every_n_steps is None:
            self.on_round_end(trainer, pl_module, trainer.current_epoch + 1)

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        """Called after the last batch of an epoch, or of so many steps, with the number of those completed."""
        self._rounds = epoch
        self.train_loss = self._mean_train_loss(trainer)
        self.rates = self.rates or current_rates(trainer)  # a resumed epoch does not begin
        if not self._due_at(epoch):
            return
        started = time.perf_counter()
        with self._guard("recording a snapshot"):
            self._record(trainer, pl_module, epoch)
        self._record_seconds = time.perf_counter() - started
        self.on_snapshot(trainer, pl_module, epoch, self.recorder.holds(epoch))

    def on_snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        """Called on all ranks after each epoch with a snapshot due; each of them holds its part of the trajectory."""

    def weights_replaced(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the weights were not trained but set, before anything records them."""

    def start_segment(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a new trajectory from the present weights, which were not trained from those recorded last."""
        self.rates = current_rates(trainer)
        self.recorder.interrupt()
        if self._active and self._keeps_weights(self._rounds):
            with self._guard("recording the weights anew"):
                self._take(self._rounds, self._read_weights(trainer, pl_module), background=False)

    def _completed(self, trainer: pl.Trainer) -> int:
        """Completed epochs, or groups of ``every_n_steps`` steps."""
        every = self.settings.every_n_steps
        return trainer.current_epoch if every is None else trainer.global_step // every

    def _when(self, epoch: int) -> str:
        """A time, for messages."""
        every = self.settings.every_n_steps
        return f"epoch {epoch}" if every is None else f"step {epoch * every}"

    def _span(self, epochs: int) -> str:
        """A length of time, for messages."""
        every = self.settings.every_n_steps
        return f"{epochs} epochs" if every is None else f"{epochs * every} steps"

    def _within(self, trainer: pl.Trainer) -> bool:
        """Whether a group of steps has begun."""
        every = self.settings.every_n_steps
        return every is not None and trainer.global_step % every > 0

    # -- what ---------------------------------------------------------------------------------------------------------

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        if self.settings.observable == WEIGHTS:
            self._take(epoch, self._read_weights(trainer, pl_module), background=self._background)
            return
        value = self._scalar(trainer) if self._zero else None
        if value is not None:
            self._take(epoch, Snapshot([torch.tensor([value], dtype=torch.float64)]), background=False)

    def _scalar(self, trainer: pl.Trainer) -> float | None:
        """The epoch's value of the watched loss or metric, if there is one."""
        use_loss = self._watched == TRAIN_LOSS and self.train_loss is not None
        return self.train_loss if use_loss else self._metric(trainer)

    def _take(self, epoch: int, snapshot: Snapshot, *, background: bool) -> None:
        """Record a snapshot, and take it in at once unless the work is done in the background."""
        self._take_in()
        trajectory, recorder = self.recorder.trajectory, self.recorder
        if trajectory is not None and trajectory.n != snapshot.numel and not recorder.interrupted:
            self._warn(
                "count",
                f"the number of observed weights changed from {trajectory.n} to {snapshot.numel} at epoch {epoch}: "
                "a new trajectory starts here.",
            )
        recorder.record(epoch, snapshot, background=background)
        if not background:
            self._take_in()

    def _take_in(self) -> None:
        """Take in what was recorded last; on all ranks."""
        if not self.recorder.busy:
            return
        self.finite = True
        self.finite = self.recorder.finish()
        if not self.finite:
            self._warn(
                "finite",
                f"the observable {self.settings.observable!r} holds NaN or infinite values after epoch {self._rounds}: "
                "it is not recorded, and a new trajectory starts once it is finite again.",
            )

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, scalars: Mapping[str, float]) -> None:
        """Log scalars for stock callbacks and loggers; on all ranks."""
        named = {f"{self.prefix}/{name}": value for name, value in scalars.items()}
        if self.settings.every_n_steps is None:
            for name, value in named.items():
                pl_module.log(name, value, batch_size=1, sync_dist=trainer.world_size > 1)
            return
        # what is logged within an epoch reaches loggers only every `log_every_n_steps` steps
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in named.items()})
        for logger in trainer.loggers if named else ():
            with self._guard("logging"):
                logger.log_metrics(named, step=trainer.global_step)

    def _keeps_weights(self, epoch: int) -> bool:
        """Whether the weights are recorded after so many completed epochs."""
        return self.settings.observable == WEIGHTS and self._due_at(epoch)

    def _due_at(self, epoch: int) -> bool:
        """Whether a snapshot is to be taken after so many completed epochs."""
        return epoch % self.settings.every_n_epochs == 0 and not (self._finished and self._alone)

    @property
    def _finished(self) -> bool:
        """Whether this callback needs no more snapshots."""
        return False

    def _read_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Snapshot:
        return Snapshot.of(self._own_parts(trainer, pl_module))

    def _own_parts(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Shards:
        """This process's part of the observed weights as they are now."""
        root = outermost(trainer, pl_module)
        chunks = local_chunks(root)
        if not all(name in chunks for name in self._names):  # layers were replaced since training began
            self._names = tuple(select_parameters(root, self.settings.parameters))
        held = {name: chunks[name] for name in self._names}
        self._shards = Shards(held, self._processes, like=self._shards)
        return self._shards

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
        name = type(trainer.strategy).__name__
        deep = is_kind(trainer.strategy, "DeepSpeedStrategy")
        shared = self.settings.observable == WEIGHTS and trainer.world_size > 1 and not deep
        self._processes = Processes.of_run() if shared else Processes()
        alone = shared and self._processes.size != trainer.world_size
        if self.settings.observable == WEIGHTS and (deep or alone):
            why = "keeps the weights in partitions of its own" if deep else "does not use torch.distributed"
            raise ValueError(
                f"strategy {name} {why}, where they cannot be observed: use 'ddp', FSDPStrategy or "
                f"ModelParallelStrategy (FSDP2){', or observable=' + repr(TRAIN_LOSS) if self.storable else ''}."
            )

    def _check_parameters(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        chosen = select_parameters(outermost(trainer, pl_module), self.settings.parameters)
        self._names = tuple(chosen)
        halves = [name for name, parameter in chosen.items() if parameter.dtype.itemsize < 4]
        if halves:
            self._warn(
                "half",
                f"{len(halves)} observed parameters such as {halves[0]!r} are stored in {chosen[halves[0]].dtype}, "
                "which rounds late updates away and fakes eigenvalues at 1: train with precision='bf16-mixed' or 32.",
            )
        shards = self._own_parts(trainer, pl_module)
        problem = self._too_large(trainer, shards.numel)
        if not shards.processes.all_agree(problem is None):
            raise ValueError(problem or "another process has no room for its snapshots: see its error.")

    def _too_large(self, trainer: pl.Trainer, numel: int) -> str | None:
        """Why the snapshots of so many weights cannot be kept here, or None."""
        rows, settings = self.settings.window, self.settings
        if settings.storage == "sketch" or self._directory is None:
            return None
        if (
            rows is None
            and settings.every_n_steps is None
            and trainer.max_epochs is not None
            and trainer.max_epochs > 0
        ):
            rows = trainer.max_epochs // settings.every_n_epochs + 1
        each = numel * (4 if settings.dtype == "float32" else 2)
        # one more is written before the oldest goes; processes of one machine share what it has
        needed = each * (rows + 1 if rows else 0) * trainer.num_devices
        in_memory = settings.storage == "ram"
        free = _available_memory() if in_memory else shutil.disk_usage(self._directory).free
        if free is None or needed <= free:
            return None
        return (
            f"window={settings.window} keeps {rows} snapshots of {each * trainer.num_devices / 2**30:.2f} GiB on this "
            f"machine, {needed / 2**30:.1f} GiB in all, but {free / 2**30:.1f} GiB of "
            f"{'memory' if in_memory else 'disk'} are free: {self._mend(in_memory)}."
        )

    def _mend(self, in_memory: bool) -> str:
        """What the user can do where memory, or the disk, is too small for the snapshots."""
        return "free some"

    def _resolve_directory(self, trainer: pl.Trainer) -> None:
        """Make the output folder and prove that it can be written, before any work starts; the same on all ranks."""
        parent = self.dirpath if self.dirpath is not None else trainer.log_dir or trainer.default_root_dir
        # a remote log folder cannot be mapped: write below the working directory
        base = (Path() if "://" in str(parent) else Path(parent)).absolute() / self.folder
        goes_on = trainer.current_epoch > 0 and base == self._base and self._directory is not None
        self._base = base
        directory = self._directory if goes_on and self._directory is not None else _unused(base)
        if self._zero:
            problem = _cannot_write(directory)
        directory, problem = trainer.strategy.broadcast((directory, problem if self._zero else None))
        if problem is not None:
            raise ValueError(f"dirpath={str(parent)!r} cannot be written ({problem}): pass another `dirpath`.")
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
        # rows that come from older versions lack newer columns
        state["history"] = {key: [row.get(key, math.nan) for row in self.history] for key in self.columns}
        with self._guard("saving the snapshots beside the checkpoint"):
            self._take_in()
            state["recorder"] = self.recorder.save()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Go on where the checkpoint left off, if there is one; a lost sidecar costs the window, nothing else."""
        state, self._pending = self._pending, None
        if state is None:
            sharing = self._sharing(trainer)  # if one of them has a state, nothing is lost; else the first one tells
            known = sharing[0] is not self or any(other._pending is not None for other in sharing)
            if trainer.ckpt_path is not None and not known:
                self._warn(
                    "resume",
                    f"the checkpoint {str(trainer.ckpt_path)!r} holds no snapshots for this callback with these "
                    "settings: its trajectory starts anew.",
                )
            return False
        self._validated, self._has_validated = state["validated"], bool(state["has_validated"])
        if self._zero:
            self._losses.restore(float(state["loss_total"]), int(state["loss_count"]))
            with self._guard("restoring the history"):
                self._restore_state(state)
        saved = state.get("recorder")
        if self.recorder.restored:  # another callback that shares the recorder was first
            return True
        self.recorder.clear()
        weights = self.settings.observable == WEIGHTS
        if not saved or not (weights or self._zero):
            return True
        with self._guard("restoring the snapshots"):
            shards = self._own_parts(trainer, pl_module) if weights else None
            sidecar = self._find_sidecar(Path(saved["sidecar"]), trainer.ckpt_path)
            lost = self.recorder.load(saved, sidecar, shards)
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
        except ProcessLostError:
            raise
        except Exception as error:
            told = f"{doing} failed, training goes on without it: {type(error).__name__}: {error}"
            self._warn(doing, told, everywhere=True)

    def _warn(self, topic: str, message: str, *, everywhere: bool = False) -> None:
        if topic not in self._warned and (self._zero or everywhere):
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


def outermost(trainer: pl.Trainer, pl_module: pl.LightningModule) -> torch.nn.Module:
    """The module, or FSDP's wrapper around it, which alone knows of all parameters."""
    wrapped = trainer.strategy.model
    return wrapped if wrapped is not None and is_kind(wrapped, "FullyShardedDataParallel") else pl_module


def draw_anew(
    trainer: pl.Trainer, pl_module: pl.LightningModule, names: Sequence[str], scheme: Scheme, seed: int
) -> None:
    """Draw the parameters of some modules anew, the same in all processes."""
    chunks = local_chunks(outermost(trainer, pl_module), remove_duplicate=False)
    owned: dict[str, dict[str, Chunk]] = {}
    for name, chunk in chunks.items():
        owner, _, leaf = name.rpartition(".")
        owned.setdefault(owner, {})[leaf] = chunk
    # the innermost of those that wrappers give the same name
    modules = {clean_name(name): module for name, module in pl_module.named_modules()}
    reinitialize([modules[name] for name in names], scheme, seed=seed, chunks=[owned.get(name, {}) for name in names])
    if trainer.world_size > 1:  # other kinds of processors may draw otherwise
        whole = {id(chunk.tensor): chunk.tensor.detach() for chunk in chunks.values() if chunk.whole}
        for tensor in (*whole.values(), *pl_module.buffers()):
            torch.distributed.broadcast(tensor, src=0)


def _cannot_write(directory: Path) -> str | None:
    """Make a folder; returns why files cannot be written to it, or None."""
    probe = directory / f".probe-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.strerror
    return None


def _unused(directory: Path) -> Path:
    """The folder itself while it is empty, else ``name-v1``, ``name-v2``, …: an earlier run's files stay."""
    candidate, version = directory, 0
    while candidate.is_dir() and any(candidate.glob("*.*")):
        version += 1
        candidate = directory.with_name(f"{directory.name}-v{version}")
    return candidate


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
