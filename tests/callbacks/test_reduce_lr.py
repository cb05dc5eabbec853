"""The learning rate is reduced only where the weights hover; also with schedules, resuming and early stopping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hovering import Net, Trained, step_by_hand
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.optim import lr_scheduler as schedules

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanSpectrumMonitor,
    Phase,
    ReduceLROnNoiseFloor,
)
from lightning_koopman.callbacks.rate_groups import lowered_rates, set_rates
from lightning_koopman.demo.experiments.training import Batches


class Noisy(Net):
    """Weights that end up hovering, at a constant learning rate unless a schedule is given."""

    def __init__(self, lr: float = 0.3, schedule: Any = None) -> None:
        super().__init__(lr=lr, shuffle=True)
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=self.lr)
        return optimizer if self.schedule is None else ([optimizer], [self.schedule(optimizer)])


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % 6 == 0:
            self.seen.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


def test_the_rate_falls_where_weights_hover_and_not_where_they_go_somewhere(fit, tmp_path):
    reduce, rates = ReduceLROnNoiseFloor(dirpath=tmp_path), Rates()
    fit(Noisy(), reduce, rates, epochs=90)
    assert 1 <= len(reduce.reductions) <= 5
    first = reduce.reductions[0]
    assert first["epoch"] >= 8
    assert (first["from"], first["to"]) == (0.3, pytest.approx(0.09))
    assert rates.seen[: first["epoch"]] == [0.3] * first["epoch"]
    assert rates.seen[first["epoch"]] == pytest.approx(0.09)
    assert reduce.history[first["epoch"] - 1]["phase"] == "hovering"

    class Far(Noisy):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return (self.net[0].weight - 100).abs().mean()

    straight = ReduceLROnNoiseFloor(dirpath=tmp_path)
    fit(Far(0.01), straight, epochs=30)
    assert straight.reductions == []


def test_reporting_changes_nothing(fit, tmp_path):
    alone, watched, report = Trained(), Trained(), ReduceLROnNoiseFloor(mode="report", dirpath=tmp_path)
    fit(Noisy(), alone, epochs=50)
    fit(Noisy(), watched, report, epochs=50)
    assert all(
        torch.equal(a["net.0.weight"], b["net.0.weight"]) for a, b in zip(alone.after, watched.after, strict=True)
    )
    assert len(report.reductions) == 1


def test_it_ends_at_the_least_rate_and_the_stop_after_it(fit, tmp_path):
    reduce, stop = ReduceLROnNoiseFloor(0.3, min_lr=0.1, dirpath=tmp_path), EarlyStopOnUnitEigenvalues(dirpath=tmp_path)
    rates = Rates()
    fit(Noisy(), reduce, stop, rates, epochs=200)
    assert min(rates.seen) == pytest.approx(0.1)
    assert not reduce.can_reduce
    assert stop.stopped_epoch is not None
    assert stop.stopped_epoch > reduce.reductions[-1]["epoch"]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: schedules.LambdaLR(o, lambda t: 1 / (1 + t)),
        lambda o: schedules.StepLR(o, 3, 0.5),
        lambda o: schedules.MultiStepLR(o, [2, 9], 0.5),
        lambda o: schedules.ExponentialLR(o, 0.9),
        lambda o: schedules.CosineAnnealingLR(o, 20, eta_min=0.01),
        lambda o: schedules.LinearLR(o, 0.1, total_iters=12),
        lambda o: schedules.ConstantLR(o, 0.5, total_iters=9),
        lambda o: schedules.PolynomialLR(o, 20, 2.0),
        lambda o: schedules.MultiplicativeLR(o, lambda t: 0.95),  # noqa: ARG005
    ],
    ids=["lambda", "step", "multistep", "exponential", "cosine", "linear", "constant", "polynomial", "multiplicative"],
)
def test_a_schedule_runs_on_that_much_lower(schedule):
    def rates(lowered_at: int | None) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
        scheduler = schedule(optimizer)
        config = type("Config", (), {"scheduler": scheduler})()
        trainer = type("Trainer", (), {"optimizers": [optimizer], "lr_scheduler_configs": [config]})()
        found = []
        for t in range(18):
            if t == lowered_at:
                changes, left = lowered_rates(trainer, None, 0.3, [[0.0]])
                set_rates(changes)
                assert left
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    plain, lowered = rates(None), rates(6)
    np.testing.assert_allclose(lowered[:6], plain[:6])
    np.testing.assert_allclose(lowered[6:], 0.3 * np.array(plain[6:]), rtol=1e-9)


def test_chosen_groups_tensors_and_plateaus():
    weights = [torch.zeros(1) for _ in range(3)]
    first = torch.optim.SGD([{"params": [weights[0]], "lr": 0.4}, {"params": [weights[1]], "lr": 0.2}])
    second = torch.optim.Adam([weights[2]], lr=torch.tensor(0.1))
    plateau = type("Config", (), {"scheduler": schedules.ReduceLROnPlateau(second)})()
    trainer = type("Trainer", (), {"optimizers": [first, second], "lr_scheduler_configs": [plateau]})()

    def lower(*given: Any) -> tuple[list[float], bool]:
        held, (changes, left) = second.param_groups[0]["lr"], lowered_rates(trainer, *given)
        set_rates(changes)
        assert second.param_groups[0]["lr"] is held
        return [float(group["lr"]) for each in trainer.optimizers for group in each.param_groups], left

    assert lower([1, 2], 0.5, [[0.0, 0.15], [0.0]]) == (pytest.approx([0.4, 0.15, 0.05]), True)
    changes, _ = lowered_rates(trainer, None, 0.5, [[0.39, 0.15], [0.0]])
    set_rates(changes)
    set_rates(changes, back=True)
    assert [float(each["lr"]) for each in first.param_groups + second.param_groups] == pytest.approx([0.4, 0.15, 0.05])
    assert lower([0], 0.5, [[0.39, 0.15], [0.0]]) == (pytest.approx([0.39, 0.15, 0.05]), False)  # none can go lower


def say_hovering(reduce: ReduceLROnNoiseFloor, at: int) -> None:
    """Make the reading after the given epoch report hovering weights."""
    read = reduce.recording.read
    reduce.recording.read = lambda epoch, *given: (
        replace(read(epoch, *given), phase=Phase.HOVERING) if epoch == at else read(epoch, *given)
    )


def test_weights_that_keep_no_direction_are_a_reason_for_one_reduction(fit, caplog):
    reduce = ReduceLROnNoiseFloor()
    read = reduce.recording.read
    reduce.recording.read = lambda *given: replace(read(*given), phase=Phase.UNKNOWN)
    with caplog.at_level("INFO"):
        fit(Noisy(), reduce, epochs=60)
    assert [row["epoch"] for row in reduce.reductions] == [24]  # of phase unknown from the first epoch on
    assert "after epoch 24 the weights have kept no direction for 24 epochs" in caplog.text
    assert reduce.exhausted


def test_groups_that_are_added_are_lowered_too(fit):
    class Grows(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            groups = trainer.optimizers[0].param_groups
            if trainer.current_epoch == 4:
                self.rate = groups[0]["lr"]
                trainer.optimizers[0].add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.5})

    grows, reduce = Grows(), ReduceLROnNoiseFloor()
    say_hovering(reduce, 10)
    trainer = fit(Noisy(), reduce, grows, epochs=14)
    found = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert found == pytest.approx([0.3 * grows.rate, 0.3 * 0.5])
    assert [row["epoch"] for row in reduce.reductions] == [10]


class Manual(Noisy):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[-1].parameters(), 0.2)]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        step_by_hand(self, loss)
        return loss


@pytest.mark.parametrize(
    ("kind", "options", "rates"),
    [
        (Manual, {}, [0.03, 0.06]),
        (Noisy, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}, [0.09]),
    ],
    ids=["manual", "mixed precision, accumulated"],
)
def test_all_rates_fall_however_the_steps_are_taken(fit, tmp_path, kind, options, rates):
    reduce = ReduceLROnNoiseFloor(dirpath=tmp_path)
    say_hovering(reduce, 3)
    trainer = fit(kind(), reduce, epochs=5, **options)
    assert [row["epoch"] for row in reduce.reductions] == [3]
    found = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert found == pytest.approx(rates)
    assert [row["learning_rate"] for row in reduce.history][2:4] == pytest.approx([rates[-1] / 0.3, rates[-1]])


def test_rates_of_chosen_groups_are_told_and_the_least_rate_is_left_alone(fit, tmp_path):
    class Two(Noisy):
        def configure_optimizers(self) -> Any:
            fast, slow = self.net[0].parameters(), self.net[-1].parameters()
            return torch.optim.SGD([{"params": fast, "lr": 0.3}, {"params": slow, "lr": 0.1}], lr=0.1)

    for least, expected in ((None, [(0.1, 0.03)]), (0.1, [])):
        reduce = ReduceLROnNoiseFloor(groups=[1], min_lr=least, dirpath=tmp_path)
        say_hovering(reduce, 3)
        trainer = fit(Two(), reduce, epochs=5)
        assert [(row["from"], pytest.approx(row["to"])) for row in reduce.reductions] == expected
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.3


def test_what_cannot_be_lowered_is_refused_by_name(fit, tmp_path):
    one = lambda o: schedules.OneCycleLR(o, 0.3, total_steps=100)  # noqa: E731
    with pytest.raises(ValueError, match="ReduceLROnNoiseFloor cannot lower the rates of the scheduler OneCycleLR"):
        fit(Noisy(schedule=one), ReduceLROnNoiseFloor(dirpath=tmp_path))
    with pytest.raises(ValueError, match="two ReduceLROnNoiseFloor lower the same parameter groups"):
        fit(Noisy(), *(ReduceLROnNoiseFloor(prefix=name, dirpath=tmp_path) for name in ("a", "b")))
    fit(
        Noisy(),
        *(ReduceLROnNoiseFloor(mode=mode, prefix=mode, dirpath=tmp_path) for mode in ("reduce", "report")),
        epochs=2,
    )
    with pytest.raises(ValueError, match="only 1 parameter groups"):
        fit(Noisy(), ReduceLROnNoiseFloor(groups=[3], dirpath=tmp_path))


def test_a_resumed_run_lowers_as_the_uninterrupted_one(fit, tmp_path):
    def parts() -> list[Any]:
        save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", every_n_epochs=1)
        return [ReduceLROnNoiseFloor(dirpath=tmp_path), KoopmanSpectrumMonitor(dirpath=tmp_path), Trained(), save]

    class Ordered(Noisy):
        def train_dataloader(self) -> Any:
            return Batches((self.x, self.y), 16, lambda: self.trainer.current_epoch)

    given = {"enable_checkpointing": True}
    reduce, monitor, trained, save = parts()
    fit(Ordered(), reduce, monitor, trained, save, epochs=50, **given)
    at = reduce.reductions[0]["epoch"]
    for start in (at - 1, at + 3):  # reduction due but not yet applied; applied
        again, watched, later, save = parts()
        fit(Ordered(), again, watched, later, save, epochs=50, ckpt_path=tmp_path / f"epoch={start}.ckpt", **given)
        assert again.reductions == reduce.reductions
        assert torch.equal(later.after[-1]["net.0.weight"], trained.after[-1]["net.0.weight"])
        assert [row["phase"] for row in watched.history] == [row["phase"] for row in monitor.history]
