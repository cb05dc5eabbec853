"""The trainings on images: snapshots, spectra, checkpoints and pruned branches, all by callbacks of a Trainer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from lightning_koopman.callbacks.monitor import WINDOW, KoopmanSpectrumMonitor
from lightning_koopman.callbacks.pruning import KoopmanPruner
from lightning_koopman.demo.cnn import PaperCNN
from lightning_koopman.demo.data import load
from lightning_koopman.demo.experiments.cache import save
from lightning_koopman.demo.experiments.runner import Progress
from lightning_koopman.demo.experiments.training import BATCH, Batches, Reached, masked, quiet_trainer, random_score
from lightning_koopman.demo.reproduce.plan import SPARSITY, Branch, Plan
from lightning_koopman.dmd.random_walk import random_walk_spectrum
from lightning_koopman.dmd.spectrum import Spectrum
from lightning_koopman.pruning.prunable import prunable_parameters
from lightning_koopman.trajectory.recorder import WEIGHTS

EVERY = 10  # epochs between checkpoints
PAPERS: dict[str, Any] = {"window": None, "rule": "paper"}  # all snapshots, the mode nearest 1 and those above


class Curves(Callback):
    """Records the losses after each epoch, and keeps them in checkpoints."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append a row: training loss, test loss, test accuracy."""
        metrics = trainer.callback_metrics
        del self.rows[trainer.current_epoch :]
        self.rows.append([float(metrics[key]) for key in ("train_loss", "test_loss", "test_accuracy")])

    def state_dict(self) -> dict[str, Any]:
        """Return the rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows."""
        self.rows = [list(row) for row in state_dict["rows"]]


class Spectra(Callback):
    """Saves the monitors' spectra after the epochs that the figures show."""

    def __init__(self, path: Path, monitors: dict[str, tuple[KoopmanSpectrumMonitor, tuple[int, ...]]]) -> None:
        self.path, self.monitors = path, monitors

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the spectra; the monitors must come before this callback."""
        for name, (monitor, epochs) in self.monitors.items():
            if trainer.current_epoch + 1 in epochs and monitor.spectrum is not None:
                arrays = spectrum_arrays("training", monitor.spectrum)
                if monitor.surrogate is not None:
                    arrays |= spectrum_arrays("walk", monitor.surrogate)
                if monitor.settings.observable == WEIGHTS:
                    arrays |= steady_arrays(monitor)
                save(self.path / f"{name}-{trainer.current_epoch + 1}.npz", **arrays)


def spectrum_arrays(kind: str, spectrum: Spectrum) -> dict[str, Any]:
    """Return what the figures and tables need of a spectrum."""
    return {
        f"{kind}_eigenvalues": spectrum.eigenvalues,
        f"{kind}_residuals": spectrum.residuals,
        f"{kind}_importance": spectrum.importance,
        f"{kind}_unit_fraction": spectrum.unit_fraction(),
    }


def steady_arrays(monitor: KoopmanSpectrumMonitor) -> dict[str, Any]:
    """Return measures that do not depend on the number of snapshots: importance near 1 of the newest, and slowing."""
    newest, trajectory = monitor.history[-1], monitor.trajectory
    assert trajectory is not None
    start = float(np.linalg.norm(trajectory.factor(last=WINDOW)[:, 0]))
    walk = random_walk_spectrum(trajectory.step_norms()[1 - WINDOW :], start, trajectory.total)
    return {
        "training_newest": newest["unit_fraction"],
        "walk_newest": walk.unit_fraction(),
        "slowing": newest["slowing"],
    }


def fit(
    model: PaperCNN,
    plan: Plan,
    root: Path | None,
    folder: Path,
    device: str,
    epochs: int,
    callbacks: list[Callback],
    start_from: Path | None,
) -> Path:
    """Train up to an epoch, from the newest checkpoint in the folder if any; return the checkpoint at the end."""
    data = load(plan.dataset, root=root, n_train=plan.n_images)
    train, test = (tuple(each.to(device) for each in part.tensors) for part in (data.train, data.test))
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.ckpt"
    options: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False}
    trainer = quiet_trainer(
        folder,
        device=device,
        max_epochs=epochs,
        enable_checkpointing=True,
        callbacks=[
            *callbacks,
            ModelCheckpoint(filename="last", every_n_epochs=EVERY, **options),
            ModelCheckpoint(filename="done", every_n_epochs=epochs, **options),
        ],
    )
    module = model if device == "cpu" else torch.compile(model)  # compiling pays off on a GPU
    batches = Batches(train, BATCH, lambda: trainer.current_epoch), Batches(test, 1000)
    trainer.fit(module, *batches, ckpt_path=last if last.exists() else start_from)  # type: ignore[arg-type]
    done = folder / "done.ckpt"
    if not done.exists():  # interrupted between the two checkpoints of the last epoch
        shutil.copyfile(last, done)
    return done


def curves_of(checkpoint: Path) -> Any:
    """Read the curves (epochs, 3) of a checkpoint."""
    return np.array(torch.load(checkpoint, map_location="cpu", weights_only=False)["callbacks"]["Curves"]["rows"])


def train(plan: Plan, start: str, root: Path | None, folder: Path, device: str, reached: Progress) -> None:
    """Run a whole training, with its spectra and a checkpoint at each pruning point."""
    done, before, shown, pruned = None, 0, max(*plan.weight_epochs, *plan.loss_epochs), max(plan.prune_at)
    for epochs in sorted({*plan.prune_at, max(shown, pruned), plan.epochs_of(start)}):  # each leg has its own snapshots
        begins, before = before, epochs
        leg = folder / f"trained-{start}-{epochs}"
        if (leg / "done.ckpt").exists():
            done = leg / "done.ckpt"
            continue
        pl.seed_everything(0, verbose=False)
        model = PaperCNN(start)
        weights = KoopmanSpectrumMonitor(window=plan.weight_epochs[-1] + 1, dirpath=leg)
        loss = KoopmanSpectrumMonitor("train_loss", window=plan.loss_epochs[-1], dirpath=leg, prefix="koopman_loss")
        kept = {f"weights-{start}": (weights, plan.weight_epochs), f"loss-{start}": (loss, plan.loss_epochs)}
        waiting = KoopmanPruner(SPARSITY, settled_change=1e-12, dirpath=leg, **PAPERS)  # for its state in the branches
        watching: list[Callback] = [weights, loss] if begins < shown else []  # each analysis costs time
        watching += [waiting] if begins < pruned else []
        watching += [Curves(), Reached(reached), Spectra(folder, kept)]
        done = fit(model, plan, root, leg, device, epochs, watching, done)
    assert done is not None
    save(folder / f"trained-{start}.npz", curves=curves_of(done))


def prune(plan: Plan, branch: Branch, root: Path | None, folder: Path, device: str, reached: Progress) -> None:
    """Prune the weights of a checkpoint and continue its training."""
    pl.seed_everything(0, verbose=False)
    model, place = PaperCNN(branch.start), folder / branch.name
    options: dict[str, Any] = {"sparsity": SPARSITY, "epoch": branch.point, "dirpath": place, **PAPERS}
    acting: Callback
    if branch.method == "algorithm 1":
        acting = KoopmanPruner(survivors="reconstruction", **options)
    elif branch.method == "algorithm 2":
        acting = KoopmanPruner(survivors="reinit", **{**options, "scheme": branch.start})
    elif branch.method == "magnitude":
        acting = masked(torch.abs, SPARSITY, branch.point)
    else:
        acting = masked(random_score(0), SPARSITY, branch.point)
    callbacks: list[Callback] = [acting, Curves(), Reached(reached, branch.point)]
    origin = folder / f"trained-{branch.start}-{branch.point}" / "done.ckpt"
    done = fit(model, plan, root, place, device, branch.point + plan.further, callbacks, origin)
    weights = list(prunable_parameters(model).values())
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    history = acting.history if isinstance(acting, KoopmanPruner) else []
    about = {name: history[0][name] if history else np.nan for name in ("magnitude_agreement", "modes", "snapshots")}
    save(folder / f"{branch.name}.npz", curves=curves_of(done), zeros=zeros, **about)
