"""The streaming update against float64, compiled and not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import distance

from lightning_koopman import Trajectory, dmd_rrr
from lightning_koopman.trajectory import border
from lightning_koopman.trajectory._compiled import kernel


@pytest.fixture(params=["compiled", "eager", "eager in float32"])
def way(request, monkeypatch):
    """Each way to compute it; in float32 only where there are many numbers, unless told otherwise."""
    if request.param == "compiled" and kernel() is None:
        pytest.skip("no C compiler")
    if request.param != "compiled":
        monkeypatch.setattr(border, "kernel", lambda: None)
        monkeypatch.setattr(border, "PRECISE", 1 if "float32" in request.param else 2**62)
    return request.param


def check(segments, increments, way, **options) -> None:
    wide = increments.astype(np.float64)
    expected = wide[[0, -1]] @ wide.T
    scale = np.linalg.norm(wide[[0, -1]], axis=1)[:, None] * np.linalg.norm(wide, axis=1)
    found = border.border_products(segments, **options)
    assert (np.abs(found - expected) / np.maximum(scale, 1e-30)).max() < (1e-5 if "32" in way else 1e-12)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9000), cut=st.integers(0, 8), seed=st.integers(0, 100))
@pytest.mark.parametrize("name", ["compiled", "eager"])
def test_both_ways_give_the_products_with_all_increments(name, rows, columns, cut, seed):
    snapshots = np.random.default_rng(seed).standard_normal((rows, columns)).cumsum(0).astype(np.float32)
    increments = np.diff(snapshots.astype(np.float64), axis=0, prepend=0.0)
    parts = [part for part in (torch.from_numpy(snapshots[:cut]), torch.from_numpy(snapshots[cut:])) if len(part)]
    before, border.kernel = border.kernel, kernel if name == "compiled" else lambda: None
    try:
        check(parts, increments, name)
    finally:
        border.kernel = before


@pytest.mark.parametrize("columns", [1, 7, 2048, 2049, 300_001])
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_increments_in_bfloat16_on_top_of_a_base(way, columns, step, count):
    torch.manual_seed(0)
    base, rows = torch.randn(columns), (0.01 * torch.randn(count, columns)).bfloat16()
    above = (0.01 * torch.randn(columns)).bfloat16() if step else None
    oldest = base if above is None else base + above.float()
    check([rows] if count else [], torch.cat([oldest[None], rows.float()]).numpy(), way, base=base, step=above)


def test_slabs_and_threads_cover_every_column_once(way, monkeypatch):
    snapshots = np.random.default_rng(0).standard_normal((6, 700_001)).cumsum(0).astype(np.float32)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(border, "LEAST", 1000)
    check(
        [torch.from_numpy(snapshots)],
        np.diff(snapshots.astype(np.float64), axis=0, prepend=0.0),
        way,
        slab=131_072,
        release=lambda *each: seen.append(each),
    )
    assert [start for start, _ in seen] == [stop for _, stop in [(0, 0), *seen[:-1]]]
    assert seen[-1][1] == 700_001


@pytest.mark.usefixtures("way")
def test_a_value_that_is_not_finite_shows():
    snapshots = torch.randn(4, 5000)
    for value in (np.nan, np.inf, -np.inf):
        snapshots[-1, 4321] = value
        assert not np.isfinite(border.border_products([snapshots])).all()


def test_a_real_trajectory_to_the_accuracy_of_each_way(way, digits_trajectory):
    trajectory = Trajectory(digits_trajectory.shape[1], capacity=60)
    for snapshot in digits_trajectory:
        trajectory.append(snapshot)
    exact = dmd_rrr(digits_trajectory[-60:])
    assert distance(trajectory.spectrum().eigenvalues, exact.eigenvalues) < (1e-5 if "32" in way else 1e-9)


def no_home() -> None:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_compiler_there_is_no_kernel(monkeypatch, tmp_path):
    build = kernel.__wrapped__
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("LIGHTNING_KOOPMAN_COMPILE", "0")
    assert build() is None
    monkeypatch.delenv("LIGHTNING_KOOPMAN_COMPILE")
    monkeypatch.setattr("pathlib.Path.home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build() is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be written there
    assert build() is None
