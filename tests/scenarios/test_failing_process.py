"""A failing process causes a warning in every process: no hang, no crash, and all continue alike."""

from __future__ import annotations

import json

from failing_process import train_all
from processes import run_processes

TRAJECTORY, RECORDER = "trajectory.trajectory:Trajectory", "trajectory.recorder:Recorder"
INCREMENTS = "trajectory.increments:Increments"
# module, function, call, process
FAILURES = [
    ("callbacks.observables", "local_chunks", 20, 1),
    ("callbacks.observables:Weights", "read", 8, 1),
    ("parameters.shards:Shards", "__init__", 8, 0),
    ("trajectory.recorder:Snapshot", "fingerprint", 8, 1),
    (INCREMENTS, "write", 6, 1),
    (INCREMENTS, "message", 6, 0),
    (INCREMENTS, "commit", 8, 1),
    ("trajectory.increments", "row_products", 6, 1),
    ("trajectory.sketch:Sketch", "of_parts", 4, 1),
    ("callbacks.reader", "read_gram", 3, 0),
    (RECORDER, "save", 3, 0),
    (RECORDER, "save", 3, 1),
    (RECORDER, "release", 3, 1),
    (TRAJECTORY, "combine", 1, 1),
    ("callbacks.survivors", "persistent", 1, 0),
    ("callbacks.weight_average", "choose", 2, 0),
    ("callbacks.weight_average:WeightAverage", "_completed", 3, 1),
    ("callbacks.training_batches:Trial", "__init__", 2, 1),
    ("callbacks.training_batches:Trial", "losses", 3, 0),
    ("callbacks.training_batches:TrainingBatches", "add", 3, 1),
    ("pruning.masks:MaskSet", "from_scores", 1, 1),
    ("pruning.masks", "largest", 1, 0),
    ("pruning.quantile", "_select", 1, 1),
    ("parameters.shards:Shards", "assemble", 2, 1),
    ("pruning.masks:MaskSet", "pin", 1, 1),
    ("callbacks.mask_rounds:MaskRounds", "accept", 1, 1),
    ("callbacks.early_stopping:EarlyStopOnUnitEigenvalues", "_judge", 3, 0),
    ("callbacks.restart:RestartOnBadInitialization", "_judge", 3, 0),
    ("callbacks.baseline_loss:BaselineProbe", "observe", 2, 1),
    ("callbacks.observables:LossMeter", "take", 3, 1),
]


# run by all processes together: if one fails, each of them warns
TOGETHER = {"local_chunks", "read", "write", "message", "commit", "from_scores", "combine", "load", "_read_layout"}
LOADING = [(TRAJECTORY, "load", 1, 1), ("trajectory.sidecar", "_read_layout", 1, 0)]


def test_a_process_that_fails_costs_a_warning_in_all(tmp_path):
    options = {"folder": str(tmp_path), "failures": FAILURES, "when_loading": LOADING}
    codes, told = run_processes(train_all, options, 2, tmp_path)
    assert not any(codes), told
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for failure, *ranks in zip([*FAILURES, *LOADING], *found, strict=True):
        epochs = 10 if failure in LOADING else 8
        assert [rank["epochs"] for rank in ranks] == [epochs, epochs], failure
        assert any("injected" in told for told in ranks[failure[3]]["warnings"]), failure
        if failure[1] in TOGETHER:
            assert all(rank["warnings"] for rank in ranks), failure
        assert ranks[0]["times"] == ranks[1]["times"], failure
        assert ranks[0]["bits"] == ranks[1]["bits"], failure
        assert ranks[0]["weights"] == ranks[1]["weights"], failure
