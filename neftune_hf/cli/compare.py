"""`neftune-hf compare`: train with several settings and seeds, and report the differences."""

import argparse
import dataclasses
import itertools
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..compare.runs import Run, setting_name
from ..errors import DatasetError, NEFTuneConfigError
from . import recipes
from .generate import complete_tokens, format_prompt, read_prompts, turns_of
from .training import (
    check_arguments,
    load_splits,
    load_tokenizer,
    make_trainer,
    maybe_launch,
    mean_snr_db,
    parse_arguments,
    quiet_third_party_warnings,
    read_config,
    shut_down_distributed,
)

if TYPE_CHECKING:
    from ..compare.measure import Workload
    from ..compare.sweep import Execute

# A sweep has its own progress bar and evaluation, and saves measurements instead of models.
_OVERRIDES = {
    "eval_strategy": "no", "eval_on_start": "false", "save_strategy": "no", "load_best_model_at_end": "false",
    "push_to_hub": "false", "disable_tqdm": "true", "eval_packing": "false",
}  # fmt: skip
# The options of `compare` that a run's result depends on, and the arguments of `sft` that it does not depend on.
_WITH_EFFECT = ("records", "max_new_tokens", "prompts", "tasks", "limit")
_WITHOUT_EFFECT = ("output_dir", "logging_dir", "run_name", "hub_token", "report_to", "model_init_kwargs")


def run(argv: Sequence[str]) -> None:
    """Train one configuration with several settings and seeds, and report the differences.

    Runs with the same seed are pairs: they have the same batches, dropout and initial adapter. Their losses and greedy
    completions with the noise off are compared record by record, with confidence intervals over records and seeds, in
    report.html, report.md and results.json in `output_dir`. When called again, it resumes after the last finished run.
    """
    options, sft_argv = _parser().parse_known_args(argv)
    runs = [Run(setting, seed) for setting in _settings(options) for seed in options.seeds]
    sft_argv = recipes.with_files(sft_argv)
    # On Ray, whether there is a GPU with bfloat16 is a question to the machines of the runs.
    config = read_config([*sft_argv, "--bf16", "false"] if options.ray else sft_argv)
    quiet_third_party_warnings()
    if "--config" in sft_argv:
        position = sft_argv.index("--config")
        del sft_argv[position : position + 2]
    job = Job(options, sft_argv, config)
    if options.ray:
        from ..compare.cluster import call_on_ray, on_ray, ray_tasks

        with ray_tasks(options.cpus_per_run, options.gpus_per_run) as task:
            _compare(runs, call_on_ray(task, job.check, runs), on_ray(task, job.load))
    else:
        checked = job.check(runs)
        if maybe_launch("compare", job.launch(), argv):
            return
        from ..compare.sweep import one_by_one

        _compare(runs, checked, one_by_one(job.load))
        shut_down_distributed()


def _compare(runs: list[Run], checked: tuple[str, list[dict[str, str]]], execute: "Execute") -> None:
    from ..compare.report import write_report
    from ..compare.sweep import Sweep

    output_dir, arguments = checked
    sweep = Sweep(Path(output_dir), runs, arguments)
    if results := sweep.run(execute):
        print(write_report(sweep.folder, results, sweep.plan()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neftune-hf compare",
        usage="%(prog)s --config FILE [--alphas A [A ...]] [--seeds N [N ...]] [OPTIONS]",
        description=run.__doc__,
        epilog="All others, such as --output_dir and --accelerate_config, are the options of `neftune-hf sft`.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "neftune_noise_alpha; the first is the baseline (default: 0 5)"
    add("--alphas", type=float, nargs="+", metavar="A", help=text)
    text = "another field to vary; can be repeated"
    add("--vary", action="append", default=[], metavar="FIELD=VALUE,...", help=text)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    text = "measure on N held-out and N training records (default: %(default)s)"
    add("--records", type=int, default=100, metavar="N", help=text)
    text = "maximum length of a completion (default: %(default)s); 0 for no completions"
    add("--max_new_tokens", type=int, default=256, metavar="N", help=text)
    text = "more instructions to complete, in the format of `neftune-hf generate`"
    add("--prompts", metavar="FILE", help=text)
    text = "tasks of lm-evaluation-harness, names or YAML files, on which each trained model is evaluated"
    add("--tasks", metavar="TASK,...", help=text)
    add("--limit", type=int, metavar="N", help="evaluate on the first N documents of each task")
    add("--ray", action="store_true", help="train the runs as Ray tasks, here or on the cluster in RAY_ADDRESS")
    add("--cpus_per_run", type=float, default=1, metavar="N", help="CPUs of a Ray task (default: %(default)s)")
    text = "GPU of a Ray task, at most 1; 0.5 trains two runs on one (default: 1 if there is a GPU)"
    add("--gpus_per_run", type=float, metavar="N", help=text)
    return parser


def _settings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All combinations of the given values; the first is the baseline."""
    for name, least in {"records": 2, "max_new_tokens": 0, "limit": 2}.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise NEFTuneConfigError(f"`--{name}` is {value}; it must be at least {least}.")
    if options.cpus_per_run <= 0 or not 0 <= (options.gpus_per_run or 0) <= 1:
        raise NEFTuneConfigError(
            "`--cpus_per_run` must be positive and `--gpus_per_run` from 0 to 1: a run on Ray is one process. For a "
            "model that needs several GPUs, use `--accelerate_config` without `--ray`."
        )
    if wrong := [seed for seed in options.seeds if not 0 <= seed < 2**32]:
        raise NEFTuneConfigError(f"`--seeds` has {wrong[0]}; a seed must be at least 0 and less than 2**32.")
    axes: dict[str, list[Any]] = {}
    for words in options.vary:
        field, _, values = words.partition("=")
        if not values:
            raise NEFTuneConfigError(f"`--vary` is {words!r}; write it like --vary neftune_length=sequence,padded")
        axes[field] = [yaml.safe_load(value) for value in values.split(",")]
    if options.alphas or not axes:
        axes["neftune_noise_alpha"] = options.alphas or [0.0, 5.0]
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    names = list(map(setting_name, settings))
    if len(set(names)) < len(names) or len(set(options.seeds)) < len(options.seeds):
        raise NEFTuneConfigError(f"A setting or a seed is given twice: {'; '.join(names)}; seeds {options.seeds}.")
    if len(names) < 2:
        raise NEFTuneConfigError(f"There is only one setting, {names[0]}. Give at least two values to compare.")
    return settings


@dataclasses.dataclass(frozen=True)
class Job:
    """Prepares runs from a command line, in any process and on any machine that has its model and data.

    Attributes:
        options: The options of `compare` itself.
        sft_argv: All others.
        config: The contents of the file that `--config` names.
    """

    options: argparse.Namespace
    sft_argv: list[str]
    config: dict[str, Any]

    def check(self, runs: list[Run]) -> tuple[str, list[dict[str, str]]]:
        """Refuse what is bound to fail in any run.

        Returns:
            `tuple[str, list[dict[str, str]]]`: `output_dir`, and the arguments that each run's result depends on.
        """
        script_args, training_args, _, mixture = parsed = self.parse()
        check_arguments(*parsed)
        if script_args.dataset_streaming or mixture.streaming:
            raise NEFTuneConfigError("`compare` reads the records more than once, so they cannot be streamed.")
        launch = self.launch()
        if self.options.ray and (launch.accelerate_config or launch.num_processes):
            raise NEFTuneConfigError(
                "`--ray` trains each run in one process. Omit `accelerate_config` and `num_processes`."
            )
        return training_args.output_dir, [self._arguments(run) for run in runs]

    def launch(self) -> argparse.Namespace:
        """How to launch with accelerate."""
        return self._parsed(())[-1]

    def parse(self, run: Run | None = None) -> tuple:
        """The arguments of `neftune-hf sft`, for a run or as they were given."""
        return self._parsed(_argv(run) if run else ())[:-1]

    def _parsed(self, more: Sequence[str]) -> tuple:
        with tempfile.TemporaryDirectory() as folder:  # `--config` may name a file of another machine
            file = Path(folder) / "config.yaml"
            file.write_text(yaml.safe_dump(self.config), encoding="utf-8")
            return tuple(parse_arguments([*self.sft_argv, "--config", str(file), *more], self.config))

    def load(self) -> "Workload":
        """Load the training set, the records to measure on, and the prompts to complete."""
        import datasets
        import transformers
        from accelerate import PartialState

        from ..compare.measure import Workload

        # TRL's way to turn gradient checkpointing off for generation
        warnings.filterwarnings("ignore", "`gradient_checkpointing_", FutureWarning)

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        logger = logging.getLogger("neftune_hf")
        logger.setLevel(logging.INFO if PartialState().is_main_process else logging.ERROR)
        _, training_args, model_args, _ = self.parse()
        tokenizer = load_tokenizer(model_args, training_args)
        with PartialState().main_process_first():
            train, records, text_field = self._records(tokenizer)
        logger.setLevel(logging.ERROR)  # the report has what each run would log

        def trainer_of(run: Run) -> Any:
            _, args, model_args, _ = self.parse(run)
            args.dataset_text_field = text_field
            if self.options.ray:
                args.output_dir = tempfile.mkdtemp()  # nothing is saved there, and this machine may not have the folder
            transformers.set_seed(run.seed)  # for the initial adapter, which TRL seeds itself only from 1.16 on
            return make_trainer(args, model_args, tokenizer, train, records)

        def complete(model: Any, prompts: list[Any]) -> list[dict[str, Any]]:
            limit = self.options.max_new_tokens
            rows = complete_tokens(model, tokenizer, prompts, limit)
            texts = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in rows]
            return [
                {"text": text, "tokens": len(ids), "ended": len(ids) < limit}
                for text, ids in zip(texts, rows, strict=True)
            ]

        evaluate = self._tasks(tokenizer, training_args.per_device_eval_batch_size)
        return Workload(len(train), self._prompts(records, tokenizer), trainer_of, complete, evaluate, mean_snr_db)

    def _records(self, tokenizer: Any) -> tuple[Any, dict[str, Any], str]:
        """The training set, the records to measure on, and the column of plain text."""
        script_args, training_args, _, mixture = self.parse()
        count, splits = self.options.records, [script_args.dataset_train_split]
        if training_args.eval_strategy != "no":
            splits.append(script_args.dataset_test_split)
        train, *tests = load_splits(script_args, training_args, mixture, tokenizer, splits)
        if not tests:
            if len(train) < 2 * count:
                raise DatasetError(
                    f"`--records` is {count}, too many to hold out of {len(train)} records. Use a smaller number, or "
                    "set `eval_strategy: epoch` to measure on `dataset_test_split`."
                )
            split = train.train_test_split(test_size=count, seed=0)
            train, tests = split["train"], [split["test"]]
        measured = {"held_out": tests[0], "training": train.shuffle(seed=0)}
        records = {name: data.select(range(min(count, len(data)))) for name, data in measured.items()}
        return train, records, training_args.dataset_text_field

    def _prompts(self, records: dict[str, Any], tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
        if not self.options.max_new_tokens:
            return {}
        prompts = {
            name: [{"prompt": row["prompt"], "reference": row["completion"]} for row in data]
            for name, data in records.items()
            if "prompt" in data.column_names
        }
        if self.options.prompts:
            firsts = [turns_of(record)[:1] for record in read_prompts(self.options.prompts)]
            prompts["prompts"] = [
                {"prompt": format_prompt(turns, [], tokenizer), "reference": None} for turns in firsts
            ]
        return prompts

    def _tasks(self, tokenizer: Any, batch_size: int) -> Any:
        if not self.options.tasks:
            return lambda model: {}
        from ..compare.tasks import load_tasks

        return load_tasks(self.options.tasks, self.options.limit, tokenizer, batch_size)

    def _arguments(self, run: Run) -> dict[str, str]:
        arguments = {name: str(getattr(self.options, name)) for name in _WITH_EFFECT}
        for group in self.parse(run):
            for field in dataclasses.fields(group):
                value = getattr(group, field.name)
                if field.init and field.name not in _WITHOUT_EFFECT and value is not None and value != field.default:
                    arguments[field.name] = str(value)
        return arguments


def _argv(run: Run) -> list[str]:
    values = _OVERRIDES | {name: str(value) for name, value in run.setting.items()} | {"seed": str(run.seed)}
    return list(itertools.chain(*((f"--{name}", value) for name, value in values.items())))
