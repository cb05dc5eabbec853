from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import distance, linear_system, record_together

from lightning_koopman import Trajectory, dmd_rrr
from lightning_koopman.trajectory.sketch import Sketch


@settings(max_examples=40, deadline=None)
@given(k=st.integers(2, 97), n=st.integers(1, 3000), cuts=st.lists(st.integers(0, 3000), max_size=3))
def test_sketches_of_the_parts_add_up(k, n, cuts):
    sketch, values = Sketch(k), torch.randn(n, generator=torch.Generator().manual_seed(n))
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    parts = [sketch.project(values[a:b], offset=a) for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(sum(parts), sketch.project(values), rtol=0, atol=1e-4)


def test_chunks_make_no_difference(monkeypatch):
    values = torch.randn(10_000, dtype=torch.float64)
    whole = Sketch(31).project(values)
    monkeypatch.setattr("lightning_koopman.trajectory.sketch.CHUNK", 100)
    torch.testing.assert_close(Sketch(31).project(values), whole)


def test_inner_products_are_unbiased_with_the_spread_that_is_claimed():
    random = np.random.default_rng(0)
    x = random.standard_normal(20_000)
    y = 0.6 * x + 0.8 * random.standard_normal(20_000)
    k, exact = 64, x @ y
    found = []
    for seed in range(150):
        sketch = Sketch(k, seed=seed)
        found.append(float(sketch.project(torch.from_numpy(x)) @ sketch.project(torch.from_numpy(y))))
    # variance of a product of Gaussians: (‖x‖²‖y‖² + ⟨x, y⟩²) / k
    spread = np.sqrt(((x @ x) * (y @ y) + exact**2) / k)
    assert abs(np.mean(found) - exact) < 4 * spread / np.sqrt(len(found))
    assert 0.8 < np.std(found) / spread < 1.2


def test_columns_of_a_matrix_do_not_fall_into_few_buckets():
    layer = torch.zeros(4096, 256)
    layer[:, 3] = torch.randn(4096)  # all nonzero values are in one column
    sketch = Sketch(251).project(layer.reshape(-1))
    assert (sketch.abs() > 0).double().mean() > 0.99


def test_a_linear_system_is_exact_in_any_sketch():
    snapshots = linear_system([1.0, 0.9, 0.7 + 0.3j], n=5000, time=30, seed=1)
    trajectory = Trajectory(5000, storage="sketch", sketch=53)
    for snapshot in snapshots:
        trajectory.append(snapshot)
    assert distance(trajectory.spectrum().eigenvalues, dmd_rrr(snapshots).eigenvalues) < 1e-6


@pytest.mark.parametrize("k", [1021, 4093])
def test_the_estimated_error_on_a_real_trajectory_is_of_the_size_of_the_true_one(k, digits_trajectory):
    true, claimed = [], []
    for seed in range(12):  # few leading eigenvalues: the true error is known to about 20 %
        trajectory = Trajectory(digits_trajectory.shape[1], storage="sketch", sketch=k)
        trajectory._sketch = Sketch(k, seed=seed)
        for snapshot in digits_trajectory[40:]:
            trajectory.append(snapshot)
        spectrum = trajectory.spectrum()
        leading = spectrum.importance > 0.05 * spectrum.importance.max()
        # at the same rank: a rank chosen differently is no error of sketching an eigenvalue
        exact = dmd_rrr(digits_trajectory[40:], tol=0.0, max_rank=spectrum.rank).eigenvalues
        near = np.abs(spectrum.eigenvalues[leading, None] - exact).min(axis=1)
        true.append(np.mean(near**2))
        claimed.append(np.mean(spectrum.sketch_errors[leading] ** 2))
    ratio = np.sqrt(np.mean(claimed) / np.mean(true))
    assert 0.4 < ratio < 4


def test_whole_snapshots_cannot_be_had_from_sketches():
    trajectory = Trajectory(5, storage="sketch", sketch=3)
    trajectory.append(torch.ones(5))
    for method in (trajectory.snapshots, trajectory.last, lambda: trajectory.combine([1.0])):
        with pytest.raises(ValueError, match="storage='sketch' keeps 3 combinations"):
            method()


def test_a_process_that_holds_nothing_adds_nothing():
    holds, empty = (Trajectory(n, storage="sketch", sketch=7, all_sum=lambda values: values) for n in (20, 0))
    for values in torch.randn(4, 20).cumsum(0):
        assert record_together([holds, empty], [values, np.zeros(0)]) == [True, True]
    np.testing.assert_array_equal(holds.spectrum().eigenvalues, empty.spectrum().eigenvalues)
