"""One of two processes fails at some point of our work: run as a script, told what to do by JSON (see test_failing)."""

from __future__ import annotations

import datetime
import importlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from kills import Net
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    RestartOnBadInitialization,
)


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    folder = Path(options["folder"])
    callbacks = [
        KoopmanSpectrumMonitor(window=6, dirpath=folder),
        KoopmanSpectrumMonitor(window=6, dirpath=folder, prefix="sketch", storage="sketch", sketch=61),
        EarlyStopOnUnitEigenvalues(mode="report", horizon=6, dirpath=folder),
        RestartOnBadInitialization(4, dirpath=folder),
        KoopmanPruner(0.5, epoch=5, window=6, dirpath=folder, survivors=options.get("survivors", "keep")),
    ]
    save = pl.callbacks.ModelCheckpoint(folder / "c", save_last=True)
    trainer = pl.Trainer(
        max_epochs=options["epochs"], callbacks=[*callbacks, save], accelerator="cpu", devices=2, logger=False,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=datetime.timedelta(seconds=20)),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    if options.get("fails"):
        path, name, count, rank = options["fails"]
        module, _, kind = path.partition(":")
        owner: Any = importlib.import_module(f"lightning_koopman.{module}")
        owner = getattr(owner, kind) if kind else owner
        original, calls = getattr(owner, name), [0]

        def counted(*given: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] >= count and trainer.global_rank == rank and calls[0] < count + options.get("times", 1):
                raise MemoryError("injected in one process")
            return original(*given, **named)

        setattr(owner, name, counted)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=random)
    data = DataLoader(TensorDataset(x, torch.sin(x[:, 0])), batch_size=8)
    started = time.time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Net(), data, ckpt_path=options.get("checkpoint"))
    masks = callbacks[-1].masks
    found = {
        "epochs": trainer.current_epoch,
        "seconds": time.time() - started,
        "warnings": [str(each.message) for each in caught if "Koopman" in each.category.__name__],
        "times": [callback.recorder.epochs for callback in callbacks],
        "bits": None if masks is None else masks.state_dict()["bits"].tolist(),
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
