"""Make one of two processes fail at a given point of our code."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from kills import Net
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    KoopmanWeightAveraging,
    RestartOnBadInitialization,
)


def train(folder: Path, failure: Any, epochs: int, checkpoint: str | None) -> dict[str, Any]:
    """Train with one failure in one process."""
    callbacks = [
        KoopmanSpectrumMonitor(window=6, dirpath=folder),
        KoopmanSpectrumMonitor(window=6, dirpath=folder, prefix="sketch", storage="sketch", sketch=61),
        EarlyStopOnUnitEigenvalues(mode="report", horizon=6, dirpath=folder),
        RestartOnBadInitialization(4, dirpath=folder),
        KoopmanWeightAveraging(window=6, dirpath=folder),
        KoopmanPruner(0.5, epoch=5, window=6, dirpath=folder),
    ]
    save = pl.callbacks.ModelCheckpoint(folder / "c", save_last="link", every_n_epochs=2)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[*callbacks, save], accelerator="cpu", devices=2, logger=False,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=datetime.timedelta(seconds=20)),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    random = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=random)
    data = DataLoader(TensorDataset(x, torch.sin(x[:, 0])), batch_size=8)
    module = Net()
    with warnings.catch_warnings(record=True) as caught, failing(trainer, *failure):
        warnings.simplefilter("always")
        trainer.fit(module, data, ckpt_path=checkpoint)
    masks = callbacks[-1].masks
    return {
        "epochs": trainer.current_epoch,
        "warnings": [str(each.message) for each in caught if "Koopman" in each.category.__name__],
        "times": [callback.recorder.epochs for callback in callbacks],
        "weights": [float(value) for value in torch.nn.utils.parameters_to_vector(module.parameters())],
        "bits": None if masks is None else masks.state_dict()["bits"].tolist(),
    }


@contextmanager
def failing(trainer: Any, path: str, name: str, count: int, rank: int) -> Iterator[None]:
    """Let a function fail at its `count`-th call in one process within the context."""
    module, _, kind = path.partition(":")
    owner: Any = importlib.import_module(f"lightning_koopman.{module}")
    owner = getattr(owner, kind) if kind else owner
    original, calls = vars(owner)[name], [0]
    function = original.__func__ if isinstance(original, classmethod) else original

    def counted(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and trainer.global_rank == rank:
            raise MemoryError("injected in one process")
        return function(*given, **named)

    setattr(owner, name, classmethod(counted) if isinstance(original, classmethod) else counted)
    try:
        yield
    finally:
        setattr(owner, name, original)


def train_all(options: dict[str, Any]) -> None:
    """Train once with each failure, and write what came of it."""
    rank, found = os.environ["RANK"], []
    saved = str(Path(options["folder"]) / "0" / "c" / "last.ckpt")
    runs = [(failure, 8, None) for failure in options["failures"]]
    runs += [(failure, 10, saved) for failure in options["when_loading"]]
    with mock.patch.object(torch.distributed, "new_group", wraps=torch.distributed.new_group) as opened:
        for number, (failure, epochs, checkpoint) in enumerate(runs):
            print(failure, flush=True)
            found.append(train(Path(options["folder"]) / str(number), failure, epochs, checkpoint))
    assert opened.call_count == 1, "all callbacks of all trainings share one process group"
    (Path(options["folder"]) / f"rank{rank}.json").write_text(json.dumps(found))
