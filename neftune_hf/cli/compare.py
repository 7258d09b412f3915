"""`neftune-hf compare`: train with several settings and seeds, and report the differences."""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
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
    from .training import Arguments

_ALPHA = "neftune_noise_alpha"
# A sweep has its own progress bar and evaluation, and keeps measurements instead of models.
_OVERRIDES = {
    "eval_strategy": "no", "eval_on_start": False, "eval_packing": False, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
_REFUSED = ("resume_from_checkpoint", "push_to_hub", "load_best_model_at_end", "streaming", "dataset_streaming")
# What a run's result does not depend on.
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
    job = Job(options, rest, file.read_text(encoding="utf-8") if file.is_file() else None)
    from ..compare.report import write_report
    from ..compare.sweep import sweep

    if options.ray:
        from ..compare.cluster import ray_task, result_of, train_on_ray

        task = ray_task(options.cpus_per_run, options.gpus_per_run)
        folder, identities = result_of(task(job.check, runs))
        results = sweep(folder, runs, identities, partial(train_on_ray, task, job.train))
    else:
        folder, identities = job.check(runs)
        results = sweep(folder, runs, identities, lambda todo: ((i, job.train(*run)) for i, run in todo.items()))
    if results:
        print(write_report(folder, results))
    from accelerate import PartialState

    PartialState().destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    usage = "%(prog)s --config FILE [--alphas A [A ...]] [--seeds N [N ...]] [OPTIONS]"
    more = "All others, such as --output_dir, are the options of `neftune-hf sft`."
    parser = argparse.ArgumentParser("neftune-hf compare", usage, run.__doc__, more, allow_abbrev=False)
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
    for name, least in {"records": 2, "max_new_tokens": 0, "limit": 2, "seeds": 0}.items():
        value = min(options.seeds) if name == "seeds" else getattr(options, name)
        if value is not None and value < least:
            raise NEFTuneConfigError(f"`--{name}` is {value}; it must be at least {least}.")
    if options.ray and ((options.gpus_per_run or 0) > 1 or "WORLD_SIZE" in os.environ):
        remedy = "For a model that needs several, use `accelerate launch -m neftune_hf compare ...` without `--ray`."
        raise NEFTuneConfigError(f"`--ray` trains each run in one process, on at most one GPU. {remedy}")
    if any(word.partition("=")[0] in ("--seed", "seed") for word in (*rest, *options.vary)):
        raise NEFTuneConfigError("Runs with the same seed are pairs: give the seeds as `--seeds`, not as `seed`.")
    axes: dict[str, list[Any]] = {}
    for words in options.vary:
        field, _, values = words.partition("=")
        if not values or field in axes or (field == _ALPHA and options.alphas):
            example = "--vary neftune_length=sequence,padded"
            raise NEFTuneConfigError(f"`--vary` is {words!r}; name each field once, with its values, like {example}")
        axes[field] = [yaml.safe_load(value) for value in values.split(",")]
    if options.alphas or not axes:
        axes[_ALPHA] = options.alphas or [0.0, 5.0]
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(settings) < 2:
        name = setting_name(settings[0])
        raise NEFTuneConfigError(f"There is only one setting, {name}. Give at least two values to compare.")
    return settings


class _Data(NamedTuple):
    """What a run reads, and hashes of the contents."""

    tokenizer: Any
    train: Any
    records: dict[str, Any]
    prompts: dict[str, list[dict[str, Any]]]
    contents: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """Prepares and trains runs of a command line, in any process and on any machine that has its model and data.

    Attributes:
        options: The options of `compare` itself.
        argv: All others.
        text: The contents of the file that `--config` names, which another machine may not have.
        read: What was read for runs that differ in noise and seed alone, which data do not depend on.
    """

    options: argparse.Namespace
    argv: list[str]
    text: str | None = None
    read: dict[str, _Data] = dataclasses.field(default_factory=dict)

    def check(self, runs: list[Run]) -> tuple[Path, list[dict[str, Any]]]:
        """Refuse what is bound to fail in any run; returns `output_dir`, and everything that each result depends on."""
        prepared = [self._prepare(run) for run in runs]
        identities = [identity for _, _, identity in prepared]
        if len({fingerprint([identity]) for identity in identities}) < len(runs):
            raise NEFTuneConfigError(
                f"Two runs are the same: {'; '.join(run.name for run in runs)}. A setting or a seed is given twice, or "
                "a field is varied on which no result depends."
            )
        return Path(prepared[0][0].training.output_dir or "."), identities

    def train(self, run: Run, identity: dict[str, Any]) -> dict[str, Any]:
        """Train and measure a run whose result depends on `identity`."""
        from ..compare.measure import train_and_measure
        from .training import make_trainer, mean_snr_db

        arguments, data, found = self._prepare(run)
        if other := [part for part in found if found[part] != identity[part]]:
            raise NEFTuneConfigError(
                f"The {' and '.join(other)} of {run.name} are not those with which the comparison began. "
                "With `--ray`, every machine needs the same data, model and packages."
            )
        for name, value in _OVERRIDES.items():
            setattr(arguments.training, name, value)
        if self.options.ray:
            arguments.training.output_dir = tempfile.mkdtemp()  # nothing is saved, and the folder may be elsewhere
        logging.getLogger("neftune_hf").setLevel(logging.ERROR)  # the report has what each run would log
        trainer = make_trainer(arguments, data.tokenizer, data.train, data.records)
        result = train_and_measure(trainer, run.name, data.prompts, complete_tokens, self.options)
        of_run = {"setting": run.setting, "seed": run.seed, "train_records": len(data.train)}
        return of_run | result | {"snr_db": mean_snr_db(trainer)}

    def _prepare(self, run: Run) -> "tuple[Arguments, _Data, dict[str, Any]]":
        arguments = self._parse(run)
        key = str({field: value for field, value in run.setting.items() if not field.startswith("neftune_")})
        if key not in self.read:
            self.read[key] = _read(arguments, self.options)
        return arguments, self.read[key], _identity(arguments, self.read[key].contents, self.options)

    def _parse(self, run: Run) -> "Arguments":
        from .training import parse

        values = run.setting | {"seed": run.seed}
        argv = [*self.argv, *itertools.chain(*((f"--{name}", str(value)) for name, value in values.items()))]
        with tempfile.TemporaryDirectory() as folder:
            config = self.options.config
            if self.text is not None:
                config = f"{folder}/config.yaml"
                Path(config).write_text(self.text, encoding="utf-8")
            return parse([*argv, *(["--config", config] if config else [])])


def _identity(arguments: "Arguments", contents: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Everything that a run's result depends on, as it is read from a file."""
    from accelerate import PartialState

    values = {name: getattr(options, name) for name in ("records", "max_new_tokens", "prompts", "tasks", "limit")}
    for field, value in (
        (field, getattr(group, field.name)) for group in arguments for field in dataclasses.fields(group)
    ):
        if field.init and field.name not in _WITHOUT_EFFECT and value is not None and value != field.default:
            values[field.name] = value
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name)}
    processes = f"{PartialState().num_processes} ({PartialState().distributed_type})"
    identity = {"arguments": values, "contents": contents, "processes": processes, "versions": versions}
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
    for group, field in itertools.product(arguments, _REFUSED):
        if str(getattr(group, field, None)).lower() not in ("none", "false"):
            raise NEFTuneConfigError(
                f"`{field}` is set, but `compare` trains each run from its start, reads the records more than once and "
                "keeps measurements instead of models. Omit it."
            )
    tokenizer = load_tokenizer(arguments)
    splits = load_records(arguments, tokenizer)
    with PartialState().main_process_first():
        train, records = _measured(splits["train"], splits.get("test"), options.records)
    prompts = _prompts(records, tokenizer, options)
    config, model = _model(arguments)
    if config and prompts:
        texts = [row["prompt"] for rows in prompts.values() for row in rows]
        check_context(config, tokenizer, texts, options.max_new_tokens)
    contents: dict[str, Any] = {name: fingerprint(rows) for name, rows in (records | {"train": train}).items()}
    contents |= {"prompts": fingerprint([prompts]), "model": model}
    if options.tasks:
        from ..compare.tasks import load_tasks

        *_, contents["tasks"] = load_tasks(options.tasks)
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


def _model(arguments: "Arguments") -> tuple[Any, str | None]:
    """The model's config, None if it has none of its own; and a hash of its files, or its commit on the hub."""
    from transformers import AutoConfig

    name, revision, config = arguments.model.model_name_or_path or "", arguments.model.model_revision, None
    with contextlib.suppress(OSError, ValueError):  # an adapter has its base's
        trust = arguments.training.trust_remote_code
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
    if not Path(name).is_dir():
        return config, getattr(config, "_commit_hash", None)
    contents = []
    for path in sorted(path for path in Path(name).iterdir() if path.is_file()):
        with path.open("rb") as file:
            contents.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return config, fingerprint(contents)
