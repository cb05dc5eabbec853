"""A process that fails costs a warning in all of them: no hang, no crash, and all go on alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_sharded import environments

SCRIPT = Path(__file__).with_name("failing_process.py")
TRAJECTORY, RECORDER = "trajectory.trajectory:Trajectory", "trajectory.recorder:Recorder"
# where, what, at which call, in which process
FAILURES = [
    ("callbacks.observables", "local_chunks", 20, 1),
    ("callbacks.observables:Weights", "read", 8, 1),
    ("parameters.shards:Shards", "__init__", 8, 0),
    ("trajectory.recorder:Snapshot", "fingerprint", 8, 1),
    (TRAJECTORY, "stage", 6, 1),
    (TRAJECTORY, "message", 6, 0),
    (TRAJECTORY, "commit", 8, 1),
    ("trajectory.trajectory", "row_products", 6, 1),
    ("trajectory.sketch:Sketch", "of_parts", 4, 1),
    ("trajectory.trajectory", "decompose", 3, 0),
    (RECORDER, "save", 3, 0),
    (RECORDER, "save", 3, 1),
    (RECORDER, "release", 3, 1),
    (TRAJECTORY, "combine", 1, 1),
    ("callbacks.survivors", "persistent_combination", 1, 0),
    ("pruning.masks:MaskSet", "from_scores", 1, 1),
    ("pruning.masks", "_keep_largest", 1, 0),
    ("pruning.quantile:Ranked", "kept", 1, 1),
    ("parameters.shards:Shards", "assemble", 2, 1),
    ("pruning.masks:MaskSet", "pin", 1, 1),
    ("callbacks.early_stopping:EarlyStopOnUnitEigenvalues", "_judge", 3, 0),
    ("callbacks.restart:RestartOnBadInitialization", "_judge", 3, 0),
    ("callbacks.baseline_loss:BaselineProbe", "observe", 2, 1),
    ("callbacks.observables:LossMeter", "take", 3, 1),
]


def train(folder: Path, **options: object) -> list[dict]:
    command = [sys.executable, str(SCRIPT), json.dumps({"folder": str(folder), "epochs": 8, **options})]
    path = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1]), str(SCRIPT.parents[2])])
    logs = [(folder / f"log{rank}").open("w") for rank in range(2)]
    started = [
        subprocess.Popen(command, env={**os.environ, **env, "PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT)
        for env, log in zip(environments(2), logs, strict=True)
    ]
    try:
        codes = [process.wait(timeout=90) for process in started]
    finally:
        for process, log in zip(started, logs, strict=True):
            process.kill()
            log.close()
    assert not any(codes), "".join((folder / f"log{rank}").read_text()[-1500:] for rank in range(2))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda each: f"{each[1]}-{each[3]}")
def test_a_process_that_fails_costs_a_warning_in_all(failure, tmp_path):
    ranks = train(tmp_path, fails=failure)
    assert [rank["epochs"] for rank in ranks] == [8, 8]
    assert any("injected" in told for told in ranks[failure[3]]["warnings"])
    assert ranks[0]["times"] == ranks[1]["times"]
    assert ranks[0]["bits"] == ranks[1]["bits"]


@pytest.mark.parametrize("failure", [(TRAJECTORY, "load", 1, 1), ("trajectory.sidecar", "_read_layout", 1, 0)])
def test_a_process_that_cannot_load_its_rows_costs_a_warning_in_all(failure, tmp_path):
    train(tmp_path)
    ranks = train(tmp_path, fails=failure, epochs=10, checkpoint=str(tmp_path / "c" / "last.ckpt"))
    assert [rank["epochs"] for rank in ranks] == [10, 10]
    assert ranks[0]["times"] == ranks[1]["times"]
    assert any("injected" in told for told in ranks[failure[3]]["warnings"])
