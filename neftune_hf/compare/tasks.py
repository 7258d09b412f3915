"""Tasks of lm-evaluation-harness, with the metrics of each document."""

import contextlib
import functools
import io
import logging
from numbers import Real
from typing import Any

import lm_eval
import numpy as np
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.huggingface import HFLM

from ..errors import NEFTuneConfigError, first_line
from .runs import fingerprint


@functools.cache
def load_tasks(names: str) -> tuple[Any, list[Any], str]:
    """Load tasks with their data.

    Returns:
        `tuple`: The harness's manager of tasks, the tasks, and a hash of their settings and documents and of the
        harness's version.

    Args:
        names (`str`): As in `lm_eval --tasks`: names or YAML files, separated by commas.

    Raises:
        NEFTuneConfigError: A task is unknown, cannot be loaded, runs generated code, or needs images.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    config = EvaluatorConfig(tasks=names.split(","))
    try:
        manager = config.process_tasks()
        tasks = list(manager.load(config.tasks)["tasks"].values())
    except Exception as error:  # of the harness, datasets, the hub, or a task's own code
        raise NEFTuneConfigError(f"`--tasks` {names} cannot be loaded: {first_line(error)}") from error
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise NEFTuneConfigError(f"`--tasks`: {task.task_name} runs generated code or needs images. Leave it out.")
    # now, because an evaluation changes the settings
    rows = (row for task in tasks for row in (task.dump_config(), *task.eval_docs))
    return manager, tasks, fingerprint([lm_eval.__version__, *rows])


def evaluate(model: Any, names: str, limit: int | None, tokenizer: Any, batch_size: int) -> dict[str, list[float]]:
    """The metrics that are one number per document, each as a list in the order of the documents.

    In several processes, all of them evaluate all documents, which keeps the forward passes of a sharded model in step.

    Args:
        names (`str`): As for [`load_tasks`].
        limit (`int`, *optional*): The number of documents of each task.
        tokenizer (`transformers.PreTrainedTokenizerBase`): If it has a chat template, the template is applied.
        batch_size (`int`): Documents per forward pass.
    """
    manager, tasks, _ = load_tasks(names)
    network = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    options: Any = {"bootstrap_iters": 0, "apply_chat_template": bool(tokenizer.chat_template)}
    with contextlib.redirect_stderr(io.StringIO()):  # the harness's own progress bars
        found = lm_eval.simple_evaluate(network, tasks=tasks, limit=limit, task_manager=manager, **options)
    values: dict[str, list[float]] = {}
    for task, documents in (found["samples"] if found else {}).items():  # on each node, one process has results
        for document in sorted(documents, key=lambda document: document["doc_id"]):
            of_filter = "" if document["filter"] == "none" else f", {document['filter']}"
            for metric in document["metrics"]:
                if isinstance(document[metric], Real | np.bool_):
                    values.setdefault(f"{task} ({metric}{of_filter})", []).append(float(document[metric]))
    return values
