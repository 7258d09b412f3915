"""`neftune-hf compare`: train with several settings and seeds, and report the differences."""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from ..compare.runs import Run, fingerprint, setting_name
from ..errors import DatasetError, NEFTuneConfigError
from .generate import check_context, complete_tokens, prompts_of, read_records

if TYPE_CHECKING:
    from ..compare.measure import Workload
    from .training import Arguments

_ALPHA = "neftune_noise_alpha"
# A sweep has its own progress bar and evaluation, and keeps measurements instead of models.
_OVERRIDES = {
    "eval_strategy": "no", "eval_on_start": False, "eval_packing": False, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
_REFUSED = ("resume_from_checkpoint", "push_to_hub", "load_best_model_at_end", "streaming", "dataset_streaming")
# What a run's result does not depend on; `seed` is one of `--seeds`.
_WITHOUT_EFFECT = {*_OVERRIDES, *_REFUSED, "output_dir", "logging_dir", "run_name", "hub_token", "report_to"}
_PACKAGES = ("torch", "transformers", "trl", "peft", "neftune_hf")


def run(argv: Sequence[str]) -> None:
    """Train one configuration with several settings and seeds, and report the differences.

    Runs with the same seed are pairs: they have the same batches, dropout and initial adapter. Their losses and greedy
    completions with the noise off are compared record by record, with confidence intervals over records and seeds, in
    report.html, report.md and results.json in `output_dir`. When called again, it takes the finished runs whose
    arguments, data, model and versions are the same. Several processes: `accelerate launch -m neftune_hf compare ...`.
    """
    options, rest = _parser().parse_known_args(argv)
    runs = [Run(setting, seed) for setting in _settings(options, rest) for seed in options.seeds]
    file = Path(options.config or "")
    job = Job(options, tuple(rest), file.read_text(encoding="utf-8") if file.is_file() else None)
    from ..compare.report import write_report
    from ..compare.sweep import Sweep

    if options.ray:
        from ..compare.cluster import call_on_ray, on_ray, ray_tasks

        with ray_tasks(options.cpus_per_run, options.gpus_per_run) as task:
            folder, identities = call_on_ray(task, job.check, runs)
            results = Sweep(folder, runs, identities).run(on_ray(task, job.prepare, identities))
    else:
        from accelerate import PartialState

        from ..compare.measure import train_and_measure

        folder, identities = job.check(runs)
        execute = lambda some: ((i, train_and_measure(job.prepare(run), run)) for i, run in some.items())  # noqa: E731
        results = Sweep(folder, runs, identities).run(execute)
        PartialState().destroy_process_group()
    if results:
        print(write_report(folder, results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neftune-hf compare",
        usage="%(prog)s --config FILE [--alphas A [A ...]] [--seeds N [N ...]] [OPTIONS]",
        description=run.__doc__,
        epilog="All others, such as --output_dir, are the options of `neftune-hf sft`.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file with options of `neftune-hf sft`, or the name of a recipe")
    text = "neftune_noise_alpha; the first is the baseline (default: 0 5)"
    add("--alphas", type=float, nargs="+", default=[], metavar="A", help=text)
    text = "another field to vary; can be repeated"
    add("--vary", action="append", default=[], metavar="FIELD=VALUE,...", help=text)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    text = "measure on N held-out and N training records (default: %(default)s)"
    add("--records", type=int, default=100, metavar="N", help=text)
    text = "maximum length of a completion (default: %(default)s); 0 for no completions"
    add("--max_new_tokens", type=int, default=256, metavar="N", help=text)
    add("--prompts", metavar="DATA", help="more prompts to complete, in any format of `neftune-hf sft`")
    text = "tasks of lm-evaluation-harness, names or YAML files, on which each trained model is evaluated"
    add("--tasks", metavar="TASK,...", help=text)
    add("--limit", type=int, metavar="N", help="evaluate on the first N documents of each task")
    add("--ray", action="store_true", help="train the runs as Ray tasks, here or on the cluster in RAY_ADDRESS")
    add("--cpus_per_run", type=float, default=1, metavar="N", help="CPUs of a Ray task (default: %(default)s)")
    text = "GPU of a Ray task, at most 1; 0.5 trains two runs on one (default: 1 if there is a GPU)"
    add("--gpus_per_run", type=float, metavar="N", help=text)
    return parser


def _settings(options: argparse.Namespace, rest: list[str]) -> list[dict[str, Any]]:
    """All combinations of the given values; the first is the baseline."""
    _check_options(options)
    axes: dict[str, list[Any]] = {}
    for words in options.vary:
        field, _, values = words.partition("=")
        if not values:
            raise NEFTuneConfigError(f"`--vary` is {words!r}; write it like --vary neftune_length=sequence,padded")
        if field in axes or (field == _ALPHA and options.alphas):
            raise NEFTuneConfigError(f"`--vary`: the values of `{field}` are given twice.")
        axes[field] = [yaml.safe_load(value) for value in values.split(",")]
    if "seed" in axes or any(word.partition("=")[0] == "--seed" for word in rest):
        raise NEFTuneConfigError(
            "`seed` belongs to `--seeds`, such as --seeds 0 1 2: runs with the same seed are pairs."
        )
    if options.alphas or not axes:
        axes[_ALPHA] = options.alphas or [0.0, 5.0]
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(settings) < 2:
        name = setting_name(settings[0])
        raise NEFTuneConfigError(f"There is only one setting, {name}. Give at least two values to compare.")
    return settings


def _check_options(options: argparse.Namespace) -> None:
    for name, least in {"records": 2, "max_new_tokens": 0, "limit": 2}.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise NEFTuneConfigError(f"`--{name}` is {value}; it must be at least {least}.")
    if options.cpus_per_run <= 0 or not 0 <= (options.gpus_per_run or 0) <= 1:
        raise NEFTuneConfigError(
            "`--cpus_per_run` must be positive and `--gpus_per_run` from 0 to 1: a run on Ray is one process. For a "
            "model that needs several GPUs, use `accelerate launch -m neftune_hf compare` without `--ray`."
        )
    if options.ray and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise NEFTuneConfigError("`--ray` trains each run in one process. Start it without `accelerate launch`.")
    if wrong := [seed for seed in options.seeds if not 0 <= seed < 2**32]:
        raise NEFTuneConfigError(f"`--seeds` has {wrong[0]}; a seed must be at least 0 and less than 2**32.")


class _Data(NamedTuple):
    """What a run reads, with hashes of the contents."""

    tokenizer: Any
    train: Any
    records: dict[str, Any]
    prompts: dict[str, list[dict[str, Any]]]
    contents: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """Prepares runs from a command line, in any process and on any machine that has its model and data.

    Attributes:
        options: The options of `compare` itself.
        argv: All others.
        text: The contents of the file that `--config` names, which another machine may not have.
        read: The data of runs that differ in noise and seed alone, which their data do not depend on.
    """

    options: argparse.Namespace
    argv: tuple[str, ...]
    text: str | None = None
    read: dict[str, _Data] = dataclasses.field(default_factory=dict)

    def check(self, runs: list[Run]) -> tuple[Path, list[dict[str, Any]]]:
        """Refuse what is bound to fail in any run; returns `output_dir`, and everything that each result depends on."""
        identities = [self._identity(self._parse(run), self._read(run)) for run in runs]
        if len({fingerprint([identity]) for identity in identities}) < len(runs):
            raise NEFTuneConfigError(
                f"Two runs are the same: {'; '.join(run.name for run in runs)}. A setting or a seed is given twice, or "
                "a field that makes no difference to `compare` is varied."
            )
        return Path(self._parse(runs[0]).training.output_dir), identities

    def prepare(self, run: Run) -> "Workload":
        """A run, from its own arguments."""
        from ..compare.measure import Workload
        from .training import make_trainer, mean_snr_db

        arguments, data, options = self._parse(run), self._read(run), self.options
        identity = self._identity(arguments, data)
        for name, value in _OVERRIDES.items():
            setattr(arguments.training, name, value)
        if options.ray:
            arguments.training.output_dir = tempfile.mkdtemp()  # nothing is saved, and the folder may be elsewhere
        logging.getLogger("neftune_hf").setLevel(logging.ERROR)  # the report has what each run would log
        return Workload(
            identity, len(data.train), data.prompts,
            partial(make_trainer, arguments, data.tokenizer, data.train, data.records),
            partial(_complete, data.tokenizer, options.max_new_tokens),
            partial(_evaluate, data.tokenizer, options, arguments.training.per_device_eval_batch_size), mean_snr_db,
        )  # fmt: skip

    def _parse(self, run: Run) -> "Arguments":
        from .training import parse

        values = run.setting | {"seed": run.seed}
        argv = [*self.argv, *itertools.chain(*((f"--{name}", str(value)) for name, value in values.items()))]
        if self.text is None:  # the name of a recipe, or of no file
            return parse([*argv, *(["--config", self.options.config] if self.options.config else [])])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.yaml"
            file.write_text(self.text, encoding="utf-8")
            return parse([*argv, "--config", str(file)])

    def _read(self, run: Run) -> _Data:
        key = str({field: value for field, value in run.setting.items() if not field.startswith("neftune_")})
        if key not in self.read:
            self.read[key] = _read(self._parse(run), self.options)
        return self.read[key]

    def _identity(self, arguments: "Arguments", data: _Data) -> dict[str, Any]:
        """Everything that a run's result depends on, as it is read from a file."""
        from accelerate import PartialState

        values = {
            name: getattr(self.options, name) for name in ("records", "max_new_tokens", "prompts", "tasks", "limit")
        }
        for group in arguments:
            for field in dataclasses.fields(group):
                value = getattr(group, field.name)
                if field.init and field.name not in _WITHOUT_EFFECT and value is not None and value != field.default:
                    values[field.name] = value
        state = PartialState()
        identity = {
            "arguments": values,
            "contents": data.contents,
            "processes": f"{state.num_processes} ({state.distributed_type})",
            "versions": {name: _version(name) for name in _PACKAGES},
        }
        return json.loads(json.dumps(identity, default=str))


def _read(arguments: "Arguments", options: argparse.Namespace) -> _Data:
    """Read a run's tokenizer, records and prompts, and refuse what cannot be compared."""
    import datasets
    import transformers
    from accelerate import PartialState

    from .training import load_records, load_tokenizer

    # TRL's way to turn gradient checkpointing off for generation
    warnings.filterwarnings("ignore", "`gradient_checkpointing_", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for group in arguments:
        for name in _REFUSED:
            if str(getattr(group, name, None)).lower() not in ("none", "false"):
                raise NEFTuneConfigError(
                    f"`{name}` is set, but `compare` trains each run from its start, reads its records more than once "
                    f"and keeps measurements instead of models. Set `{name}: false`, or omit it."
                )
    tokenizer = load_tokenizer(arguments)
    splits = load_records(arguments, tokenizer)
    with PartialState().main_process_first():
        train, records = _measured(splits["train"], splits.get("test"), options.records)
    prompts = _prompts(records, tokenizer, options)
    config = _model_config(arguments)
    if config and prompts:
        both = [row["prompt"] for rows in prompts.values() for row in rows]
        check_context(config, tokenizer, both, options.max_new_tokens)
    contents = {"train": fingerprint(train), **{name: fingerprint(rows) for name, rows in records.items()}}
    contents |= {
        "prompts": fingerprint([prompts]),
        "model": _model_contents(arguments.model.model_name_or_path, config),
    }
    if options.tasks:
        from ..compare import tasks

        contents["tasks"] = tasks.contents(options.tasks)
    return _Data(tokenizer, train, records, prompts, contents)


def _measured(train: Any, held_out: Any, count: int) -> tuple[Any, dict[str, Any]]:
    """The records to train on, and at most `count` held-out and `count` of these to measure on."""
    if held_out is None:
        if len(train) < 2 * count:
            raise DatasetError(
                f"`--records` is {count}, too many to hold out of {len(train)} records. Use a smaller number, or set "
                "`eval_strategy: epoch` to measure on `dataset_test_split`."
            )
        split = train.train_test_split(test_size=count, seed=0)
        train, held_out = split["train"], split["test"]
    measured = {"held_out": held_out, "training": train.shuffle(seed=0)}
    return train, {name: data.select(range(min(count, len(data)))) for name, data in measured.items()}


def _prompts(records: dict[str, Any], tokenizer: Any, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    if not options.max_new_tokens:
        return {}
    prompts = {
        name: [{"prompt": row["prompt"], "reference": row["completion"]} for row in data]
        for name, data in records.items()
        if "prompt" in data.column_names
    }
    if options.prompts:
        more = prompts_of(read_records(options.prompts), tokenizer, options.prompts)
        prompts["prompts"] = [{"prompt": prompt, "reference": None} for prompt in more]
    return prompts


def _complete(tokenizer: Any, limit: int, model: Any, prompts: list[Any]) -> list[dict[str, Any]]:
    rows = complete_tokens(model, tokenizer, prompts, limit)
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in rows]
    return [
        {"text": text, "tokens": len(ids), "ended": len(ids) < limit} for text, ids in zip(texts, rows, strict=True)
    ]


def _evaluate(tokenizer: Any, options: argparse.Namespace, batch_size: int, model: Any) -> dict[str, list[float]]:
    if not options.tasks:
        return {}
    from ..compare import tasks

    return tasks.evaluate(model, options.tasks, options.limit, tokenizer, batch_size)


def _model_config(arguments: "Arguments") -> Any:
    """The model's config; None if it has none of its own, as an adapter."""
    from transformers import AutoConfig

    model = arguments.model
    with contextlib.suppress(OSError, ValueError):
        return AutoConfig.from_pretrained(
            model.model_name_or_path, revision=model.model_revision,
            trust_remote_code=arguments.training.trust_remote_code,
        )  # fmt: skip


def _model_contents(name: str, config: Any) -> str | None:
    """A hash of a local model's files, or the commit of one on the hub."""
    if not Path(name).is_dir():
        return getattr(config, "_commit_hash", None)
    files = sorted(file for file in Path(name).iterdir() if file.is_file())
    return fingerprint([file.name, hashlib.file_digest(file.open("rb"), "sha256").hexdigest()] for file in files)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
