"""Train the paper's CNN, watch its Koopman spectrum, and say what it shows: ``python -m lightning_koopman.demo``."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
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
        self.bar = tqdm(total=trainer.max_epochs, initial=trainer.current_epoch, unit="epoch", file=sys.stdout)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Advance the bar."""
        shown = {"loss": "train_loss", "test acc": "test_accuracy"}
        metrics = trainer.callback_metrics
        found = {label: f"{float(metrics[key]):.3g}" for label, key in shown.items() if key in metrics}
        phase = Phase.of(metrics["koopman/phase"]).value if "koopman/phase" in metrics else "unknown"
        self.bar.set_postfix({**found, "phase": phase})
        self.bar.update()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self.bar.close()


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(prog="python -m lightning_koopman.demo", description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="digits", help="digits needs no network (default)")
    parser.add_argument("--data-root", type=Path, help="folder of torchvision's data sets (default: ./data)")
    parser.add_argument("--n-train", type=_positive, help="keep only so many training images (default: all)")
    parser.add_argument("--initialization", choices=sorted(INITIALIZATIONS), default="he")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adam")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=_positive, default=100)
    parser.add_argument("--window", type=int, default=100, help="snapshots to analyse (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--output", type=Path, default=Path("koopman_demo"), help="folder for logs and figures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Run the demo, or reproduce the paper; returns the figures that were drawn, or the report."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["reproduce"]:
        from lightning_koopman.demo.reproduce.command import main as reproduce

        return [reproduce(given[1:])]
    options = parse(given)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)

    pl.seed_everything(options.seed, verbose=False)
    data = load(options.dataset, root=options.data_root, n_train=options.n_train)
    model = PaperCNN(options.initialization, options.optimizer, options.learning_rate)
    print(
        f"{len(data.train):,} images of {options.dataset}, {sum(p.numel() for p in model.parameters()):,} weights "
        f"({options.initialization} initialisation), {options.optimizer}, {options.epochs} epochs",
        flush=True,
    )
    weights = KoopmanSpectrumMonitor(window=options.window, log_figure=True)
    loss = KoopmanSpectrumMonitor("train_loss", window=options.window, log_figure=True, prefix="koopman_loss")
    stop = EarlyStopOnUnitEigenvalues(mode="report")
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=1,
        callbacks=[weights, loss, stop, EpochProgress()],
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
    for monitor in (weights, loss):
        print(f"\n{monitor.summary()}")
    print(f"\n{stop.message or 'The stop rule was never met; at the end: ' + stop.history[-1]['hold'] + '.'}")
    seconds = sum(row["seconds"] for monitor in (weights, loss) for row in monitor.history)
    print(f"\nBoth monitors together took {seconds:.1f} s. Figures and tables:")
    for path in [path for monitor in (weights, loss) for path in (*monitor.figure_paths, monitor.history_path)]:
        print(f"  {path}")
    print(f"  {stop.history_path}")
    return weights.figure_paths + loss.figure_paths


if __name__ == "__main__":
    main()
