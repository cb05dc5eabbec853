"""All callbacks together: a shared trajectory, restart, learning rate reduction, averaging and early stopping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hovering import Net, Trained, mean

from lightning_koopman import StoppingReason, koopman_autopilot


class Convex(Net):
    """A linear model, whose weights end up hovering."""

    def __init__(self) -> None:
        super().__init__(lr=0.02, shuffle=True)
        drawn = torch.Generator().manual_seed(1)
        self.net, self.x = torch.nn.Linear(60, 1), torch.randn(384, 60, generator=drawn)
        self.y = self.x[:, :9].sum(1, keepdim=True) + torch.randn(384, 1, generator=drawn)


def test_they_share_a_trajectory_end_by_themselves_and_keep_the_average(fit, tmp_path):
    module, trained, callbacks = Convex(), Trained(), koopman_autopilot(dirpath=tmp_path, factor=0.2)
    trainer = fit(module, *callbacks, trained, epochs=300)
    restart, reduce, average, stop = callbacks
    assert reduce.recorder is average.recorder is stop.recorder
    assert restart.restarts == []
    assert len(reduce.reductions) >= 1
    assert stop.stopped_epoch == trainer.current_epoch < 300
    assert stop.stopping_reason in (StoppingReason.CONVERGED, StoppingReason.HOVERING)
    length = average.average.length
    assert length > 1
    assert torch.allclose(module.net.weight, mean(trained.after[-length:], "net.weight"), atol=1e-6)


def test_a_bad_start_is_drawn_anew_first(fit, tmp_path):
    class Bad(Convex):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(60, 30), torch.nn.ReLU(), torch.nn.Linear(30, 1))
            with torch.no_grad():
                self.net[0].bias.fill_(-1e4)  # all units are dead

    callbacks = koopman_autopilot(dirpath=tmp_path)
    fit(Bad(), *callbacks, epochs=30)
    restart, _, average, stop = callbacks
    assert len(restart.restarts) == 1
    assert average.recorder.epochs[0] == restart.restarts[0]["epoch"]
    assert stop.stopping_reason is not StoppingReason.BAD_START


def test_it_ends_where_a_lower_rate_brings_nothing(fit, tmp_path):
    class Wrong(Convex):
        """Noise in the data, like wrong labels: no learning rate can remove it from the loss."""

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1] + 2 * torch.randn_like(batch[1]))

    callbacks = koopman_autopilot(dirpath=tmp_path)
    trainer = fit(Wrong(), *callbacks, epochs=400)
    _, reduce, _, stop = callbacks
    assert stop.stopped_epoch == trainer.current_epoch < 400
    assert stop.stopping_reason is StoppingReason.HOVERING
    assert reduce.exhausted
    assert "keep no lasting direction" in stop.message


@pytest.mark.parametrize("given", [{"every_n_steps": 3}, {"baseline_loss": 2.5}], ids=str)
def test_settings_reach_all_that_take_them(given: dict[str, Any], tmp_path):
    for callback in koopman_autopilot(**given, dirpath=tmp_path):
        assert callback.run_folder.dirpath == tmp_path
        assert callback.settings.every_n_steps == given.get("every_n_steps")
