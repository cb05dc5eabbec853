from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_koopman import shrink_noise, suggest_scales
from lightning_koopman.sobolev.noise import _lowest_modes, fit_cosines


def chirp(n: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 2, n)
    clean = x + np.sin(2 * np.pi * x**4)
    return x, clean, clean + noise * rng.standard_normal(n)


@given(st.integers(1, 3), st.sampled_from([1, 2]), st.integers(1, 60))
@settings(deadline=None, max_examples=30)
def test_the_lowest_modes_are_the_lowest(dim, norm, count):
    modes, sizes = _lowest_modes(count, dim, norm)
    assert modes.shape == (count, dim)
    grid = np.stack(np.meshgrid(*[np.arange(count + 1)] * dim, indexing="ij"), -1).reshape(-1, dim)
    every = np.sort(np.linalg.norm(grid, ord=norm, axis=1))[:count] / 2
    np.testing.assert_allclose(sizes, every)
    np.testing.assert_allclose(np.linalg.norm(modes, ord=norm, axis=1) / 2, sizes)


def test_gains_are_the_monotone_ones_of_least_estimated_risk():
    x, _, y = chirp(400, 0.5, 0)
    fit = fit_cosines(x[:, None], y[:, None], (0, 2), 1)
    power, gains = fit.coefficients[1:, 0] ** 2, fit.gains[1:, 0]
    assert (np.diff(gains) <= 1e-12).all()
    assert gains.min() >= 0
    assert gains.max() <= 1

    def risk(shares: np.ndarray) -> float:  # Stein's unbiased estimate, for coefficients with noise of known size
        return float((shares**2 * fit.noise[0] ** 2 + (1 - shares) ** 2 * (power - fit.noise[0] ** 2)).sum())

    rng = np.random.default_rng(0)
    for _ in range(300):  # no other monotone gains do better, near or far
        other = np.sort(np.clip(gains + rng.normal(0, rng.choice([0.01, 0.1, 1.0]), gains.shape), 0, 1))[::-1]
        assert risk(gains) <= risk(other) + 1e-9


def test_modes_of_equal_norm_share_a_gain():
    rng = np.random.default_rng(0)
    fit = fit_cosines(rng.uniform(0, 1, (300, 2)), rng.normal(0, 1, (300, 2)), (0, 1), 2)
    for size in np.unique(fit.sizes):
        assert np.ptp(fit.gains[fit.sizes == size], axis=0).max() == 0


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_the_noise_is_estimated(noise):
    found = [
        (fit.noise * fit.units)[0]
        for fit in (
            fit_cosines(x[:, None], y[:, None], (0, 2), 1) for x, _, y in (chirp(1500, noise, s) for s in range(8))
        )
    ]
    assert np.mean(found) == pytest.approx(noise, rel=0.03)


@pytest.mark.parametrize("noise", [0.15, 1.5, 3.0])
def test_shrinking_beats_the_best_number_of_modes(noise):
    # truncated fits of the same cosines; the best one is chosen by the clean signal
    ours, best = [], []
    for seed in range(8):
        x, clean, y = chirp(1500, noise, seed)
        fit = fit_cosines(x[:, None], y[:, None], (0, 2), 1)
        truncated = np.cumsum(fit.basis * fit.coefficients[:, 0], axis=1)
        best.append(np.sqrt(((truncated - clean[:, None]) ** 2).mean(0)).min())
        ours.append(np.sqrt(((shrink_noise(x, y, domain=(0, 2)) - clean) ** 2).mean()))
    assert np.mean(ours) < np.mean(best)


def test_clean_samples_stay_as_they_are():
    x, clean, _ = chirp(1500, 0.0, 0)
    assert np.std(shrink_noise(x, clean, domain=(0, 2)) - clean) < 5e-3
    constant = np.full(50, 3.0)
    np.testing.assert_allclose(shrink_noise(np.arange(50.0), constant), constant)
    assert suggest_scales(np.arange(50.0), constant) == (1,)


def test_outputs_without_signal_and_targets_of_other_types():
    x = np.linspace(0, 1, 200)
    wave = np.cos(2 * np.pi * x)
    assert suggest_scales(x, np.zeros(200)) == (1,)
    assert suggest_scales(x, np.stack([wave, np.zeros(200)], axis=1), domain=(0, 1)) == (1,)
    labels = torch.as_tensor(wave > 0)
    assert shrink_noise(x, labels).dtype == torch.float64
    np.testing.assert_allclose(shrink_noise(x, labels).numpy(), shrink_noise(x, labels.numpy().astype(float)))
    half = shrink_noise(x, torch.as_tensor(wave).bfloat16())
    assert half.dtype == torch.bfloat16


def test_many_inputs_form_no_box():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (200, 20))
    assert np.std(shrink_noise(x, x[:, 0] + 0.1 * rng.standard_normal(200))) > 0.2


def test_the_suggested_mode_errs_towards_too_many():
    found = {0: [], 3: [], 20: []}
    for mode, values in found.items():
        for seed in range(40):
            rng = np.random.default_rng(seed)
            x = rng.uniform(0, 1, 1000)
            wave = np.cos(2 * np.pi * mode * x) + 0.3 * rng.standard_normal(1000)
            values.extend(suggest_scales(x, wave, domain=(0, 1)))
    assert np.median(found[0]) <= 40  # pure noise: most modes are left out in at least half of the draws
    assert min(found[3]) >= 3
    assert np.median(found[3]) <= 20
    assert min(found[20]) >= 20
    assert np.median(found[20]) <= 30


@pytest.mark.parametrize(("dim", "mode"), [(1, 200), (1, 300), (2, 16)])
def test_signal_beyond_the_cosines_is_said(dim, mode):
    # 1500 samples: 375 cosines, up to 187 cycles of one input and to 13 of two
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (1500, dim))
    y = np.cos(2 * np.pi * mode * x[:, 0]) + 0.05 * rng.standard_normal(1500)
    for function in (suggest_scales, shrink_noise):
        with pytest.warns(UserWarning, match="signal at higher frequencies"):
            function(x, y, domain=(0, 1))


def test_pure_noise_is_shrunk_to_its_mean():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 1, 2000), rng.normal(5, 1, 2000)
    assert np.std(shrink_noise(x, y)) < 0.15


def test_several_inputs_outputs_and_kinds():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (800, 2))
    clean = np.stack([np.cos(2 * np.pi * (x[:, 0] - x[:, 1])), x[:, 0] * x[:, 1]], axis=1)
    y = clean + rng.normal(0, [1.0, 0.1], (800, 2))
    shrunk = shrink_noise(x, y, domain=[(0, 1), (0, 1)])
    for output in range(2):  # each output has its own noise and its own gains
        np.testing.assert_allclose(shrunk[:, output], shrink_noise(x, y[:, output], domain=(0, 1)))
        assert np.std(shrunk[:, output] - clean[:, output]) < 0.4 * np.std(y[:, output] - clean[:, output])
    tensors = shrink_noise(torch.tensor(x), torch.tensor(y, dtype=torch.float32), domain=(0, 1))
    assert tensors.dtype == torch.float32
    np.testing.assert_allclose(tensors.numpy(), shrunk, rtol=1e-4, atol=1e-5)
    scales = suggest_scales(x, y, n_layers=4, domain=(0, 1), norm=2)
    assert len(scales) == 4
    assert 1 <= scales[-1] <= 20


def test_a_grid_with_few_different_values_is_no_trouble():
    x = np.stack(np.meshgrid(np.arange(40.0), np.arange(3.0)), -1).reshape(-1, 2)
    y = np.cos(np.pi * x[:, 0] / 20)
    np.testing.assert_allclose(shrink_noise(x, y), y, atol=0.05)
    single = np.repeat(np.arange(5.0), 20)  # five points, twenty samples at each
    np.testing.assert_allclose(shrink_noise(single, single**2), single**2, atol=1e-9)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.arange(8.0), np.arange(8.0), {}, "≥ 16, got 8, 8"),
        (np.arange(30.0), np.arange(29.0), {}, "the same number of samples"),
        (np.arange(30.0), np.full(30, np.nan), {}, "y must be .* finite"),
        (np.full(30, np.inf), np.arange(30.0), {}, "x must be .* finite"),
        (np.zeros(30), np.arange(30.0), {}, "do not differ"),
        (np.arange(30.0), np.arange(30.0) + 0j, {}, "y must be real"),
        (np.zeros((30, 2, 2)), np.arange(30.0), {}, r"\(N,\) or \(N, columns\)"),
        (np.arange(30.0), np.arange(30.0), {"domain": (0, 5)}, "outside of the period"),
        (np.arange(30.0), np.arange(30.0), {"norm": 0}, "norm must be 1 or 2"),
    ],
)
def test_bad_input_is_named(x, y, options, message):
    for function in (suggest_scales, shrink_noise):
        with pytest.raises(ValueError, match=message):
            function(x, y, **options)
    with pytest.raises(ValueError, match="n_layers"):
        suggest_scales(np.arange(30.0), np.arange(30.0), n_layers=0)


@pytest.mark.parametrize("unit", [1e-200, 1e-100, 1e100, 1e155])
def test_units_and_origins_make_no_difference(unit):
    x, _, y = chirp(300, 0.3, 0)
    expected = shrink_noise(x, y, domain=(0, 2))
    np.testing.assert_allclose(shrink_noise(x, y * unit, domain=(0, 2)) / unit, expected, atol=1e-9)
    np.testing.assert_allclose(shrink_noise(x, y + 1e3, domain=(0, 2)) - 1e3, expected, atol=1e-6)
    assert suggest_scales(x, y * unit, domain=(0, 2)) == suggest_scales(x, y, domain=(0, 2))
