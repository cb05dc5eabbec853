from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from problems import linear_system

from lightning_koopman import dmd_rrr

SYSTEM = [1.0, 0.97, 0.6 + 0.5j]


@pytest.fixture
def snapshots():
    return linear_system(SYSTEM, n=9, time=25)


def test_clusters_and_fractions_count_importance(snapshots):
    spectrum = dmd_rrr(snapshots, tol=1e-10)
    near = spectrum.unit_cluster(0.05)
    assert sorted(spectrum.ritz_values[near].real.round(6)) == [0.97, 1.0]
    expected = np.abs(spectrum.coefficients[near]).sum() / np.abs(spectrum.coefficients).sum()
    assert spectrum.unit_fraction(0.05) == pytest.approx(expected)
    assert spectrum.unit_fraction(1e-4) < spectrum.unit_fraction(0.05) < spectrum.unit_fraction(3.0) == 1.0


def test_slowest_modulus_leaves_out_one_and_the_untrusted(snapshots):
    assert dmd_rrr(snapshots, tol=1e-10).slowest_modulus() == pytest.approx(0.97, abs=1e-8)
    assert np.isnan(dmd_rrr(np.ones((5, 3))).slowest_modulus())
    walk = np.random.default_rng(0).standard_normal((8, 500)).cumsum(0)
    assert np.isnan(dmd_rrr(walk).slowest_modulus(max_residual=1e-9))


def test_reconstruction_and_forecast_are_exact_for_a_linear_system(snapshots):
    spectrum = dmd_rrr(snapshots[:15], tol=1e-12)
    np.testing.assert_allclose(spectrum.reconstruct(snapshots[:15]), snapshots[:15], atol=1e-9)
    np.testing.assert_allclose(spectrum.forecast(snapshots[:15], 10), snapshots[15:], atol=1e-8)


def test_selected_modes_add_up_to_all(snapshots):
    spectrum = dmd_rrr(snapshots, tol=1e-12)
    near = spectrum.unit_cluster()
    parts = spectrum.reconstruct(snapshots, modes=near) + spectrum.reconstruct(snapshots, modes=~near)
    np.testing.assert_allclose(parts, spectrum.reconstruct(snapshots), atol=1e-10)


def test_clipping_holds_growing_modes_at_their_last_size():
    snapshots = linear_system([1.2, 1.0], n=5, time=12)
    spectrum = dmd_rrr(snapshots, tol=1e-12)
    held = spectrum.forecast(snapshots, 5)
    np.testing.assert_allclose(held, np.repeat(snapshots[-1:], 5, axis=0), rtol=1e-6)
    free = spectrum.forecast(snapshots, 5, clip=False)
    np.testing.assert_allclose(free, linear_system([1.2, 1.0], n=5, time=17)[12:], rtol=1e-6)


def test_bad_selections_are_named(snapshots):
    spectrum = dmd_rrr(snapshots, tol=1e-12)
    with pytest.raises(ValueError, match="one entry per mode"):
        spectrum.combination([0], modes=[True])
    with pytest.raises(ValueError, match="conjugate pair"):
        spectrum.combination([0], modes=spectrum.ritz_values.imag > 0)
    with pytest.raises(ValueError, match="pass the same snapshots"):
        spectrum.forecast(snapshots[:3], 1)


def test_it_is_frozen_and_pickles(snapshots):
    spectrum = dmd_rrr(snapshots)
    with pytest.raises(FrozenInstanceError):
        spectrum.rank = 3
    with pytest.raises(ValueError, match="read-only"):
        spectrum.eigenvalues[0] = 0
    copy = pickle.loads(pickle.dumps(spectrum))
    np.testing.assert_array_equal(copy.eigenvalues, spectrum.eigenvalues)
    assert repr(copy) == repr(spectrum)
