"""What real runs do to the callbacks: several optimizers, steps without a loss, lost files, other intervals."""

from __future__ import annotations

import copy
import shutil
from types import MethodType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hovering import Net
from problems import koopman_warnings
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner import Tuner
from torch import nn

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    KoopmanWarning,
    KoopmanWeightAveraging,
    ReduceLROnNoiseFloor,
    RestartOnBadInitialization,
)
from lightning_koopman.parameters.process_group import Processes
from lightning_koopman.parameters.reinitialize import reinitialize_by_name, select_modules, without_reset

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # resumed with other callbacks


class Adversarial(Net):
    """The generator's loss goes through fakes that were drawn before the discriminator's step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.judge = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(), nn.Linear(32, 1))

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.generator, self.judge)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        fakes = self.generator(torch.randn(8, 4, device=self.device))
        generator, judge = self.optimizers()
        for optimizer, given, sign in ((judge, fakes.detach(), 1.0), (generator, fakes, -1.0)):
            optimizer.zero_grad()
            self.manual_backward(sign * self.judge(given).mean())
            optimizer.step()


def test_a_step_leaves_the_pruned_weights_of_other_optimizers_alone(fit):
    pruner, module = KoopmanPruner(0.5, epoch=4), Adversarial()
    fit(module, pruner, epochs=7, limit_val_batches=0)
    assert pruner.achieved == pytest.approx(0.5, abs=0.01)
    assert int((module.generator[0].weight == 0).sum()) > 0


def test_weights_that_masks_cannot_reach_are_named(fit):
    module = Net()
    nn.utils.parametrizations.weight_norm(module.net[0])
    with pytest.warns(KoopmanWarning, match="2 weights such as 'net.0.parametrizations.*are not pruned"):
        fit(module, KoopmanPruner(0.5, epoch=2), epochs=3)


class Plain(Net):
    """Without biases, and with a step that returns no loss now and then."""

    def __init__(self, silent: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.silent = silent
        self.net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if self.trainer.current_epoch == 0 and batch_idx in self.silent else loss


@pytest.mark.parametrize("silent", [(), (1,)])
@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_the_baseline_is_measured_without_biases_and_past_a_silent_step(fit, silent):
    restart = RestartOnBadInitialization(3)
    fit(Plain(silent), restart, epochs=9, limit_val_batches=0)
    assert restart.baseline_loss.value is not None
    assert silent or "the start was judged good, after epoch" in restart.message


def test_a_start_that_cannot_be_judged_is_not_called_good(fit):
    restart = RestartOnBadInitialization(3)
    with pytest.warns(KoopmanWarning, match="the baseline loss cannot be measured"):
        fit(Adversarial(), restart, epochs=5, limit_val_batches=0)
    assert "the start was not judged, since the baseline loss is unknown, after epoch 3." in restart.message


def test_nothing_is_logged_twice_through_the_trainer(fit, tmp_path):
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.trainer.logger.log_metrics({"mine": 1.0}, step=self.trainer.global_step)
            self.trainer.logger.experiment.calls = getattr(self.trainer.logger.experiment, "calls", 0) + 1
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    trainer = fit(Logs(), EarlyStopOnUnitEigenvalues(), KoopmanWeightAveraging(), epochs=4, logger=logger)
    assert logger.experiment.calls == trainer.global_step


def test_a_folder_deleted_between_two_fits_is_made_again(fit, tmp_path):
    monitor, module = KoopmanSpectrumMonitor(storage="disk", dirpath=tmp_path / "out"), Net()
    trainer = fit(module, monitor, epochs=4)
    shutil.rmtree(tmp_path / "out")
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module)
    assert len(monitor.recorder) >= 3


def test_checkpoints_are_saved_whatever_a_module_keeps_in_them(fit, tmp_path):
    class Keeps(Net):
        def get_extra_state(self) -> Any:
            return (self.net[0].weight * 2).sum()  # its graph cannot be copied

        def set_extra_state(self, state: Any) -> None:
            pass

    save = ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(Keeps(), KoopmanWeightAveraging(length=2), save, epochs=3, enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == 3


def test_callbacks_that_share_a_trajectory_warn_of_it_once(fit):
    class Breaks(Net):
        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 3:
                nn.init.constant_(self.net[0].weight, torch.nan)

    callbacks = [KoopmanSpectrumMonitor(), ReduceLROnNoiseFloor(), KoopmanWeightAveraging("tail", length=2)]
    with pytest.warns(KoopmanWarning) as caught:
        fit(Breaks(), *callbacks, epochs=7)
    assert len([told for told in koopman_warnings(caught) if "NaN or infinite" in told]) == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (KoopmanWeightAveraging, {"every_n_epochs": 2}),
        (ReduceLROnNoiseFloor, {"every_n_epochs": 2}),
        (RestartOnBadInitialization, {"every_n_steps": 3}),
    ],
)
def test_snapshots_of_another_interval_are_not_continued(fit, tmp_path, before, after):
    save = ModelCheckpoint(tmp_path, save_last=True)
    fit(Net(), before(dirpath=tmp_path / "a"), save, epochs=4, enable_checkpointing=True)
    resumed = before(**after, dirpath=tmp_path / "b")
    with pytest.warns(KoopmanWarning, match="a new trajectory starts") as caught:
        fit(Net(), resumed, epochs=10, ckpt_path=tmp_path / "last.ckpt")
    assert len(koopman_warnings(caught)) == 1
    steps = set(torch.tensor(resumed.recorder.epochs).diff().tolist())
    assert len(steps) <= 1


@pytest.mark.parametrize("what", ["*.bin", ""])
def test_files_deleted_in_mid_run_are_written_again(fit, tmp_path, what):
    class Deletes(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 5:
                for path in list((tmp_path / "out" / "koopman").glob(what)) if what else []:
                    path.unlink()
                if not what:
                    shutil.rmtree(tmp_path / "out")

    save = ModelCheckpoint(tmp_path / "c", save_top_k=-1, filename="{epoch}")
    fit(Net(), KoopmanSpectrumMonitor(dirpath=tmp_path / "out"), Deletes(), save, epochs=8, enable_checkpointing=True)
    resumed = KoopmanSpectrumMonitor(dirpath=tmp_path / "out")
    fit(Net(), resumed, epochs=9, ckpt_path=tmp_path / "c" / "epoch=7.ckpt")
    assert resumed.recorder.epochs == list(range(10))


def test_snapshots_that_could_not_be_saved_are_missed_aloud(fit, tmp_path, monkeypatch):
    save = ModelCheckpoint(tmp_path, save_last=True)
    monitor = KoopmanSpectrumMonitor(dirpath=tmp_path / "a")

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lightning_koopman.trajectory.sidecar._dump", full)
    with pytest.warns(KoopmanWarning, match="No space left"):
        fit(Net(), monitor, save, epochs=3, enable_checkpointing=True)
    monkeypatch.undo()
    with pytest.warns(KoopmanWarning, match="could not be saved with it: a new trajectory starts"):
        fit(Net(), KoopmanSpectrumMonitor(dirpath=tmp_path / "b"), epochs=5, ckpt_path=tmp_path / "last.ckpt")


def test_a_module_without_reset_goes_back_to_its_first_values(fit):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.scale = nn.Linear(6, 6), nn.Parameter(torch.full((6,), 0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scale * self.inside(x)

    class Breaks(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(Scaled(), nn.Linear(6, 1))
            self.found: list[list[float]] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.found.append(self.net[0].scale.tolist())

        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 1:
                nn.init.constant_(self.net[0].scale, torch.nan)

    restart, module = RestartOnBadInitialization(2), Breaks()
    with pytest.warns(KoopmanWarning, match="NaN or infinite"):
        fit(module, restart, epochs=4, limit_val_batches=0)
    assert [row["epoch"] for row in restart.restarts] == [2]
    batches = len(module.found) // 4
    assert module.found[2 * batches] == [0.5] * 6


def test_models_of_transformers_initialize_themselves():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **small))
    chosen = select_modules(network, None, None)
    assert not without_reset(network, chosen, None)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(7.0)
    reinitialize_by_name(network, list(chosen), None, seed=0, processes=Processes())
    norm, query = network.model.layers[0].input_layernorm.weight, network.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(norm, torch.ones(32))
    assert float(query.detach().std()) == pytest.approx(network.config.initializer_range, rel=0.1)


class Steering(Net):
    """A step that ends training if the loss is high, and changes the rate and the data module by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3].bias.data.fill_(0.1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trainer.datamodule.steps += 1
        for group in (*self.optimizers().param_groups, *self.trainer.optimizers[0].param_groups):
            group["lr"] *= 0.99
        loss = super().training_step(batch, batch_idx)
        if not any(self.net[3].bias):  # as in the copy that the baseline loss is measured with
            self.trainer.should_stop = True
        return loss


class Counting(pl.LightningDataModule):
    def __init__(self, module: Net) -> None:
        super().__init__()
        self.module, self.steps = module, 0

    def train_dataloader(self) -> Any:
        return self.module.train_dataloader()

    def val_dataloader(self) -> Any:
        return self.module.val_dataloader()


def quiet(tmp_path: Any, *callbacks: Callback, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", limit_val_batches=0, logger=False,
        default_root_dir=tmp_path, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [KoopmanWeightAveraging, EarlyStopOnUnitEigenvalues, RestartOnBadInitialization])
def test_what_a_step_changes_in_the_run_is_changed_by_the_run_alone(tmp_path, kind):
    found = []
    for callbacks in ([], [kind()]):
        module = Steering()
        ours = quiet(tmp_path, *callbacks, epochs=5)
        data = Counting(module)
        ours.fit(module, datamodule=data)
        found.append((ours.current_epoch, data.steps, ours.optimizers[0].param_groups[0]["lr"]))
    assert found[0] == found[1]


def test_a_step_that_is_set_on_the_module_is_the_one_that_is_measured(fit):
    losses = []
    for times in (1, 100):
        module, stop = Net(), EarlyStopOnUnitEigenvalues(mode="report")
        if times > 1:

            def step(self: Net, batch: Any, _: int) -> torch.Tensor:
                return 100 * nn.functional.mse_loss(self.net(batch[0]), batch[1])

            module.training_step = MethodType(step, module)
        fit(module, stop, epochs=6, limit_val_batches=0)
        losses.append(stop.chance.loss)
    assert losses[1] == pytest.approx(100 * losses[0])


@pytest.mark.filterwarnings("ignore:.*global hook.*", "ignore:.*torch.jit.script.*")
def test_compiled_parts_are_compiled_no_more_often(fit):
    made = []

    def backend(graph: Any, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    counts = []
    for callbacks in ([], [EarlyStopOnUnitEigenvalues(mode="report"), KoopmanWeightAveraging()]):
        torch._dynamo.reset()
        made.clear()
        module = Net()
        module.net = torch.compile(module.net, backend=backend)
        fit(module, *callbacks, epochs=6, limit_val_batches=0)
        counts.append(len(made))
    assert counts[0] == counts[1] > 0


def test_what_cannot_be_copied_is_named(fit):
    module = Net()
    module.more = (each for each in range(3))
    with pytest.warns(KoopmanWarning, match="'more' of the module cannot be copied"):
        fit(module, EarlyStopOnUnitEigenvalues(mode="report"), epochs=3, limit_val_batches=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize(
    "callback",
    [
        KoopmanPruner(0.5, epoch=3),
        KoopmanPruner(0.5, epoch=3, structured=True),
        RestartOnBadInitialization(2, baseline_loss=1e-9, max_restarts=1),
        RestartOnBadInitialization(2, scheme="he", baseline_loss=1e-9, max_restarts=1),
    ],
)
def test_scripted_parts_are_trained_like_others(fit, callback):
    module = Net()
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 12)))
    module.net = nn.Sequential(scripted, nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1))
    assert fit(module, copy.deepcopy(callback), epochs=5, limit_val_batches=0).current_epoch >= 4


def test_a_sparse_buffer_does_not_end_a_training_before_it_begins(fit):
    module = Net()
    module.register_buffer("graph", torch.eye(3).to_sparse())
    assert fit(module, RestartOnBadInitialization(), epochs=3, limit_val_batches=0).current_epoch == 3


def test_a_search_for_the_learning_rate_leaves_the_folder_to_the_run(tmp_path):
    module, monitor = Net(), KoopmanSpectrumMonitor(dirpath=tmp_path)
    ours = quiet(tmp_path, monitor, epochs=4)
    Tuner(ours).lr_find(module, num_training=20)
    ours.fit(module)
    assert monitor.history_path == tmp_path / "koopman" / "history.csv"
    assert [path.name for path in tmp_path.glob("koopman*")] == ["koopman"]


def test_a_home_folder_is_found(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monitor = KoopmanSpectrumMonitor(dirpath="~/runs")
    fit(Net(), monitor, epochs=1)
    assert monitor.history_path == tmp_path / "runs" / "koopman" / "history.csv"
