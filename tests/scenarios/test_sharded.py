"""Two processes on the CPU compared with the single-process result, under each strategy."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from problems import distance, held, trajectory_of
from processes import run_processes
from processes import train as train_in_process
from torch import nn

from lightning_koopman import MaskSet, dmd_rrr
from lightning_koopman.averaging.persistent import persistent
from lightning_koopman.callbacks.restart import FAR_SEED
from lightning_koopman.parameters.reinitialize import reinitialize

STRATEGIES = ["ddp", "fsdp2", "fsdp"]
SHAPES = {"net.0.weight": (25, 64), "net.0.bias": (25,), "net.1.weight": (25,), "net.1.bias": (25,),
          "net.3.weight": (10, 25), "net.3.bias": (10,)}  # fmt: skip
PRUNED = ["net.0.weight", "net.3.weight"]
recorded = partial(trajectory_of, dtype=torch.float32)  # as the callbacks record


@pytest.fixture
def train(tmp_path):
    """Return a function that trains in separate processes and returns the output of each."""

    def run(
        name: str, strategy: str, *callbacks: Any, devices: int = 2, fails: bool = False, **options: Any
    ) -> list[Any]:
        if strategy in ("fsdp2", "hybrid") and not hasattr(torch.cpu.Stream, "record_event"):
            pytest.skip("this PyTorch's FSDP2 needs an accelerator")
        folder = tmp_path / name
        folder.mkdir()
        asked = {"strategy": strategy, "devices": devices, "folder": str(folder), "epochs": 14, **options}
        codes, told = run_processes(train_in_process, {**asked, "callbacks": callbacks}, devices, folder)
        assert all(codes) if fails else not any(codes), told
        ranks = [folder / f"rank{rank}.pt" for rank in range(devices)]
        return [torch.load(path, weights_only=False) for path in ranks if path.exists()]

    return run


def parts_of(flat: np.ndarray) -> dict[str, torch.Tensor]:
    """Split flat weights by parameter."""
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    pieces = torch.split(torch.from_numpy(flat.copy()), sizes)
    return {name: piece.reshape(shape) for (name, shape), piece in zip(SHAPES.items(), pieces, strict=True)}


def check_spectra(ranks: list[Any], whole: np.ndarray, since: int = 0) -> None:
    """Check that each process's eigenvalues and residuals are those of the gathered weights, in every epoch."""
    for rank in ranks:
        assert rank["spectra"]
        for times, eigenvalues, residuals in rank["spectra"]:
            exact = dmd_rrr(held(recorded(whole[since : times[-1] + 1], capacity=len(times))))
            assert distance(eigenvalues, exact.eigenvalues) < 1e-9
            np.testing.assert_allclose(np.sort(residuals), np.sort(exact.residuals), atol=1e-9)
        np.testing.assert_array_equal(rank["spectra"][-1][1], ranks[0]["spectra"][-1][1])  # to the last bit


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_callbacks_give_the_single_process_result(train, strategy):
    ranks = train(
        "run",
        strategy,
        ("monitor", {"window": 10}),
        ("stop", {"mode": "report"}),
        ("restart", {}),
        ("prune", {"sparsity": 0.6, "epoch": 12, "survivors": "reconstruction"}),
    )
    whole = ranks[0]["whole"]
    assert ranks[0]["names"] == list(SHAPES)
    assert ranks[0]["warnings"] == []
    assert [rank["monitor"]["total"] for rank in ranks] == [1935, 1935]
    sizes = [rank["monitor"]["n"] for rank in ranks]
    assert sum(sizes) == 1935  # no element counts twice
    assert max(sizes) < 1100  # and both processes have a share
    before = whole[:13]
    check_spectra([{**rank, "spectra": rank["spectra"][:11]} for rank in ranks], before)
    # masks and survivors
    trajectory = recorded(before)
    combination, spectrum, modes = persistent(trajectory)
    values = trajectory.combine(combination).numpy()
    scores = {name: value for name, value in parts_of(values).items() if name in PRUNED}
    expected = MaskSet.from_scores(scores, sparsity=0.6)
    for rank in ranks:
        masks = MaskSet.from_state_dict(rank["prune"]["masks"])
        assert all(torch.equal(masks[name], expected[name]) for name in PRUNED)
    now, last = parts_of(whole[13]), parts_of(whole[-1])  # set at the start of the epoch
    for name in PRUNED:
        torch.testing.assert_close(now[name], scores[name] * expected[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(last[name] != 0, expected[name])
    # only the first process writes the history; all have the same messages
    row = ranks[0]["prune"]["history"][0]
    assert (row["snapshots"], row["modes"], row["rank"]) == (13, modes.sum(), spectrum.rank)
    assert [row["epoch"] for row in ranks[0]["monitor"]["history"]] == list(range(1, 15))
    assert len({rank["stop"]["message"] for rank in ranks}) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_drawing_anew_gives_every_process_what_a_single_one_would_draw(train, strategy):
    bad = {"epochs": 13, "scale": 60.0, "lr": 1e-3}
    ranks = train(
        "run",
        strategy,
        ("restart", {"check_epoch": 3, "max_restarts": 1}),
        (
            "prune",
            {"sparsity": 0.5, "epoch": 9, "rounds": 2, "round_epochs": 3, "survivors": "reinit", "scope": "tensor"},
        ),
        **bad,
    )
    assert ranks[0]["restart"]["restarts"] == ranks[1]["restart"]["restarts"]
    assert [row["epoch"] for row in ranks[0]["restart"]["restarts"]] == [3]
    net = nn.Sequential(nn.Linear(64, 25), nn.LayerNorm(25), nn.ReLU(), nn.Linear(25, 10))
    reinitialize([net[0], net[1], net[3]], seed=FAR_SEED)
    drawn = nn.utils.parameters_to_vector(net.parameters()).detach().numpy()
    whole = ranks[0]["whole"]
    np.testing.assert_array_equal(whole[4], drawn)  # snapshots 0 … 3, then the restart
    # two rounds, each followed by a reinitialization with its own seed
    masks = MaskSet.from_state_dict(ranks[0]["prune"]["masks"])
    assert all(row["sparsity"] == pytest.approx(0.5, abs=0.01) for row in masks.rows())
    reinitialize([net[0], net[1], net[3]], seed=2)
    masks.apply(nn.ModuleDict({"net": net}))
    drawn = nn.utils.parameters_to_vector(net.parameters()).detach().numpy()
    assert any(np.array_equal(each, drawn) for each in whole)
    assert torch.equal(ranks[0]["prune"]["masks"]["bits"], ranks[1]["prune"]["masks"]["bits"])


@pytest.mark.parametrize(
    ("strategy", "then", "devices"),
    [("ddp", "single", 1), ("fsdp2", "fsdp2", 3), ("fsdp", "fsdp", 2), ("single", "ddp", 2)],
)
def test_resuming_in_another_number_of_processes(train, tmp_path, strategy, then, devices):
    callbacks = ("monitor", {"window": 8}), ("prune", {"sparsity": 0.5, "epoch": 4})
    before = 1 if strategy == "single" else 2
    first = train("first", strategy, *callbacks, devices=before, epochs=9)
    checkpoint = tmp_path / "first" / "checkpoints" / "epoch=8.ckpt"
    ranks = train("then", then, *callbacks, devices=devices, epochs=12, checkpoint=str(checkpoint))
    assert ranks[0]["warnings"] == []
    # weights by time: pruning replaced them after epoch 4, so the trajectory starts there
    whole = np.concatenate([first[0]["whole"][[*range(4), *range(5, 11)]], ranks[0]["whole"][1:]])
    assert len(whole) == 13
    assert ranks[0]["spectra"][0][0] == list(range(4, 11))[-8:]
    check_spectra(ranks, whole, since=4)
    assert [row["epoch"] for row in ranks[0]["monitor"]["history"]] == list(range(1, 13))
    bits = {tuple(rank["prune"]["masks"]["bits"].tolist()) for rank in (*first, *ranks)}
    assert len(bits) == 1
    masks = MaskSet.from_state_dict(ranks[0]["prune"]["masks"])
    assert all(torch.equal(parts_of(ranks[0]["whole"][-1])[name] != 0, masks[name]) for name in PRUNED)


def test_a_process_that_dies_ends_the_run_and_what_was_saved_goes_on(train, tmp_path):
    strategy = "fsdp2"
    callbacks = [("monitor", {"window": 8})]
    assert train("first", strategy, *callbacks, epochs=9, dies=[6, 1], fails=True) == []
    saved = sorted((tmp_path / "first" / "checkpoints").glob("*.ckpt"))
    assert saved[-1].name == "epoch=5.ckpt"
    ranks = train("then", strategy, *callbacks, devices=1, epochs=9, checkpoint=str(saved[-1]))
    assert ranks[0]["warnings"] == []
    assert ranks[0]["spectra"][0][0] == list(range(8))
    assert ranks[0]["monitor"]["times"] == list(range(2, 10))


def test_whatever_is_kept_of_a_snapshot_works_in_shards(train):
    options = [
        {"storage": "sketch", "sketch": 101, "prefix": "a"},
        {"dtype": "bfloat16", "prefix": "b"},
        {"storage": "disk", "prefix": "c", "window": None},
        {"every_n_steps": 3, "prefix": "d"},
    ]
    ranks = train("run", "fsdp2", *(("monitor", each) for each in options), epochs=9)
    whole = ranks[0]["whole"]
    sketched = recorded(whole, storage="sketch", sketch=101)
    rounded = recorded(whole, dtype=torch.bfloat16)
    for rank in ranks:
        assert rank["warnings"] == []
        sketch, half, disk, steps = rank["all"]
        assert distance(sketch["eigenvalues"], sketched.spectrum().eigenvalues) < 1e-9
        assert distance(half["eigenvalues"], rounded.spectrum().eigenvalues) < 1e-9
        assert distance(disk["eigenvalues"], dmd_rrr(held(recorded(whole))).eigenvalues) < 1e-9
        assert steps["times"] == list(range(16))  # 45 steps
    assert [row["step"] for row in ranks[0]["all"][3]["history"]] == list(range(3, 46, 3))
    assert [row["epoch"] for row in ranks[0]["all"][1]["history"]] == list(range(1, 10))  # no epoch is lost at the end


def test_replicas_of_shards_count_once(train):
    callbacks = ("monitor", {"window": 6}), ("prune", {"sparsity": 0.5, "epoch": 4})
    ranks = train("run", "hybrid", *callbacks, devices=4, epochs=6)
    sizes = [rank["monitor"]["n"] for rank in ranks]
    assert sum(sizes) == 1935
    assert min(sizes) > 400
    check_spectra([{**rank, "spectra": rank["spectra"][:3]} for rank in ranks], ranks[0]["whole"])
    assert len({tuple(rank["prune"]["masks"]["bits"].tolist()) for rank in ranks}) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_averages_are_those_of_the_whole_weights(train, tmp_path, strategy):
    given = ("average", {"profile": "tail", "length": 4})
    options = {"epochs": 6, "sharded_checkpoints": False}
    ranks = train("run", strategy, given, **options)
    whole = ranks[0]["whole"]
    for rank in ranks:
        assert rank["warnings"] == []
        np.testing.assert_allclose(rank["final"], whole[3:].mean(0), rtol=1e-5, atol=1e-6)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "epoch=3.ckpt", weights_only=True)
    for name, value in parts_of(whole[1:5].mean(0)).items():
        torch.testing.assert_close(saved["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    path = str(tmp_path / "run" / "checkpoints" / "epoch=3.ckpt")
    resumed = train("then", strategy, given, checkpoint=path, **options)
    np.testing.assert_array_equal(resumed[0]["whole"][0], whole[4])
    if strategy != "fsdp":  # Lightning does not resume FSDP exactly from full states
        np.testing.assert_array_equal(resumed[0]["whole"], whole[4:])
        np.testing.assert_allclose(resumed[0]["final"], ranks[0]["final"], rtol=1e-6, atol=1e-7)


def test_processes_compare_averages_on_all_their_batches(train):
    ranks = train("run", "ddp", ("average", {}), epochs=6)
    first, second = (rank["average"]["losses"] for rank in ranks)
    assert first.shape == (3, 8)  # lengths 1, 2 and 5
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(ranks[0]["final"], ranks[1]["final"])


def test_the_rate_falls_in_all_processes(train):
    ranks = train("run", "ddp", ("reduce", {"min_lr": 2e-3}), epochs=4, hovers=True)
    for rank in ranks:
        assert [row["epoch"] for row in rank["reduce"]["reductions"]] == [1, 2]
        assert rank["reduce"]["rates"] == [2e-3]
    np.testing.assert_array_equal(ranks[0]["final"], ranks[1]["final"])


def test_sharded_checkpoints_have_no_place_for_two_sets_of_weights(train):
    train("run", "fsdp2", ("average", {}), epochs=2, fails=True)
