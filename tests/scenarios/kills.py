"""Compare training runs that are killed at random moments and resumed with an uninterrupted run.

``python tests/scenarios/kills.py --runs 60 --seed 0`` runs many; the tests run a few.  A run is killed with signal 9
after a random time, while a row of snapshots is written, before a file is renamed, before, during or after the write of
a checkpoint, or after a step.  It is then resumed from its last checkpoint, up to three times.  Spectra (to 1e-12),
masks, decisions, histories and weights must equal those of the uninterrupted run.

No checkpoint is written between an epoch's last batch and its end: when a run is resumed twice from such checkpoints,
Lightning 2.6 itself trains too many batches (51 instead of 48, without any callback).
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning_fabric.plugins.io.torch_io as torch_io
import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from tqdm import tqdm

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    KoopmanWeightAveraging,
    RestartOnBadInitialization,
)
from lightning_koopman.trajectory import sidecar

EPOCHS, BATCHES = 22, 8
VARIANTS: dict[str, dict[str, Any]] = {
    "every": {"every_n_epochs": 1},
    "sparse": {"every_n_epochs": 4},
    "within": {"every_n_train_steps": 5},
    "steps": {"every_n_train_steps": 3},
    "reconstruction": {"every_n_epochs": 1},
    "reinit": {"every_n_epochs": 1},
}
KINDS = ("time", "time", "time", "row", "rename", "before", "after", "within", "step")


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Resumable:
    """Batches from which Lightning can resume within an epoch."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(1)
        x = torch.randn(8 * BATCHES, 8, generator=random)
        y = torch.sin(x[:, 0]) + 0.3 * x[:, 1]
        self.batches, self.at, self.start = list(zip(x.split(8), y.split(8), strict=True)), 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.at, self.start = self.start, 0
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"] % len(self.batches)


class Save(pl.callbacks.ModelCheckpoint):
    """Skip the checkpoints from which Lightning cannot resume twice."""

    def on_train_batch_end(self, trainer: Any, *given: Any) -> None:
        if trainer.global_step % BATCHES:
            super().on_train_batch_end(trainer, *given)


def callbacks(variant: str) -> list[Any]:
    every = {"every_n_steps": 6} if variant == "steps" else {}
    survivors = variant if variant in ("reconstruction", "reinit") else "keep"
    return [
        KoopmanSpectrumMonitor(window=9, prefix="plain", **every),
        KoopmanSpectrumMonitor(window=None, prefix="all", storage="disk", **every),
        KoopmanSpectrumMonitor(window=9, prefix="half", dtype="bfloat16", **every),
        KoopmanSpectrumMonitor(window=9, prefix="sketch", storage="sketch", sketch=61, **every),
        KoopmanSpectrumMonitor("train_loss", window=12, prefix="loss", **every),
        RestartOnBadInitialization(4, **every),
        EarlyStopOnUnitEigenvalues(mode="report", horizon=6, tolerance=0.2, fraction=0.3, **every),
        KoopmanWeightAveraging("tail", length=4, **every),
        KoopmanPruner(0.6, epoch=7, rounds=3, round_epochs=4, window=9, survivors=survivors, **every),
    ]


def run(variant: str, folder: Path, resume: str | None, kill: tuple[str, Any] | None) -> None:
    """Train in this process, which may be killed, and write the results to compare at the end."""
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    own = callbacks(variant)
    if kill is not None:
        arm(*kill, own)
    save = Save(folder / "c", save_last=True, save_top_k=1, **VARIANTS[variant])
    trainer = pl.Trainer(
        max_epochs=EPOCHS, callbacks=[*own, save], accelerator="cpu", default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Net()
    (folder / "started").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, Resumable(), ckpt_path=resume)
    found: dict[str, Any] = {
        "weights": {name: value.numpy() for name, value in module.state_dict().items()},
        "warnings": sorted({str(each.message) for each in caught if "Koopman" in each.category.__name__}),
    }
    for callback in own:
        if isinstance(callback, pl.Callback) and hasattr(callback, "history"):
            table = callback.history_path
            found[f"{type(callback).__name__} {callback.prefix}"] = {
                "history": [{key: value for key, value in row.items() if key != "seconds"} for row in callback.history],
                "rows": len(table.read_text().splitlines()) if callback.columns and table is not None else 0,
                "epochs": callback.recorder.epochs,
                "spectrum": [
                    (spectrum.eigenvalues, spectrum.residuals)
                    for spectrum in [getattr(callback, "spectrum", None)]
                    if spectrum is not None
                ],
                "masks": {name: mask.numpy() for name, mask in (getattr(callback, "masks", None) or {}).items()},
                "baseline": getattr(callback, "chance", None),
                "message": getattr(callback, "message", ""),
            }
    (folder / "result").write_bytes(pickle.dumps(found))


def arm(kind: str, count: Any, own: list[Any]) -> None:
    """Make this process kill itself at the `count`-th event of a kind."""

    def at(owner: Any, name: str, before: bool, cut: Callable[..., None] | None = None) -> None:
        original, calls = getattr(owner, name), [0]

        def counted(*given: Any, **named: Any) -> Any:
            calls[0] += 1
            last = calls[0] == count
            if last and cut is not None:
                cut(*given)
            if last and before:
                os.kill(os.getpid(), 9)
            found = original(*given, **named)
            if last:
                os.kill(os.getpid(), 9)
            return found

        setattr(owner, name, counted)

    def half(row: torch.Tensor, file: Any) -> None:
        data = row.contiguous().view(torch.uint8).numpy().tobytes()
        file.write(data[: len(data) // 2])
        file.flush()

    if kind == "row":
        at(sidecar, "_dump", True, half)
    elif kind == "rename":
        at(Path, "replace", True)
    elif kind in ("before", "after"):
        at(torch_io, "_atomic_save", kind == "before")
    elif kind == "within":
        from fsspec.implementations.local import LocalFileOpener

        at(LocalFileOpener, "write", True)
    elif kind == "step":

        class Kill(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if trainer.global_step == count:
                    os.kill(os.getpid(), 9)

        own.insert(0, Kill())


def child(variant: str, folder: Path, resume: str | None, kill: tuple[str, Any] | None = None) -> tuple[int, float]:
    """Run in a child process; return its exit status (9 if killed) and its training time in seconds."""
    started = folder / "started"
    started.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 0
        with (folder / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                run(variant, folder, resume, None if kill is None or kill[0] == "time" else kill)
            except BaseException:
                traceback.print_exc()
                code = 7
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    begun, fitted = time.time(), 0.0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = 9 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            return code, time.time() - (fitted or begun)
        if not fitted and started.exists():
            fitted = time.time()
        late = time.time() - begun > 120
        if late or (kill is not None and kill[0] == "time" and fitted and time.time() - fitted > kill[1]):
            os.kill(pid, 9)
        time.sleep(0.002)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the places where two results differ."""
    if isinstance(a, dict):
        keys = [f"{path}: {set(a) ^ set(b)}"] if set(a) != set(b) else []
        return keys + [each for key in a.keys() & b.keys() for each in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return [each for i, pair in enumerate(zip(a, b, strict=True)) for each in differences(*pair, f"{path}[{i}]")]
    if isinstance(a, (float, np.ndarray)) and np.asarray(a).dtype != bool:
        same = np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
    else:
        same = bool(np.all(a == b))
    return [] if same else [f"{path}: {a!r} and {b!r}"[:300]]


class Kills:
    """Killed runs compared with uninterrupted ones, which run once."""

    def __init__(self, root: Path) -> None:
        self.root, self.kills = root, 0
        self._whole: dict[str, tuple[Any, float]] = {}

    def whole(self, variant: str) -> tuple[Any, float]:
        """Return the result of the uninterrupted run and its time in seconds."""
        if variant not in self._whole:
            folder = self.root / f"whole-{variant}"
            folder.mkdir()
            code, seconds = child(variant, folder, None)
            assert code == 0, (folder / "log").read_text()[-3000:]
            self._whole[variant] = pickle.loads((folder / "result").read_bytes()), seconds
        return self._whole[variant]

    def compare(self, variant: str, number: int, seed: int) -> tuple[list[str], list[Any]]:
        """Return where a run that is killed up to three times differs, and how it was killed."""
        draw, (expected, seconds) = random.Random(f"{seed}-{number}"), self.whole(variant)
        folder = self.root / f"killed-{number}-{variant}"
        folder.mkdir()
        resume, story = None, []
        for attempt in range(draw.choice([1, 1, 2, 3]) + 1):
            kind = draw.choice(KINDS)
            most = {"row": 150, "rename": 30, "step": 150, "within": 25}.get(kind, 25)
            count = draw.uniform(0.02, 0.95) * seconds if kind == "time" else draw.randint(1, most)
            kill = None if attempt == 3 else (kind, count)
            code, _ = child(variant, folder, resume, kill)
            story.append((kill, code))
            if code not in (0, 9):
                return [(folder / "log").read_text()[-1500:]], story
            last = folder / "c" / "last.ckpt"
            resume = str(last) if last.exists() else None
            if code == 9 and resume and torch.load(last, weights_only=True)["global_step"] == EPOCHS * BATCHES:
                return [], story  # killed after the last step
            if code == 0:
                break
            self.kills += 1
        if code == 9:
            code, _ = child(variant, folder, resume)
            story.append((None, code))
        if code:
            return [(folder / "log").read_text()[-1500:]], story
        found = differences(expected, pickle.loads((folder / "result").read_bytes()))
        if not found:
            shutil.rmtree(folder)
        return found, story


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        kills, bad = Kills(Path(root)), 0
        for number in tqdm(range(options.runs), unit="run"):
            variant = list(VARIANTS)[number % len(VARIANTS)]
            found, story = kills.compare(variant, number, options.seed)
            if found:
                bad += 1
                tqdm.write(f"{number} {variant} {story}: {len(found)} differences, {found[:4]}")
        print(f"{options.runs} runs, {kills.kills} kills, {options.runs - bad} as uninterrupted")
    return min(bad, 100)


if __name__ == "__main__":
    raise SystemExit(main())
