from __future__ import annotations

import os

import pytest
from kills import VARIANTS, Kills
from problems import ACCELERATOR


@pytest.mark.skipif(not hasattr(os, "fork") or ACCELERATOR != "cpu", reason="forks, which CUDA does not survive")
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_runs_equal_uninterrupted_ones(tmp_path, variant):
    found, story = Kills(tmp_path).compare(variant, list(VARIANTS).index(variant), seed=3)
    assert not found, (story, found[:5])
