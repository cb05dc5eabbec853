from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_koopman import SobolevLoss, estimate_depth, plot_depth, suggest_mlp
from lightning_koopman.demo.table1 import DOMAIN, N_SAMPLES, TABLE
from lightning_koopman.depth.estimate import octaves
from lightning_koopman.fourier.grid import find_grid

x = np.linspace(*DOMAIN, N_SAMPLES)
FFT_DIFFERS = {"x + x² + x³": 6, "cos(32πx)³": 2, "sin(13πx) + sin(17πx) + sin(19πx) + sin(23πx)": 2} | {
    "sin(40πx) cos(10πx) + 3 sin(20x) sin(40x)": 6
}


# -- the paper's table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_table_1(row):
    y = row.function(x)
    assert 0.01 * np.ptp(y) == pytest.approx(row.epsilon, rel=0.05)
    assert estimate_depth(x, y).n_layers == FFT_DIFFERS.get(row.name, row.fft_layers)
    assert estimate_depth(x, y, "dmd").n_layers == row.dmd_layers


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_the_transform_is_numpys(row):
    y = row.function(x)
    sizes, frequencies = np.abs(np.fft.rfft(y)), np.fft.rfftfreq(len(y), x[1] - x[0])
    kept = sizes > 0.01 * sizes.max()
    kept[0] = False
    found = estimate_depth(x, y)
    np.testing.assert_allclose(found.frequencies, frequencies[kept], rtol=1e-12)
    np.testing.assert_allclose(found.amplitudes, 2 * sizes[kept] / len(y), rtol=1e-9)
    assert found.counts.sum() == kept.sum()
    np.testing.assert_allclose(found.spectrum_frequencies, frequencies[1:], rtol=1e-12)
    np.testing.assert_allclose(found.scales, 1 / (6 * found.layer_frequencies))
    np.testing.assert_allclose(found.gammas, found.scales**-2.0)


# -- known waves -----------------------------------------------------------------------------------------------------


@given(st.floats(1, 30), st.floats(2.2, 5), st.floats(0.5, 2), st.floats(0, 6))
@settings(deadline=None, max_examples=25)
def test_dmd_finds_waves_that_do_not_fit_the_range(low, ratio, size, phase):
    waves = np.cos(2 * np.pi * low * x + phase) + size * np.sin(2 * np.pi * ratio * low * x)
    found = estimate_depth(x, waves, "dmd")
    np.testing.assert_allclose(found.frequencies, [low, ratio * low], rtol=1e-6)
    np.testing.assert_allclose(found.amplitudes, [1, size], rtol=1e-6)
    assert found.n_layers == 2


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_a_taper_finds_waves_that_do_not_fit_the_range(scattered, offset):
    points = np.sort(np.random.default_rng(0).uniform(0, 2, 1001)) if scattered else x
    y = offset + np.cos(2 * np.pi * 3.3 * points) + 0.5 * np.sin(2 * np.pi * 20.7 * points)
    plain, tapered = estimate_depth(points, y, threshold=1e-3), estimate_depth(points, y, taper=True)
    assert plain.n_layers > 2
    assert tapered.n_layers == 2
    np.testing.assert_allclose(tapered.layer_frequencies, [3.3, 20.7], atol=0.55)  # about one bin
    assert tapered.method == ("least squares" if scattered else "fft")


def test_a_taper_keeps_the_amplitude_of_a_wave():
    t = np.arange(400) / 400
    found = estimate_depth(t, 3 + 2.5 * np.cos(2 * np.pi * 12 * t), taper=True)
    np.testing.assert_allclose(found.frequencies, [12])
    np.testing.assert_allclose(found.amplitudes, [2.5])


def test_a_taper_saves_layers_of_table_1():
    plain = [estimate_depth(x, row.function(x)).n_layers for row in TABLE]
    tapered = [estimate_depth(x, row.function(x), taper=True).n_layers for row in TABLE]
    assert all(after <= before for before, after in zip(plain, tapered, strict=True))
    assert sum(tapered) <= 0.7 * sum(plain)


def test_scattered_samples_give_the_same_layers_as_a_grid_where_nothing_leaks():
    points = np.sort(np.random.default_rng(1).uniform(0, 2, 1500))
    for row in TABLE:
        if row.fft_layers == row.dmd_layers:
            found = estimate_depth(points, row.function(points))
            assert found.method == "least squares"
            assert found.n_layers == row.fft_layers, row.name


@given(st.integers(2, 3), st.integers(0, 10**6))
@settings(deadline=None, max_examples=15)
def test_waves_on_grids_of_several_inputs(dim, seed):
    rng = np.random.default_rng(seed)
    sizes, periods = rng.integers(9, 16, dim), rng.uniform(0.5, 4, dim)
    axes = [period * np.arange(size) / size for size, period in zip(sizes, periods, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, dim)
    rng.shuffle(points)  # in any order
    mode = rng.integers(-4, 5, dim)
    mode[0] = 4
    y = 7 + 1.5 * np.cos(2 * np.pi * points @ (mode / periods) + 1)
    found = estimate_depth(points, y)
    np.testing.assert_allclose(found.frequencies, [np.linalg.norm(mode / periods)])
    np.testing.assert_allclose(found.amplitudes, [1.5])
    assert found.method == "fft"


@pytest.mark.parametrize("shape", [(8,), (9,), (8, 6), (7, 6), (9, 2), (4, 5, 6), (3, 3, 4)])
def test_each_pair_of_conjugate_waves_is_listed_once(shape):
    rng = np.random.default_rng(0)
    points = np.stack(np.meshgrid(*map(np.arange, map(float, shape)), indexing="ij"), -1).reshape(-1, len(shape))
    y = rng.standard_normal(len(points))
    if len(points) < 8:
        return
    found = estimate_depth(points[:, 0] if len(shape) == 1 else points, y, threshold=1e-9)
    coefficients = np.abs(np.fft.fftn(y.reshape(shape))) / y.size
    index = np.indices(shape)
    own = np.ravel_multi_index(index, shape)
    conjugate = np.ravel_multi_index([-i % n for i, n in zip(index, shape, strict=True)], shape)
    amplitudes = np.where(own == conjugate, 1, 2) * coefficients
    expected = amplitudes[(own <= conjugate) & (own > 0)]
    np.testing.assert_allclose(np.sort(found.spectrum_amplitudes), np.sort(expected.ravel()), atol=1e-12)
    assert (found.spectrum_amplitudes**2 * 1.0).sum() > 0


def test_amplitudes_at_the_nyquist_frequency():
    k = np.arange(64)
    y = np.cos(2 * np.pi * k / 8) + np.cos(np.pi * k)
    for method in ("fft", "dmd"):
        np.testing.assert_allclose(estimate_depth(k, y, method).amplitudes, [1, 1], rtol=1e-6)


def test_scattered_samples_against_least_squares():
    rng = np.random.default_rng(0)
    points = np.sort(rng.uniform(0, 1, 400))
    y = np.cos(2 * np.pi * 5 * points) + 0.3 * rng.standard_normal(400)
    found = estimate_depth(points, y)
    period = (points[-1] - points[0]) * (1 + 1 / 399)
    turns = 2 * np.pi * (points - points[0])[:, None] * np.arange(1, 100) / period
    design = np.hstack([np.ones((400, 1)), np.cos(turns), np.sin(turns)])
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    np.testing.assert_allclose(found.spectrum_amplitudes, np.hypot(solution[1:100], solution[100:]), rtol=0.01)


@pytest.mark.parametrize("dim", [2, 3])
def test_scattered_points_of_several_inputs(dim):
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (3000, dim))
    y = np.cos(2 * np.pi * (points[:, 0] - 2 * points[:, 1]))
    found = estimate_depth(points, y, taper=dim == 2, threshold=0.3)
    assert found.n_layers == 1
    assert found.layer_frequencies[0] == pytest.approx(np.sqrt(5), rel=0.02)


def test_several_outputs_count_together_and_have_their_own_cutoffs():
    y = np.stack([1000 * np.sin(2 * np.pi * x), 0.01 * np.sin(20 * np.pi * x)], axis=1)
    for method in ("fft", "dmd"):
        found = estimate_depth(x, y, method, threshold=0.3)
        assert found.n_layers == 2
        assert found.amplitudes.shape == (len(found.frequencies), 2)
        assert found.cutoff.shape == (2,)
    alone = estimate_depth(x, y[:, 0], threshold=0.3)
    np.testing.assert_allclose(alone.cutoff, estimate_depth(x, y, threshold=0.3).cutoff[0])


def test_an_output_without_waves_asks_for_nothing():
    t = np.arange(64) / 64
    y = np.stack([np.sin(2 * np.pi * 5 * t), np.full(64, 0.1)], axis=1)
    rng = np.random.default_rng(0)
    scattered = np.sort(rng.uniform(0, 1, 64))
    for taper in (False, True):
        assert estimate_depth(t, y, taper=taper).n_layers == 1
        constant = 0.1 + 1e-16 * rng.standard_normal(64)
        constant[3] += 1e-15
        assert "no frequency counts" in estimate_depth(t, constant, taper=taper).notes[0]
        waves = np.stack([np.sin(2 * np.pi * 5 * scattered), np.full(64, 0.1)], axis=1)
        alone = estimate_depth(scattered, waves[:, 0], taper=taper, threshold=0.1)
        assert estimate_depth(scattered, waves, taper=taper, threshold=0.1).n_layers == alone.n_layers
    assert estimate_depth(t, y, "dmd").n_layers == 1


@pytest.mark.parametrize("offset", [0.0, 2.0, 1000.0])
def test_a_distant_mean_hides_no_waves(offset):
    y = np.sin(20 * np.pi * x) + offset
    found = estimate_depth(x, y, "dmd")
    np.testing.assert_allclose(found.frequencies, [10], rtol=1e-6)
    chirp = x + np.sin(2 * np.pi * x**4)
    assert estimate_depth(x, chirp + offset).n_layers >= 6  # the mean still has some effect
    assert estimate_depth(x, chirp + offset, taper=True).n_layers == 6


def test_the_unit_of_x_and_y_does_not_matter():
    y = x + np.sin(2 * np.pi * x**4)
    for method in ("fft", "dmd"):
        found, other = estimate_depth(x, y, method), estimate_depth(3600 * x + 7, 1e-6 * y, method)
        assert other.n_layers == found.n_layers
        np.testing.assert_allclose(other.scales, 3600 * found.scales, rtol=1e-3)


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.floats(1.1, 4))
@settings(deadline=None)
def test_octaves(frequencies, decay):
    ordered = np.sort(frequencies)
    taken = octaves(ordered, decay)
    assert taken[0] == ordered[0]
    assert (taken[1:] >= decay * taken[:-1] * (1 - 1e-8)).all()
    for frequency in ordered:  # each lies in the band of a layer
        assert (taken <= frequency).any()
        assert frequency < decay * taken[taken <= frequency].max() * (1 + 1e-8)


def test_decay_threshold_and_highest_frequency():
    y = x + np.sin(2 * np.pi * x**4)
    assert estimate_depth(x, y, decay=4).n_layers == 4
    assert estimate_depth(x, y, threshold=0.1).n_layers == 3
    assert estimate_depth(x, y, max_frequency=5).frequencies.max() <= 5


def test_tensors_and_single_precision():
    y = np.sin(2 * np.pi * x**2)
    found = estimate_depth(torch.linspace(0, 2, 1001), torch.as_tensor(y).float().requires_grad_())
    assert found.method == "fft"
    assert found.n_layers == 5


# -- notes and errors ------------------------------------------------------------------------------------------------


def test_notes():
    rng = np.random.default_rng(0)
    cubic = x + x**2 + x**3
    (jump,) = estimate_depth(x, cubic).notes
    assert jump.startswith("end-point jump: the samples differ by 100%")
    assert not estimate_depth(x, cubic, taper=True).notes
    assert "a trend rather than a wave" in estimate_depth(x, cubic, "dmd").notes[0]
    assert "noise, or a jump" in estimate_depth(x, rng.standard_normal(1001)).notes[0]
    assert (
        "as many modes as the samples allow"
        in estimate_depth(x, np.sin(9 * x) + rng.standard_normal(1001), "dmd").notes[0]
    )
    fast = estimate_depth(x[::20], np.sin(2 * np.pi * 12.2 * x[::20]), threshold=0.2)
    assert any("sample more densely" in note for note in fast.notes)
    hole = np.delete(np.linspace(0, 1, 1001), slice(400, 600))
    assert "a gap of 0.201 between neighbors" in estimate_depth(hole, np.sin(6 * np.pi * hole)).notes[0]
    many = np.sort(rng.uniform(0, 1, 3000))
    limited = estimate_depth(many, np.sin(2 * np.pi * 1200 * many)).notes
    assert any("500 modes are fitted to 3000 scattered samples" in note for note in limited)
    assert not any("a gap of" in note for note in limited)
    unlike = rng.uniform(0, 1, (400, 2)) * [1, 1000]
    assert "ranges differ by a factor of" in estimate_depth(unlike, unlike[:, 0] ** 2).notes[0]
    step = np.linspace(0, 1, 200)
    assert "end-point jump" in estimate_depth(step, (step > 0.3).astype(float)).notes[0]
    flat = np.stack(np.meshgrid(np.arange(200) / 200, np.arange(4.0), indexing="ij"), -1).reshape(-1, 2)
    slow = estimate_depth(flat, np.sin(2 * np.pi * 5 * flat[:, 0]))
    assert not any("highest" in note for note in slow.notes)
    none = estimate_depth(x, np.sin(20 * np.pi * x), max_frequency=0.1)
    assert none.n_layers == 1
    assert "no frequency counts" in none.notes[0]
    assert "notes=" in repr(none)
    plane = np.stack(np.meshgrid(np.arange(20.0), np.arange(12.0), indexing="ij"), -1).reshape(-1, 2)
    assert "end-point jump of input 1" in estimate_depth(plane, plane[:, 1]).notes[0]
    shuffled = np.sort(rng.uniform(0, 2, 400))
    assert "end-point jump" in estimate_depth(shuffled, shuffled).notes[0]
    assert not estimate_depth(x, np.sin(2 * np.pi * x)).notes


@pytest.mark.parametrize(
    ("points", "values", "options", "message"),
    [
        (x[::-1], x, {}, "not sorted: 2 comes before 1.998. Sort both"),
        (np.repeat(x[:20], 2), np.arange(40.0), {}, "holds the point 0 2 times: average"),
        (x, np.where(x > 1, np.nan, x), {}, "y must be .* NaN"),
        (np.where(x > 1, np.inf, x), x, {}, "x must be .* NaN"),
        (x, np.full(1001, 3.0), {}, r"y is constant \(3\)"),
        (x[:7], x[:7], {}, "≥ 8, got 7, 7"),
        (x, x[:-1], {}, "the same number of samples"),
        (x, x + 0j, {}, "y must be real numbers, got complex128: give real and imaginary part"),
        (x.astype("datetime64[s]"), x, {}, "x must be real numbers, got datetime64"),
        (x, np.array(["a"] * 1001, dtype=object), {}, "y must be real numbers, got object: convert"),
        (x, np.zeros((1001, 0)), {}, "y must be .* got the shape"),
        (x * 1e200, x, {}, "too far from 1 to compute with"),
        (x**2, x, {"method": "dmd"}, "x is not equidistant, which method='dmd' needs: resample"),
        (np.random.default_rng(0).uniform(0, 1, (99, 2)), x[:99], {"method": "dmd"}, "has 2 inputs, but method='dmd'"),
        (np.random.default_rng(0).uniform(0, 1, (99, 4)), x[:99], {}, "has 4 inputs, more than 3"),
        (np.stack([x, 0 * x], 1), x, {}, "is constant in input 1"),
        (x, x, {"decay": 1.0}, "decay must be a number > 1, got 1.0"),
        (x, x, {"decay": "2"}, "decay must be a number > 1"),
        (x, x, {"threshold": 0.0}, r"threshold must lie in \(0, 1\), got 0.0"),
        (x, x, {"method": "wavelet"}, r"method must be one of \('fft', 'dmd'\), got 'wavelet'"),
        (x, x, {"max_frequency": -1}, "max_frequency must be a number > 0"),
        (x, x, {"method": "dmd", "taper": True}, "taper=True is for method='fft'"),
    ],
)
def test_bad_input_is_named(points, values, options, message):
    with pytest.raises(ValueError, match=message):
        estimate_depth(points, values, **options)


def test_a_grid_is_told_from_scattered_points():
    rng = np.random.default_rng(0)
    step = x[1]
    assert find_grid(x[:, None] + rng.uniform(-0.003, 0.003, (1001, 1)) * step, x[:, None]) is not None
    assert find_grid(x[:, None] + rng.uniform(-0.1, 0.1, (1001, 1)) * step, x[:, None]) is None
    assert find_grid(np.delete(x, 500)[:, None], x[1:, None]) is None  # a missing point
    assert find_grid(rng.uniform(0, 1, (50, 2)), x[:50, None]) is None
    lattice = np.stack(np.meshgrid(np.arange(5.0), np.arange(4.0), indexing="ij"), -1).reshape(-1, 2)
    assert find_grid(lattice[:-1], x[:19, None]) is None
    order = rng.permutation(20)
    grid = find_grid(lattice[order], lattice[order] @ [[10.0], [1.0]])
    np.testing.assert_array_equal(grid.values[..., 0], 10 * np.arange(5.0)[:, None] + np.arange(4.0))


# -- networks --------------------------------------------------------------------------------------------------------


def test_scales_of_a_network_serve_the_sobolev_loss():
    with pytest.raises(ValueError, match="depth must be what estimate_depth returns, or None, got 3"):
        suggest_mlp(x, x, depth=3)
    suggestion = suggest_mlp(x, x + np.sin(2 * np.pi * x**4))
    assert suggestion.n_layers == suggestion.depth.n_layers == len(suggestion.scales) == 7
    assert suggestion.scales == (1, 3, 7, 15, 31, 63, 68)
    width = 5
    hidden = [torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh()) for _ in range(6)]
    network = torch.nn.Sequential(torch.nn.Linear(1, width), *hidden, torch.nn.Linear(width, 1))
    inputs = torch.as_tensor(x, dtype=torch.float32)[:, None]
    names = [str(layer) for layer in range(6)]
    loss = SobolevLoss(suggestion.scales, domain=suggestion.domain, network=network, layers=names, example=inputs)
    assert loss(network(inputs), inputs, inputs).isfinite()


def test_scales_of_several_inputs_hold_all_modes_that_count():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (3000, 2))
    y = np.cos(2 * np.pi * (3 * points[:, 0] + 3 * points[:, 1]))
    suggestion = suggest_mlp(points, y, depth=estimate_depth(points, y, threshold=0.3))
    assert suggestion.scales[-1] >= 6
    assert len(suggestion.domain) == 2


# -- the figure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_figure_marks_layers_and_the_cutoff(outputs):
    y = np.stack([np.sin(2 * np.pi * x**2), np.cos(20 * np.pi * x)], axis=1)[:, :outputs]
    estimate = estimate_depth(x, y if outputs == 2 else y[:, 0])
    (axis,) = plot_depth(estimate).axes
    assert [text.get_text() for text in axis.texts] == [str(layer + 1) for layer in range(estimate.n_layers)]
    left_out, counts = (line for line in axis.get_lines() if line.get_label() in ("left out", "counts"))
    assert not plot_depth(estimate_depth(x, x, "dmd")).axes[0].collections  # no wave at all
    assert counts.get_ydata().min() >= 1
    assert left_out.get_ydata().max() <= 1
    assert len(counts.get_xdata()) == len(estimate.frequencies)
