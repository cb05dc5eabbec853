from __future__ import annotations

import numpy as np
import pytest

from lightning_koopman import dmd_rrr, random_walk_spectrum


def explicit_walk(steps: np.ndarray, start: float, n: int, seed: int) -> np.ndarray:
    directions = np.random.default_rng(seed).standard_normal((len(steps) + 1, n))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return np.cumsum(directions * np.concatenate([[start], steps])[:, None], axis=0)


@pytest.mark.parametrize("n", [10, 3000])
def test_it_has_the_law_of_explicit_random_walks(n):
    steps = np.geomspace(1.0, 0.05, 30)
    ours = [random_walk_spectrum(steps, 6.0, n, seed=seed) for seed in range(40)]
    theirs = [dmd_rrr(explicit_walk(steps, 6.0, n, seed)) for seed in range(40)]
    for quantity in (
        lambda s: s.unit_fraction(),
        lambda s: s.misfit,
        lambda s: s.residual_at(1.0),
        lambda s: abs(s.ritz_values).max(),
    ):
        a, b = np.array([quantity(s) for s in ours]), np.array([quantity(s) for s in theirs])
        spread = np.hypot(a.std(), b.std()) / np.sqrt(40)
        assert abs(a.mean() - b.mean()) < 4 * spread + 1e-12


def test_it_has_the_given_step_lengths_in_any_dimension():
    steps = np.linspace(0.1, 1, 12)
    for n in (1, 5, 12, 13, 14, 10**9):
        spectrum = random_walk_spectrum(steps, 2.0, n, tol=1e-12)
        assert spectrum.n_snapshots == 13
        assert spectrum.rank <= min(n, 12)


def test_a_random_walk_has_an_eigenvalue_at_one_too():
    spectrum = random_walk_spectrum(np.full(99, 0.1), 10.0, 10**6, refine=True)
    nearest = np.argmin(abs(spectrum.eigenvalues - 1))
    assert abs(spectrum.eigenvalues[nearest] - 1) < 5e-3
    assert spectrum.residuals[nearest] < 5e-3


def test_it_is_reproducible_and_seeded():
    one, same, other = (random_walk_spectrum(np.ones(20), 5.0, 1000, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.eigenvalues, same.eigenvalues)
    assert one.unit_fraction() != other.unit_fraction()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="step_norms must have shape"):
        random_walk_spectrum(np.ones((2, 2)), 1.0, 3)
    with pytest.raises(ValueError, match="n must be at least 1"):
        random_walk_spectrum(np.ones(3), 1.0, 0)
