"""The contract of every callback, also when it or its surroundings fail."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import ACCELERATOR
from torch import nn

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    KoopmanWarning,
    KoopmanWeightAveraging,
    ReduceLROnNoiseFloor,
    RestartOnBadInitialization,
)
from lightning_koopman.callbacks import base, recording, run_folder
from lightning_koopman.callbacks.base import TrajectoryCallback
from lightning_koopman.callbacks.observables import LossMeter, Metric, Weights
from lightning_koopman.trajectory.increments import Increments
from lightning_koopman.trajectory.recorder import Recorder
from lightning_koopman.trajectory.trajectory import Trajectory

CALLBACKS: dict[str, Callable[..., TrajectoryCallback]] = {
    "monitor": lambda **given: KoopmanSpectrumMonitor(window=6, **given),
    "steps": lambda **given: KoopmanSpectrumMonitor(window=6, every_n_steps=3, **given),
    "sketch": lambda **given: KoopmanSpectrumMonitor(window=6, storage="sketch", sketch=31, **given),
    "loss": lambda **given: KoopmanSpectrumMonitor("train_loss", window=8, **given),
    "stop": lambda **given: EarlyStopOnUnitEigenvalues(horizon=6, mode="report", **given),
    "restart": lambda **given: RestartOnBadInitialization(5, **given),
    "average": lambda **given: KoopmanWeightAveraging(window=6, **given),
    "reduce": lambda **given: ReduceLROnNoiseFloor(**given),
    "masks": lambda **given: KoopmanPruner(0.5, epoch=4, rounds=2, round_epochs=3, window=6, **given),
    "channels": lambda **given: KoopmanPruner(0.5, epoch=4, structured=True, window=6, **given),
}
EVENTS = [
    "forget", "own_state", "fit_begins", "round_begins", "batch_begins", "batch_ends", "snapshot_taken", "round_ends",
    "weights_replaced", "segment_begins", "fit_ends",
]  # fmt: skip
PARTS = [
    (Increments, "write"), (Increments, "message"), (Increments, "commit"), (Trajectory, "factor"),
    (Trajectory, "combine"), (Recorder, "save"), (Recorder, "release"), (Weights, "read"), (LossMeter, "take"),
    (LossMeter, "add"), (Metric, "begin"), (run_folder.RunFolder, "write_table"), (base, "current_rates"),
    (base, "log_scalars"), (recording, "checkpoints"),
]  # fmt: skip
EPOCHS = 9


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
        self.x = torch.randn(24, 4)
        self.y = self.x.sum(1, keepdim=True).sin()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0].to(self.net[0].weight.dtype)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        data = torch.utils.data.TensorDataset(self.x, self.y)
        return torch.utils.data.DataLoader(data, batch_size=8)


@pytest.fixture(params=CALLBACKS)
def make(request, tmp_path):
    """Return a function that builds a callback which writes to the test's folder."""
    return lambda **given: CALLBACKS[request.param](dirpath=tmp_path / "out", **given)


def fit(callback: Any, module: Any = None, *more: Any, epochs: int = EPOCHS, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback, *more],
        accelerator=ACCELERATOR,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": bool(more), **options},
    )
    trainer.fit(module or Net())
    return trainer


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("injected")


@pytest.fixture
def together(tmp_path):
    """All callbacks, for one trainer."""
    named = {name: {} if name == "restart" else {"prefix": f"koopman_{name}"} for name in CALLBACKS}
    return [CALLBACKS[name](dirpath=tmp_path / "out", **named[name]) for name in CALLBACKS]


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_that_fails_costs_each_of_them_one_warning(together, event, tmp_path):
    save = pl.callbacks.ModelCheckpoint(tmp_path / "c", save_last=True)
    for callback in together:
        setattr(callback, event, fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit(together[0], None, *together[1:], save).current_epoch == EPOCHS
    told = [str(each.message) for each in caught if each.category is KoopmanWarning and "injected" in str(each.message)]
    if event not in ("weights_replaced", "segment_begins"):  # these occur only when pruning
        assert len({each.split(":")[0] for each in told}) == 6  # one per kind of callback
    assert len(told) <= 2 * len(together)
    assert (tmp_path / "c" / "last.ckpt").is_file()


@pytest.mark.parametrize(("owner", "name"), PARTS)
def test_a_part_that_fails_costs_warnings_and_nothing_else(together, owner, name, tmp_path, monkeypatch):
    save = pl.callbacks.ModelCheckpoint(tmp_path / "c", save_last=True)
    if owner is Weights:  # unreadable weights before training are an error: fail later
        for callback in together:
            callback.fit_begins = lambda *_, own=callback: setattr(own.recording.weights, name, fail)
    else:
        monkeypatch.setattr(owner, name, fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit(together[0], None, *together[1:], save).current_epoch == EPOCHS
    assert any("injected" in str(each.message) for each in caught if each.category is KoopmanWarning)
    assert (tmp_path / "c" / "last.ckpt").is_file()


def test_warnings_as_errors_do_not_end_a_training(make, monkeypatch, caplog):
    monkeypatch.setattr(Trajectory, "record", fail)
    with warnings.catch_warnings(), caplog.at_level(logging.ERROR, "lightning_koopman"):
        warnings.simplefilter("error", KoopmanWarning)
        assert fit(make()).current_epoch == EPOCHS
    if make().recording.of_weights:
        assert "injected" in caplog.text
    caplog.clear()


class WithoutRate(Net):
    """Like Adafactor of `transformers` with relative steps: its learning rate is None."""

    def configure_optimizers(self) -> Any:
        class Relative(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                for group in self.param_groups:
                    group["lr"] = 0.01
                found = super().step(closure)
                for group in self.param_groups:
                    group["lr"] = None
                return found

        optimizer = Relative(self.parameters(), lr=0.01)
        optimizer.param_groups[0]["lr"] = None
        return optimizer


class WithoutOptimizer(Net):
    automatic_optimization = False
    example_input_array = torch.zeros(2, 4)

    def forward(self, x: Any) -> torch.Tensor:
        return self.net(x)

    def configure_optimizers(self) -> Any:
        return None


class OwnLog(Net):
    def log(self, name: str, value: Any) -> Any:
        return super().log(name, value)


class Converted(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 6:
            self.double()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step([each.to(self.net[0].weight.dtype) for each in batch], batch_idx)


class Uncopyable(list):
    def __copy__(self) -> Any:
        raise TypeError("not to be copied")

    __deepcopy__ = __copy__


class StrangeBatches(Net):
    def train_dataloader(self) -> Any:
        data = torch.utils.data.TensorDataset(self.x, self.y)
        return torch.utils.data.DataLoader(
            data,
            batch_size=8,
            collate_fn=lambda rows: Uncopyable(torch.stack(column) for column in zip(*rows, strict=True)),
        )

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return Uncopyable(column.to(device) for column in batch)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`.*")
@pytest.mark.parametrize("kind", [WithoutRate, WithoutOptimizer, OwnLog, Converted, StrangeBatches])
def test_unusual_modules_are_trained_to_the_end(make, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KoopmanWarning)
        assert fit(make(), kind()).current_epoch == EPOCHS


def test_it_can_be_copied_and_pickled_at_any_time(make):
    callback = make()
    for epochs in (EPOCHS - 1, EPOCHS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KoopmanWarning)
            fit(callback, epochs=epochs)
        for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
            assert str(twin.history) == str(callback.history)  # NaN is not equal to itself
            assert twin.state_key == callback.state_key


def test_fast_dev_run_writes_nothing(make, tmp_path):
    fit(make(), fast_dev_run=True, default_root_dir=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_prefix_that_leaves_the_folder_is_refused(make):
    for prefix in ("../up", "a/../../b", "/abs", "..", "a/..", "C:\\x", "\\\\host\\share"):
        if type(make()) is RestartOnBadInitialization:  # has no prefix
            return
        with pytest.raises(ValueError, match="must not leave the run's folder"):
            make(prefix=prefix)


def test_a_relative_folder_that_leaves_the_working_directory_is_refused():
    for make in CALLBACKS.values():
        with pytest.raises(ValueError, match="must not leave the working directory"):
            make(dirpath="../elsewhere")


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (KoopmanPruner, {"sparsity": np.linspace(0.5, 0.9, 3)[0], "epoch": np.int64(3), "rounds": np.int32(2)}),
        (KoopmanPruner, {"threshold": np.float32(0.1), "epoch": 3, "seed": np.int64(1), "radius": np.float64(0.1)}),
        (KoopmanSpectrumMonitor, {"window": np.int64(10), "radius": np.float32(0.1), "tol": np.float64(1e-3)}),
        (KoopmanSpectrumMonitor, {"every_n_epochs": np.int64(2), "sketch": np.int64(31), "storage": "sketch"}),
        (EarlyStopOnUnitEigenvalues, {"chance_loss": np.log(10), "horizon": np.int64(6), "patience": np.int8(2)}),
        (KoopmanPruner, {"sparsity": torch.tensor(0.5), "epoch": torch.tensor(3), "window": np.array(9)}),
        (KoopmanWeightAveraging, {"length": range(1, 4), "window": torch.tensor(6), "power": np.array(2.0)}),
        (KoopmanWeightAveraging, {"length": np.array([1, 3]), "n_batches": np.int64(8)}),
        (RestartOnBadInitialization, {"check_epoch": np.int64(4), "baseline_loss": np.log(10), "seed": np.uint8(3)}),
    ],
)
def test_numbers_that_numpy_or_torch_made_are_plain_in_checkpoints(kind, given, tmp_path):
    path = tmp_path / "last.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KoopmanWarning)
        trainer = fit(kind(**given, dirpath=tmp_path))
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["callbacks"]


@pytest.mark.parametrize("value", [True, "3", 2.5, None, float("nan"), -1, [3]])
@pytest.mark.parametrize("name", ["window", "radius", "every_n_epochs", "max_residual", "sketch"])
def test_bad_numbers_are_named_with_their_value(name, value):
    if (value is None and name == "window") or (value == 2.5 and name in ("radius", "max_residual")):
        return
    with pytest.raises(ValueError, match=name):
        KoopmanSpectrumMonitor(**{name: value})


def test_each_fit_has_a_folder_of_its_own(make):
    paths: set[Path] = set()
    for _ in range(3):
        callback = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KoopmanWarning)
            fit(callback)
        paths.add(callback.run_folder.path)
    assert len(paths) == 3
