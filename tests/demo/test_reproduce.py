from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_koopman.demo.__main__ import main
from lightning_koopman.demo.experiments.cache import read, save
from lightning_koopman.demo.experiments.runner import Reporter
from lightning_koopman.demo.experiments.training import Batches
from lightning_koopman.demo.reproduce import command, images
from lightning_koopman.demo.reproduce.claims import FAILS, HOLDS, PART, claims, judge
from lightning_koopman.demo.reproduce.plan import FIGURES, PLANS, SPECTRA, Plan, wanted
from lightning_koopman.demo.reproduce.results import Results
from lightning_koopman.demo.reproduce.tasks import tasks

TINY = Plan("small", 128, 13, 15, (6, 7, 8), (4, 6, 8), (12, 13), 2, 50, 1, dataset="digits")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PLANS, "small", TINY)


def test_the_plans_are_the_papers_and_a_smaller_one():
    full = PLANS["full"]
    assert (full.n_images, full.epochs, full.past_divergence) == (None, 1000, 2000)
    assert full.loss_epochs == (40, 100, 500)
    assert full.weight_epochs == (50, 100, 500)
    assert full.prune_at == (100, 500)
    for plan in PLANS.values():
        starts, branches, noisy = wanted(plan, FIGURES)
        assert sorted(starts) == sorted(SPECTRA.values())
        assert len(branches) == 2 * 2 * 4
        assert len(noisy) == 5 * 3 * plan.seeds
    starts, branches, noisy = wanted(full, ("S5",))
    assert starts == ["xavier", "he"]
    assert {branch.method for branch in branches} == {"algorithm 2", "magnitude", "random"}
    assert {branch.point for branch in branches} == {100}
    assert not noisy


@pytest.mark.usefixtures("tiny")
def test_everything_is_run_once_and_reported(tmp_path, capsys):
    (report,) = main(["reproduce", "all", "--output", str(tmp_path), "--jobs", "2"])
    printed = capsys.readouterr().out
    assert "34 trainings to go, 2 at a time" in printed
    page = report.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)='(?!data:|#)", page)  # the page loads nothing external
    for figure in (*FIGURES, "T1"):
        assert f"id='{figure}'" in page
    folder = report.parent
    with open(folder / "pruning.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"algorithm 1", "algorithm 2", "magnitude", "random"}
    assert {int(row["epoch"]) for row in rows if row["pruned_after"] == "12"} == {13, 14}
    for path in folder.glob("pruned-*.npz"):
        assert read(path)["zeros"] == pytest.approx(0.75, abs=1e-4)
    with open(folder / "eigenvalues.csv") as file:
        kinds = {(row["observable"], row["kind"]) for row in csv.DictReader(file)}
    assert kinds == {(seen, kind) for seen in ("loss", "weights") for kind in ("training", "walk")}
    assert sorted(path.name for path in folder.glob("gallery-*.png")) == [
        "gallery-noise.png",
        "gallery-pruning.png",
        "gallery-spectra.png",
    ]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    main(["reproduce", "--figure", "3", "--output", str(tmp_path)])
    assert "0 trainings to go" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")} == before
    assert "id='5'" in report.read_text(encoding="utf-8")  # earlier results are kept


def test_figures_without_a_training_need_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", None)
    report = command.main(["--figure", "4", "--output", str(tmp_path)])
    page = report.read_text(encoding="utf-8")
    assert "id='4'" in page
    assert "id='2'" not in page
    assert "0 trainings to go" in capsys.readouterr().out


class KilledError(Exception):
    pass


@pytest.mark.filterwarnings("ignore:KoopmanPruner. training ended")  # it only records snapshots
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # each leg has its own checkpoint callback
def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path):
    def killed(epochs: int) -> None:
        if epochs == 11:  # after the checkpoint of epoch 10
            raise KilledError

    told: list[int] = []
    folders = [tmp_path / name for name in ("whole", "cut")]
    for folder in folders:
        folder.mkdir()
    images.train(TINY, "he", None, folders[0], "cpu", [].append)
    with pytest.raises(KilledError):
        images.train(TINY, "he", None, folders[1], "cpu", killed)
    images.train(TINY, "he", None, folders[1], "cpu", told.append)
    assert told[0] == 10
    leg = folders[1] / "trained-he-13"
    (folders[1] / "trained-he.npz").unlink()  # as if killed right before the end
    images.train(TINY, "he", None, folders[1], "cpu", lambda epochs: None)  # noqa: ARG005
    (folders[1] / "trained-he.npz").unlink()
    (leg / "done.ckpt").rename(leg / "last.ckpt")  # or between the last epoch's two checkpoints
    images.train(TINY, "he", None, folders[1], "cpu", lambda epochs: None)  # noqa: ARG005
    whole, cut = (read(folder / "trained-he.npz")["curves"] for folder in folders)
    assert whole.shape == (13, 3)
    np.testing.assert_allclose(cut, whole, rtol=1e-5)
    for name in ("weights-he-8.npz", "loss-he-8.npz"):
        ours, theirs = (read(folder / name)["training_eigenvalues"] for folder in folders)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_batches_are_shuffled_by_the_epoch():
    tensors = torch.arange(10), torch.arange(10) * 2
    epoch = 0
    batches = Batches(tensors, 4, lambda: epoch)
    assert len(batches) == 3
    first, again = ([some.tolist() for some, _ in batches] for _ in range(2))
    assert first == again
    assert sorted(each for some in first for each in some) == list(range(10))
    epoch = 1
    assert [some.tolist() for some, _ in batches] != first
    assert all((twice == 2 * some).all() for some, twice in batches)


def test_progress_counts_each_epoch_once():
    class Channel(list):
        put = list.append

    channel = Channel()
    reporter = Reporter(channel, "run")
    for epochs in (3, 3, 2, 5):
        reporter(epochs)
    assert channel == [("run", 3), ("run", 2)]


def test_only_what_is_missing_is_run(tmp_path):
    every = tasks(TINY, None, tmp_path, "cpu", wanted(TINY, FIGURES))
    save(tmp_path / f"{every[0].name}.npz", curves=np.zeros((1, 3)))
    assert [task.name for task in tasks(TINY, None, tmp_path, "cpu", wanted(TINY, FIGURES))] == [
        task.name for task in every[1:]
    ]
    names = {task.name for task in every}
    assert all(task.needs in names for task in every if task.needs)


def made_up(folder: Path, loss: float, test: float, near: float, walk: float) -> Results:
    """Results of a training that ends at these losses; its importance near eigenvalue 1 rises to ``near``."""
    plan = dataclasses.replace(TINY, epochs=10, weight_epochs=(4, 8), loss_epochs=(4, 8))
    curves = np.stack([np.geomspace(2.0, loss, 10), np.geomspace(0.5, test, 10), np.full(10, 0.9)], axis=1)
    save(folder / "trained-he.npz", curves=curves)
    for epochs, share in ((4, 0.1), (8, near)):
        save(
            folder / f"weights-he-{epochs}.npz",
            training_eigenvalues=np.array([1.0, 0.5], dtype=complex),
            training_unit_fraction=share,
            walk_unit_fraction=walk,
            training_newest=share,
            walk_newest=walk,
            slowing=1 - test,
        )
        save(
            folder / f"loss-he-{epochs}.npz",
            training_eigenvalues=np.array([0.1, 0.99 if epochs == 8 else 0.8], dtype=complex),
            training_importance=np.array([0.9, 0.1]),
            walk_eigenvalues=np.array([0.9, 1.0], dtype=complex),
            walk_importance=np.array([0.5, 0.5]),
        )
    return Results(plan, folder, ("S2",), table_1=False)


@pytest.mark.parametrize(
    ("loss", "test", "near", "walk", "verdicts"),
    [
        (1e-3, 0.9, 0.8, 0.1, [HOLDS, HOLDS, PART, HOLDS, PART]),  # nothing to compare the test loss with
        (1.9, 0.3, 0.8, 0.9, [FAILS, PART, PART, HOLDS, FAILS]),
        (1e-3, 0.9, 0.05, 0.5, [HOLDS, FAILS, FAILS, HOLDS, PART]),
    ],
)
def test_verdicts_follow_their_rules(tmp_path, loss, test, near, walk, verdicts):
    found = claims(made_up(tmp_path, loss, test, near, walk))["S2"]
    assert [claim.verdict for claim in found] == verdicts
    assert f"{walk:.1%}" in found[1].ours  # the surrogate's share is stated


def test_judge():
    assert judge([True, True]) == HOLDS
    assert judge([True, False]) == PART
    assert judge([False, False]) == FAILS


@pytest.mark.parametrize(
    "arguments", [["--figure", "1"], ["--table", "2"], ["--scale", "huge"], ["all", "--figure", "2"], ["--jobs", "0"]]
)
def test_bad_arguments_end_before_any_work(arguments, tmp_path):
    with pytest.raises(SystemExit):
        command.main([*arguments, "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
