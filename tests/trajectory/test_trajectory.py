from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dgedmdq, lapack
from problems import distance, held, record_together

from lightning_koopman import Trajectory, dmd_rrr
from lightning_koopman.dmd.gram import PRECISE, row_products
from lightning_koopman.dmd.rrr import decompose


def filled(snapshots, **options) -> Trajectory:
    trajectory = Trajectory(snapshots.shape[1], **options)
    for snapshot in snapshots:
        trajectory.append(snapshot)
    return trajectory


def walk(time: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((time, n)).cumsum(0).astype(np.float32)


@pytest.mark.parametrize("capacity", [None, 100, 40])
@pytest.mark.parametrize("storage", ["ram", "disk"])
def test_streaming_equals_householder_qr_on_a_real_trajectory(capacity, storage, real_trajectory):
    trajectory = filled(real_trajectory, capacity=capacity, storage=storage)
    kept = real_trajectory[-(capacity or 101) :].astype(np.float64)
    exact = decompose(np.linalg.qr(kept.T, mode="r"))
    ours = trajectory.spectrum()
    assert ours.rank == exact.rank
    # held snapshots differ from the weights by one rounding of a step; their Gram matrix is as accurate as QR
    assert distance(ours.eigenvalues, exact.eigenvalues) < 1e-8
    same = held(trajectory)
    assert distance(ours.eigenvalues, decompose(np.linalg.qr(same.T, mode="r")).eigenvalues) < 1e-9
    if lapack() is not None:
        plain = trajectory.spectrum(refine=False)
        assert distance(plain.eigenvalues, dgedmdq(same).eigenvalues) < 1e-9


@settings(max_examples=40, deadline=None)
@given(
    time=st.integers(2, 90),
    capacity=st.one_of(st.none(), st.integers(2, 40)),
    n=st.integers(1, 50),
    storage=st.sampled_from(["ram", "disk"]),
)
def test_the_ring_keeps_the_newest_snapshots_and_their_gram(time, capacity, n, storage):
    snapshots = walk(time, n)
    trajectory = filled(snapshots, capacity=capacity, storage=storage)
    kept = snapshots[-(capacity or time) :]
    assert len(trajectory) == len(kept)
    # an increment is rounded to float32, and the next one compensates for it
    np.testing.assert_allclose(trajectory.snapshots().numpy(), kept, rtol=0, atol=4e-7 * np.abs(snapshots).max())
    np.testing.assert_array_equal(trajectory.last().numpy(), trajectory.snapshots()[-1].numpy())
    root = trajectory.factor()
    wide = kept.astype(np.float64)
    rounding = 1e-6 * np.abs(wide).max() ** 2 * n  # float32 rounding of the increments
    np.testing.assert_allclose(root.T @ root, wide @ wide.T, rtol=0, atol=rounding)
    np.testing.assert_allclose(trajectory.step_norms(), np.linalg.norm(np.diff(wide, axis=0), axis=1), atol=1e-6)
    assert trajectory.start_norm() == pytest.approx(np.linalg.norm(wide[0]), rel=1e-6)


def test_a_ring_that_turned_a_thousand_times_does_not_drift():
    snapshots = walk(2000, 300)
    trajectory = filled(snapshots, capacity=12)
    kept = snapshots[-12:].astype(np.float64)
    assert distance(trajectory.spectrum().eigenvalues, decompose(np.linalg.qr(kept.T, mode="r")).eigenvalues) < 1e-9


@pytest.mark.parametrize("start", [1e4, 1e8])
def test_a_start_far_off_leaves_no_trace_once_it_has_left_the_window(start):
    values = 0.3 + 0.1 * 0.97 ** np.arange(60.0)
    values[:5] = start
    trajectory = filled(values[:, None], capacity=20, dtype=torch.float64)
    assert distance(trajectory.spectrum(delays=11, tol=1e-6).eigenvalues, np.array([1.0, 0.97])) < 1e-6


def test_part_of_the_window(digits_trajectory):
    trajectory = filled(digits_trajectory[:30])
    part = dmd_rrr(digits_trajectory[20:30])
    assert distance(trajectory.spectrum(last=10).eigenvalues, part.eigenvalues) < 1e-9


def test_combinations_are_matrix_products():
    snapshots = walk(20, 20_000)
    trajectory = filled(snapshots, capacity=15)
    weights = np.random.default_rng(1).standard_normal((3, 15))
    expected = weights @ snapshots[-15:].astype(np.float64)
    np.testing.assert_allclose(trajectory.combine(weights).numpy(), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(trajectory.combine(weights[0]).numpy(), expected[0], rtol=1e-5, atol=1e-4)


def test_reconstruction_at_the_last_snapshot_of_a_real_trajectory(digits_trajectory):
    trajectory = filled(digits_trajectory)
    spectrum = trajectory.spectrum()
    state = trajectory.combine(spectrum.combination([100])[0])
    missed = np.linalg.norm(state.numpy() - digits_trajectory[-1]) / np.linalg.norm(digits_trajectory[-1])
    assert missed < 0.02


KEPT = [{}, {"storage": "disk"}, {"dtype": torch.bfloat16}, {"storage": "sketch", "sketch": 31}]


@pytest.mark.parametrize("capacity", [None, 10])
@pytest.mark.parametrize("kept", KEPT)
def test_saving_and_loading_give_the_same_spectrum_to_the_last_bit(tmp_path, capacity, kept):
    snapshots = walk(47, 100)
    trajectory = Trajectory(100, capacity=capacity, **kept)
    for index, snapshot in enumerate(snapshots):
        trajectory.append(snapshot)
        if index % 7 == 0:
            state = trajectory.save(tmp_path / "rows")  # most rows are already there at the next save
    state = trajectory.save(tmp_path / "rows")
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded = Trajectory.load(state, tmp_path / "rows", storage=kept.get("storage", "ram"))
    for more in walk(5, 100, seed=1):
        trajectory.append(more)
        loaded.append(more)
    if "sketch" not in kept:
        assert torch.equal(loaded.snapshots(), trajectory.snapshots())
    np.testing.assert_array_equal(loaded.spectrum().eigenvalues, trajectory.spectrum().eigenvalues)


@pytest.mark.parametrize("kept", KEPT)
def test_every_older_state_still_finds_all_its_snapshots(tmp_path, kept):
    snapshots, trajectory, states = walk(60, 30), Trajectory(30, capacity=8, **kept), []
    for index, snapshot in enumerate(snapshots):
        trajectory.append(snapshot)
        if index % 3 == 1:
            states.append((trajectory.save(tmp_path / "rows"), trajectory.spectrum().eigenvalues))
    for state, eigenvalues in states:
        loaded = Trajectory.load(state, tmp_path / "rows")
        np.testing.assert_array_equal(loaded.spectrum().eigenvalues, eigenvalues)
        assert len(state["starts"]) <= 3  # each file holds at most about two windows
    sizes = [file.stat().st_size for file in tmp_path.glob("rows-*.bin")]
    assert max(sizes) <= 2.5 * 8 * trajectory._held.rows.row_bytes + 8 * 30


def test_saves_further_apart_than_the_window_begin_a_new_file(tmp_path):
    trajectory = Trajectory(30, capacity=4)
    for index, snapshot in enumerate(walk(40, 30)):
        trajectory.append(snapshot)
        if index % 13 == 12:
            state = trajectory.save(tmp_path / "rows")
            assert torch.equal(Trajectory.load(state, tmp_path / "rows").snapshots(), trajectory.snapshots())


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "pipe"])
def test_a_damaged_file_is_noticed(tmp_path, damage):
    state = filled(walk(9, 30)).save(tmp_path / "rows")
    (file,) = tmp_path.glob("rows-*.bin")
    data = bytearray(file.read_bytes())
    data[8 * 30 * 4 + 5] ^= 1  # in the newest snapshot
    file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    elif damage != "gone":
        file.write_bytes(data if damage == "flip" else data[:-1])
    assert len(Trajectory.load(state, tmp_path / "rows")) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"marks": torch.zeros(10**6, dtype=torch.int64)},
        {"gram": torch.zeros(1, 1).expand(10**6, 10**6)},
        {"start": -3},
    ],
)
def test_a_state_whose_parts_do_not_agree_costs_neither_time_nor_memory(tmp_path, change):
    state = filled(walk(9, 30), capacity=9).save(tmp_path / "rows") | change
    with pytest.raises(ValueError, match="damaged"):
        Trajectory.load(state, tmp_path / "rows")


def test_double_precision_for_a_few_numbers():
    losses = 1 + 0.5 ** np.arange(40.0)
    trajectory = filled(losses[:, None], dtype=torch.float64)
    np.testing.assert_array_equal(trajectory.snapshots().numpy().ravel(), losses)
    assert distance(trajectory.spectrum(delays=21).eigenvalues, np.array([1.0, 0.5])) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"n": 3, "capacity": 1}, "capacity must be at least 2"),
        ({"n": 3, "storage": "tape"}, "storage must be one of"),
        ({"n": 3, "path": "x"}, "only applies to storage='disk'"),
        ({"n": 3, "dtype": torch.float16}, "dtype must be"),
        ({"n": 3, "storage": "disk", "path": "no/such/folder"}, "path='no/such/folder' is not a folder"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Trajectory(**options)


def test_bad_snapshots_leave_the_trajectory_unchanged():
    trajectory = filled(walk(4, 3), capacity=4)
    before = trajectory.snapshots()
    with pytest.raises(ValueError, match="shape"):
        trajectory.append(np.ones(4))
    with pytest.raises(ValueError, match="NaN"):
        trajectory.append(np.array([1.0, np.nan, 0.0]))
    assert torch.equal(trajectory.snapshots(), before)
    with pytest.raises(ValueError, match="one weight per snapshot"):
        trajectory.combine(np.ones(3))
    with pytest.raises(ValueError, match="needs at least 5 snapshots"):
        trajectory.spectrum(delays=4)
    with pytest.raises(IndexError, match="empty"):
        Trajectory(2).last()
    with pytest.raises(ValueError, match="needs at least 2"):
        Trajectory(2).spectrum()


# -- other storage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [None, 12])
def test_errors_of_bfloat16_increments_do_not_add_up(capacity):
    snapshots = walk(300, 2000)
    trajectory = filled(snapshots, dtype=torch.bfloat16, capacity=capacity)
    kept = snapshots[-(capacity or 300) :]
    steps = np.abs(np.diff(snapshots, axis=0)).max()
    assert np.abs(trajectory.snapshots().numpy() - kept).max() < steps / 200  # one rounding of a step, at any time
    np.testing.assert_array_equal(trajectory.last().numpy(), trajectory.snapshots()[-1].numpy())
    weights = np.random.default_rng(0).standard_normal((2, len(kept)))
    combined = weights @ trajectory.snapshots().double().numpy()
    np.testing.assert_allclose(trajectory.combine(weights).numpy(), combined, rtol=1e-4, atol=1e-3)


def test_bfloat16_increments_of_a_real_trajectory(real_trajectory):
    exact, ours = dmd_rrr(real_trajectory), filled(real_trajectory, dtype=torch.bfloat16)
    assert ours.nbytes < 0.52 * real_trajectory.nbytes + 8 * real_trajectory.shape[1]
    spectrum = ours.spectrum()
    assert spectrum.rank == exact.rank
    assert distance(spectrum.eigenvalues, exact.eigenvalues) < 2e-3
    assert spectrum.unit_fraction() == pytest.approx(exact.unit_fraction(), abs=2e-3)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 60), capacity=st.sampled_from([None, 5]), seed=st.integers(0, 99))
def test_processes_that_share_their_sums_all_hold_the_spectrum_of_the_whole(cut, capacity, seed):
    snapshots = walk(12, 60, seed)
    parts = [Trajectory(size, capacity=capacity, all_sum=lambda values: values) for size in (cut, 60 - cut)]
    for snapshot in snapshots:
        assert record_together(parts, [snapshot[:cut], snapshot[cut:]]) == [True, True]
    whole = filled(snapshots, capacity=capacity)
    for part in parts:
        assert part.total == 60
        assert distance(part.spectrum().eigenvalues, whole.spectrum().eigenvalues) < 1e-9
    bad = snapshots[-1].copy()
    bad[-1 if cut < 60 else 0] = np.inf  # in one of the parts
    assert record_together(parts, [bad[:cut], bad[cut:]]) == [False, False]
    assert all(len(part) == len(whole) for part in parts)


def test_nobody_else_can_reach_a_mapped_file(tmp_path):
    trajectory = filled(walk(20, 5000), capacity=12, storage="disk", path=tmp_path)
    assert list(tmp_path.iterdir()) == []  # an unnamed file cannot be truncated, shared or left behind
    assert len(trajectory.snapshots()) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 7, 5000, PRECISE + 1])
@pytest.mark.parametrize("rows", [[], [1], [3, 2]])
def test_products_of_a_row_with_others(dtype, columns, rows):
    random = torch.Generator().manual_seed(0)
    segments = [torch.randn(count, columns, generator=random).to(dtype) for count in rows]
    first, second = torch.randn(2, columns, generator=random).to(dtype)
    vector = first.double() + second.double()
    expected = [*(row for segment in segments for row in segment.double() @ vector), vector @ vector]
    found = row_products(segments, first, second)
    scale = float(vector.norm()) * columns**0.5
    assert np.abs(found - np.array(expected)).max() / scale < (1e-14 if columns < PRECISE else 1e-6)


@pytest.mark.parametrize("storage", ["ram", "disk", "sketch"])
def test_snapshots_are_recorded_in_inference_mode_too(storage):
    trajectory = Trajectory(3, storage=storage, capacity=5)
    with torch.inference_mode():
        trajectory.append(torch.zeros(3))
    for value in (2.0, 4.0):
        trajectory.append(torch.full((3,), value))
    np.testing.assert_allclose(trajectory.step_norms(), 2 * np.sqrt(3), rtol=1e-6)
