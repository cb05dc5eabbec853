from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
from problems import ACCELERATOR
from pytorch_lightning.callbacks import Callback


@pytest.fixture
def fit(tmp_path):
    def run(module: pl.LightningModule, *callbacks: Callback, epochs: int = 10, **options: Any) -> pl.Trainer:
        ckpt = options.pop("ckpt_path", None)
        given: dict[str, Any] = {
            "logger": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
            **options,
        }
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=list(callbacks), accelerator=ACCELERATOR, enable_progress_bar=False,
            enable_model_summary=False, **given,
        )  # fmt: skip
        pl.seed_everything(3, verbose=False)
        trainer.fit(module, ckpt_path=ckpt)
        return trainer

    return run
