"""Search the learning rate with Optuna, and prune trials by what the reading says of them.

Run with ``python examples/optuna_study.py``.  It needs optuna, no network, and takes under a minute.
"""

import logging

import optuna
import pytorch_lightning as pl

from lightning_koopman import KoopmanSpectrumMonitor, Phase
from lightning_koopman.demo.cnn import PaperCNN
from lightning_koopman.demo.data import load

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
optuna.logging.set_verbosity(optuna.logging.WARNING)


class PruneByReading(pl.Callback):
    """Report the training loss predicted ten epochs ahead; give up a trial that diverges or swings to and fro."""

    def __init__(self, trial: optuna.Trial, monitor: KoopmanSpectrumMonitor) -> None:
        self.trial, self.monitor = trial, monitor

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reading, epoch = self.monitor.reading, trainer.current_epoch
        if reading is None:
            return
        if reading.phase in (Phase.DIVERGING, Phase.OSCILLATING):
            raise optuna.TrialPruned(f"{reading.phase.value} after epoch {epoch}")
        ahead = reading.loss + reading.loss_change  # NaN while unknown
        if ahead == ahead:
            self.trial.report(ahead, epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned(f"predicted loss {ahead:.2g} after epoch {epoch}")


def objective(trial: optuna.Trial) -> float:
    pl.seed_everything(0, verbose=False)
    network = PaperCNN(optimizer="sgd", learning_rate=trial.suggest_float("lr", 1e-4, 1.0, log=True))
    monitor = KoopmanSpectrumMonitor()
    trainer = pl.Trainer(
        max_epochs=12, callbacks=[monitor, PruneByReading(trial, monitor)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    train, test = DATA.loaders()
    trainer.fit(network, train, test)
    return float(trainer.callback_metrics["test_loss"])


def tell(_: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    done = "pruned" if trial.state is optuna.trial.TrialState.PRUNED else f"test loss {trial.value:.3f}"
    print(f"trial {trial.number}: learning rate {trial.params['lr']:.4f}, {done} after {trial.last_step + 1} epochs")


DATA = load("digits", n_train=300)
pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=6)
study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
study.optimize(objective, n_trials=8, callbacks=[tell])
print(f"best learning rate {study.best_params['lr']:.4f}")
