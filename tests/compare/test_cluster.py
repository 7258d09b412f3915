"""A comparison's runs as tasks of Ray, on two CPUs of this machine."""

import json
import os
import re
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from ray.exceptions import RayError

from neftune_hf.cli import main
from neftune_hf.cli.compare import Job, _parser
from neftune_hf.cli.training import read_config
from neftune_hf.compare.cluster import call_on_ray, on_ray, ray_tasks
from neftune_hf.compare.runs import Run
from neftune_hf.compare.sweep import Sweep, one_by_one
from neftune_hf.errors import DatasetError

from ..cli.test_compare import SETTINGS
from ..conftest import ROOT
from ..records import records, write
from .test_tasks import write_choices

pytestmark = pytest.mark.slow

RUNS = [Run({"neftune_noise_alpha": alpha}, 0) for alpha in (0.0, 5.0)]


@pytest.fixture(scope="module")
def task():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a task with one CPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    with ray_tasks(cpus=1, gpus=None) as task:
        yield task
    ray.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("cluster")
    data = write(folder / "train.json", records("tatsu-lab/alpaca", 24))
    file = folder / "config.yaml"
    file.write_text(SETTINGS.format(data=data, model=model_folder, output=folder / "out", evaluation="epoch"))
    return file


@pytest.fixture(scope="module")
def job(config):
    options = _parser().parse_args(["--records", "4", "--max_new_tokens", "4", "--ray"])
    return Job(options, [], read_config(["--config", str(config)]))


def sweep(folder, job):
    return Sweep(folder, RUNS, job.check(RUNS)[1])


def is_first(marker):
    """Whether no other task was here before."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def load_together(marker, load):
    """Waits until another task is here at the same time; if none comes, the worker is killed."""
    signal.alarm(200)
    with open(marker + ".fifo", "r" if is_first(marker) else "w"):
        signal.alarm(0)
    return load()


def load_and_die_once(marker, load):
    if is_first(marker):
        os.kill(os.getpid(), signal.SIGKILL)
    return load()


def load_and_fail_once(marker, load):
    if is_first(marker):
        raise DatasetError("`dataset_name`: not on this machine.")
    return load()


def load_once(marker, load):
    if not is_first(marker):
        threading.Event().wait()
    return load()


@pytest.fixture(scope="module")
def expected(task, job, tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("alone"), job).run(one_by_one(job.load))


def test_two_tasks_at_once_measure_what_one_process_does(task, job, expected, tmp_path, capsys):
    marker = tmp_path / "marker"
    os.mkfifo(f"{marker}.fifo")
    load = partial(load_together, str(marker), job.load)
    assert sweep(tmp_path / "out", job).run(on_ray(task, load)) == expected
    assert re.search(r"0 of 2 done, now alpha \d, seed 0; alpha \d, seed 0", capsys.readouterr().err)


def test_the_run_of_a_killed_worker_is_repeated(task, job, expected, tmp_path):
    load = partial(load_and_die_once, str(tmp_path / "marker"), job.load)
    assert sweep(tmp_path / "out", job).run(on_ray(task, load)) == expected
    assert (tmp_path / "marker").exists()


def test_the_command_on_ray_writes_what_it_writes_alone(task, config, tmp_path):
    words = ["compare", "--config", str(config), "--records", "4", "--max_new_tokens", "4", "--alphas", "0", "500"]
    words += ["--seeds", "0", "1", "--tasks", write_choices(tmp_path)]
    assert main([*words, "--ray", "--output_dir", str(tmp_path / "ray")]) == 0
    assert main([*words, "--output_dir", str(tmp_path / "alone")]) == 0
    files = sorted(file.name for file in (tmp_path / "alone" / "runs").iterdir())
    assert len(files) == 4
    for name in ("results.json", *(f"runs/{file}" for file in files)):
        found, alone = (json.loads((tmp_path / folder / name).read_text()) for folder in ("ray", "alone"))
        assert found == alone
    results = json.loads((tmp_path / "ray" / "results.json").read_text())
    (accuracy,) = [metric for metric in results["metrics"] if metric["key"] == "colours (acc)"]
    assert accuracy["records"] == 5
    assert accuracy["kind"] == "absolute"
    assert re.search(r"colours \(acc\) [+-]\d+\.\d points \[", results["verdict"][0])


def test_a_failed_run_does_not_end_the_others(task, job, tmp_path, caplog):
    load = partial(load_and_fail_once, str(tmp_path / "marker"), job.load)
    with pytest.raises(DatasetError, match="not on this machine"):
        sweep(tmp_path / "out", job).run(on_ray(task, load))
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    assert re.search(r"alpha \d, seed 0 failed, and the others go on: `dataset_name`", caplog.text)


def test_an_interrupt_cancels_the_tasks_and_keeps_what_is_done(task, job, tmp_path, monkeypatch):
    cancelled, wait, cancel, folder = [], ray.wait, ray.cancel, tmp_path / "out"

    def interrupted(*args, **kwargs):
        if list((folder / "runs").iterdir()):
            raise KeyboardInterrupt
        return wait(*args, **kwargs)

    def remembered(reference, **kwargs):
        cancelled.append(reference)
        cancel(reference, **kwargs)

    load = partial(load_once, str(tmp_path / "marker"), job.load)
    with monkeypatch.context() as patch:
        patch.setattr(ray, "wait", interrupted)
        patch.setattr(ray, "cancel", remembered)
        with pytest.raises(KeyboardInterrupt):
            sweep(folder, job).run(on_ray(task, load))
    (reference,) = cancelled
    with pytest.raises(RayError):
        ray.get(reference, timeout=60)
    (kept,) = (folder / "runs").iterdir()
    before = kept.stat().st_mtime_ns
    assert len(sweep(folder, job).run(on_ray(task, job.load))) == 2  # a later call
    assert kept.stat().st_mtime_ns == before


def test_errors_of_a_task_are_those_of_the_command(task, job):
    job = Job(job.options, ["--num_processes", "2"], job.config)
    with pytest.raises(ValueError, match=r"`--ray` trains each run in one process") as error:
        call_on_ray(task, job.check, RUNS)
    assert "\n" not in str(error.value)
