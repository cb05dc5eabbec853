"""What users of similar tools have reported: unusual steps, weights, losses and runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_koopman import KoopmanPruner, KoopmanSpectrumMonitor, KoopmanWarning


def step(parameter: torch.Tensor) -> None:
    """Of an optimizer that is fused into the backward pass."""
    parameter.data.sub_(1e-2)


class SAM(torch.optim.Optimizer):
    """As the usual ones: an optimizer inside steps, its own `step` is not called."""

    def __init__(self, params) -> None:
        super().__init__(params, {})
        self.base = torch.optim.Adam(self.param_groups, 1e-2)

    def second_step(self) -> None:
        self.base.step()

    def step(self, closure=None) -> None:
        raise NotImplementedError


@pytest.fixture
def manual(root):
    """Builds modules that step by themselves."""

    class Manual(root.LightningModule):
        def __init__(self, kind: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization, self.kind, self.zeros = False, kind, []
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

        def configure_optimizers(self):
            if self.kind == "two":
                return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.net[0], self.net[2])]
            return SAM(self.parameters()) if self.kind == "SAM" else None

        def on_fit_start(self) -> None:
            self.own = torch.optim.Adam(self.parameters(), 1e-2)
            if self.kind == "fused":  # steps within the backward pass
                for parameter in self.parameters():
                    parameter.register_post_accumulate_grad_hook(step)

        def training_step(self, batch, batch_idx):
            self.zeros.append(int((self.net[0].weight == 0).sum()))
            self.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            if self.kind == "SAM":
                self.optimizers().second_step()
            elif self.kind == "two":
                for optimizer in self.optimizers():
                    optimizer.step()
            elif self.kind == "own":
                self.own.step()

        def train_dataloader(self):
            x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
            data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
            return torch.utils.data.DataLoader(data, 16)

    return Manual


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` returned `None`")
@pytest.mark.parametrize("kind", ["own", "SAM", "fused", "two"])
def test_masks_hold_and_batches_count_however_the_module_steps(trainer, manual, kind):
    module, pruner = manual(kind), KoopmanPruner(sparsity=0.5, epoch=3)
    monitor = KoopmanSpectrumMonitor(every_n_steps=2, prefix="steps")
    run = trainer(max_epochs=6, callbacks=[pruner, monitor])
    if kind != "two":
        with pytest.warns(KoopmanWarning, match="pruned weights were moved"):
            run.fit(module)
    else:
        run.fit(module)
    zeros = int((~pruner.masks["net.0.weight"]).sum())
    assert module.zeros[:12] == [0] * 12
    assert module.zeros[12:] == [zeros] * 12
    assert [row["step"] for row in monitor.history] == list(range(2, 25, 2))  # of 4 batches an epoch


@pytest.mark.parametrize("structured", [False, True])
def test_a_preview_says_what_would_go_and_changes_nothing(trainer, regression, structured):
    module, other = regression(), regression()
    batch = module.x[:16], module.y[:16]
    pruner = KoopmanPruner(sparsity=0.5, epoch=3, structured=structured, parameters=["net*weight"])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    drawn = torch.random.get_rng_state()
    preview = pruner.preview(module, batch)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert pruner.history == []
    trainer(callbacks=pruner).fit(module)  # the same counts as the run comes to
    if structured:
        assert (
            preview.changes == pruner.changes == {"net.0": {"out_features": (8, 4)}, "net.2": {"in_features": (8, 4)}}
        )
        assert "left alone, its outputs leave the network: head" in preview.table()
    else:
        assert preview.pruned == pruner.masks.pruned == 20
        assert set(preview) == set(pruner.masks)
    assert len(other.state_dict()) == len(before)


@pytest.mark.filterwarnings("ignore:.*no `validation_step`")
def test_a_module_without_validation_loses_channels(trainer, regression):
    module = regression()
    type(module).validation_step = None
    pruner = KoopmanPruner(sparsity=0.5, epoch=3, structured=True)
    trainer(callbacks=pruner, limit_val_batches=0).fit(module, train_dataloaders=module.train_dataloader())
    assert pruner.achieved == 0.5
