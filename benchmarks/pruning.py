"""Evidence for the pruner: ``python -m benchmarks.pruning``.

The paper's CNN on 10,000 images of MNIST, He and Xavier weights, three seeds, is trained for 130 epochs.  From its
checkpoints after 50 and 100 epochs it goes on for 30 more, pruned to 75 % and to 90 % by each method, with the
optimizer's state as it was (Figures 3–6 of the paper); from the one after 50 epochs also with whole channels removed.
Then the times of an epoch and of inference are measured.  Finished runs are kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch_pruning
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ModelPruning
from torch import Tensor, nn

from benchmarks.training import Batches, Case, Training, data_of, quiet_trainer, run_all
from lightning_koopman import KoopmanPruner, MaskSet, prunable_parameters, remove_channels
from lightning_koopman.demo.experiments.cache import save as save_arrays
from lightning_koopman.parameters.reinitialize import reinitialize, select_modules
from lightning_koopman.pruning.optimizer_state import forget

STARTS, SEEDS = ("he", "xavier"), (0, 1, 2)
POINTS, FURTHER, SPARSITIES = (50, 100), 30, (0.75, 0.9)
LAST = POINTS[-1] + FURTHER
CHANNEL_POINT = POINTS[0]
# by the channels left of 16, 32 and 100: the share to remove, by layer; the first layer takes most of the time
LEFT = {
    "8, 16, 50": {"network.*.weight": 0.5},
    "4, 16, 50": {"network.0.weight": 0.75, "network.[37].weight": 0.5},
    "3, 16, 50": {"network.0.weight": 0.8, "network.[37].weight": 0.5},
    "4, 8, 25": {"network.*.weight": 0.75},
    "2, 5, 15": {"network.*.weight": 0.85},
}
ALL = {"window": None, "rule": "paper", "prefix": "paper"}  # as the paper: all snapshots, and the one mode at 1

# -- methods ----------------------------------------------------------------------------------------------------------


class Once(Callback):
    """Does something once, before the first epoch of a branch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not getattr(self, "done", False):
            self.done = True
            self.act(trainer, pl_module)

    def act(self, trainer: pl.Trainer, pl_module: Any) -> None:
        raise NotImplementedError


class Masked(Once):
    """Our masks from other scores: the weights' magnitude, or random numbers."""

    def __init__(self, score: Callable[[Tensor], Tensor], sparsity: float) -> None:
        self.score, self.sparsity = score, sparsity

    def act(self, trainer: pl.Trainer, pl_module: Any) -> None:
        scores = {name: self.score(weight.detach()) for name, weight in prunable_parameters(pl_module).items()}
        MaskSet.from_scores(scores, sparsity=self.sparsity).pin(pl_module, *trainer.optimizers)


class LightningPruning(ModelPruning, Once):
    """Lightning's own callback, at the same moment as the others."""

    def __init__(self, sparsity: float, module: Training) -> None:
        layers = [(layer, "weight") for layer in module.network if isinstance(layer, (nn.Conv2d, nn.Linear))]
        super().__init__("l1_unstructured", layers, amount=sparsity, apply_pruning=False, use_global_unstructured=True)

    def act(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.apply_pruning(self.amount)


class Reinitialized(Once):
    """All weights drawn anew, none pruned."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def act(self, trainer: pl.Trainer, pl_module: Any) -> None:
        reinitialize(list(select_modules(pl_module, None, self.scheme).values()), self.scheme, seed=0)
        forget(trainer.optimizers, pl_module.parameters())


class Removed(Once):
    """Channels removed by other scores, with the same tool: Torch-Pruning's magnitude, or random numbers."""

    def __init__(self, shares: dict[str, float], images: Tensor, drawn: torch.Generator | None = None) -> None:
        self.shares, self.images, self.drawn = shares, images, drawn

    def act(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for layers, share in self.shares.items():
            named = dict(pl_module.named_parameters())
            drawn = self.drawn
            scores = drawn and {name: torch.rand(each.shape, generator=drawn) for name, each in named.items()}
            remove_channels(
                pl_module,
                lambda module: module.network(self.images),
                sparsity=share,
                scores=scores,
                layers=layers,
                optimizers=trainer.optimizers,
            )


def channel_pruners(left: str, epoch: int, folder: str | Path) -> list[Callback]:
    """Pruners that remove channels, one for each group of layers."""
    return [
        KoopmanPruner(share, epoch=epoch, structured=True, parameters=layers, dirpath=folder, prefix=f"koopman{suffix}")
        for (layers, share), suffix in zip(LEFT[left].items(), ("", "/more"), strict=False)
    ]


def callbacks_of(run: Run, module: Training, folder: str) -> list[Callback]:
    """The callbacks that carry a method out."""
    if isinstance(run.amount, float):
        return [mask_callback(run.method, run.case, run.point, run.amount, module, folder)]
    if run.method == "koopman channels":
        return channel_pruners(run.amount, run.point, folder)
    drawn = torch.Generator().manual_seed(run.case.seed) if run.method.startswith("random") else None
    return [Removed(LEFT[run.amount], torch.zeros(1, 1, 28, 28), drawn)]


def mask_callback(method: str, case: Case, point: int, sparsity: float, module: Training, folder: str) -> Callback:
    drawn = torch.Generator().manual_seed(case.seed)
    if method.startswith("koopman"):
        options: dict[str, Any] = {"sparsity": sparsity, "epoch": point, "dirpath": folder}
        if method == "koopman, paper's rule":
            return KoopmanPruner(survivors="reconstruction", **options, **ALL)
        survivors = method.removeprefix("koopman, ")
        scheme = case.start if survivors == "reinit" else None
        return KoopmanPruner(survivors=survivors, scheme=scheme, **options)
    return {
        "magnitude": lambda: Masked(torch.abs, sparsity),
        "random mask": lambda: Masked(lambda weight: torch.rand(weight.shape, generator=drawn), sparsity),
        "ModelPruning": lambda: LightningPruning(sparsity, module),
        "dense, drawn anew": lambda: Reinitialized(case.start),
    }[method]()


METHODS = (
    "koopman, reconstruction",
    "koopman, keep",
    "koopman, reinit",
    "koopman, paper's rule",
    "magnitude",
    "ModelPruning",
    "random mask",
)
CHANNELS = ("koopman channels", "magnitude channels", "random channels")
UNPRUNED, DENSE = "unpruned", "dense, drawn anew"

# -- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One branch: a case, the epoch after which it is pruned, how, and how much."""

    case: Case
    point: int
    method: str
    amount: float | str
    """The sparsity of masks, or the channels left."""

    @property
    def name(self) -> str:
        method = self.method.replace(",", "").replace("'", "").replace(" ", "_")
        amount = self.amount.replace(", ", "-") if isinstance(self.amount, str) else f"{100 * self.amount:.0f}"
        return f"{self.case.name}-{self.point}-{method}-{amount}"


CASES = [Case("mnist", start, "adam", seed) for seed, start in product(SEEDS, STARTS)]


def runs_of(case: Case) -> Iterator[Run]:
    for point, sparsity, method in product(POINTS, SPARSITIES, METHODS):
        yield Run(case, point, method, sparsity)
    for point in POINTS:
        yield Run(case, point, DENSE, 0.0)
    for left, method in product(LEFT, CHANNELS):
        yield Run(case, CHANNEL_POINT, method, left)


class Scores(Callback):
    """Loss and accuracy on the test data at the start and after each epoch; on the training data at start and end."""

    def __init__(self, training: Any, test: Any) -> None:
        self.training, self.test = training, test
        self.train_losses: list[float] = []
        self.rows: list[tuple[float, float]] = []
        self.ends: list[tuple[float, float]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.total, self.count = torch.zeros(()), 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.rows:  # by now all methods have acted
            self.rows.append(pl_module.score(self.test))
            self.ends.append(pl_module.score(self.training))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.total += outputs["loss"].detach() * len(batch[0])
        self.count += len(batch[0])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.train_losses.append(float(self.total) / self.count)
        self.rows.append(pl_module.score(self.test))
        if trainer.current_epoch + 1 in (*POINTS, *(point + FURTHER for point in POINTS)):
            self.ends.append(pl_module.score(self.training))


def save(path: Path, scores: Scores, **more: Any) -> None:
    save_arrays(path, train_losses=scores.train_losses, test=scores.rows, train=scores.ends, **more)


def train_base(case: Case, root: Path | None, folder: Path) -> None:
    """Train a case to the end without pruning, with a checkpoint and its snapshots at each point."""
    torch.set_num_threads(1)
    training, _, test = data_of(case.problem, root)
    module, batches, scores, ckpt_path = Training(case), Batches(training, case.seed), Scores(training, test), None
    for stop in (*POINTS, LAST):
        leg = folder / f"{case.name}-{stop}"
        shutil.rmtree(leg, ignore_errors=True)  # of a run that was cut off
        never: dict[str, Any] = {"sparsity": 0.5, "settled_change": 1e-12, "dirpath": leg}
        callbacks = [KoopmanPruner(**never), KoopmanPruner(**never, **ALL), scores]
        if stop in POINTS:
            callbacks.append(ModelCheckpoint(leg, filename="base", every_n_epochs=stop))
        trainer = quiet_trainer(leg, max_epochs=stop, callbacks=callbacks, enable_checkpointing=stop in POINTS)
        trainer.fit(module, batches, ckpt_path=ckpt_path)
        ckpt_path = leg / "base.ckpt"
    shutil.rmtree(leg)
    save(folder / f"{case.name}.npz", scores)


def train_branch(run: Run, root: Path | None, folder: Path) -> None:
    """Prune a case at a point and train it on."""
    torch.set_num_threads(1)
    training, _, test = data_of(run.case.problem, root)
    module, scores = Training(run.case), Scores(training, test)
    with tempfile.TemporaryDirectory() as scratch:
        pruners = callbacks_of(run, module, scratch)
        trainer = quiet_trainer(scratch, max_epochs=run.point + FURTHER, callbacks=[*pruners, scores])
        batches = Batches(training, 1000 * run.case.seed + run.point)
        trainer.fit(module, batches, ckpt_path=folder / f"{run.case.name}-{run.point}" / "base.ckpt")
    weights = [layer.weight for layer in module.network if hasattr(layer, "weight")]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    size = sum(parameter.numel() for parameter in module.parameters())
    macs, _ = torch_pruning.utils.count_ops_and_params(module.network, training[0][:1])
    history = getattr(pruners[0], "history", None) or [{}]
    about = {key: float(history[0].get(key, np.nan)) for key in ("modes", "rank", "misfit", "magnitude_agreement")}
    save(folder / f"{run.name}.npz", scores, zeros=zeros, size=size, macs=macs, **about)


def train_all(cases: list[Case], root: Path | None, folder: Path, jobs: int) -> None:
    """Train what is missing: the bases first, then the branches."""
    folder.mkdir(parents=True, exist_ok=True)
    bases = [case for case in cases if not (folder / f"{case.name}.npz").exists()]
    run_all(jobs, [(case.name, LAST, train_base, (case, root, folder)) for case in bases])
    runs = [run for case in cases for run in runs_of(case) if not (folder / f"{run.name}.npz").exists()]
    run_all(jobs, [(run.name, FURTHER, train_branch, (run, root, folder)) for run in runs])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"))
    parser.add_argument("--output", type=Path, default=Path("pruning-runs"), help="folder of the recorded runs")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="trainings at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--threads", type=int, default=2, help="threads of the timed runs (default: 2)")
    parser.add_argument("--figures", type=Path, help="where figures and table go (default: the output folder)")
    options = parser.parse_args()
    from benchmarks import pruning_report, pruning_times  # which import from here

    cases, folder = [case for case in CASES if case.seed in options.seeds], options.output.absolute()
    train_all(cases, options.data_root, folder, options.jobs)
    pruning_report.print_tables(cases, folder)
    pruning_report.print_channels(cases, folder)
    target = options.figures or folder
    pruning_report.write_csv(cases, folder, target / "pruning.csv")
    for path in pruning_report.draw(cases, folder, target):
        print(path)
    pruning_times.run(options.data_root, options.threads)


if __name__ == "__main__":
    main()
