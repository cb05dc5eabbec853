"""Planned learning rates compared with those that the schedulers then set."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from lightning_koopman.callbacks.lr_schedule import current_rates, planned_rates

SCHEDULES = {
    "step": lambda o: schedulers.StepLR(o, 3, gamma=0.5),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 12),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: (1 + epoch) ** -0.5),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.8)], milestones=[4]
    ),
    "every second epoch": lambda o: {"scheduler": schedulers.ExponentialLR(o, 0.8), "frequency": 2},
    "cycle by step": lambda o: {"scheduler": schedulers.OneCycleLR(o, 0.1, total_steps=48), "interval": "step"},
    "by step": lambda o: {"scheduler": schedulers.ExponentialLR(o, 0.97), "interval": "step", "frequency": 2},
}


@pytest.fixture
def run(root, trainer, regression):
    def start(build, epochs: int = 12, at: int = 5, **options):
        class Scheduled(regression):
            def configure_optimizers(self):
                groups = [{"params": self.net.parameters()}, {"params": self.head.parameters(), "lr": 0.01}]
                optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
                built = build(optimizer)
                return {"optimizer": optimizer, "lr_scheduler": built}

        class Look(root.Callback):
            def __init__(self):
                self.seen, self.planned = [], None

            def on_train_epoch_start(self, trainer, pl_module):
                self.seen.append(current_rates(trainer))

            def on_train_epoch_end(self, trainer, pl_module):
                if trainer.current_epoch == at:
                    state = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
                    self.planned = planned_rates(trainer)
                    assert str([c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]) == str(state)

        look = Look()
        trainer(callbacks=look, max_epochs=epochs, **options).fit(Scheduled())
        return look

    return start


@pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step:UserWarning")  # by PyTorch's SequentialLR
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_read_ahead_are_those_that_come(run, name):
    look = run(SCHEDULES[name])
    torch.testing.assert_close(torch.tensor(look.planned), torch.tensor(look.seen[6:]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("accumulated", "frequency", "batches"), [(2, 1, 4), (3, 1, 4), (4, 1, 4), (2, 2, 4), (2, 3, 3)]
)
def test_steps_are_counted_as_lightning_counts_them(run, accumulated, frequency, batches):
    look = run(
        lambda o: {"scheduler": schedulers.ExponentialLR(o, 0.97), "interval": "step", "frequency": frequency},
        accumulate_grad_batches=accumulated,
        limit_train_batches=batches,
    )
    torch.testing.assert_close(torch.tensor(look.planned), torch.tensor(look.seen[6:]), rtol=1e-9, atol=1e-12)


def test_a_schedule_that_ends_with_max_steps_is_read_to_its_end(run):
    look = run(
        lambda o: {"scheduler": schedulers.OneCycleLR(o, 0.1, total_steps=40), "interval": "step"},
        epochs=-1,
        max_steps=40,
    )
    torch.testing.assert_close(torch.tensor(look.planned[:4]), torch.tensor(look.seen[6:10]), rtol=1e-9, atol=1e-12)


def test_a_plateau_scheduler_plans_its_next_reduction_until_it_has_reached_its_minimum(run):
    def plateau(least):
        return lambda o: {
            "scheduler": schedulers.ReduceLROnPlateau(o, factor=0.1, min_lr=least),
            "monitor": "fit_error",
        }

    assert run(plateau(0.0)).planned == [pytest.approx([0.005, 0.001])] * 6
    assert run(plateau(0.05)).planned == [pytest.approx([0.05, 0.05])] * 6


def test_without_schedulers_nothing_is_planned(trainer, regression):
    fit = trainer(max_epochs=1)
    fit.fit(regression())
    assert planned_rates(fit) == []


@pytest.mark.parametrize("by_steps", [False, True])
def test_the_length_of_an_epoch_is_learnt_where_the_data_have_none(root, trainer, regression, by_steps):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(4), torch.randn(1)) for _ in range(48)])

    class Scheduled(regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            rising = schedulers.LambdaLR(optimizer, lambda step: 0.01 if step < 18 else 1.0)  # 3 steps per epoch
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rising, "interval": "step"}}

    planned = {}

    class Look(root.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            planned[trainer.current_epoch] = planned_rates(trainer, 3 if by_steps else None)

    module = Scheduled()
    data = torch.utils.data.DataLoader(Stream(), 16)
    trainer(callbacks=Look(), max_epochs=10, limit_val_batches=0).fit(module, data)
    rates = [0.001] * 6 + [0.1] * 4
    for epoch in (1, 3):
        assert [rate for (rate,) in planned[epoch]][: 9 - epoch] == pytest.approx(rates[epoch + 1 :])
