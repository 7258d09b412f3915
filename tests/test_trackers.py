"""What trackers write to disk for a run with only a `NEFTuneCallback`: alpha and the measured ratio of every step."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from neftune_hf import NEFTuneCallback

from .conftest import ROOT
from .helpers import make, train

RATIO = "neftune/snr_db"


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.glob("out/runs/*")))).Reload()
    return {key: [event.value for event in events.Scalars(f"train/{key}")] for key in ("neftune/alpha", RATIO)}


def trackio(folder):
    with sqlite3.connect(next(folder.glob("trackio/*.db"))) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by step")]
    return {key: [row[f"train/{key}"] for row in rows if "train/loss" in row] for key in ("neftune/alpha", RATIO)}


def wandb(folder):
    """The run's log consists of protobuf messages, in which each key is followed by its value as JSON."""
    log = next(folder.glob("wandb/*/*.wandb")).read_bytes()
    return {
        key: [float(value) for value in re.findall(rb"train/%s\x82\x01.(-?[\d.]+)" % key.encode(), log, re.DOTALL)]
        for key in ("neftune/alpha", RATIO)
    }


def run(folder, tracker):
    trainer = make(Path(folder) / "out", callbacks=[NEFTuneCallback(neftune_noise_alpha=5)], report_to=tracker)
    train(trainer)
    logged = [entry[RATIO] for entry in trainer.state.log_history if "loss" in entry]
    (Path(folder) / "logged.json").write_text(json.dumps(logged))


@pytest.mark.slow
@pytest.mark.parametrize("read", [tensorboard, trackio, wandb], ids=lambda read: read.__name__)
def test_trackers_are_given_alpha_and_the_ratio(read, tmp_path):
    """In a separate process, because trackers read their settings on import and finish at exit."""
    settings = {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline"}
    result = subprocess.run(
        [sys.executable, "-c", f"from tests.test_trackers import run; run({str(tmp_path)!r}, {read.__name__!r})"],
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    logged = json.loads((tmp_path / "logged.json").read_text())
    found = read(tmp_path)
    assert len(logged) == 4
    assert {5.0} == set(found["neftune/alpha"])
    assert sorted({round(value, 3) for value in found[RATIO]}) == sorted({round(value, 3) for value in logged})
