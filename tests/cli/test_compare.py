"""`neftune-hf compare` on a tiny model: runs are pairs, are known by what they depend on, and are always reported."""

import json
import re
import shutil

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from neftune_hf import NEFTuneSFTTrainer
from neftune_hf.cli import compare as command
from neftune_hf.cli import main

from ..conftest import byte_tokenizer, tiny_llama
from ..helpers import accelerate_launch
from ..records import records, write

SETTINGS = """
dataset_name: {data}
dataset_test_split: train
model_name_or_path: {model}
output_dir: {output}
max_steps: {steps}
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
    file, output = folder / "config.yaml", folder / "out"
    file.write_text(SETTINGS.format(data=data, model=model_folder, output=output, evaluation="epoch", steps=6))
    return file, output


def compare(config, *words):
    return main(["compare", "--config", str(config[0]), "--records", "4", "--max_new_tokens", "4", *words])


def quickly(config, folder, *words):
    """Two runs of one step."""
    short = ["--seeds", "0", "--max_steps", "1", "--records", "2", "--max_new_tokens", "0"]
    return compare(config, *short, "--output_dir", str(folder), *words)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def runs_of(folder):
    """The measurements by alpha and seed, with the file of each."""
    runs = {file: json.loads(file.read_text()) for file in (folder / "runs").glob("*.json")}
    return {(run["setting"]["neftune_noise_alpha"], run["seed"]): run | {"file": file} for file, run in runs.items()}


@pytest.fixture(scope="module")
def compared(config):
    config[1].mkdir()
    (config[1] / "model.safetensors").touch()  # of another run, which is no reason to refuse: no model is written
    assert compare(config, "--alphas", "0", "5", "500", "--seeds", "0", "1") == 0
    return config


def test_a_large_alpha_is_seen_and_told(compared):
    results = results_of(compared[1])
    assert [setting["name"] for setting in results["settings"]] == ["alpha 0", "alpha 5", "alpha 500"]
    held_out = next(metric for metric in results["metrics"] if metric["key"] == "held_out")
    assert held_out["differences"]["alpha 500"][0] > 1  # %
    assert re.search("difference|cannot tell", results["verdict"][0])
    db = [setting["snr_db"] for setting in results["settings"]]
    assert db[0] is None
    assert db[1] - db[2] == pytest.approx(40, abs=0.5)  # 100 times the alpha
    assert results["plan"]["changes"] == []


def test_the_page_stands_alone_and_has_all_of_it(compared):
    page = (compared[1] / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!#)[^\"]+\"", page)
    assert "@import" not in page
    assert page.count("<svg") == 5  # panels; without the lengths of completions, which all have 4 tokens
    assert "no verdict on completion length (100 % met the limit of 4 tokens)" in page
    for line in results_of(compared[1])["verdict"]:
        assert line in page
        assert line in (compared[1] / "report.md").read_text()
    assert re.search(r"Say \w+", page.split("Side by side")[1])


def test_runs_are_pairs(compared, tmp_path):
    """Alpha 0 as the second run of another grid gives identical results; another seed does not."""
    runs = runs_of(compared[1])
    assert compare(compared, "--vary", "neftune_noise_alpha=1,0", "--seeds", "0", "--output_dir", str(tmp_path)) == 0
    again = runs_of(tmp_path)
    assert again[0, 0]["losses"] == runs[0, 0]["losses"]
    assert again[0, 0]["completions"] == runs[0, 0]["completions"]
    assert runs[0, 1]["losses"] != runs[0, 0]["losses"]
    assert again[1, 0]["losses"] != again[0, 0]["losses"]


@pytest.mark.slow
def test_a_run_is_taken_only_if_all_that_it_depends_on_is_equal(config, model_folder, tmp_path, caplog):
    rows, model = records("tatsu-lab/alpaca", 8), shutil.copytree(model_folder, tmp_path / "model")
    words = ["--alphas", "5", "--vary", "neftune_length=sequence,padded", "--model_name_or_path", str(model)]

    def trained(*more):
        """How many runs a call trains, with the data as they are."""
        words.extend(("--dataset_name", write(tmp_path / "train.json", rows), *more))
        before = set((tmp_path / "runs").glob("*"))
        assert quickly(config, tmp_path, *words) == 0
        return len(set((tmp_path / "runs").glob("*")) - before)

    assert trained() == 2
    damaged = next((tmp_path / "runs").iterdir())
    result = json.loads(damaged.read_text())
    damaged.write_text('{"setting": {"neftune')
    assert trained() == 0
    assert json.loads(damaged.read_text())["losses"] == result["losses"]
    assert trained("--learning_rate", "0.02") == 2
    assert "2 other finished runs in" in caplog.text
    assert trained("--model_init_kwargs", '{"attention_dropout": 0.5}') == 2
    rows[0]["output"] = "eight!"
    assert trained() == 2
    tiny_llama(seed=1).save_pretrained(model)
    assert trained() == 2
    assert "8 other finished runs in" in caplog.text


def test_a_varied_data_set_is_the_runs_own(config, tmp_path):
    names = ["a b$x$.json", "a-b$x$.json"]  # with what a file's name or mathtext would not take
    rows = records("tatsu-lab/alpaca", 20)
    short, long = (write(tmp_path / name, part) for name, part in zip(names, (rows[:8], rows[8:]), strict=True))
    words = ["--vary", f"dataset_name={short},{long}", "--alphas", "5", "--eval_strategy", "no"]
    assert quickly(config, tmp_path / "out", *words) == 0
    runs = [json.loads(file.read_text()) for file in (tmp_path / "out" / "runs").iterdir()]
    assert {run["train_records"] for run in runs} == {6, 10}
    assert len({tuple(run["losses"]["training"]) for run in runs}) == 2
    assert "measured on different records, so not in pairs" in results_of(tmp_path / "out")["verdict"][0]


def test_a_varied_model_has_its_own_tokenizer(config, model_folder, tmp_path):
    plain = tmp_path / "plain"
    tiny_llama().save_pretrained(plain)
    byte_tokenizer(chat=False).save_pretrained(plain)
    words = ["--vary", f"model_name_or_path={model_folder},{plain}", "--max_new_tokens", "2"]
    assert quickly(config, tmp_path / "out", *words) == 0
    runs = [json.loads(file.read_text()) for file in (tmp_path / "out" / "runs").iterdir()]
    prompts = {run["setting"]["model_name_or_path"]: run["prompts"]["held_out"][0]["prompt"] for run in runs}
    assert "### Instruction" in prompts[str(plain)]
    assert prompts[model_folder][0]["role"] == "user"


def test_a_diverged_setting_is_reported_and_the_others_are_compared(config, tmp_path, capsys):
    words = ["--vary", "learning_rate=0.01,0.02,1e38", "--optim", "sgd", "--max_steps", "3", "--max_new_tokens", "2"]
    for _ in range(2):  # and by a later call
        assert quickly(config, tmp_path, *words) == 0
        said = capsys.readouterr().out
        assert "learning_rate 1e38: diverged with seed 0" in said
        assert "learning_rate 1e38 against learning_rate 0.01: cannot tell" in said
        assert re.search(r"learning_rate 0.02 against learning_rate 0.01: .*held-out loss", said)
    assert "learning_rate 1e38: diverged" in (tmp_path / "report.html").read_text()


def test_completions_that_failed_are_missing_and_empty_ones_are_named(config, tmp_path, monkeypatch, capsys):
    def complete(model, tokenizer, prompts, limit):
        if any("four" in message["content"] for prompt in prompts for message in prompt):
            raise IndexError("index out of range")
        return [[tokenizer.eos_token_id]] * len(prompts)

    monkeypatch.setattr(command, "complete_tokens", complete)
    words = ["--records", "8", "--max_new_tokens", "2", "--per_device_eval_batch_size", "1"]
    assert quickly(config, tmp_path, *words) == 0
    assert re.search(r"alpha 5: completions missing, because they failed: \d+ .index", capsys.readouterr().out)
    page = (tmp_path / "report.html").read_text()
    assert "(missing: index out of range)" in page
    assert "(empty)" in page


def test_a_model_without_positions_for_the_completions_is_refused_before_the_first_run(config, tmp_path, capsys):
    model = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    words = ["--model_name_or_path", str(model), "--use_peft", "false", "--max_length", "64", "--packing", "false"]
    assert quickly(config, tmp_path / "out", *words, "--max_new_tokens", "60") == 2
    error = capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    advice = re.search(r"Set it to (\d+) or less", error)[1]
    assert quickly(config, tmp_path / "out", *words, "--max_new_tokens", advice) == 0


def test_ctrl_c_keeps_the_finished_runs(config, tmp_path, capsys, monkeypatch):
    train = NEFTuneSFTTrainer.train

    def interrupted(trainer, *args, **kwargs):
        if trainer.args.neftune_noise_alpha:
            raise KeyboardInterrupt
        return train(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(NEFTuneSFTTrainer, "train", interrupted)
        assert quickly(config, tmp_path) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"neftune-hf: interrupted. 1 of 2 runs are kept in {tmp_path}/runs; the same command trains")
    (kept,) = runs_of(tmp_path).values()
    time = kept["file"].stat().st_mtime_ns
    assert quickly(config, tmp_path) == 0
    assert kept["file"].stat().st_mtime_ns == time


def test_records_are_held_out_where_there_is_no_test_split(config, tmp_path, capsys):
    words = ["--eval_strategy", "no", "--vary", "neftune_length=sequence,padded", "--alphas", "5"]
    assert quickly(config, tmp_path, *words) == 0
    results = results_of(tmp_path)
    assert results["train_records"] == 22
    assert [setting["name"] for setting in results["settings"]] == ["length sequence", "length padded"]
    assert results["settings"][1]["snr_db"] > results["settings"][0]["snr_db"]  # packed rows
    assert quickly(config, tmp_path, *words, "--records", "13") == 2
    assert "`--records` is 13, too many to hold out of 24 records" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alphas", "5"], "one setting, alpha 5"),
        (["--alphas", "5", "5"], "given twice"),
        (["--seeds", "1", "1"], "given twice"),
        (["--vary", "neftune_noise_alpha=0,5", "--alphas", "0", "5"], "name each field once"),
        (["--vary", "run_name=a,b"], "on which no result depends"),
        (["--vary", "seed=1,2"], "give the seeds as `--seeds`"),
        (["--seed", "1"], "give the seeds as `--seeds`"),
        (["--alphas", "0", "-1"], "`neftune_noise_alpha` must be a finite number"),
        (["--vary", "neftune_lenght=tokens,width"], "neftune_lenght"),
        (["--vary", "neftune_length"], "--vary neftune_length=sequence,padded"),
        (["--records", "1"], "`--records` is 1"),
        (["--seeds", "-1"], "`--seeds` is -1"),
        (["--ray", "--gpus_per_run", "2"], "on at most one GPU"),
        (["--dataset_streaming", "true"], "`dataset_streaming` is set"),
        (["--resume_from_checkpoint", "true"], "`resume_from_checkpoint` is set"),
        (["--push_to_hub", "true"], "`push_to_hub` is set"),
    ],
)
def test_bad_input_is_refused_before_any_training(config, tmp_path, capsys, words, message):
    assert compare(config, "--output_dir", str(tmp_path / "new"), *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(config, tmp_path):
    """Half the batch on each process: the same up to the order in which gradients are summed, and not taken for it."""
    model = tmp_path / "without_dropout"  # which is drawn by each process for its rows
    tiny_llama(attention_dropout=0.0).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    words = ["compare", "--config", str(config[0]), "--records", "4", "--max_new_tokens", "4"]
    words += ["--model_name_or_path", str(model), "--lora_dropout", "0", "--packing", "false"]
    words += ["--alphas", "0", "500", "--seeds", "0", "--output_dir", str(tmp_path / "out")]
    printed = accelerate_launch("-m", "neftune_hf", *words, "--per_device_train_batch_size", "1")
    assert printed.count("Report: ") == 1
    both = runs_of(tmp_path / "out")
    assert main(words) == 0
    for file in (run["file"] for run in both.values()):
        file.unlink()
    alone = runs_of(tmp_path / "out")
    assert alone.keys() == both.keys()
    for key, run in both.items():
        for name, losses in run["losses"].items():
            assert losses == pytest.approx(alone[key]["losses"][name], rel=1e-3)
        assert len(run["completions"]["held_out"]) == 4
