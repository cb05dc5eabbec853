"""Trainings in several processes, for the tests of sharded strategies.

Each process writes what its callbacks hold. The first also writes the whole weights after each epoch, gathered by
PyTorch itself, from which the tests compute the single-process result.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    KoopmanWeightAveraging,
    Phase,
    ReduceLROnNoiseFloor,
    RestartOnBadInitialization,
)
from lightning_koopman.parameters.sharded_modules import local_chunks

# processes are forked from one that has imported what takes seconds
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["lightning.pytorch", "pytorch_lightning", "sklearn.datasets", "torch.distributed.fsdp", "lightning_koopman"]
)
KINDS = {
    "monitor": KoopmanSpectrumMonitor,
    "stop": EarlyStopOnUnitEigenvalues,
    "prune": KoopmanPruner,
    "restart": RestartOnBadInitialization,
    "average": KoopmanWeightAveraging,
    "reduce": ReduceLROnNoiseFloor,
}


def environments(devices: int) -> list[dict[str, str]]:
    """Return each process's environment as set by torchrun; Lightning's own launcher sleeps for seconds first."""
    if devices == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    size = str(devices)
    return [
        {**shared, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        for rank in map(str, range(devices))
    ]


def run_processes(work: Callable[[Any], None], options: Any, devices: int, folder: Path) -> tuple[list[int], str]:
    """Call a function in several processes of a training; return their exit codes, and the ends of what they wrote."""
    given = enumerate(environments(devices))
    started = [FORKS.Process(target=_enter, args=(work, options, env, folder, rank)) for rank, env in given]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    codes = [-1 if process.exitcode is None else process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes, "".join(log.read_text()[-2000:] for log in sorted(folder.glob("std*")))


def _enter(work: Callable[[Any], None], options: Any, environment: dict[str, str], folder: Path, rank: int) -> None:
    os.environ.update(environment)
    for stream, name in enumerate(("stdout", "stderr"), start=1):
        with (folder / f"{name}{rank}").open("w") as file:
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    work(options)


def run_script(options: tuple[Path, list[str], Path]) -> None:
    """Run a script with its arguments in a folder, as the main program on the CPU."""
    script, arguments, folder = options
    os.chdir(folder)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.argv = [str(script), *arguments]
    warnings.simplefilter("ignore")
    runpy.run_path(str(script), run_name="__main__")


def make_module(pl: Any, options: dict[str, Any]) -> Any:
    """Build a classifier of digits on ``pl``, one of the two names of Lightning."""

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(64, 25), nn.LayerNorm(25), nn.ReLU(), nn.Linear(25, 10))
            if options.get("scale"):
                with torch.no_grad():
                    for parameter in self.net.parameters():
                        parameter.mul_(options["scale"])
            bunch = load_digits()
            self.x = torch.as_tensor(bunch.images[:320], dtype=torch.float32).reshape(-1, 64) / 16
            self.y = torch.as_tensor(bunch.target[:320])

        def configure_model(self) -> None:
            if options["strategy"] not in ("fsdp2", "hybrid"):
                return
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            if options["strategy"] == "hybrid":  # replicated over one dimension, sharded over the other
                mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            for layer in (self.net[0], self.net[3], self.net):
                fully_shard(layer, mesh=mesh)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if options.get("dies") == [self.trainer.current_epoch, self.trainer.global_rank]:
                os._exit(3)
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=options.get("lr", 1e-2))

        def _loader(self) -> Any:
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(self.x, self.y), batch_size=32)

        train_dataloader = val_dataloader = _loader

    return Classifier()


def make_strategy(pl: Any, kind: str, devices: int, *, sharded: bool = True) -> Any:
    if kind in ("fsdp2", "hybrid"):
        sizes = {"data_parallel_size": devices, "tensor_parallel_size": 1, "save_distributed_checkpoint": sharded}
        return pl.strategies.ModelParallelStrategy(**sizes, process_group_backend="gloo")
    if kind == "fsdp":
        # overrides the checks of Lightning and PyTorch that refuse FSDP on the CPU
        class OnCPU(pl.strategies.FSDPStrategy):
            @contextmanager
            def model_sharded_context(self) -> Any:
                yield

            def _setup_model(self, model: nn.Module) -> nn.Module:
                from torch.distributed.fsdp import FullyShardedDataParallel

                return FullyShardedDataParallel(
                    model, device_id=torch.device("cpu"), **self.kwargs
                )  # for PyTorch's own CPU check

        saved = "sharded" if sharded else "full"
        return OnCPU(auto_wrap_policy={nn.Linear}, state_dict_type=saved, process_group_backend="gloo")
    return pl.strategies.DDPStrategy(process_group_backend="gloo") if kind == "ddp" else "auto"


def whole_weights(trainer: Any, module: Any) -> np.ndarray:
    """Return all weights, gathered by PyTorch."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    root = trainer.strategy.model
    if isinstance(root, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(root, writeback=False):
            found = {
                name.replace("_fsdp_wrapped_module.", ""): each.detach().clone()
                for name, each in module.named_parameters()
            }
        order = list(local_chunks(root))
        values = [found[name] for name in order]
    else:
        local_chunks(module)  # reshards gathered parameters
        values = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in module.parameters()]
    return torch.cat([each.detach().reshape(-1) for each in values]).numpy()


def train(options: dict[str, Any]) -> None:
    """Train in this process, and save what its callbacks hold."""
    pl = import_module(options.get("root", "pytorch_lightning"))
    folder = Path(options["folder"])

    class Witness(pl.Callback):
        def __init__(self) -> None:
            self.whole: list[np.ndarray] = []
            self.spectra: list[Any] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.whole.append(whole_weights(trainer, pl_module))

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            now = whole_weights(trainer, pl_module)
            if not np.array_equal(now, self.whole[-1]):  # changed by a callback
                self.whole.append(now)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if options.get("steps") and trainer.global_step % options["steps"] == 0:
                self.whole.append(whole_weights(trainer, pl_module))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if not options.get("steps"):
                self.whole.append(whole_weights(trainer, pl_module))
            self.look(trainer.current_epoch + 1)

        def look(self, epoch: int) -> None:
            for (kind, _), callback in zip(options["callbacks"], callbacks, strict=True):
                recorder = callback.recorder
                if kind == "monitor" and len(recorder) > 2:
                    spectrum = recorder.trajectory.spectrum()
                    self.spectra.append((list(recorder.epochs), spectrum.eigenvalues, spectrum.residuals))

    callbacks = [KINDS[kind](**given, dirpath=folder / "out") for kind, given in options["callbacks"]]
    if options.get("hovers"):  # make every reading report hovering
        for callback in callbacks:
            callback.recording.read = lambda *given, read=callback.recording.read: replace(
                read(*given), phase=Phase.HOVERING
            )
    witness = Witness()
    save = pl.callbacks.ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=options["devices"],
        strategy=make_strategy(
            pl, options["strategy"], options["devices"], sharded=options.get("sharded_checkpoints", True)
        ),
        max_epochs=options["epochs"],
        callbacks=[*callbacks, witness, save],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=True,
    )
    module = make_module(pl, options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, ckpt_path=options.get("checkpoint"))
    found: dict[str, Any] = {
        "warnings": [str(each.message) for each in caught if "Koopman" in each.category.__name__],
        "whole": np.stack(witness.whole),
        "spectra": witness.spectra,
        "final": whole_weights(trainer, module),
        "stopped": trainer.current_epoch,
        "names": list(local_chunks(trainer.strategy.model if options["strategy"] == "fsdp" else module)),
    }
    for (kind, _), callback in zip(options["callbacks"], callbacks, strict=True):
        own: dict[str, Any] = {"history": callback.history, "times": callback.recorder.epochs}
        trajectory = callback.recorder.trajectory
        if trajectory is not None and len(trajectory) > 1:
            own |= {"eigenvalues": trajectory.spectrum().eigenvalues, "n": trajectory.n, "total": trajectory.total}
        if kind == "monitor" and callback.spectrum is not None:
            own["spectrum"] = callback.spectrum.eigenvalues
        if kind == "prune" and callback.masks is not None:
            own["masks"] = callback.masks.state_dict()
        if kind == "average":
            own["losses"] = callback.average.losses
        if kind == "reduce":
            own |= {"reductions": callback.reductions, "rates": callback.rates}
        if kind in ("stop", "restart"):
            own["message"] = callback.message
        if kind == "restart":
            own["restarts"] = callback.restarts
        found[kind] = own
        found.setdefault("all", []).append(own)
    torch.save(found, folder / f"rank{trainer.global_rank}.pt")
