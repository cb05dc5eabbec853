"""The monitor on a network of a billion weights, on one machine: memory and time an epoch.

The weights are synthetic shards, one for each of some processes (DTensors under Lightning's ``ModelParallelStrategy``):
half of what they are off their limit decays by 0.97 an epoch, half by 0.8, and a random walk slows down beside it.  The
training is that alone; what is measured is the monitor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trajectory.spectrum import memory

TENSORS, COLUMNS = 50, 1000  # matrices that share the weights, and their columns
WAYS = {
    "sketch": {"storage": "sketch"},
    "disk": {"storage": "disk"},
    "bfloat16": {"storage": "disk", "dtype": "bfloat16"},
    "ram": {"storage": "ram"},
}


def worker(options: dict[str, Any]) -> None:
    """Train in this process and in those that Lightning starts; each writes its own measurements."""
    import pytorch_lightning as pl
    import torch
    from torch.distributed.tensor import Shard, distribute_tensor

    from lightning_koopman import KoopmanSpectrumMonitor
    from lightning_koopman.demo.experiments.training import quiet_trainer

    torch.set_num_threads(max(1, torch.get_num_threads() // options["processes"]))

    class Synthetic(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.weights = torch.nn.ParameterList()

        def configure_model(self) -> None:
            torch.manual_seed(self.global_rank)
            mesh = self.device_mesh["data_parallel"]
            for _ in range(TENSORS if not self.weights else 0):
                # on the meta device first, so that no process ever holds the whole
                whole = torch.empty(int(options["parameters"]) // (TENSORS * COLUMNS), COLUMNS, device="meta")
                self.weights.append(torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
            self.to_empty(device="cpu")
            self.noise = torch.randn(2**22)
            for weight in self.weights:
                weight.data.to_local().normal_()

        def training_step(self, batch: Any, batch_idx: int) -> None:
            at = torch.randint(2**21, ()).item()
            size = 0.01 / (1 + self.current_epoch)
            for weight in self.weights:
                local = weight.data.to_local().view(-1)
                local[::2].mul_(0.97)
                local[1::2].mul_(0.8)
                for piece in local.split(2**21):
                    piece.add_(self.noise[at : at + piece.numel()], alpha=size)

        def configure_optimizers(self) -> None:
            return None

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.zeros(1))

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.epochs: list[float] = []

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.epochs.append(time.perf_counter() - self.started)
            if trainer.is_global_zero:
                print(f"  epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {self.epochs[-1]:.1f} s, of which "
                      f"the monitor {monitor.history[-1]['seconds']:.1f} s; peak memory of this process "
                      f"{memory('VmHWM') / 1024:.1f} GiB", flush=True)  # fmt: skip

    folder = Path(options["folder"])
    monitor = KoopmanSpectrumMonitor(window=options["window"], dirpath=folder, **WAYS[options["way"]])
    clock = Clock()
    trainer = quiet_trainer(
        folder,
        devices=options["processes"],
        strategy=pl.strategies.ModelParallelStrategy(
            data_parallel_size=options["processes"], tensor_parallel_size=1, process_group_backend="gloo"
        ),
        max_epochs=options["epochs"],
        callbacks=[monitor, clock],
    )
    module = Synthetic()
    trainer.fit(module)
    trajectory = monitor.trajectory
    assert trajectory is not None
    found = {
        "peak": memory("VmHWM") / 1024,
        "weights": sum(weight.data.to_local().numel() for weight in module.weights) * 4 / 2**30,
        "epoch": float(np.median(clock.epochs[-3:])),
        "monitor": float(np.median([row["seconds"] for row in monitor.history[-3:]] or [0])),
        "disk": trajectory.nbytes / 2**30 if trajectory.storage == "disk" else 0.0,
        "total": trajectory.total,
        "eigenvalues": [[value.real, value.imag] for value in trajectory.spectrum().eigenvalues[:3]],
        "sketch_error": None if (spectrum := monitor.spectrum) is None else spectrum.sketch_error(),
    }
    (folder / f"measured-{trainer.global_rank}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--parameters", type=float, default=1e9, help="weights in all (default: 1e9)")
    parser.add_argument("--processes", type=int, default=2, help="shards (default: 2)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["sketch", "bfloat16", "disk"])
    parser.add_argument("--window", type=int, default=8, help="snapshots kept (default: 8)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="where the snapshots go (default: a temporary folder)")
    options = parser.parse_args()
    rows = []
    for way in options.ways:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(f"{way}: {options.parameters:.0e} weights in {options.processes} processes", flush=True)
            asked = {**vars(options), "way": way, "folder": folder}
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.trajectory.scale", json.dumps(asked)]
            subprocess.run(command, check=True)
            shards = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("measured-*.json"))]
            rows.append((way, shards))
    print(f"\n{options.parameters:.0e} weights in {options.processes} processes, window of {options.window} snapshots, "
          f"{shutil.disk_usage('/').total / 2**30:.0f} GiB disk")  # fmt: skip
    print(f"{'kept as':<10} {'peak memory':>12} {'of it weights':>14} {'on disk':>9} {'epoch':>8} {'monitor':>8}  "
          "largest eigenvalues")  # fmt: skip
    for way, shards in rows:
        peak, weights, disk = (sum(shard[key] for shard in shards) for key in ("peak", "weights", "disk"))
        first = shards[0]
        values = ", ".join(f"{real:.4f}" for real, _ in shards[0]["eigenvalues"])
        error = shards[0]["sketch_error"]
        shown = f" ± {error:.1g}" if error and error == error else ""
        print(f"{way:<10} {peak:>8.1f} GiB {weights:>10.1f} GiB {disk:>5.1f} GiB {first['epoch']:>6.1f} s "
              f"{first['monitor']:>6.1f} s  {values}{shown}")  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        worker(json.loads(sys.argv[1]))
    else:
        main()
