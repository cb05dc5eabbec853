from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dgedmdq, lapack
from problems import distance

from lightning_koopman import Trajectory, dmd_rrr
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
    assert distance(ours.eigenvalues, exact.eigenvalues) < 1e-9  # the issue asks for 1e-7
    if lapack() is not None:
        plain = trajectory.spectrum(refine=False)
        assert distance(plain.eigenvalues, dgedmdq(kept).eigenvalues) < 1e-9


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
    np.testing.assert_array_equal(trajectory.snapshots().numpy(), kept)
    np.testing.assert_array_equal(trajectory.last().numpy(), kept[-1])
    root = trajectory.factor()
    wide = kept.astype(np.float64)
    np.testing.assert_allclose(root.T @ root, wide @ wide.T, rtol=1e-9, atol=1e-7)
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
            state = trajectory.save(tmp_path / "rows.bin")  # most rows are already there at the next save
    state = trajectory.save(tmp_path / "rows.bin")
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded = Trajectory.load(state, tmp_path / "rows.bin", storage=kept.get("storage", "ram"))
    for more in walk(5, 100, seed=1):
        trajectory.append(more)
        loaded.append(more)
    if "sketch" not in kept:
        assert torch.equal(loaded.snapshots(), trajectory.snapshots())
    np.testing.assert_array_equal(loaded.spectrum().eigenvalues, trajectory.spectrum().eigenvalues)


def test_the_disk_store_can_be_its_own_sidecar(tmp_path):
    snapshots = walk(50, 64)
    path = tmp_path / "rows.bin"
    trajectory = filled(snapshots, storage="disk", path=path)
    state = trajectory.save(path)
    loaded = Trajectory.load(state, path, storage="disk", path=path)
    assert torch.equal(loaded.snapshots(), torch.from_numpy(snapshots))


def test_an_older_state_recovers_what_the_ring_still_holds(tmp_path):
    snapshots = walk(20, 30)
    trajectory = Trajectory(30, capacity=8)
    for snapshot in snapshots[:12]:
        trajectory.append(snapshot)
    early = trajectory.save(tmp_path / "rows.bin")
    for snapshot in snapshots[12:15]:
        trajectory.append(snapshot)
    trajectory.save(tmp_path / "rows.bin")
    loaded = Trajectory.load(early, tmp_path / "rows.bin")  # 2 of its 8 snapshots are overwritten
    assert torch.equal(loaded.snapshots(), torch.from_numpy(snapshots[6:12]))
    assert distance(loaded.spectrum().eigenvalues, dmd_rrr(snapshots[6:12]).eigenvalues) < 1e-8


def test_a_damaged_sidecar_is_noticed(tmp_path):
    trajectory = filled(walk(9, 30))
    state = trajectory.save(tmp_path / "rows.bin")
    data = bytearray((tmp_path / "rows.bin").read_bytes())
    data[8 * 30 * 4 + 5] ^= 1  # in the newest snapshot
    (tmp_path / "rows.bin").write_bytes(data)
    assert len(Trajectory.load(state, tmp_path / "rows.bin")) == 0


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
        ({"n": 3, "path": "x"}, "goes with storage='disk'"),
        ({"n": 3, "dtype": torch.float16}, "dtype must be"),
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
    with pytest.raises(ValueError, match="one weight a snapshot"):
        trajectory.combine(np.ones(3))
    with pytest.raises(ValueError, match="needs at least 5 snapshots"):
        trajectory.spectrum(delays=4)
    with pytest.raises(IndexError, match="empty"):
        Trajectory(2).last()
    with pytest.raises(ValueError, match="needs at least 2"):
        Trajectory(2).spectrum()


# -- kept otherwise ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("capacity", [None, 9])
def test_parts_recorded_elsewhere_are_joined(kept, capacity):
    snapshots = walk(20, 150)
    edges = [0, 40, 41, 150]
    parts = [
        filled(snapshots[:, a:b], capacity=capacity, **({"offset": a} if "sketch" in kept else {}), **kept)
        for a, b in itertools.pairwise(edges)
    ]
    merged, whole = Trajectory.merge(parts), filled(snapshots, capacity=capacity, **kept)
    assert (merged.n, merged.total, len(merged)) == (150, 150, len(whole))
    assert distance(merged.spectrum().eigenvalues, whole.spectrum().eigenvalues) < 1e-9
    for more in walk(3, 150, seed=2):  # and it goes on
        merged.append(more)
        whole.append(more)
    assert distance(merged.spectrum().eigenvalues, whole.spectrum().eigenvalues) < 1e-9
    if "sketch" not in kept:
        assert torch.equal(merged.snapshots(), whole.snapshots())


def test_parts_that_went_on_for_different_times():
    snapshots = walk(20, 10)
    early, late = filled(snapshots[:18, :4], capacity=10), filled(snapshots[:, 4:], capacity=10)
    merged = Trajectory.merge([early, late])
    assert torch.equal(merged.snapshots(), torch.from_numpy(snapshots[10:18]))
    assert distance(merged.spectrum().eigenvalues, dmd_rrr(snapshots[10:18]).eigenvalues) < 1e-9


def test_what_cannot_be_joined_is_said():
    with pytest.raises(ValueError, match="must not be empty"):
        Trajectory.merge([])
    with pytest.raises(ValueError, match="same dtype"):
        Trajectory.merge([filled(walk(3, 2)), filled(walk(3, 2), capacity=3)])
    with pytest.raises(ValueError, match="no time in common"):
        Trajectory.merge([filled(walk(30, 2), capacity=4), filled(walk(3, 2), capacity=4)])
    with pytest.raises(ValueError, match="already gives the spectrum"):
        Trajectory.merge([filled(walk(3, 2), all_sum=lambda values: values)])


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 60), capacity=st.sampled_from([None, 5]), seed=st.integers(0, 99))
def test_processes_that_share_their_sums_all_hold_the_spectrum_of_the_whole(cut, capacity, seed):
    snapshots = walk(12, 60, seed)
    sums = []
    parts = [Trajectory(size, capacity=capacity, all_sum=lambda values: values) for size in (cut, 60 - cut)]
    for snapshot in snapshots:
        for part, values in zip(parts, (snapshot[:cut], snapshot[cut:]), strict=True):
            part.stage(torch.from_numpy(values))
        sums = np.sum([part.border() for part in parts], axis=0)
        assert all(part.commit(sums) for part in parts)
    whole = filled(snapshots, capacity=capacity)
    for part in parts:
        assert part.total == 60
        assert distance(part.spectrum().eigenvalues, whole.spectrum().eigenvalues) < 1e-9
    bad = snapshots[-1].copy()
    bad[-1 if cut < 60 else 0] = np.inf  # in one of them
    for part, values in zip(parts, (bad[:cut], bad[cut:]), strict=True):
        part.stage(torch.from_numpy(values))
    with np.errstate(invalid="ignore"):
        sums = np.sum([part.border() for part in parts], axis=0)
        assert not any(part.commit(sums) for part in parts)
    assert all(len(part) == len(whole) for part in parts)


def test_mapped_snapshots_stay_out_of_memory(tmp_path, monkeypatch):
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("the system does not tell the resident memory")
    monkeypatch.setattr("lightning_koopman.trajectory.rows.RESIDENT", 2**22)

    def held() -> int:
        return int(resident.read_text().split()[2]) * 4096  # pages shared with files

    n = 2**21  # 8 MiB a snapshot
    trajectory = Trajectory(n, capacity=12, storage="disk", path=tmp_path / "rows.bin")
    values, before = torch.randn(n), held()
    for _ in range(20):
        trajectory.append(values)
        values.mul_(0.9)
    assert held() - before < 30 * 2**20  # of 100 MiB on disk
    trajectory.combine(np.ones(12))
    trajectory.save(tmp_path / "sidecar.bin")
    assert held() - before < 30 * 2**20
