from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import sobolev_sum
from torch.autograd import gradcheck, gradgradcheck

from lightning_koopman import sobolev_loss, sobolev_scales
from lightning_koopman.fourier import basis
from lightning_koopman.fourier.modes import half_space

f64 = torch.float64


def problem(n: int, dim: int, n_outputs: int = 1, n_layers: int = 1, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    points = torch.rand(n, dim, generator=draw, dtype=f64)
    targets = torch.randn(n, n_outputs, generator=draw, dtype=f64)
    outputs = [torch.randn(n, n_outputs, generator=draw, dtype=f64) for _ in range(n_layers)]
    return outputs if n_layers > 1 else outputs[0], targets, points


# -- modes and scales ------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(0, 6), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=40)
def test_half_of_the_ball_is_one_of_each_pair_of_modes(dim, radius, norm):
    modes = [tuple(mode) for mode in half_space(radius, dim, norm).tolist()]
    both = {mode for some in modes for mode in (some, tuple(-k for k in some))}
    box = itertools.product(range(-radius, radius + 1), repeat=dim)
    assert both == {mode for mode in box if sum(abs(k) ** norm for k in mode) <= radius**norm}
    assert len(modes) == len(set(modes)) == (len(both) + 1) // 2


def test_the_box_around_a_ball_in_four_dimensions_is_never_formed():
    assert len(half_space(30, 4, 1)) == (sum(1 for k in _ball(30, 4)) + 1) // 2


def _ball(radius, dim):
    """Modes of an ℓ1 ball by another recursion."""
    if dim == 0:
        yield ()
        return
    for k in range(-radius, radius + 1):
        for rest in _ball(radius - abs(k), dim - 1):
            yield (k, *rest)


def test_scale_functions():
    assert sobolev_scales(9, "linear", start=0) == tuple(range(9))
    assert sobolev_scales(5, "exponential") == (2, 4, 8, 16, 32)
    assert sobolev_scales(1, highest=7) == (7,)
    assert sobolev_scales(3, highest=2) == (2, 2, 2)
    assert sobolev_scales(3, highest=100, lowest=1) == (1, 10, 100)
    assert sobolev_scales(3, highest=3.6) == (3.6, 3.6, 3.6)
    assert sobolev_scales(4, highest=4.7, lowest=3) == (3, 3, 4, 4.7)
    assert sobolev_scales(3, lambda layer: 1.5 * layer) == (1.5, 3, 4.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_layers": 0, "highest": 3}, "n_layers must be a whole number"),
        ({"n_layers": 3}, "highest=None"),
        ({"n_layers": 3, "highest": 2, "lowest": 5}, "0 < lowest ≤ highest"),
        ({"n_layers": 3, "kind": "cubic"}, "kind must be one of"),
        ({"n_layers": 3, "kind": "linear", "highest": 9}, "belong to kind='geometric'"),
        ({"n_layers": 1100, "kind": "exponential"}, "which is too large"),
        ({"n_layers": 3, "kind": lambda layer: -layer}, "a number ≥ 0"),
        ({"n_layers": 3, "kind": lambda layer: 1 / layer}, "must not decrease"),
    ],
)
def test_bad_scales_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sobolev_scales(**arguments)


# -- against sums, transforms and closed forms -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:scales")
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("dim", "n_outputs", "n_layers"), [(1, 1, 1), (1, 2, 3), (2, 2, 3), (3, 1, 2), (2, 3, 1), (4, 2, 1)]
)
def test_brute_force_sums(dim, n_outputs, n_layers, weighted, literal, norm):
    outputs, targets, points = problem(12, dim, n_outputs, n_layers)
    scales = (1, 2, 4) if n_layers == 3 else (1, 3)
    weights = torch.rand(12, dtype=f64, generator=torch.Generator().manual_seed(1))
    weights /= weights.sum()
    rule = {"scales": scales, "exponent": -0.7, "literal": literal, "norm": norm}
    ours = sobolev_loss(outputs, targets, 2 + 3 * points, domain=(2, 5), weights=weights if weighted else None, **rule)
    theirs = sobolev_sum(
        [each.numpy() for each in (outputs if n_layers > 1 else [outputs])],
        targets.numpy(),
        points.numpy(),
        weights=weights.numpy() if weighted else None,
        **rule,
    )
    assert float(ours) == pytest.approx(theirs, rel=1e-11)


def test_equation_7_and_8_as_written():
    # one cosine of mode 3, seen by the shells 1…4: only ℓ = 3 has it, with 1/4 for each of k = ±3
    x = torch.arange(16, dtype=f64) / 16
    missed = torch.cos(2 * math.pi * 3 * x)
    value = 2 * 0.25 / math.sqrt(1 + (2 * math.pi * 3) ** 2)
    zero = torch.zeros(16, dtype=f64)
    loss_2 = sobolev_loss(missed, zero, x, scales=sobolev_scales(4, "linear"), literal=True)
    assert float(loss_2) == pytest.approx(value, rel=1e-12)
    scales = sobolev_scales(4, "linear")
    for layer in range(4):
        outputs = [missed if index == layer else zero for index in range(4)]
        loss_1 = sobolev_loss(outputs, zero, x, scales=scales, literal=True)
        assert float(loss_1) == pytest.approx(value if layer == 2 else 0.0, rel=1e-12, abs=1e-15)


def test_the_zero_mode_is_the_error_of_the_mean_and_not_the_squared_error():
    # the paper equates ℓ = 0 of equation 7 with the L² norm "by Parseval's theorem", but it is smaller
    outputs, targets, points = problem(50, 1)
    zeroth = sobolev_loss(outputs, targets, points, scales=0, literal=True)
    assert float(zeroth) == pytest.approx(float((targets - outputs).mean() ** 2), rel=1e-12)
    assert float(zeroth) < 0.2 * float(((targets - outputs) ** 2).mean())


def test_parseval():
    values = torch.randn(1, 2, 15, dtype=f64)
    zero = torch.zeros_like(values)
    squared = float(values.square().mean(2).sum())
    assert float(sobolev_loss(values, zero, scales=7, exponent=0.0)) == pytest.approx(squared, rel=1e-12)
    flat, points = values[0].mT, torch.arange(15, dtype=f64)
    assert float(sobolev_loss(flat, zero[0].mT, points, scales=7, exponent=0.0)) == pytest.approx(squared, rel=1e-12)


@pytest.mark.parametrize("sizes", [(9,), (8,), (5, 8), (6, 7), (4, 5, 6)])
@pytest.mark.parametrize("norm", [1, 2])
def test_grids_against_the_full_complex_transform(sizes, norm):
    values = torch.randn(3, 2, *sizes, dtype=f64, generator=torch.Generator().manual_seed(0))
    scale = (min(sizes) - 1) // 2
    full = torch.fft.fftn(values, dim=tuple(range(2, values.dim())), norm="forward").abs().square()
    axes = [torch.fft.fftfreq(size, 1 / size, dtype=f64) for size in sizes]
    modes = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    inside = torch.linalg.vector_norm(modes, ord=norm, dim=-1) <= scale
    weights = (1 + (2 * math.pi) ** 2 * modes.square().sum(-1)) ** -0.25 * inside
    expected = float((full * weights).sum() / 3)
    assert float(sobolev_loss(values, torch.zeros_like(values), scales=scale, norm=norm)) == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:scales")
@pytest.mark.parametrize("scale", [2, 9])  # 9 aliases on this grid
def test_a_grid_is_the_same_as_its_points(scale):
    values = torch.randn(1, 2, 5, 8, dtype=f64, generator=torch.Generator().manual_seed(0))
    points = torch.cartesian_prod(
        torch.arange(5, dtype=f64), torch.arange(8, dtype=f64) / 4
    )  # any unit: the period is inferred
    flat = values[0].flatten(1).mT
    on_points = sobolev_loss([flat, flat / 2], torch.zeros_like(flat), points, scales=(1, scale))
    on_grid = sobolev_loss([values, values / 2], torch.zeros_like(values), scales=(1, scale))
    assert float(on_points) == pytest.approx(float(on_grid), rel=1e-12)


def test_the_negative_norm_of_a_sawtooth_in_closed_form():
    # x − 1/2 has the coefficients i/(2πk): ‖·‖²_{H^-1} = Σ_{k≠0} 1/((2πk)²(1 + (2πk)²)) = 1/12 − (coth(1/2)/2 − 1)
    x = (torch.arange(2**14, dtype=f64) + 0.5) / 2**14
    loss = sobolev_loss(x - 0.5, torch.zeros_like(x), x, scales=300, exponent=-1.0, domain=(0, 1))
    assert float(loss) == pytest.approx(1 / 12 - (0.5 / math.tanh(0.5) - 1), rel=1e-5)


def test_the_negative_norm_of_a_wave_in_two_dimensions_in_closed_form():
    axis = torch.arange(16, dtype=f64) / 16
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    wave = torch.sin(2 * math.pi * (3 * x - 2 * y))[None, None]
    loss = sobolev_loss(wave, torch.zeros_like(wave), scales=5, exponent=-0.5)
    assert float(loss) == pytest.approx(0.5 / math.sqrt(1 + (2 * math.pi) ** 2 * 13), rel=1e-12)


@given(st.floats(0, 1), st.integers(1, 3), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_shifts_on_the_torus_change_nothing(shift, dim, seed):
    outputs, targets, points = problem(60, dim, seed=seed)
    rule = {"scales": 2, "domain": (0, 1)}
    moved = (points + shift * torch.arange(1, dim + 1)) % 1
    before = float(sobolev_loss(outputs, targets, points, **rule))
    assert float(sobolev_loss(outputs, targets, moved, **rule)) == pytest.approx(before, rel=1e-9)


def test_the_period_is_observed_where_it_is_not_given():
    outputs, targets, points = problem(40, 1)
    low, high = float(points.min()), float(points.max())
    given_domain = sobolev_loss(outputs, targets, points, scales=3, domain=(low, high + (high - low) / 39))
    assert float(sobolev_loss(outputs, targets, points, scales=3)) == pytest.approx(float(given_domain), rel=1e-12)


# -- parts of a data set ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_the_mean_over_all_mini_batches_is_the_loss_of_the_whole(size, weighted):
    outputs, targets, points = problem(7, 1, n_outputs=2, n_layers=2)
    weights = torch.arange(1.0, 8.0, dtype=f64) / 28 if weighted else None
    rule = {"scales": (1, 3), "domain": (0, 1)}
    whole = float(sobolev_loss(outputs, targets, points, weights=weights, **rule))
    parts = []
    for chosen in itertools.combinations(range(7), size):
        some = list(chosen)
        part = sobolev_loss(
            [each[some] for each in outputs],
            targets[some],
            points[some],
            weights=None if weights is None else weights[some],
            n_samples=7,
            **rule,
        )
        parts.append(float(part))
    assert np.mean(parts) == pytest.approx(whole, rel=1e-11)


def test_infinitely_many_samples():
    outputs, targets, points = problem(9, 1)
    missed = (targets - outputs)[:, 0].numpy()
    k = np.arange(-2, 3)
    sums = np.exp(-2j * np.pi * k[:, None] * points[:, 0].numpy()) @ missed
    weights = (1 + (2 * np.pi * k) ** 2) ** -0.25
    expected = (weights * (np.abs(sums) ** 2 - (missed**2).sum())).sum() / (9 * 8)
    ours = sobolev_loss(outputs, targets, points, scales=2, domain=(0, 1), n_samples=math.inf)
    assert float(ours) == pytest.approx(expected, rel=1e-11)


@pytest.mark.filterwarnings("ignore:scales")
def test_a_last_batch_of_one_sample_gives_a_finite_loss():
    outputs, targets, points = problem(1, 1)
    loss = sobolev_loss(outputs, targets, points, scales=2, domain=(0, 1), n_samples=100)
    assert 0 < float(loss) < 1


# -- memory, precision and gradients ---------------------------------------------------------------------------------


def small_pieces(monkeypatch):
    monkeypatch.setattr(basis, "WHOLE", 5000)
    monkeypatch.setattr(basis, "PIECE", 5000)


@pytest.mark.filterwarnings("ignore:scales")
def test_modes_are_taken_piece_by_piece_within_the_bound(monkeypatch):
    outputs, targets, points = problem(50, 4, n_outputs=2, n_layers=2)
    outputs = [each.requires_grad_() for each in outputs]
    rule = {"scales": (1, 3), "domain": (0, 1)}
    whole = sobolev_loss(outputs, targets, points, **rule)
    expected = torch.autograd.grad(whole, outputs)
    small_pieces(monkeypatch)
    made = []
    original = basis.fourier_basis

    def spy(torus_points, modes):
        found = original(torus_points, modes)
        made.append(found.nbytes)
        return found

    monkeypatch.setattr("lightning_koopman.sobolev.functional.fourier_basis", spy)
    pieces = sobolev_loss(outputs, targets, points, **rule)
    found = torch.autograd.grad(pieces, outputs)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert max(made) <= 5000
    assert len(made) > 4  # rebuilt for the gradient, each within the bound


@pytest.mark.parametrize("way", ["points", "pieces", "part", "grid"])
def test_gradients(way, monkeypatch):
    if way == "pieces":
        monkeypatch.setattr(basis, "WHOLE", 500)
        monkeypatch.setattr(basis, "PIECE", 500)
    if way == "grid":
        targets = torch.randn(2, 2, 5, 6, dtype=f64)
        outputs = [torch.randn_like(targets).requires_grad_() for _ in range(2)]

        def loss(*outputs):
            return sobolev_loss(list(outputs), targets, scales=(1, 2))
    else:
        outputs, targets, points = problem(15, 2, n_outputs=2, n_layers=2)
        outputs = [each.requires_grad_() for each in outputs]

        def loss(*outputs):
            n_samples = 40 if way == "part" else None
            return sobolev_loss(list(outputs), targets, points, scales=(1, 2), domain=(0, 1), n_samples=n_samples)

    assert gradcheck(loss, outputs)
    assert gradgradcheck(loss, outputs)


def test_gradients_reach_the_points():
    outputs, targets, points = problem(14, 2)
    points.requires_grad_()
    assert gradcheck(lambda p: sobolev_loss(outputs, targets, p, scales=2, domain=(-1, 2)), [points])


@pytest.mark.parametrize("grid", [False, True])
def test_autocast_does_not_lower_the_precision(grid):
    shape = (1, 1, 64) if grid else (64, 1)
    outputs, targets = torch.randn(shape), torch.randn(shape)
    arguments = (outputs, targets) if grid else (outputs, targets, torch.rand(64, 1))
    rule = {"scales": 8} if grid else {"scales": 8, "domain": (0, 1)}
    expected = sobolev_loss(*arguments, **rule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sobolev_loss(*arguments, **rule), expected)
        low = sobolev_loss(outputs.bfloat16(), *arguments[1:], **rule)
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(expected), rel=2e-2)


def test_high_modes_in_single_precision_are_exact():
    outputs, targets, points = problem(2000, 1)
    points = (points * 2**16).round() / 2**16  # exact in both precisions
    double = float(sobolev_loss(outputs, targets, points, scales=900, exponent=0.0, domain=(0, 1)))
    single = sobolev_loss(outputs.float(), targets.float(), points.float(), scales=900, exponent=0.0, domain=(0, 1))
    assert float(single) == pytest.approx(double, rel=1e-5)


# -- bad input -------------------------------------------------------------------------------------------------------

x, y = torch.linspace(0.02, 0.98, 10)[:, None], torch.randn(10, 1)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((y, y[:, 0], x), {}, ValueError, r"outputs has the shape \(10, 1\), targets \(10,\)"),
        (([y, y[:9]], y, x), {}, ValueError, r"outputs\[1\] has the shape"),
        (([], y, x), {}, ValueError, "empty list"),
        ((y, y, x[:9]), {}, ValueError, "with the same N"),
        ((y[None, None], y[None, None], x), {}, ValueError, "leave points out for values on a grid"),
        ((y, y), {}, ValueError, "points=None is for values on a grid"),
        ((y + 0j, y, x), {}, TypeError, "outputs is complex"),
        ((y, y + 0j, x), {}, TypeError, "targets is complex"),
        ((y.int(), y, x), {}, TypeError, "outputs must be floating point"),
        ((y, y, x.numpy()), {}, TypeError, "points must be a tensor"),
        ((y, y, x + 0.5), {"domain": (0, 1)}, ValueError, "outside of the period"),
        ((y, y, x * math.nan), {"domain": (0, 1)}, ValueError, "NaN or infinite"),
        ((y, y, x * math.nan), {}, ValueError, "NaN or infinite"),
        ((y, y, x * 0), {}, ValueError, "do not differ in input 0"),
        ((y, y, x), {"domain": (1, 0)}, ValueError, "low < high"),
        ((y, y, x), {"domain": "torus"}, ValueError, "low < high"),
        ((y, y, x), {"domain": [(0, 1), (0, 1)]}, ValueError, "2 intervals, but the points have 1 inputs"),
        ((y, y, x), {"scales": -1}, ValueError, "a number ≥ 0"),
        ((y, y, x), {"scales": "linear"}, ValueError, "a number ≥ 0"),
        (([y, y, y], y, x), {"scales": (1, 2)}, ValueError, "has length 2, but 3 outputs"),
        (([y, y], y, x), {"scales": (2, 1)}, ValueError, "must not decrease"),
        ((y, y, x), {"scales": 1.5, "literal": True}, ValueError, "its shell is empty"),
        ((y, y, x), {"exponent": math.nan}, ValueError, "exponent must be a finite number"),
        ((y, y, x), {"norm": 3}, ValueError, "norm must be 1 or 2"),
        ((y, y, x), {"weights": torch.ones(10)}, ValueError, "divide them by their sum"),
        ((y, y, x), {"weights": torch.ones(10), "n_samples": 40}, ValueError, "sum over the whole data set"),
        ((y, y, x), {"scales": 1e9}, ValueError, "more than 10,000,000 modes up to 1e\\+09 in 1 dimensions"),
        ((y[:0], y[:0], x[:0]), {}, ValueError, "targets are empty"),
        ((y[None][:0], y[None][:0]), {}, ValueError, "targets are empty"),
        ((y[:1], y[:1], x[:1]), {}, ValueError, "cannot infer `domain` from one sample"),
        ((y, y, x), {"weights": y[:, 0] * math.nan, "n_samples": 40}, ValueError, "weights sum to nan"),
        ((y, y, x), {"weights": torch.ones(9)}, ValueError, r"real tensor \(10,\)"),
        ((y, y, x), {"weights": torch.ones(10), "n_samples": math.inf}, ValueError, "are all zero"),
        ((y, y, x), {"n_samples": 9}, ValueError, "less than the 10 samples"),
        ((y, y, x), {"n_samples": "all"}, ValueError, "n_samples must be the number"),
        ((y[None], y[None]), {"domain": (0, 1)}, ValueError, "domain is for scattered points"),
    ],
)
def test_bad_input_is_named(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        sobolev_loss(*arguments, **{"scales": 3, **options})


def test_each_input_has_its_own_period():
    outputs, targets, points = problem(30, 2)
    unit = sobolev_loss(outputs, targets, points, scales=2, domain=(0, 1))
    moved = points * torch.tensor([3.0, 0.5], dtype=f64) + torch.tensor([-1.0, 7.0], dtype=f64)
    assert float(sobolev_loss(outputs, targets, moved, scales=2, domain=[(-1, 2), (7, 7.5)])) == pytest.approx(
        float(unit), rel=1e-9
    )


@pytest.mark.parametrize("low", [1000.3, 1000.7, 5000.3])
def test_points_far_from_zero_are_within_their_period(low):
    points = torch.linspace(low, low + 1, 10)
    sobolev_loss(y, 0 * y, points, scales=2, domain=(low, low + 1))
    with pytest.raises(ValueError, match="outside of the period"):
        sobolev_loss(y, 0 * y, points + 0.01, scales=2, domain=(low, low + 1))


def test_points_of_half_precision_are_said():
    with pytest.warns(UserWarning, match=r"points are torch\.bfloat16"):
        sobolev_loss(y, 0 * y, x.bfloat16(), scales=2, domain=(0, 1))


def test_numbers_and_intervals_may_be_numpys():
    expected = sobolev_loss(y, 0 * y, x, scales=2, domain=(0, 1), n_samples=40)
    ours = sobolev_loss(y, 0 * y, x, scales=np.array([2]), domain=np.array([0.0, 1.0]), n_samples=np.int64(40))
    assert torch.equal(ours, expected)


def test_the_widest_precision_of_all_is_kept():
    assert sobolev_loss([y, y.double()], y, x, scales=2).dtype == torch.float64


def test_no_lattice_point_on_a_circle_is_an_empty_shell():
    outputs, targets, points = problem(30, 2)
    sobolev_loss(outputs, targets, points, scales=math.sqrt(5), norm=2, literal=True)
    with pytest.raises(ValueError, match="its shell is empty"):
        sobolev_loss(outputs, targets, points, scales=math.sqrt(3), norm=2, literal=True)


def test_more_modes_than_samples_can_tell_apart_are_a_warning():
    sobolev_loss(y[:9], y[:9], x[:9], scales=4)  # 9 cosines and sines for 9 samples
    with pytest.warns(UserWarning, match="the 11 cosines and sines .* more than the 10 samples"):
        sobolev_loss(y, y, x, scales=5)
    sobolev_loss(y, y, x, scales=5, domain=(0, 1), n_samples=11)
    values = torch.randn(1, 1, 6, 6)
    sobolev_loss(values, values, scales=3)
    with pytest.warns(UserWarning, match="6 points in dimension 0, too few to distinguish mode 4"):
        sobolev_loss(values, values, scales=4)


def test_functional_transforms_give_what_a_loop_gives():
    outputs, points = torch.randn(3, 40, 1), torch.rand(3, 40, 1)

    def loss(outputs, points, scale=4):
        return sobolev_loss(outputs, torch.zeros_like(outputs), points, scales=scale, domain=(0, 1))

    looped = torch.stack([loss(*each) for each in zip(outputs, points, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(outputs, points), looped)
    shared = torch.stack([loss(each, points[0]) for each in outputs])
    torch.testing.assert_close(torch.func.vmap(loss, in_dims=(0, None))(outputs, points[0]), shared)
    for count, scale in ((400, 4), (4000, 40)):  # all modes at once, and in pieces
        values, places = torch.randn(count, 1, requires_grad=True), torch.rand(count, 2)
        expected = torch.autograd.grad(loss(values, places, scale), values)[0]
        found = torch.func.grad(lambda each, at=places, scale=scale: loss(each, at, scale))(values.detach())
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"domain=None is inferred from the points, which torch\.func hides"):
        torch.func.vmap(lambda o, p: sobolev_loss(o, torch.zeros_like(o), p, scales=4))(outputs, points)
