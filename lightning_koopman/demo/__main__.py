"""Train the paper's CNN, watch its Koopman spectrum, and say what it shows: ``python -m lightning_koopman.demo``."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger
from tqdm import tqdm

from lightning_koopman.callbacks.early_stopping import EarlyStopOnUnitEigenvalues
from lightning_koopman.callbacks.monitor import KoopmanSpectrumMonitor
from lightning_koopman.demo.cnn import INITIALIZATIONS, OPTIMIZERS, PaperCNN
from lightning_koopman.demo.data import DATASETS, load
from lightning_koopman.reading.phase import Phase


class EpochProgress(pl.Callback):
    """One bar over all epochs, with the time left, the loss and the phase."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        often = 0.1 if sys.stdout.isatty() else 60.0  # seconds between updates; a file keeps every update
        shown = {"total": trainer.max_epochs, "initial": trainer.current_epoch, "unit": "epoch"}
        self.bar = tqdm(**shown, file=sys.stdout, mininterval=often, maxinterval=often)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Advance the bar."""
        shown = {"loss": "train_loss", "test acc": "test_accuracy"}
        metrics = trainer.callback_metrics
        found = {label: f"{float(metrics[key]):.3g}" for label, key in shown.items() if key in metrics}
        phase = Phase.of(metrics["koopman/phase"]).value if "koopman/phase" in metrics else "unknown"
        self.bar.set_postfix({**found, "phase": phase}, refresh=False)
        self.bar.update()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self.bar.close()


def _whole(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers of at least ``least``."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number


def _rate(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command-line arguments."""
    parser = argparse.ArgumentParser(prog="python -m lightning_koopman.demo", description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="digits", help="digits needs no network (default)")
    parser.add_argument("--data-root", type=Path, help="folder of torchvision's data sets (default: ./data)")
    parser.add_argument("--n-train", type=_whole(1), help="keep only so many training images (default: all)")
    parser.add_argument("--initialization", choices=sorted(INITIALIZATIONS), default="he")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adam")
    parser.add_argument("--learning-rate", type=_rate, default=1e-3)
    parser.add_argument("--epochs", type=_whole(1), default=100)
    parser.add_argument("--window", type=_whole(3), default=100, help="snapshots to analyse (default: 100)")
    parser.add_argument("--seed", type=_whole(0), default=0)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--output", type=Path, default=Path("koopman_demo"), help="folder for logs and figures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Run the demo or reproduce the paper; return the paths of the figures, or the report."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["reproduce"]:
        from lightning_koopman.demo.reproduce.command import main as reproduce

        return [reproduce(given[1:])]
    options = parse(given)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)

    pl.seed_everything(options.seed, verbose=False)
    try:
        data = load(options.dataset, root=options.data_root, n_train=options.n_train)
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(str(error)) from None
    model = PaperCNN(options.initialization, options.optimizer, options.learning_rate)
    print(
        f"{len(data.train):,} images of {options.dataset}, {sum(p.numel() for p in model.parameters()):,} weights "
        f"({options.initialization} initialization), {options.optimizer}, {options.epochs} epochs",
        flush=True,
    )
    monitor = KoopmanSpectrumMonitor(window=options.window, log_figure=True)
    stop = EarlyStopOnUnitEigenvalues(mode="report")
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=1,
        callbacks=[monitor, stop, EpochProgress()],
        logger=CSVLogger(options.output, name=options.dataset),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, *data.loaders(seed=options.seed))

    metrics = trainer.callback_metrics
    print(
        f"\nAfter {trainer.current_epoch} epochs: training loss {float(metrics['train_loss']):.2g}, test loss "
        f"{float(metrics['test_loss']):.2g}, test accuracy {float(metrics['test_accuracy']):.1%}."
    )
    print("\nWhat the training did:")
    for phase, rows in groupby(monitor.history, key=lambda row: row["phase"]):
        epochs = [row["epoch"] for row in rows]
        print(f"  epochs {epochs[0]:>3} to {epochs[-1]:>3}  {phase:<11}  {Phase(phase).meaning}")
    print(f"\nWhat it is doing now. {monitor.summary()}")
    print(f"\nWhen it could have stopped. {stop.message}")
    history, *others = sorted(monitor.figure_paths, key=lambda path: path.stem != "history")
    print(f"\nThe monitor took {sum(row['seconds'] for row in monitor.history):.1f} s. Look at\n  {history}")
    print("and, for details, at", *(*others, monitor.history_path, stop.history_path), sep="\n  ")
    return monitor.figure_paths


if __name__ == "__main__":
    main()
