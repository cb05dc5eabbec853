"""Data of any finite scale, and snapshots that vanish, explode or repeat: no false eigenvalue, no raw error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_koopman import Trajectory, dmd_rrr

EIGENVALUES = [0.5, 0.8, 1.0]
TIMES = np.arange(12)
PLAIN = np.stack([1 + 0.5**TIMES, 0.5**TIMES, -(0.8**TIMES)], axis=1)


def wide(snapshots: np.ndarray) -> np.ndarray:
    """Snapshots padded with zeros until the Gram matrix is used."""
    return np.concatenate([snapshots, np.zeros((len(snapshots), 100_000))], axis=1)


def record(snapshots: np.ndarray, dtype: torch.dtype = torch.float64, **options) -> Trajectory:
    trajectory = Trajectory(snapshots.shape[1], dtype=dtype, **options)
    for snapshot in snapshots:
        trajectory.append(torch.as_tensor(snapshot))
    return trajectory


WAYS = {
    "QR": dmd_rrr,
    "Gram": lambda snapshots: dmd_rrr(wide(snapshots)),
    "trajectory": lambda snapshots: record(snapshots).spectrum(),
    "window": lambda snapshots: record(np.concatenate([snapshots[:1], snapshots]), capacity=12).spectrum(),
    "disk": lambda snapshots: record(snapshots, storage="disk").spectrum(),
}


@pytest.mark.parametrize("exponent", [-307, -300, -160, -30, 30, 150, 200, 300, 307])
@pytest.mark.parametrize("way", WAYS)
def test_the_scale_of_the_data_changes_nothing(way, exponent):
    found, expected = WAYS[way](PLAIN * 10.0**exponent), WAYS[way](PLAIN)
    np.testing.assert_allclose(np.sort(found.eigenvalues), np.sort(EIGENVALUES), atol=1e-6)
    np.testing.assert_allclose(found.misfit, expected.misfit, atol=1e-7)
    np.testing.assert_allclose(np.sort(found.importance / 10.0**exponent), np.sort(expected.importance), rtol=1e-6)
    weights = found.combination([11])
    np.testing.assert_allclose((weights @ PLAIN)[0], PLAIN[11], atol=1e-6)


@pytest.mark.parametrize("exponent", [-300, 300])
def test_a_trajectory_of_any_scale_gives_its_snapshots_back(exponent, tmp_path):
    snapshots = PLAIN * 10.0**exponent
    trajectory = record(snapshots, capacity=8)
    np.testing.assert_allclose(trajectory.snapshots(), snapshots[4:], rtol=1e-12)
    np.testing.assert_allclose(trajectory.last(), snapshots[-1], rtol=1e-12)
    np.testing.assert_allclose(trajectory.combine(np.eye(8)[3]), snapshots[7], rtol=1e-12)
    steps = np.linalg.norm(np.diff(PLAIN[4:], axis=0), axis=1) * 10.0**exponent
    np.testing.assert_allclose(trajectory.step_norms(), steps, rtol=1e-9)
    np.testing.assert_allclose(trajectory.start_norm(), np.linalg.norm(PLAIN[4]) * 10.0**exponent, rtol=1e-12)
    again = Trajectory.load(trajectory.save(tmp_path / "file"), tmp_path / "file")
    np.testing.assert_array_equal(again.snapshots(), trajectory.snapshots())
    np.testing.assert_array_equal(again.spectrum().eigenvalues, trajectory.spectrum().eigenvalues)


@pytest.mark.parametrize("rate", [1e-15, 1e-12, 1e-8, 1e-5, 1e-3, 1e3, 1e8, 1e15])
@pytest.mark.parametrize("way", WAYS)
def test_fast_decay_and_growth_have_one_eigenvalue(way, rate):
    snapshots = np.array([1.0, -2.0]) * rate ** TIMES[:, None]
    (found,) = WAYS[way](snapshots).eigenvalues
    # in a Gram matrix, snapshots much smaller than others lose all digits and count as zero
    assert found == pytest.approx(rate, rel=1e-9, abs=max(1e-5, 0.0 if way == "QR" else min(1.0, rate) / 4))


@pytest.mark.parametrize("way", [*WAYS, "float32"])
def test_snapshots_that_become_zero_leave_no_eigenvalue_at_one(way):
    snapshots = PLAIN.copy()
    snapshots[6:] = 0.0
    ways = {**WAYS, "float32": lambda given: record(given, torch.float32).spectrum()}
    found = ways[way](snapshots).eigenvalues
    np.testing.assert_allclose(found, dmd_rrr(snapshots).eigenvalues, atol=1e-6)
    assert abs(found - 1).min() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_low_rank_in_any_precision(dtype):
    drawn = np.random.default_rng(0)
    snapshots = np.outer(0.5**TIMES, drawn.standard_normal(50)) + drawn.standard_normal(50)
    found = record(snapshots, dtype).spectrum()
    np.testing.assert_allclose(np.sort(found.eigenvalues.real), [0.5, 1.0], atol=1e-2)
    constant = record(np.ones((12, 50)), dtype).spectrum()
    np.testing.assert_allclose(constant.eigenvalues, [1.0], atol=1e-12)
    period = record(np.array([[1.0, 0.0], [0.0, 1.0]] * 6), dtype).spectrum()
    np.testing.assert_allclose(np.sort(period.eigenvalues.real), [-1.0, 1.0], atol=1e-12)


@pytest.mark.parametrize(
    ("snapshots", "message"),
    [
        (np.zeros((3, 2)), "all snapshots are zero"),
        (np.array([[0.0], [0.0], [1.0]]), "all snapshots but the last are zero"),
        (np.array([[1.0], [np.inf]]), "NaN or infinite"),
    ],
)
def test_what_cannot_be_decomposed_is_said_in_words(snapshots, message):
    with pytest.raises(ValueError, match=message):
        dmd_rrr(snapshots)
    with pytest.raises(ValueError, match=message):
        record(snapshots).spectrum()
