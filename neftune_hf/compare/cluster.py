"""The runs of a comparison as tasks of Ray, on this machine or on a cluster."""

import logging
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.queue import Queue

from ..errors import NEFTuneError, first_line
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


def on_ray(task: Callable[[Callable], Any], load: Callable[[], Workload]) -> Execute:
    """Trains each run in a Ray task, which calls `load` itself: it must be picklable, as data and models are not sent.

    A run that fails does not end the others; the first error is raised after the last run. If the caller stops
    early, the tasks are cancelled.
    """

    def execute(runs: dict[int, Run], report: Callable[[int, float], Any]) -> Generator:
        queue = Queue(actor_options={"num_cpus": 0})
        tasks = {
            task(_in_folder).remote(os.getcwd(), _train_and_measure, load, run, i, queue): i for i, run in runs.items()
        }
        waiting, errors = list(tasks), []
        try:
            while waiting:
                finished, waiting = ray.wait(waiting, timeout=0.5)
                unfinished = {tasks[reference] for reference in waiting}
                for i, share in queue.get_nowait_batch(queue.qsize()):
                    if i in unfinished:  # messages may arrive after the result
                        report(i, share)
                for reference in finished:
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
            queue.shutdown(force=True)
        if errors:
            raise errors[0]

    return execute


def _in_folder(folder: str, function: Callable[..., Any], *args: Any) -> Any:
    if Path(folder).is_dir():  # relative paths mean the same as where the command was started, if it is there
        os.chdir(folder)
    return function(*args)


def _train_and_measure(load: Callable[[], Workload], run: Run, i: int, queue: Queue) -> dict[str, Any]:
    actor: Any = queue.actor

    def report(share: float) -> None:
        actor.put_nowait.remote((i, share))  # without waiting for it

    report(0.0)
    return train_and_measure(load(), run, report)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:  # what the task raised
        raise (error.cause if isinstance(error.cause, NEFTuneError | ModuleNotFoundError) else error) from None
    except RayError as error:
        raise NEFTuneError(
            f"`--ray`: a task failed {1 + _RETRIES['max_retries']} times: {first_line(error)}"
        ) from error
