"""Distances between spectra against brute force, p-values over all splits, and runs that cannot be compared."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import noisy_decay, trajectory_of

from lightning_koopman import KoopmanSpectrumMonitor, compare_trainings, dmd_rrr, plot_comparison
from lightning_koopman.compare.__main__ import main
from lightning_koopman.compare.comparison import eigenvalue_distance
from lightning_koopman.compare.signature import step_measure
from lightning_koopman.reading.steps import FREQUENCIES


@given(st.integers(1, 5), st.integers(0, 10**6))
@settings(deadline=None)
def test_the_distance_of_eigenvalues_is_the_cheapest_assignment(count, seed):
    random = np.random.default_rng(seed)
    first, second = random.standard_normal((2, count)) + 1j * random.standard_normal((2, count))
    brute = min(np.abs(first - np.array(chosen)).mean() for chosen in itertools.permutations(second))
    assert eigenvalue_distance(first, second) == pytest.approx(brute)
    assert eigenvalue_distance(first, random.permutation(first)) == 0


def test_the_measure_of_steps_is_a_sum_over_all_pairs():
    steps = np.random.default_rng(0).standard_normal((7, 9))
    units = steps / np.linalg.norm(steps, axis=0)
    density = [np.linalg.norm(units @ np.exp(2j * np.pi * f * np.arange(9))) ** 2 for f in FREQUENCIES]
    np.testing.assert_allclose(step_measure(steps), density / np.sum(density), rtol=1e-9)
    np.testing.assert_allclose(step_measure(np.zeros((3, 4))).sum(), 1)


def test_coordinates_do_not_matter():
    """A linear change of coordinates is a conjugacy."""
    snapshots = [noisy_decay(rate, seed) for seed, rate in enumerate((0.1, 0.3))]
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((120, 120)))
    wide = [5 * np.hstack([each, np.zeros_like(each)]) @ turn for each in snapshots]
    runs = [trajectory_of(each) for each in (*snapshots, *wide)]
    for matrix in compare_trainings(*runs).distances.values():
        np.testing.assert_allclose(matrix[[0, 1], [2, 3]], 0, atol=1e-7)
        np.testing.assert_allclose(matrix[0, 1], matrix[2, 3], atol=1e-7)
        assert matrix[0, 1] > 0.01


def test_chance_is_counted_over_all_splits():
    runs = [trajectory_of(noisy_decay(rate, seed)) for seed, rate in enumerate((0.1, 0.1, 0.1, 0.14, 0.1, 0.14))]
    found = compare_trainings(runs[:3], runs[3:])
    for test in found.tests:
        matrix, seen = found.distances[test.by], []
        for chosen in itertools.combinations(range(6), 3):
            rest = [index for index in range(6) if index not in chosen]
            inner = [matrix[a, b] for part in (chosen, rest) for a, b in itertools.combinations(part, 2)]
            seen.append(np.mean([matrix[a, b] for a in chosen for b in rest]) - np.mean(inner))
        assert test.p_value == np.mean(np.array(seen) >= test.between - test.within - 1e-12)
    first, second = sorted(found.tests, key=lambda test: test.p_value)
    assert first.adjusted == min(1, 2 * first.p_value)
    assert second.adjusted == max(first.adjusted, second.p_value)


def test_false_alarms_keep_their_level_and_differences_are_found():
    random = np.random.default_rng(0)
    alarms = []
    for _ in range(100):
        seeds = random.integers(10**9, size=10)
        runs = [trajectory_of(noisy_decay(0.2, int(seed), 8)) for seed in seeds]
        alarms.append(compare_trainings(runs[:5], runs[5:], level=0.1).different())
    assert np.mean(alarms) < 0.1 + 2.5 * np.sqrt(0.09 / 100)
    slow, fast = ([trajectory_of(noisy_decay(rate, seed)) for seed in range(5)] for rate in (0.1, 0.3))
    found = compare_trainings(slow, fast, slow[:3])
    assert found.different(0, 1)
    assert not found.different(0, 2)
    assert "Groups 0 and 1 behave differently" in str(found)
    assert "Holm's correction for 6 tests" in str(found)
    assert found.order("steps").index(1) != 1  # the other two are adjacent


def test_too_few_runs_have_distances_and_no_verdict():
    one, other = trajectory_of(noisy_decay(0.1, 0)), trajectory_of(noisy_decay(0.3, 1))
    found = compare_trainings(one, other)
    assert found.different() is None
    assert all(np.isnan(test.p_value) and test.between > 0 for test in found.tests)
    assert "too few" in str(found)
    assert compare_trainings([one, one], [other, other]).different() is None  # only three splits exist
    with pytest.raises(ValueError, match="second must be"):
        found.different(0, 2)


def test_of_trajectories_the_newest_snapshots_count_and_of_spectra_the_leading_eigenvalues():
    long, short = noisy_decay(0.1, 0, 20), noisy_decay(0.2, 1)
    cut = compare_trainings(trajectory_of(long), trajectory_of(short)).distances
    np.testing.assert_allclose(
        cut["eigenvalues"], compare_trainings(trajectory_of(long[6:]), trajectory_of(short)).distances["eigenvalues"]
    )
    spectra = [dmd_rrr(each) for each in (short, noisy_decay(0.2, 2))]
    found = compare_trainings(*spectra, rank=3)
    assert list(found.distances) == ["eigenvalues"]
    expected = eigenvalue_distance(*(each.eigenvalues[:3] for each in spectra))
    assert found.distances["eigenvalues"][0, 1] == pytest.approx(expected)


def test_no_pair_of_complex_eigenvalues_of_spectra_is_split():
    time = np.arange(24.0)
    spectra = [dmd_rrr(5 + rate**time * np.cos(time), delays=6) for rate in (0.9, 0.99)]
    assert np.abs(spectra[0].eigenvalues.imag[:3]) == pytest.approx([0, 0.9 * np.sin(1), 0.9 * np.sin(1)])
    assert [compare_trainings(*spectra, rank=rank).rank for rank in (1, 2, 3)] == [1, 1, 3]


def test_what_cannot_be_compared_is_refused_with_the_reason(tmp_path):
    run = trajectory_of(noisy_decay(0.1, 0))
    with pytest.raises(ValueError, match="two or more"):
        compare_trainings(run)
    with pytest.raises(ValueError, match="two or more"):
        compare_trainings(run, [])
    with pytest.raises(TypeError, match="runs must be"):
        compare_trainings(run, 3)
    with pytest.raises(ValueError, match="all spectra or none"):
        compare_trainings(run, run.spectrum())
    with pytest.raises(ValueError, match="equally many"):
        compare_trainings(run.spectrum(), run.spectrum(last=9))
    with pytest.raises(ValueError, match="6 or more"):
        compare_trainings(run, trajectory_of(noisy_decay(0.1, 1, 5)))
    with pytest.raises(ValueError, match=r"no trajectory\.npz"):
        compare_trainings(run, tmp_path)
    (tmp_path / "trajectory.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match="cannot be read"):
        compare_trainings(run, tmp_path)


def test_folders_of_runs_are_compared_over_the_rounds_in_common(trainer, regression, tmp_path, capsys):
    monitors = [
        KoopmanSpectrumMonitor(window=window, dirpath=tmp_path / str(index), prefix="mine")
        for index, window in enumerate((100, 9))
    ]
    for monitor in monitors:
        trainer(callbacks=monitor, max_epochs=12).fit(regression())
    folders = [tmp_path / str(index) / "mine" for index in range(2)]
    found = compare_trainings(*folders)  # the same training with a long and a short window
    assert all(matrix.max() < 1e-6 for matrix in found.distances.values())
    finer = KoopmanSpectrumMonitor(every_n_steps=2, dirpath=tmp_path / "finer")
    trainer(callbacks=finer, max_epochs=12).fit(regression())
    with pytest.raises(ValueError, match="every 1 epochs and every 2 steps"):
        compare_trainings(folders[0], tmp_path / "finer")
    main([str(each) for each in folders] + ["--figure", str(tmp_path / "d.png")])
    assert "too few runs to be told apart" in capsys.readouterr().out
    assert (tmp_path / "d.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="2"):
        main([str(folders[0]), "nowhere"])
    assert "holds no finished run" in capsys.readouterr().err


def test_the_figure_shows_the_distances_in_the_order_of_the_clusters():
    runs = [trajectory_of(noisy_decay(rate, seed)) for seed, rate in enumerate((0.1, 0.3, 0.1, 0.3))]
    found = compare_trainings([runs[0], runs[2]], [runs[1], runs[3]])
    axis, _ = plot_comparison(found, by="steps", names=["slow", "fast"]).axes
    labels = [each.get_text() for each in axis.get_xticklabels()]
    assert labels == ["slow", "fast"]
    np.testing.assert_array_equal(axis.get_xticks(), [0.5, 2.5])
    np.testing.assert_array_equal(axis.images[0].get_array(), found.distances["steps"])
    with pytest.raises(ValueError, match="names must be one string for each of the 2 groups"):
        plot_comparison(found, names=["slow"])
