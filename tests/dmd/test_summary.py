from __future__ import annotations

import numpy as np
import pytest
from problems import linear_system

from lightning_koopman import dmd_rrr, random_walk_spectrum
from lightning_koopman.dmd.summary import summarize


def said(snapshots, **options) -> str:
    spectrum = dmd_rrr(snapshots, tol=1e-8)
    walk = random_walk_spectrum(np.ones(len(snapshots) - 1), 1.0, 1000)
    return summarize(spectrum, walk, **options)


def test_it_names_the_rate_in_epochs():
    text = said(linear_system([1.0, 0.5], n=6, time=12), every=3)
    assert "cannot be told from 1" in text
    assert "|λ| = 0.5000, so that part halves every 3.0 epochs" in text


def test_it_names_growth_and_full_rank():
    assert "still grows" in said(linear_system([1.2, 1.0], n=6, time=12))
    full = said(np.random.default_rng(0).standard_normal((5, 50)).cumsum(0))
    assert "small residuals certify nothing" in full
    assert "no other eigenvalue is certain enough" in full


@pytest.mark.parametrize("snapshots", [[[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
def test_it_copes_with_degenerate_spectra(snapshots):
    assert said(np.array(snapshots)).startswith("- Koopman spectrum")
