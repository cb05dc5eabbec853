from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_koopman.dmd.gram import (
    factor,
    factor_from_increment_gram,
    hankel,
    increment_gram,
    merge_oldest,
    row_products,
)


@pytest.mark.parametrize("exact", [False, True])
def test_factor_has_the_gram_matrix_of_the_snapshots(exact, real_trajectory):
    root = factor(torch.from_numpy(real_trajectory), exact=exact)
    wide = real_trajectory.astype(np.float64)
    np.testing.assert_allclose(root.T @ root, wide @ wide.T, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 12), columns=st.integers(1, 20_000), seed=st.integers(0, 1000))
def test_increment_gram_is_the_gram_of_the_increments(rows, columns, seed):
    snapshots = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    increments = np.diff(snapshots.astype(np.float64), axis=0, prepend=0)
    np.testing.assert_allclose(increment_gram(torch.from_numpy(snapshots)), increments @ increments.T, rtol=1e-9)
    cut = rows // 2
    parts = [torch.from_numpy(increments[:cut]), torch.from_numpy(increments[cut:-1])]
    row = row_products(parts, torch.from_numpy(increments[-1]))
    np.testing.assert_allclose(row, increments[-1] @ increments.T, rtol=1e-9, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 12), dropped=st.integers(0, 10), seed=st.integers(0, 1000))
def test_merging_the_oldest_equals_starting_later(rows, dropped, seed):
    dropped = min(dropped, rows - 1)
    snapshots = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, 30)))
    merged = merge_oldest(increment_gram(snapshots), dropped)
    np.testing.assert_allclose(merged, increment_gram(snapshots[dropped:]), atol=1e-10)


def test_dependent_increments_fall_back_to_the_nearest_semidefinite_matrix():
    snapshots = np.outer(np.arange(1.0, 7.0), np.linspace(1, 2, 5))  # one direction, five increments
    root = factor_from_increment_gram(increment_gram(torch.from_numpy(snapshots)))
    np.testing.assert_allclose(root.T @ root, snapshots @ snapshots.T, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(delays=st.integers(1, 6), seed=st.integers(0, 1000), n=st.integers(1, 9))
def test_hankel_of_the_factor_is_a_factor_of_the_hankel(delays, seed, n):
    snapshots = np.random.default_rng(seed).standard_normal((9, n))
    embedded = np.stack([snapshots[t : t + delays].ravel() for t in range(9 - delays + 1)])
    root = hankel(factor(torch.from_numpy(snapshots), exact=True), delays)
    assert root.shape[0] <= max(root.shape[1], n)
    np.testing.assert_allclose(root.T @ root, embedded @ embedded.T, atol=1e-10)
