"""Restarts in real training runs, under both import roots."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanSpectrumMonitor,
    KoopmanWarning,
    RestartOnBadInitialization,
    StoppingReason,
)


@pytest.fixture
def network(classifier):
    """Classifiers with a named initialization, without batch norm, which would correct any scale."""

    class Plain(classifier):
        def __init__(self, start: str = "he", **options) -> None:
            super().__init__(**options)
            self.network = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
            )
            for layer in self.network[1::2]:
                (nn.init.normal_ if start == "normal" else nn.init.kaiming_normal_)(layer.weight)
                layer.weight.data.mul_(5.0 if start == "5he" else 1.0)
                if start == "dead":
                    nn.init.constant_(layer.bias, -1e3)

        def configure_optimizers(self):
            if self.optimizer == "adam":
                return torch.optim.Adam(self.parameters(), lr=1e-3)
            return super().configure_optimizers()

    return Plain


@pytest.fixture
def fit(trainer, tmp_path):
    def start(model, restart=None, epochs=25, callbacks=(), ckpt_path=None, **options):
        restart = RestartOnBadInitialization(scheme="he", dirpath=tmp_path / "r") if restart is None else restart
        run = trainer(callbacks=[restart, *callbacks], max_epochs=epochs, **options)
        run.fit(model, ckpt_path=ckpt_path)
        return restart, run

    return start


def accuracy(model) -> float:
    with torch.no_grad():
        return float((model.network(model.images).argmax(1) == model.labels).float().mean())


@pytest.mark.filterwarnings("ignore:.*NaN or infinite.*:UserWarning")
@pytest.mark.parametrize(
    ("start", "optimizer"),
    [("normal", "adam"), ("normal", "sgd"), ("5he", "adam"), ("dead", "adam"), ("dead", "sgd")],
)
def test_bad_starts_are_found_by_epoch_ten_and_trained_anew(fit, network, start, optimizer):
    model = network(start, optimizer=optimizer)
    restart, run = fit(model, epochs=60)
    assert len(restart.restarts) == 1
    assert restart.restarts[0]["epoch"] <= 10
    assert "bad start, after epoch" in restart.message
    assert run.current_epoch == 60
    assert accuracy(model) > 0.9
    assert restart.stopping_reason is StoppingReason.NOT_STOPPED


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_good_starts_are_left_alone(fit, network, optimizer, tmp_path):
    guarded, plain = network(optimizer=optimizer), network(optimizer=optimizer)
    restart, _ = fit(guarded, epochs=14)
    assert restart.restarts == []
    fit(plain, RestartOnBadInitialization(chance_loss=1e9, dirpath=tmp_path / "off"), epochs=14)
    for a, b in zip(guarded.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_regression_and_the_bad_start_of_it(fit, regression, tmp_path):
    assert fit(regression(lr=0.01), RestartOnBadInitialization(dirpath=tmp_path / "a"))[0].restarts == []
    bad = regression(lr=0.01)
    with torch.no_grad():
        bad.net[2].weight.mul_(1e3)
    assert fit(bad, RestartOnBadInitialization(dirpath=tmp_path / "b"))[0].restarts[0]["epoch"] == 10


def test_a_loss_that_is_not_finite_is_found_at_once(fit, network):
    class Breaking(network):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (math.nan if self.current_epoch == 1 else 1.0)

    with pytest.warns(KoopmanWarning, match="NaN or infinite"):
        restart, _ = fit(Breaking(), epochs=6)
    assert [(row["epoch"], row["reason"]) for row in restart.restarts] == [(2, "the loss is nan")]


def test_a_failing_record_is_no_bad_start(fit, network, monkeypatch):
    from lightning_koopman.trajectory.trajectory import Trajectory

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trajectory, "record", full)
    with pytest.warns(KoopmanWarning, match="No space left"):
        restart, run = fit(network(), epochs=14)
    assert restart.restarts == []
    assert run.current_epoch == 14


def test_few_steps_an_epoch_are_no_bad_start(fit, network):
    """One full batch per epoch: after ten steps a sound network may not yet beat the baseline loss."""

    class Slow(network):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-4)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(super().train_dataloader().dataset, batch_size=600)

    restart, _ = fit(Slow(), epochs=60)
    assert restart.restarts == []


def test_a_due_restart_does_not_reach_into_another_fit(fit, network, tmp_path):
    restart = RestartOnBadInitialization(3, scheme="he", dirpath=tmp_path / "r")
    _, run = fit(network("5he"), restart, epochs=3)
    assert restart.restarts == []  # no epoch was left
    run.fit_loop.max_epochs = 6
    good = network()
    before = good.network[1].weight.detach().clone()
    run.fit(good)
    assert restart.restarts == []
    assert float((good.network[1].weight.detach() - before).norm() / before.norm()) < 0.5


def test_statistics_of_norms_without_weights_are_reset(fit, network):
    class Normed(network):
        def __init__(self):
            super().__init__()
            self.network.insert(1, nn.BatchNorm1d(64, affine=False))

        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                self.network[1].running_mean.fill_(math.nan)
                self.network[2].weight.data.fill_(math.nan)

    with pytest.warns(KoopmanWarning, match="NaN or infinite"):
        restart, run = fit(Normed(), epochs=4)
    assert len(restart.restarts) == 1
    assert run.lightning_module.network[1].running_mean.isfinite().all()


def test_averages_that_keep_the_bad_start_are_named(root, fit, network, tmp_path):
    if not hasattr(root.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    restart = RestartOnBadInitialization(3, scheme="he", dirpath=tmp_path / "r")
    with pytest.warns(KoopmanWarning, match="the average of EMAWeightAveraging still holds weights of the bad start"):
        fit(network("5he"), restart, epochs=5, callbacks=[root.callbacks.EMAWeightAveraging()])


def test_optimizers_and_schedulers_start_anew(root, fit, network, tmp_path):
    class Look(root.Callback):
        states = ()

        def on_train_epoch_start(self, trainer, pl_module):
            optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
            state = len(optimizer.state), optimizer.param_groups[0]["lr"], scheduler.last_epoch
            self.states = (*self.states, state)

    def decay(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    look = Look()
    model = network("5he", optimizer="sgd", scheduler=decay)
    restart = RestartOnBadInitialization(3, scheme="he", dirpath=tmp_path / "r")
    fit(model, restart, epochs=6, callbacks=[look])
    assert restart.restarts[0]["epoch"] == 3
    assert look.states[2] == (6, pytest.approx(0.05 / 4), 2)
    assert look.states[3] == (0, pytest.approx(0.05), 0)
    assert look.states[4] == (6, pytest.approx(0.05 / 2), 1)


def test_every_callback_starts_a_new_trajectory(fit, network, tmp_path):
    monitor = KoopmanSpectrumMonitor(dirpath=tmp_path / "m")
    loss = KoopmanSpectrumMonitor("train_loss", prefix="loss", dirpath=tmp_path / "m")
    stop = EarlyStopOnUnitEigenvalues(mode="report", dirpath=tmp_path / "s")
    restart, _ = fit(network("5he"), epochs=18, callbacks=[stop, monitor, loss])
    assert restart.recorder is stop.recorder is monitor.recorder
    assert monitor.recorder.epochs == list(range(10, 19))
    assert loss.recorder.epochs == list(range(11, 19))
    assert [row["hold"] for row in stop.history[10:]] == ["too few epochs to tell"] * 8


@pytest.mark.parametrize("seed", [0, 7])
def test_restarts_are_seeded_and_differ_from_each_other(fit, network, tmp_path, seed):
    def weights(folder, seed):
        restart = RestartOnBadInitialization(2, scheme=spoil, max_restarts=3, seed=seed, dirpath=tmp_path / folder)
        fit(network("5he"), restart, epochs=7)
        return restart, drawn

    drawn: list[torch.Tensor] = []

    def spoil(module):
        nn.init.normal_(module.weight, std=5.0)
        drawn.append(module.weight.detach().clone())

    restart, _ = weights("a", seed)
    assert [row["epoch"] for row in restart.restarts] == [2, 4, 6]
    first = list(drawn)
    drawn.clear()
    weights("b", seed)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn, strict=True))
    assert not torch.equal(first[0], first[3])


def test_it_gives_up_with_the_reason(fit, network, tmp_path):
    restart = RestartOnBadInitialization(
        2, scheme=lambda module: nn.init.normal_(module.weight, std=5.0), max_restarts=1, dirpath=tmp_path / "r"
    )
    _, run = fit(network("5he"), restart)
    assert run.current_epoch == restart.stopped_epoch == 4
    assert restart.stopping_reason is StoppingReason.BAD_START
    assert restart.message.endswith("training ends after 1 restarts.")
    assert "worse than 2.3" in restart.message


def test_only_the_chosen_modules_are_drawn(fit, network, tmp_path):
    model = network("dead")
    before = model.network[1].weight.detach().clone()
    restart = RestartOnBadInitialization(3, modules=["*", "!network.1"], max_restarts=1, dirpath=tmp_path / "r")
    fit(model, restart, epochs=4)
    assert restart.restarts
    assert torch.equal(model.network[1].weight, before)  # excluded, and no gradient reached it
    assert model.network[5].bias.min() > -1.0


def test_judgement_waits_for_the_warm_up(fit, network, tmp_path, monkeypatch):
    def warm_up(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, 10.0 ** (epoch - 14)))

    model = network(optimizer="sgd", scheduler=warm_up)
    restart, _ = fit(model, RestartOnBadInitialization(5, dirpath=tmp_path / "r"), epochs=25)
    assert restart.restarts == []
    hasty = RestartOnBadInitialization(5, dirpath=tmp_path / "h")
    monkeypatch.setattr("lightning_koopman.callbacks.restart.warming_up", lambda *_: False)
    assert fit(network(optimizer="sgd", scheduler=warm_up), hasty, epochs=7)[0].restarts  # restarts if not waiting


def test_manual_optimization_needs_the_loss_at_chance(fit, network, tmp_path):
    class Manual(network):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            return loss

    with pytest.warns(KoopmanWarning, match="pass `baseline_loss`"):
        restart, _ = fit(Manual("5he"), epochs=12)
    assert restart.restarts == []
    given = RestartOnBadInitialization(5, scheme="he", chance_loss=math.log(10), dirpath=tmp_path / "g")
    model = Manual("5he")
    assert fit(model, given, epochs=30)[0].restarts[0]["epoch"] == 5
    assert accuracy(model) > 0.9


@pytest.mark.parametrize("cut", [2, 3, 4])  # before the decision, between decision and restart, after it
def test_a_resumed_run_restarts_as_an_uninterrupted_one(root, fit, network, tmp_path, cut):
    def run(name, epochs, ckpt_path=None):
        restart = RestartOnBadInitialization(3, scheme="he", dirpath=tmp_path / name)
        stop = EarlyStopOnUnitEigenvalues(mode="report", dirpath=tmp_path / name)
        save = root.callbacks.ModelCheckpoint(tmp_path / "c" / name, filename="{epoch}", save_top_k=-1)
        model = network("5he")
        fit(model, restart, epochs, [stop, save], ckpt_path, enable_checkpointing=True)
        return restart, stop, model

    whole, whole_stop, expected = run("whole", 18)
    run("part", cut)
    resumed, resumed_stop, model = run("resumed", 18, tmp_path / "c" / "part" / f"epoch={cut - 1}.ckpt")
    assert resumed.restarts == whole.restarts
    assert [row["hold"] for row in resumed_stop.history] == [row["hold"] for row in whole_stop.history]
    for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    torch.load(tmp_path / "c" / "part" / f"epoch={cut - 1}.ckpt", weights_only=True)


def test_a_checkpoint_that_knows_nothing_of_it_is_no_start(root, fit, trainer, network, tmp_path):
    save = root.callbacks.ModelCheckpoint(tmp_path, filename="plain")
    trainer(callbacks=save, enable_checkpointing=True, max_epochs=3).fit(network("5he"))
    path = tmp_path / "plain.ckpt"
    with pytest.warns(KoopmanWarning, match="holds no snapshots for this callback"):
        restart, _ = fit(network("5he"), epochs=16, callbacks=[save], ckpt_path=path, enable_checkpointing=True)
    assert restart.restarts == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check_epoch": 0}, "check_epoch must be at least 1 and whole, got 0"),
        ({"check_epoch": 2.5}, "check_epoch must be at least 1 and whole, got 2.5"),
        ({"max_restarts": -1}, "max_restarts must be at least 0 and whole, got -1"),
        ({"seed": "a"}, "seed must be at least 0 and whole, got 'a'"),
        ({"scheme": "kaiming"}, r"scheme must be None, one of \['he', 'orthogonal', 'xavier'\] or a callable"),
        ({"chance_loss": -2.3}, "chance_loss must be positive and finite, got -2.3"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RestartOnBadInitialization(**options)


def test_modules_that_do_not_exist_are_named_before_training(fit, network, tmp_path):
    with pytest.raises(ValueError, match="modules='encoder' matches no module"):
        fit(network(), RestartOnBadInitialization(modules="encoder", dirpath=tmp_path / "r"))
