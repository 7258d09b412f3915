"""A comparison's runs as tasks of Ray, on two CPUs of this machine."""

import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayError

from neftune_hf.cli import main
from neftune_hf.compare.cluster import ray_task, result_of, train_on_ray
from neftune_hf.compare.runs import Run
from neftune_hf.errors import DatasetError

from ..cli.test_compare import SETTINGS, results_of, runs_of
from ..conftest import ROOT
from ..records import records, write
from .test_tasks import write_choices

pytestmark = pytest.mark.slow

RUNS = {n: (Run({"neftune_noise_alpha": alpha}, 0), {"alpha": alpha}) for n, alpha in enumerate((0.0, 5.0))}


@pytest.fixture(scope="module")
def task():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield ray_task(cpus=1, gpus=None)
    ray.shutdown()


def is_first(marker):
    """Whether no other task was here before."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def train(run, identity):
    return {"name": run.name} | identity


def train_together(marker, run, identity):
    """Waits until another task is here at the same time; if none comes, the worker is killed."""
    signal.alarm(200)
    with open(marker + ".fifo", "r" if is_first(marker) else "w"):
        signal.alarm(0)
    return train(run, identity)


def train_and_die_once(marker, run, identity):
    if is_first(marker):
        os.kill(os.getpid(), signal.SIGKILL)
    return train(run, identity)


def train_and_fail_once(marker, run, identity):
    if is_first(marker):
        raise DatasetError("`dataset_name`: not on this machine.")
    return train(run, identity)


def train_once(marker, run, identity):
    if not is_first(marker):
        threading.Event().wait()
    return train(run, identity)


EXPECTED = {0: {"name": "alpha 0, seed 0", "alpha": 0.0}, 1: {"name": "alpha 5, seed 0", "alpha": 5.0}}


def test_two_tasks_run_at_once(task, tmp_path):
    os.mkfifo(tmp_path / "marker.fifo")
    assert dict(train_on_ray(task, partial(train_together, str(tmp_path / "marker")), RUNS)) == EXPECTED


def test_the_run_of_a_killed_worker_is_repeated(task, tmp_path):
    assert dict(train_on_ray(task, partial(train_and_die_once, str(tmp_path / "marker")), RUNS)) == EXPECTED
    assert (tmp_path / "marker").exists()


def test_a_failed_run_does_not_end_the_others(task, tmp_path, caplog):
    results = train_on_ray(task, partial(train_and_fail_once, str(tmp_path / "marker")), RUNS)
    found = dict([next(results), next(results)])
    with pytest.raises(DatasetError, match="not on this machine"):
        next(results)
    assert sorted(result is None for result in found.values()) == [False, True]
    assert "seed 0 failed, and the others go on: `dataset_name`" in caplog.text


def test_an_interrupt_cancels_the_tasks(task, tmp_path, monkeypatch):
    cancelled, cancel = [], ray.cancel

    def remembered(reference, **kwargs):
        cancelled.append(reference)
        cancel(reference, **kwargs)

    monkeypatch.setattr(ray, "cancel", remembered)
    results = train_on_ray(task, partial(train_once, str(tmp_path / "marker")), RUNS)
    assert next(results)[1] in EXPECTED.values()
    results.close()
    (reference,) = cancelled
    with pytest.raises(RayError):
        ray.get(reference, timeout=60)


def test_the_command_on_ray_writes_what_it_writes_alone(task, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in a task with one CPU
    data, file = write(tmp_path / "train.json", records("tatsu-lab/alpaca", 24)), tmp_path / "config.yaml"
    file.write_text(SETTINGS.format(data=data, model=model_folder, output="out", evaluation="epoch", steps=2))
    words = ["compare", "--config", str(file), "--records", "4", "--max_new_tokens", "4", "--alphas", "0", "500"]
    words += ["--seeds", "0", "1", "--tasks", write_choices(tmp_path)]
    assert main([*words, "--ray", "--output_dir", str(tmp_path / "ray")]) == 0
    assert main([*words, "--output_dir", str(tmp_path / "alone")]) == 0
    found, alone = (runs_of(tmp_path / folder) for folder in ("ray", "alone"))
    assert len(found) == 4
    for key, run in found.items():
        different = {name for name, value in run.items() if value != alone[key][name]}
        assert different <= {"file", "plan"}
        assert run["file"].name == alone[key]["file"].name
    (accuracy,) = [m for m in results_of(tmp_path / "ray")["metrics"] if m["key"] == "colours (acc)"]
    assert (accuracy["records"], accuracy["kind"]) == (5, "absolute")


def test_errors_of_a_task_are_those_of_the_command(task, tmp_path):
    with pytest.raises(DatasetError, match=r"`dataset_name`: not on this machine\.") as error:
        result_of(task(train_and_fail_once, str(tmp_path / "marker"), *RUNS[0]))
    assert "\n" not in str(error.value)
