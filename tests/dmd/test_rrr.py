from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dgedmd, dgedmdq, lapack
from problems import distance, full_spectrum, linear_system, match

from lightning_koopman import dmd_rrr

needs_lapack = pytest.mark.skipif(lapack() is None, reason="this SciPy does not bundle LAPACK's dgedmd")
SYSTEM = [1.0, 0.9 + 0.2j, 0.5, -0.3, 0.1 + 0.6j]


@needs_lapack
@pytest.mark.parametrize("oracle", [dgedmd, dgedmdq])
@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_lapack_on_noisy_linear_systems(oracle, tol, seed):
    snapshots = linear_system(SYSTEM, n=60, time=25, seed=seed, noise=1e-3)
    theirs, ours = oracle(snapshots, tol=tol), dmd_rrr(snapshots, tol=tol, refine=False)
    assert ours.rank == len(theirs.eigenvalues)
    i, j = match(ours.eigenvalues, theirs.eigenvalues)
    np.testing.assert_allclose(ours.eigenvalues[i], theirs.eigenvalues[j], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.residuals[i], theirs.residuals[j], rtol=0, atol=1e-9)


@needs_lapack
@pytest.mark.parametrize("oracle", [dgedmd, dgedmdq])
@pytest.mark.parametrize("count", [12, 51, 101])
def test_agrees_with_lapack_on_a_real_trajectory(oracle, count, real_trajectory):
    snapshots = real_trajectory[:count]
    theirs, ours = oracle(snapshots), dmd_rrr(snapshots, refine=False)
    assert ours.rank == len(theirs.eigenvalues)
    i, j = match(ours.eigenvalues, theirs.eigenvalues)
    np.testing.assert_allclose(ours.eigenvalues[i], theirs.eigenvalues[j], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.residuals[i], theirs.residuals[j], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [8, 200, 40_000])  # 40,000 × 30 uses the Gram matrix
@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy])
def test_finds_the_eigenvalues_of_a_linear_system(dtype, n, wrap):
    snapshots = linear_system(SYSTEM, n=n, time=30).astype(dtype)
    streamed = n > 1000  # uses the Gram matrix, which squares the condition number
    spectrum = dmd_rrr(wrap(snapshots), tol=1e-5 if dtype == np.float32 else 2e-6 if streamed else 1e-10)
    bound = 2e-3 if dtype == np.float32 else 1e-7 if streamed else 1e-9
    assert distance(spectrum.eigenvalues, full_spectrum(SYSTEM)) < bound
    assert spectrum.residuals.max() < bound


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_gives_the_same_spectrum(dtype):
    snapshots = torch.from_numpy(linear_system(SYSTEM, n=50_000, time=30, noise=1e-3)).to(dtype)
    here, there = dmd_rrr(snapshots), dmd_rrr(snapshots.cuda())
    assert distance(here.eigenvalues, there.eigenvalues) < 1e-9


def brute_force(snapshots: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """U (n, k) and A U (n, k) straight from the definition, on full-length vectors."""
    x, y = snapshots[:-1].T, snapshots[1:].T
    scale = np.linalg.norm(x, axis=0)
    u, s, vt = np.linalg.svd(x / scale, full_matrices=False)
    return u[:, :rank], (y / scale) @ vt[:rank].T / s[:rank]


def test_residuals_and_misfit_follow_their_definitions():
    snapshots = linear_system(SYSTEM, n=30, time=20, noise=1e-2)
    spectrum = dmd_rrr(snapshots, tol=1e-2)
    basis, image = brute_force(snapshots, spectrum.rank)
    operator = image @ basis.T
    modes = snapshots[:-1].T @ spectrum.mode_weights
    np.testing.assert_allclose(np.linalg.norm(modes, axis=0), 1.0)
    plain = np.linalg.norm(operator @ modes - modes * spectrum.ritz_values, axis=0)
    np.testing.assert_allclose(spectrum.ritz_residuals, plain, atol=1e-10)
    x, y = snapshots[:-1].T, snapshots[1:].T
    assert spectrum.misfit == pytest.approx(np.linalg.norm(y - operator @ x) / np.linalg.norm(y), rel=1e-8)
    for index, value in enumerate(spectrum.ritz_values):
        best = np.linalg.svd(image - value * basis, compute_uv=False)[-1]
        assert spectrum.residual_at(value) == pytest.approx(best, abs=1e-10)
        assert spectrum.residuals[index] <= best + 1e-10  # the Rayleigh quotient is no worse than the Ritz value
        assert spectrum.residuals[index] <= spectrum.ritz_residuals[index] + 1e-10


def test_refined_pairs_are_rayleigh_quotients_of_the_smallest_singular_vector():
    snapshots = linear_system(SYSTEM, n=30, time=20, noise=1e-2)
    spectrum = dmd_rrr(snapshots, tol=1e-2)
    basis, image = brute_force(snapshots, spectrum.rank)
    for value, refined in zip(spectrum.ritz_values, spectrum.eigenvalues, strict=True):
        vector = np.linalg.svd(image - value * basis)[2][-1].conj()
        assert refined == pytest.approx((vector.conj() @ basis.T @ image @ vector), abs=1e-9)


def test_coefficients_are_the_least_squares_fit_over_all_snapshots():
    snapshots = linear_system(SYSTEM, n=30, time=20, noise=1e-2)
    spectrum = dmd_rrr(snapshots, tol=1e-2)
    modes = snapshots[:-1].T @ spectrum.mode_weights
    powers = spectrum.ritz_values[None, :] ** np.arange(20)[:, None]
    design = np.concatenate([modes * row for row in powers])
    expected = np.linalg.lstsq(design, snapshots.ravel().astype(complex), rcond=None)[0]
    np.testing.assert_allclose(spectrum.coefficients, expected, atol=1e-8)


def test_coefficients_survive_fast_growth_and_decay():
    values = [3.0, 1.0, 1e-3]
    snapshots = linear_system(values, n=12, time=60)
    spectrum = dmd_rrr(snapshots, tol=1e-12)
    assert np.isfinite(spectrum.coefficients).all()
    growing = spectrum.combination([58, 59]) @ snapshots
    np.testing.assert_allclose(growing, snapshots[58:], rtol=1e-6)


def test_nearly_equal_eigenvalues_still_reconstruct():
    snapshots = linear_system([0.9, 0.9 + 1e-7, 0.5], n=12, time=30)
    spectrum = dmd_rrr(snapshots, tol=1e-13)
    np.testing.assert_allclose(spectrum.reconstruct(snapshots), snapshots, atol=1e-6)


def test_a_real_trajectory_is_reconstructed(digits_trajectory):
    spectrum = dmd_rrr(digits_trajectory)
    errors = np.linalg.norm(spectrum.reconstruct(digits_trajectory) - digits_trajectory, axis=1)
    assert errors.max() < 0.05 * np.linalg.norm(digits_trajectory[0])
    assert np.median(errors) < 0.01 * np.linalg.norm(digits_trajectory[0])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(3, 40),
    time=st.integers(3, 25),
    scale=st.floats(1e-6, 1e6),
    tol=st.sampled_from([1e-2, 1e-3]),
)
def test_invariants_of_any_trajectory(seed, n, time, scale, tol):
    rng = np.random.default_rng(seed)
    snapshots = np.cumsum(rng.standard_normal((time, n)), axis=0)
    spectrum = dmd_rrr(snapshots, tol=tol)
    # eigenvalues come in conjugate pairs and importance falls
    assert distance(spectrum.eigenvalues, spectrum.eigenvalues.conj()) < 1e-7
    assert np.all(np.diff(spectrum.importance) <= 1e-9 * spectrum.importance[0])
    assert spectrum.misfit >= 0
    assert 0 <= spectrum.unit_fraction() <= 1
    assert np.all(spectrum.residuals <= spectrum.ritz_residuals + 1e-8)
    # rotating the weights changes nothing; changing their unit only scales the coefficients
    turned = dmd_rrr(snapshots @ np.linalg.qr(rng.standard_normal((n, n)))[0], tol=tol)
    scaled = dmd_rrr(snapshots * scale, tol=tol)
    for other, factor in ((turned, 1.0), (scaled, scale)):
        if other.rank == spectrum.rank:  # a singular value may lie on the threshold
            assert np.sort(other.ritz_residuals) == pytest.approx(np.sort(spectrum.ritz_residuals), abs=1e-5)
            assert other.importance.sum() == pytest.approx(factor * spectrum.importance.sum(), rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(delays=st.integers(1, 8), seed=st.integers(0, 1000))
def test_delays_equal_an_explicit_hankel_embedding(delays, seed):
    snapshots = np.random.default_rng(seed).standard_normal((14, 5)).cumsum(0)
    embedded = np.stack([snapshots[t : t + delays].ravel() for t in range(14 - delays + 1)])
    ours, explicit = dmd_rrr(snapshots, delays=delays), dmd_rrr(embedded)
    assert distance(ours.eigenvalues, explicit.eigenvalues) < 1e-7
    assert ours.misfit == pytest.approx(explicit.misfit, abs=1e-9)
    reconstruction = ours.reconstruct(snapshots)
    np.testing.assert_allclose(
        reconstruction[delays - 1 :], explicit.reconstruct(embedded)[:, -5:], atol=1e-6 * np.abs(snapshots).max()
    )


def test_delayed_loss_gives_its_rates_and_its_forecast():
    t = np.arange(24.0)
    loss = 0.3 + 2 * 0.8**t + 0.5 * 0.6**t
    spectrum = dmd_rrr(loss[:20], delays=11, tol=1e-8)
    assert distance(spectrum.eigenvalues, np.array([1.0, 0.8, 0.6])) < 1e-6
    np.testing.assert_allclose(spectrum.forecast(loss[:20], 4).ravel(), loss[20:], atol=1e-8)
    np.testing.assert_allclose(spectrum.reconstruct(loss[:20]).ravel(), loss[:20], atol=1e-8)


@pytest.mark.parametrize(
    "layout",
    [lambda a: a[:, ::-1], lambda a: np.asfortranarray(a), lambda a: a.astype(">f8"), lambda a: a[::1, ::1]],
    ids=["reversed", "fortran", "big-endian", "view"],
)
def test_any_memory_layout_is_read(layout):
    snapshots = linear_system(SYSTEM, n=10, time=20)
    assert distance(dmd_rrr(layout(snapshots)).eigenvalues, dmd_rrr(snapshots).eigenvalues) < 1e-9


def test_a_read_only_memory_map_is_read_without_a_warning(tmp_path):
    snapshots = linear_system(SYSTEM, n=10, time=20)
    snapshots.tofile(tmp_path / "w.bin")
    mapped = np.memmap(tmp_path / "w.bin", mode="r", dtype=np.float64, shape=(20, 10))
    assert distance(dmd_rrr(mapped).eigenvalues, dmd_rrr(snapshots).eigenvalues) < 1e-12


def test_gradients_lists_and_integers_are_accepted():
    assert dmd_rrr([[1, 0], [2, 0], [4, 0]]).eigenvalues == pytest.approx([2.0])
    tracked = torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.25, 0.25]], requires_grad=True)
    assert dmd_rrr(tracked).eigenvalues == pytest.approx([0.5])


def test_constant_weights_have_the_single_eigenvalue_one():
    for n in (7, 60_000):
        spectrum = dmd_rrr(np.full((20, n), 0.3, dtype=np.float32))
        assert spectrum.rank == 1
        assert spectrum.eigenvalues == pytest.approx([1.0], abs=1e-7)
        assert spectrum.unit_fraction() == 1.0


@pytest.mark.parametrize(
    ("snapshots", "options", "error", "message"),
    [
        (np.ones((1, 3)), {}, ValueError, "needs at least 2"),
        (np.ones((3, 3)), {"delays": 3}, ValueError, "needs at least 4"),
        (np.ones((3, 3)) * np.nan, {}, ValueError, "NaN or infinite"),
        (np.array([[1.0], [np.inf]]), {}, ValueError, "NaN or infinite"),
        (np.zeros((4, 3)), {}, ValueError, "all snapshots are zero"),
        (np.ones((2, 2, 2)), {}, ValueError, "Flatten each snapshot"),
        (np.ones((4, 0)), {}, ValueError, "at least one column"),
        (np.ones((4, 2)), {"tol": 1.0}, ValueError, "tol must lie in"),
        (np.ones((4, 2)), {"tol": -0.1}, ValueError, "tol must lie in"),
        (np.ones((4, 2)), {"max_rank": 0}, ValueError, "max_rank must be at least 1"),
        (np.ones((4, 2)), {"delays": 0}, ValueError, "delays must be at least 1"),
        (np.ones((4, 2)) * 1j, {}, TypeError, "must be real numbers"),
        (torch.ones(4, 2, dtype=torch.bfloat16), {}, TypeError, "half precision"),
        (np.array([["a"], ["b"]]), {}, TypeError, "must be real numbers"),
    ],
)
def test_bad_input_is_named(snapshots, options, error, message):
    with pytest.raises(error, match=message):
        dmd_rrr(snapshots, **options)


def test_refining_stays_cheap_at_high_rank():
    snapshots = np.random.default_rng(0).standard_normal((260, 400)).cumsum(0)
    spectrum = dmd_rrr(snapshots, tol=1e-6)
    assert spectrum.rank > 240
    refined = spectrum.eigenvalues != spectrum.ritz_values
    assert 100 < refined.sum() < spectrum.rank
    assert distance(spectrum.eigenvalues, spectrum.eigenvalues.conj()) < 1e-12
    assert np.all(spectrum.residuals <= spectrum.ritz_residuals + 1e-9)


def test_max_rank_bounds_the_rank():
    snapshots = linear_system(SYSTEM, n=30, time=20, noise=1e-2)
    assert dmd_rrr(snapshots, max_rank=3).rank == 3
