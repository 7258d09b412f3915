"""`neftune-hf compare` on a tiny model: runs are pairs, are not repeated, and are reported correctly."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from neftune_hf import NEFTuneSFTTrainer
from neftune_hf.cli import main

from ..conftest import ROOT, byte_tokenizer, tiny_llama
from ..helpers import cpu_environment as environment
from ..records import records, write

SETTINGS = """
dataset_name: {data}
dataset_test_split: train
model_name_or_path: {model}
output_dir: {output}
max_steps: 6
learning_rate: 0.01
use_peft: true
lora_target_modules: all-linear
packing: true
max_length: 256
per_device_train_batch_size: 2
eval_strategy: {evaluation}
bf16: false
use_cpu: true
report_to: none
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("compare")
    data = write(folder / "train.json", records("tatsu-lab/alpaca", 24))
    file = folder / "config.yaml"
    output = folder / "out"
    file.write_text(SETTINGS.format(data=data, model=model_folder, output=output, evaluation="epoch"))
    return file, output


def compare(config, *words):
    file, _ = config
    return main(["compare", "--config", str(file), "--records", "4", "--max_new_tokens", "4", *words])


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def compared(config):
    assert compare(config, "--alphas", "0", "5", "500", "--seeds", "0", "1") == 0
    return config


def test_a_large_alpha_is_seen_and_told(compared):
    results = results_of(compared[1])
    assert [setting["name"] for setting in results["settings"]] == ["alpha 0", "alpha 5", "alpha 500"]
    held_out = next(metric for metric in results["metrics"] if metric["key"] == "held_out")
    assert held_out["differences"]["alpha 500"][0] > 1  # %
    assert len(results["verdict"]) == 2
    assert results["settings"][0]["snr_db"] is None
    db = [setting["snr_db"] for setting in results["settings"][1:]]
    assert db[0] - db[1] == pytest.approx(40, abs=0.5)  # 100 times the alpha


def test_runs_are_pairs(compared, tmp_path):
    """Alpha 0 as the second run of another grid gives identical results; another seed does not."""
    run = {n: json.loads((compared[1] / "runs" / f"alpha-0_seed-{n}.json").read_text()) for n in (0, 1)}
    assert compare(compared, "--vary", "neftune_noise_alpha=1,0", "--seeds", "0", "--output_dir", str(tmp_path)) == 0
    again = json.loads((tmp_path / "runs" / "alpha-0_seed-0.json").read_text())
    assert again["losses"] == run[0]["losses"]
    assert again["completions"] == run[0]["completions"]
    assert run[1]["losses"] != run[0]["losses"]
    small = json.loads((tmp_path / "runs" / "alpha-1_seed-0.json").read_text())
    assert small["losses"] != again["losses"]


def test_finished_runs_are_kept_and_others_are_trained(compared, capsys):
    runs = compared[1] / "runs"
    kept, lost = runs / "alpha-0_seed-0.json", runs / "alpha-5_seed-1.json"
    before, result = kept.stat().st_mtime_ns, json.loads(lost.read_text())
    lost.unlink()
    assert compare(compared, "--alphas", "0", "5", "500", "--seeds", "0", "1") == 0
    assert kept.stat().st_mtime_ns == before
    assert json.loads(lost.read_text())["losses"] == result["losses"]
    assert "5 of 6 done, now alpha 5, seed 1" in capsys.readouterr().err


def test_ctrl_c_keeps_the_finished_runs(config, tmp_path, capsys, monkeypatch):
    asked = ["--alphas", "0", "5", "--seeds", "0", "--output_dir", str(tmp_path)]
    train = NEFTuneSFTTrainer.train

    def interrupted(trainer, *args, **kwargs):
        if trainer.args.neftune_noise_alpha:
            raise KeyboardInterrupt
        return train(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(NEFTuneSFTTrainer, "train", interrupted)
        assert compare(config, *asked) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"neftune-hf: interrupted. 1 of 2 runs are kept in {tmp_path}; the same command trains")
    assert compare(config, *asked) == 0
    assert "1 of 2 done, now alpha 5, seed 0" in capsys.readouterr().err


def test_runs_of_other_settings_are_not_taken_for_these(compared, capsys):
    assert compare(compared, "--learning_rate", "0.02", "--seeds", "0") == 2
    error = capsys.readouterr().err
    assert re.search(r"has 2 of the 2 runs with other arguments: .*`learning_rate` 0\.01 instead of 0\.02", error)


def test_runs_that_were_not_planned_are_told(compared, tmp_path):
    folder = tmp_path / "extended"
    shutil.copytree(compared[1], folder)
    assert results_of(folder)["plan"]["changes"] == []
    assert compare(compared, "--alphas", "0", "5", "--seeds", "0", "1", "--output_dir", str(folder)) == 0
    assert results_of(folder)["plan"]["changes"] == ["settings planned, but not in this report: alpha 500"]


def test_the_page_stands_alone_and_has_all_of_it(compared):
    page = (compared[1] / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!#)[^\"]+\"", page)
    assert "@import" not in page
    assert page.count("<svg") == 3  # without the lengths of completions, which all have 4 tokens
    assert "no verdict on completion length (100 % met the limit of 4 tokens)" in page
    for line in results_of(compared[1])["verdict"]:
        assert line in page
        assert line in (compared[1] / "report.md").read_text()
    assert re.search(r"Say \w+", page.split("Side by side")[1])


def test_records_are_held_out_where_there_is_no_test_split(config, tmp_path, capsys):
    arguments = ["--eval_strategy", "no", "--output_dir", str(tmp_path), "--seeds", "0", "--max_new_tokens", "0"]
    assert compare(config, *arguments, "--vary", "neftune_length=sequence,padded", "--alphas", "5") == 0
    results = results_of(tmp_path)
    assert results["train_records"] == 20
    assert [setting["name"] for setting in results["settings"]] == ["length sequence", "length padded"]
    assert results["settings"][1]["snr_db"] > results["settings"][0]["snr_db"]  # packed rows
    assert compare(config, *arguments, "--records", "13") == 2
    assert "`--records` is 13, too many to hold out of 24 records" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"setting": {"neftune', "[1]", '{"losses": {}}', "null"])
def test_a_damaged_file_of_a_run_is_named(compared, tmp_path, capsys, content):
    folder = tmp_path / "damaged"
    shutil.copytree(compared[1], folder)
    file = folder / "runs" / "alpha-5_seed-0.json"
    file.write_text(content)
    arguments = ["--alphas", "0", "5", "500", "--seeds", "0", "1", "--output_dir", str(folder)]
    assert compare(compared, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith(f"{file} is damaged, or of another version. Remove it, and it is made again.")


@pytest.mark.parametrize("below", [(), ("folder",)])
def test_an_output_folder_that_is_a_file(config, tmp_path, capsys, below):
    file = tmp_path / "file"
    file.touch()
    assert compare(config, "--output_dir", str(file.joinpath(*below))) == 2
    assert re.search(r"`output_dir` is \S+, but \S+ is a file", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alphas", "5"], "one setting, alpha 5"),
        (["--alphas", "5", "5"], "given twice"),
        (["--seeds", "1", "1"], "given twice"),
        (["--alphas", "0", "-1"], "`neftune_noise_alpha` must be a finite number"),
        (["--vary", "neftune_lenght=tokens,width"], "Did you mean `neftune_length`"),
        (["--vary", "neftune_length"], "--vary neftune_length=sequence,padded"),
        (["--records", "1"], "`--records` is 1"),
        (["--seeds", "-1"], "`--seeds` has -1"),
        (["--limit", "1"], "`--limit` is 1"),
        (["--ray", "--gpus_per_run", "2"], "`--gpus_per_run` from 0 to 1"),
        (["--ray", "--cpus_per_run", "0"], "`--cpus_per_run` must be positive"),
        (["--seeds", "0", str(2**64)], f"`--seeds` has {2**64}"),
        (["--dataset_streaming", "true"], "cannot be streamed"),
    ],
)
def test_bad_input_is_refused_before_any_training(config, tmp_path, capsys, words, message):
    assert compare(config, "--output_dir", str(tmp_path / "new"), *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(compared, tmp_path):
    """Half the batch on each process: the same runs, up to the order in which gradients are summed."""
    file, _ = compared
    words = ["--config", str(file), "--records", "4", "--max_new_tokens", "4", "--output_dir", str(tmp_path)]
    model = tmp_path / "without_dropout"  # which is drawn by each process for its rows
    tiny_llama(attention_dropout=0.0).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    words += ["--model_name_or_path", str(model), "--lora_dropout", "0", "--packing", "false"]
    words += ["--alphas", "0", "500", "--seeds", "0"]
    launched = ["--accelerate_config", "configs/accelerate/ddp.yaml", "--num_processes", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "neftune_hf", "compare", *words, *launched, "--per_device_train_batch_size", "1"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Report: ") == 1
    alone = tmp_path / "alone"
    assert main(["compare", *words, "--output_dir", str(alone)]) == 0
    for name in ("alpha-0_seed-0", "alpha-500_seed-0"):
        both = [json.loads((folder / "runs" / f"{name}.json").read_text()) for folder in (tmp_path, alone)]
        for key in ("held_out", "training"):
            assert both[0]["losses"][key] == pytest.approx(both[1]["losses"][key], rel=1e-3)
        assert [len(run["completions"]["held_out"]) for run in both] == [4, 4]
