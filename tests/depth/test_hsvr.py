from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from sklearn.utils.estimator_checks import check_estimator

from lightning_koopman import HSVR
from lightning_koopman.demo.table1 import DOMAIN, N_FINE, N_SAMPLES, TABLE

x, fine = np.linspace(*DOMAIN, N_SAMPLES)[:, None], np.linspace(*DOMAIN, N_FINE)[:, None]
ROWS = {row.name: row for row in TABLE}
CHIRP, WAVES = ROWS["x + sin(2πx⁴)"].function, ROWS["cos(2πx) + sin(20πx)"].function
FFT_ERROR_DIFFERS = {"x + sin(2πx⁴)"}  # ours is smaller
DMD_ERROR_DIFFERS = {"x + x² + x³", "x + sin(2πx⁴)"}  # a trend taken for a wave; a chirp of many frequencies


# -- scikit-learn's contract -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:X has .* inputs")  # some checks use ten inputs
@pytest.mark.parametrize("legacy", [False, True])
def test_scikit_learns_own_checks(legacy):
    results = check_estimator(HSVR(), legacy=legacy, on_skip=None)  # raises on failure
    skipped = [result["check_name"] for result in results if result["status"] != "passed"]
    assert skipped in ([], ["check_array_api_input"])  # needs SCIPY_ARRAY_API


def test_pipelines_searches_clones_and_pickles():
    y = WAVES(x[:, 0])
    model = make_pipeline(StandardScaler(), HSVR()).fit(x, y)
    assert model.score(x, y) > 0.998
    assert model[-1].n_layers_ == 2
    order = np.random.default_rng(0).permutation(len(x))
    search = GridSearchCV(HSVR(), {"n_layers": [1, 2], "epsilon": [0.01, 0.05]}, cv=3).fit(x[order], y[order])
    assert search.best_params_ == {"n_layers": 2, "epsilon": 0.01}
    copied = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(copied.predict(fine), search.predict(fine))
    assert not hasattr(clone(copied), "estimators_")


# -- the paper's table -----------------------------------------------------------------------------------------------


def error(method: str, row, **options) -> float:
    model = HSVR(method=method, samples_per_scale=None, **options).fit(x, row.function(x[:, 0]))
    return float(np.abs(model.predict(fine) - row.function(fine[:, 0])).max())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_table_1(row):
    for method, theirs, apart in (("fft", row.fft_error, FFT_ERROR_DIFFERS), ("dmd", row.dmd_error, DMD_ERROR_DIFFERS)):
        ours = error(method, row)
        if row.name in apart:
            assert (ours < 0.95 * theirs) if method == "fft" else (ours > 1.05 * theirs)
        else:
            assert ours == pytest.approx(theirs, rel=0.05)


def test_the_layers_are_those_of_a_loop_over_scikit_learns():
    y = CHIRP(x[:, 0])
    model = HSVR(samples_per_scale=None).fit(x, y)
    left, total, errors = y.copy(), np.zeros(len(fine)), []
    for scale in model.scales_:
        layer = SVR(gamma=scale**-2, C=5 * np.ptp(left), epsilon=0.01 * np.ptp(y), tol=1e-4 * np.ptp(y)).fit(x, left)
        left = left - layer.predict(x)
        total += layer.predict(fine)
        errors.append(np.abs(left).max())
    within = 1e-3 * np.ptp(y)  # both are solved to a tolerance only
    np.testing.assert_allclose(model.predict(fine), total, atol=within)
    np.testing.assert_allclose(model.layer_errors_, errors, atol=within)
    assert model.n_layers_ == len(model.estimators_) == 7


@pytest.mark.parametrize("offset", [-3e9, 1e6])
@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_origins_and_units_do_not_matter(offset, unit):
    y = CHIRP(x[:, 0])
    expected = HSVR().fit(x, y)
    scales = expected.scales_
    moved = HSVR(scales=scales).fit(x + offset, unit * (y + 30))
    np.testing.assert_allclose(moved.predict(fine + offset) / unit - 30, expected.predict(fine), atol=0.01)
    np.testing.assert_allclose(moved.layer_errors_ / unit, expected.layer_errors_, atol=0.01)
    columns = np.stack([y, unit * y, 1e9 + y, 0.1 + 1e-17 * y], axis=1)
    together = HSVR(scales=scales).fit(x, columns).predict(fine)
    np.testing.assert_allclose(together[:, 1] / unit, together[:, 0], atol=0.01)
    np.testing.assert_allclose(together[:, 2] - 1e9, together[:, 0], atol=0.01)
    np.testing.assert_allclose(together[:, 3], 0.1)
    assert list(HSVR().fit(x * unit, y).predict(fine * unit)[:3]) == pytest.approx(
        list(expected.predict(fine)[:3]), abs=0.01
    )


def test_a_distant_mean_takes_no_layers_away():
    for offset in (20.0, 300.0):
        model = HSVR().fit(x, CHIRP(x[:, 0]) + offset)
        assert model.n_layers_ == 6
        assert model.layer_errors_[-1] < 0.012 * np.ptp(CHIRP(x[:, 0]))


def test_stages_end_at_the_prediction_and_the_errors_fall():
    y = CHIRP(x[:, 0])
    model = HSVR().fit(x, y)
    stages = list(model.staged_predict(x))
    assert len(stages) == 7
    np.testing.assert_array_equal(stages[-1], model.predict(x))
    np.testing.assert_allclose([np.abs(stage - y).max() for stage in stages], model.layer_errors_)
    assert model.layer_errors_[-1] < 0.1 * model.layer_errors_[0]


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_early_layers_need_few_samples(noise):
    rng = np.random.default_rng(0)
    many = np.linspace(0, 2, 4000)[:, None]
    y = CHIRP(many[:, 0])
    every, thinned = (
        HSVR(7, scales=[1 / 3 / 2**layer for layer in range(7)], samples_per_scale=each).fit(
            many, y + noise * rng.standard_normal(4000)
        )
        for each in (None, 30)
    )
    errors = [np.abs(model.predict(many) - y).max() for model in (every, thinned)]
    assert errors[1] < 1.2 * errors[0]
    first = [model.estimators_[0][0] for model in (every, thinned)]
    assert len(first[1].support_) < 0.2 * len(first[0].support_)
    assert thinned.estimators_[-1][0].shape_fit_ == (4000, 1)  # the last layer is fitted to all samples


# -- accepted input --------------------------------------------------------------------------------------------------


def test_several_outputs_are_fitted_each_with_the_same_scales():
    y = np.stack([WAVES(x[:, 0]), 100 * CHIRP(x[:, 0])], axis=1)
    model = HSVR().fit(x, y)
    assert model.predict(fine).shape == (N_FINE, 2)
    scales = model.scales_
    for output in range(2):
        alone = HSVR(scales=scales).fit(x, y[:, output]).predict(fine)
        within = 1e-3 * np.ptp(y[:, output])  # the solver's tolerance
        np.testing.assert_allclose(alone, model.predict(fine)[:, output], atol=within)


def test_points_in_any_order_that_come_twice():
    rng = np.random.default_rng(0)
    points = np.repeat(x[::2], 2, axis=0)
    y = WAVES(points[:, 0])
    order = rng.permutation(len(points))
    model = HSVR().fit(points[order], y[order])
    assert model.depth_.method == "fft"
    assert model.n_layers_ == 2
    np.testing.assert_allclose(model.predict(points), y, atol=0.05)


def test_two_inputs():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (900, 2))
    model = HSVR(threshold=0.1).fit(points, np.sin(2 * np.pi * (points[:, 0] + points[:, 1])))
    inner = rng.uniform(0.1, 0.9, (300, 2))
    assert np.abs(model.predict(inner) - np.sin(2 * np.pi * inner.sum(1))).max() < 0.1
    wider = np.column_stack([points, np.ones(900)])  # a constant input carries no information
    again = HSVR(threshold=0.1).fit(wider, np.sin(2 * np.pi * points.sum(1)))
    np.testing.assert_allclose(again.scales_, model.scales_)
    wider[:, 2] += 1e-15 * rng.standard_normal(900)
    np.testing.assert_allclose(HSVR(threshold=0.1).fit(wider, again.predict(wider)).scales_, model.scales_)


def test_where_nothing_can_be_estimated_there_is_one_layer():
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((80, 6))
    with pytest.warns(UserWarning, match="X has 6 inputs: scales are estimated for 3 at most"):
        model = HSVR().fit(wide, wide[:, 0])
    assert model.n_layers_ == 1
    assert model.depth_ is None
    assert model.scales_[0] == pytest.approx(np.sqrt(6 * wide.var()))  # gamma="scale"
    assert HSVR().fit(x[:6], x[:6, 0]).n_layers_ == 1
    constant = HSVR().fit(x, np.full(len(x), 3.0))
    np.testing.assert_allclose(constant.predict(fine), 3.0)


def test_given_layers_and_scales():
    y = CHIRP(x[:, 0])
    found = HSVR().fit(x, y).scales_
    np.testing.assert_allclose(HSVR(3).fit(x, y).scales_, found[:3])
    np.testing.assert_allclose(HSVR(9).fit(x, y).scales_, [*found, found[-1] / 2, found[-1] / 4])
    model = HSVR(scales=[0.5, 0.1]).fit(x, y)
    assert model.n_layers_ == 2
    assert model.depth_ is None
    assert HSVR(scales=0.5).fit(x, y).n_layers_ == 1


def test_progress(capsys):
    HSVR(verbose=1).fit(x, CHIRP(x[:, 0]))
    assert capsys.readouterr().out.startswith("[HSVR] note: end-point jump")
    HSVR(verbose=1).fit(x, WAVES(x[:, 0]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("[HSVR] layer 1 of 2: scale 0.1668, 360 samples")
    HSVR().fit(x, WAVES(x[:, 0]))
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "n_layers must be a whole number ≥ 1"),
        ({"scales": []}, "scales must be a list of numbers > 0"),
        ({"scales": [0.1, 0.0]}, "scales must be a list of numbers > 0"),
        ({"scales": [[0.5], [0.1]]}, "scales must be a list of numbers > 0"),
        ({"scales": [0.1, 0.2]}, "scales must decrease from layer to layer"),
        ({"scales": [0.2, 0.1], "n_layers": 3}, "n_layers=3, but scales has length 2"),
        ({"method": "wavelet"}, "method must be one of"),
        ({"decay": 1}, "decay must be a number > 1"),
        ({"epsilon": -0.1}, "epsilon must be a number ≥ 0"),
        ({"C": 0}, "C must be a number > 0"),
        ({"tol": 0}, "tol must be a number > 0"),
        ({"cache_size": -1}, "cache_size must be a number > 0"),
        ({"samples_per_scale": 0}, "samples_per_scale must be a number > 0"),
        ({"threshold": 2}, r"threshold must lie in \(0, 1\)"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        HSVR(**options).fit(x, x[:, 0])


def test_dmd_needs_equidistant_samples():
    with pytest.raises(ValueError, match="not equidistant"):
        HSVR(method="dmd").fit(x**2, x[:, 0])
