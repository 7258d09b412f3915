"""The runs of a comparison as tasks of Ray, on this machine or on a cluster."""

import logging
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ..errors import NEFTuneError, first_line
from .runs import Run

logger = logging.getLogger(__name__)


def ray_task(cpus: float, gpus: float | None) -> Any:
    """What calls a function in a Ray task, on the cluster in RAY_ADDRESS or on this machine; returns a reference.

    Ray repeats a task whose process or machine fails, and here also one whose disk or network does.

    Args:
        cpus (`float`): CPUs for each task. Ray sets the number of threads accordingly.
        gpus (`float`, *optional*): GPUs for each task. By default 1 if the cluster has any now.
    """
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    gpus = min(ray.cluster_resources().get("GPU", 0), 1) if gpus is None else gpus
    resources: Any = {"num_cpus": cpus, "num_gpus": gpus, "retry_exceptions": [OSError]}
    task = ray.remote(max_retries=3, **resources)(_in_folder)
    return lambda function, *args: task.remote(os.getcwd(), function, *args)


def result_of(reference: Any) -> Any:
    """What a Ray task returned; its error if it raised one."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, NEFTuneError | ModuleNotFoundError) else error) from None


def train_on_ray(task: Any, train: Callable[..., Any], runs: dict[int, tuple[Run, dict[str, Any]]]) -> Generator:
    """Train runs, each in a Ray task: `train` must be picklable, as data and models are not sent.

    A run that fails does not end the others; the first error is raised after the last run. If the caller stops
    early, the tasks are cancelled.

    Yields:
        `tuple[int, dict | None]`: Each run's index and measurements, None if it failed.
    """
    tasks = {task(train, *run): i for i, run in runs.items()}
    waiting, errors = list(tasks), []
    try:
        while waiting:
            (reference,), waiting = ray.wait(waiting)
            i, result = tasks[reference], None
            try:
                result = result_of(reference)
            except Exception as error:
                logger.error("%s failed, and the others go on: %s", runs[i][0].name, first_line(error))
                errors.append(error)
            yield i, result
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
    if errors:
        raise errors[0]


def _in_folder(folder: str, function: Callable[..., Any], *args: Any) -> Any:
    if Path(folder).is_dir():  # relative paths mean the same as where the command was started, if it is there
        os.chdir(folder)
    return function(*args)
