"""The runs of a comparison as tasks of Ray, on this machine or on a cluster."""

import logging
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ..errors import NEFTuneConfigError, NEFTuneError, first_line
from .measure import Workload, train_and_measure
from .runs import Run
from .sweep import Execute

logger = logging.getLogger(__name__)

# Ray repeats a task whose process or machine fails, and here also one whose disk or network does.
_RETRIES: dict[str, Any] = {"max_retries": 3, "retry_exceptions": [OSError]}


@contextmanager
def ray_tasks(cpus: float, gpus: float | None) -> Iterator[Callable[[Callable], Any]]:
    """Connect to the cluster in RAY_ADDRESS, or start Ray on this machine; yields what makes a function a Ray task.

    Args:
        cpus (`float`): CPUs for each task. Ray sets the number of threads accordingly.
        gpus (`float`, *optional*): GPUs for each task. By default 1 if the cluster has any now.
    """
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        gpus = min(ray.cluster_resources().get("GPU", 0), 1) if gpus is None else gpus
        yield ray.remote(num_cpus=cpus, num_gpus=gpus, **_RETRIES)
    finally:
        if is_ours:
            ray.shutdown()


def call_on_ray(task: Callable[[Callable], Any], function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function that is called in a Ray task."""
    return _result(task(_in_folder).remote(os.getcwd(), function, *args))


def on_ray(
    task: Callable[[Callable], Any], prepare: Callable[[Run], Workload], identities: list[dict[str, Any]]
) -> Execute:
    """Trains each run in a Ray task, which calls `prepare`: it must be picklable, as data and models are not sent.

    A run that fails does not end the others; the first error is raised after the last run. If the caller stops
    early, the tasks are cancelled.
    """

    def execute(runs: dict[int, Run]) -> Generator:
        tasks = {
            task(_in_folder).remote(os.getcwd(), _train_and_measure, prepare, run, identities[i]): i
            for i, run in runs.items()
        }
        waiting, errors = list(tasks), []
        try:
            while waiting:
                (reference,), waiting = ray.wait(waiting)
                i = tasks[reference]
                try:
                    yield i, _result(reference)
                except Exception as error:
                    logger.error("%s failed, and the others go on: %s", runs[i].name, first_line(error))
                    errors.append(error)
                    yield i, None
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
        if errors:
            raise errors[0]

    return execute


def _in_folder(folder: str, function: Callable[..., Any], *args: Any) -> Any:
    if Path(folder).is_dir():  # relative paths mean the same as where the command was started, if it is there
        os.chdir(folder)
    return function(*args)


def _train_and_measure(prepare: Callable[[Run], Workload], run: Run, identity: dict[str, Any]) -> dict[str, Any]:
    workload = prepare(run)
    if other := [part for part, value in (workload.identity or {}).items() if value != identity[part]]:
        raise NEFTuneConfigError(
            f"`--ray`: the {' and '.join(other)} of {run.name} on this machine are not those with which the comparison "
            "began. Every machine needs the same data, model and packages."
        )
    return train_and_measure(workload, run)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:  # what the task raised
        raise (error.cause if isinstance(error.cause, NEFTuneError | ModuleNotFoundError) else error) from None
    except RayError as error:
        raise NEFTuneError(
            f"`--ray`: a task failed {1 + _RETRIES['max_retries']} times: {first_line(error)}"
        ) from error
