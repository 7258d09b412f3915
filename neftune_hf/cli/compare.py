"""`neftune-hf compare`: train with several settings and seeds, and report the differences."""

import argparse
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import DatasetError, NEFTuneConfigError, NEFTuneError
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

_POINTS = 4  # how often a run measures its losses without noise
# The grid has its own progress bar and evaluation, and saves measurements instead of models.
_FIXED = {
    "eval_strategy": "no", "eval_on_start": "false", "save_strategy": "no", "load_best_model_at_end": "false",
    "push_to_hub": "false", "disable_tqdm": "true", "eval_packing": "false",
}  # fmt: skip


def run(argv: Sequence[str]) -> None:
    """Train one configuration with several settings and seeds, and report the differences.

    Runs with the same seed are pairs: they have the same batches, dropout and initial adapter. Their losses and greedy
    completions with the noise off are compared record by record, with confidence intervals over records and seeds, in
    report.html, report.md and results.json in `output_dir`. When called again, it resumes after the last finished run.
    """
    parser = argparse.ArgumentParser(
        prog="neftune-hf compare",
        usage="%(prog)s --config FILE [--alphas A [A ...]] [--seeds N [N ...]] [OPTIONS]",
        description=run.__doc__,
        epilog="All other options, such as --output_dir, are those of `neftune-hf sft`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--alphas",
        type=float,
        nargs="+",
        metavar="A",
        help="neftune_noise_alpha; the first is the baseline (default: 0 5)",
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=VALUE,...",
        help="another field to vary; can be repeated",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument(
        "--records",
        type=int,
        default=100,
        metavar="N",
        help="measure on N held-out and N training records (default: %(default)s)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=256,
        metavar="N",
        help="maximum length of a completion (default: %(default)s); 0 for no completions",
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="more instructions to complete, in the format of `neftune-hf generate`"
    )
    parser.add_argument(
        "--judge", metavar="NAME", help="an alpaca_eval annotator, which calls a paid service with your API key"
    )
    own, rest = parser.parse_known_args(argv)
    for name, least in {"records": 2, "max_new_tokens": 0}.items():
        if (value := getattr(own, name)) < least:
            raise NEFTuneConfigError(f"`--{name}` is {value}; it must be at least {least}.")
    cells = [(setting, seed) for setting in _settings(own) for seed in own.seeds]
    rest = recipes.with_files(rest)
    in_file = read_config(rest)
    quiet_third_party_warnings()
    *given, launch = parse_arguments(rest, in_file)
    # validate all runs before training any
    parsed = [parse_arguments(_words(rest, *cell), in_file)[:-1] for cell in cells]
    if maybe_launch("compare", launch, argv):
        return
    check_arguments(*given)
    script_args, training_args, _, mixture = given
    if script_args.dataset_streaming or mixture.streaming:
        raise NEFTuneConfigError("`compare` reads the records more than once, so they cannot be streamed.")
    _Grid(own, cells, parsed, evaluates=training_args.eval_strategy != "no").run()


def _settings(own: argparse.Namespace) -> list[dict[str, Any]]:
    """All combinations of the given values; the first is the baseline."""
    import yaml

    axes: dict[str, list[Any]] = {}
    for words in own.vary:
        field, _, values = words.partition("=")
        if not values:
            raise NEFTuneConfigError(f"`--vary` is {words!r}; write it like --vary neftune_length=sequence,padded")
        axes[field] = [yaml.safe_load(value) for value in values.split(",")]
    if own.alphas or not axes:
        axes["neftune_noise_alpha"] = own.alphas or [0.0, 5.0]
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    names = list(map(_name, settings))
    if len(set(names)) < len(names) or len(set(own.seeds)) < len(own.seeds):
        raise NEFTuneConfigError(f"A setting or a seed is given twice: {'; '.join(names)}; seeds {own.seeds}.")
    if len(names) < 2:
        raise NEFTuneConfigError(f"There is only one setting, {names[0]}. Give at least two values to compare.")
    return settings


def _name(setting: dict[str, Any]) -> str:
    """A short name, such as `alpha 5` or `length padded, alpha 5`."""
    parts = []
    for field, value in setting.items():
        short = field.removeprefix("neftune_").removeprefix("noise_")
        parts.append(f"{short} {value:g}" if isinstance(value, float) else f"{short} {value}")
    return ", ".join(parts)


def _words(rest: Sequence[str], setting: dict[str, Any], seed: int) -> list[str]:
    words = _FIXED | {name: str(value) for name, value in setting.items()} | {"seed": str(seed)}
    return [*rest, *itertools.chain(*((f"--{name}", value) for name, value in words.items()))]


class _Grid:
    """The runs of a comparison. Each run's measurements are a file in `output_dir`/runs.

    Attributes:
        cells: The setting and seed of each run.
        parsed: The parsed arguments of each run, as in `neftune-hf sft`.
    """

    def __init__(self, own: argparse.Namespace, cells: list[tuple[dict, int]], parsed: list[tuple], evaluates: bool):
        self.own, self.cells, self.parsed, self.evaluates = own, cells, parsed, evaluates
        _, training_args, model_args, _ = parsed[0]
        self.folder = Path(training_args.output_dir)
        self.tokenizer = load_tokenizer(model_args, training_args)

    def run(self) -> None:
        import datasets
        import transformers
        from accelerate import PartialState
        from tqdm import tqdm

        from ..compare.report import write_report

        state = PartialState()
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        logger = logging.getLogger("neftune_hf")
        logger.setLevel(logging.INFO if state.is_main_process else logging.ERROR)
        with state.main_process_first():
            self.load()
        logger.setLevel(logging.ERROR)  # the report has what each run would log
        todo = [number for number in range(len(self.cells)) if not self.is_done(number)]
        shown = "{desc} {percentage:3.0f} % |{bar}| {elapsed}, {remaining} left"
        with tqdm(total=len(todo), smoothing=0, bar_format=shown, disable=not state.is_main_process) as bar:
            for count, number in enumerate(todo, start=1):
                bar.set_description_str(f"{self.name(number)} ({count} of {len(todo)})")
                result = self.train(number, lambda share: bar.update(min(share, len(todo) - bar.n)))
                if state.is_main_process:
                    self.file(number).parent.mkdir(parents=True, exist_ok=True)
                    part = self.file(number).with_suffix(".part")  # an interrupted write leaves no result file
                    part.write_text(json.dumps(result), encoding="utf-8")
                    part.replace(self.file(number))
                state.wait_for_everyone()
        if state.is_main_process:
            runs = [json.loads(self.file(number).read_text(encoding="utf-8")) for number in range(len(self.cells))]
            varied = [field for field in runs[0]["setting"] if len({str(run["setting"][field]) for run in runs}) > 1]
            for run in runs:
                run["name"] = _name({field: run["setting"][field] for field in varied})
            print(write_report(self.folder, runs, self.own.judge))
        shut_down_distributed()

    def load(self) -> None:
        """Load the training set, the records to measure on, and the prompts to complete."""
        script_args, training_args, _, mixture = self.parsed[0]
        wanted = [script_args.dataset_train_split, *([script_args.dataset_test_split] if self.evaluates else [])]
        train, *tests = load_splits(script_args, training_args, mixture, self.tokenizer, wanted)
        for _, args, _, _ in self.parsed:
            args.dataset_text_field = training_args.dataset_text_field
        count = self.own.records
        if not tests:
            if len(train) < 2 * count:
                raise DatasetError(
                    f"`--records` is {count}, too many to hold out of {len(train)} records. Use a smaller number, or "
                    "set `eval_strategy: epoch` to measure on `dataset_test_split`."
                )
            split = train.train_test_split(test_size=count, seed=0)
            train, tests = split["train"], [split["test"]]
        self.train_set = train
        self.measured = {
            name: data.select(range(min(count, len(data))))
            for name, data in {"held_out": tests[0], "training": train.shuffle(seed=0)}.items()
        }
        self.asked: dict[str, list[dict[str, Any]]] = {}
        if not self.own.max_new_tokens:
            return
        for name, data in self.measured.items():
            if "prompt" in data.column_names:
                self.asked[name] = [{"prompt": r["prompt"], "reference": r["completion"]} for r in data]
        if self.own.prompts:
            firsts = [turns_of(record)[:1] for record in read_prompts(self.own.prompts)]
            prompts = [format_prompt(turns, [], self.tokenizer) for turns in firsts]
            self.asked["prompts"] = [{"prompt": prompt, "reference": None} for prompt in prompts]

    def name(self, number: int) -> str:
        setting, seed = self.cells[number]
        return f"{_name(setting)}, seed {seed}"

    def file(self, number: int) -> Path:
        return self.folder / "runs" / f"{self.name(number).replace(', ', '_').replace(' ', '-')}.json"

    def settings(self, number: int) -> dict[str, str]:
        """The settings that a run's result depends on, saved with it to detect results from other settings."""
        found = {name: str(getattr(self.own, name)) for name in ("records", "max_new_tokens", "prompts")}
        for group in self.parsed[number]:
            for field in dataclasses.fields(group):
                if field.init and (value := getattr(group, field.name)) != field.default and value is not None:
                    found[field.name] = str(value)
        for name in ("output_dir", "logging_dir", "run_name", "hub_token", "report_to", "model_init_kwargs"):
            found.pop(name, None)
        return found

    def is_done(self, number: int) -> bool:
        file = self.file(number)
        if not file.exists():
            return False
        then, now = json.loads(file.read_text(encoding="utf-8"))["settings"], self.settings(number)
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                raise NEFTuneConfigError(
                    f"`output_dir` {self.folder} has a run of {self.name(number)} with `{name}` {then.get(name)}, but "
                    f"it is {now.get(name)} now. Use another folder, or remove {file}."
                )
        return True

    def train(self, number: int, progress: Callable[[float], Any]) -> dict[str, Any]:
        """Train one cell and measure it.

        Args:
            progress (`Callable`): Called with the share of the run completed since the last call.
        """
        from transformers import PrinterCallback, TrainerCallback, set_seed

        from ..compare.metrics import record_losses

        setting, seed = self.cells[number]
        _, training_args, model_args, _ = self.parsed[number]
        settings = self.settings(number)  # before the trainer modifies the arguments
        set_seed(seed)  # for the initial adapter, which TRL seeds itself only from 1.16 on
        trainer: Any = make_trainer(training_args, model_args, self.tokenizer, self.train_set, self.measured)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise NEFTuneError(
                "`accelerate_config` shards the model over processes, but `compare` measures losses and completions on "
                "unsharded models. Use `--accelerate_config ddp` or a single process."
            )
        trainer.remove_callback(PrinterCallback)
        collate = dataclasses.replace(trainer.data_collator, padding_free=False)
        batch_size, processes = training_args.per_device_eval_batch_size, trainer.accelerator.num_processes
        # Rough shares of a run's time; the estimate of the time left evens out over whole runs.
        records, prompts = (sum(map(len, group.values())) for group in (self.measured, self.asked))
        per_step, per_loss = 0.5, (0.3 if prompts else 0.5) / _POINTS / records * processes
        per_completion = 0.2 / max(prompts, 1) * processes
        curve: list[dict[str, float]] = []
        losses: dict[str, list[float]] = {}

        def loss_of(rows: list[dict]) -> list[float]:
            return record_losses(trainer.model, rows, collate, batch_size, lambda count: progress(count * per_loss))

        def complete(asked: list[dict]) -> list[dict]:
            return self.complete(trainer, asked, lambda count: progress(count * per_completion))

        class Measure(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                progress(per_step / state.max_steps)
                if state.global_step in {-(-state.max_steps * point // _POINTS) for point in range(1, _POINTS + 1)}:
                    for name, rows in trainer.eval_dataset.items():
                        losses[name] = _over_processes(trainer.accelerator, list(rows), loss_of)
                    means = {name: sum(values) / len(values) for name, values in losses.items()}
                    curve.append({"step": state.global_step} | means)

        trainer.add_callback(Measure)
        trainer.train()
        completions = {
            name: _over_processes(trainer.accelerator, asked, complete) for name, asked in self.asked.items()
        }
        lengths = [len(ids) for ids in trainer.eval_dataset["training"]["input_ids"]]
        result = {
            "name": _name(setting),
            "setting": setting,
            "seed": seed,
            "settings": settings,
            "steps": trainer.state.max_steps,
            "epochs": trainer.state.epoch,
            "train_records": len(self.train_set),
            "mean_length": sum(lengths) / len(lengths),
            "snr_db": mean_snr_db(trainer),
            "curve": curve,
            "losses": losses,
            "asked": self.asked,
            "completions": completions,
        }
        trainer.accelerator.free_memory()
        return result

    def complete(self, trainer: Any, asked: list[dict], progress: Callable[[int], Any]) -> list[dict[str, Any]]:
        """Greedy completions with the authors' repetition penalty."""
        made, size = [], trainer.args.per_device_eval_batch_size
        for start in range(0, len(asked), size):
            prompts = [row["prompt"] for row in asked[start : start + size]]
            for ids in complete_tokens(trainer.model, self.tokenizer, prompts, self.own.max_new_tokens):
                text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
                made.append({"text": text, "tokens": len(ids), "ended": len(ids) < self.own.max_new_tokens})
            progress(len(prompts))
        return made


def _over_processes(accelerator: Any, items: list, measure: Callable[[list], list]) -> list:
    """The results of `measure` for all items, computed in parts by all processes."""
    from accelerate.utils import gather_object

    with accelerator.split_between_processes(items) as own:
        return gather_object(measure(own))
