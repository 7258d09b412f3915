"""The report on simulated runs whose true effects are known."""

import json

import numpy as np
import pytest

from neftune_hf.compare.report import summarise, write_report
from neftune_hf.compare.runs import setting_name


def runs(effects, seeds=3, records=60, length=1.0, noise=0.02, ended=lambda n: n % 8 > 0):
    """Simulated runs: per-record losses with an effect of each setting, and completions `length` times as long."""
    rng = np.random.default_rng(0)
    difficulty = rng.lognormal(0.5, 0.3, records)
    made = []
    for number, effect in enumerate(effects):
        for seed in range(seeds):
            losses = (
                difficulty * (1 + effect + 0.002 * rng.standard_normal()) * (1 + noise * rng.standard_normal(records))
            )
            words = [int(n * (length if number else 1)) for n in rng.integers(20, 40, records)]
            prompts = [{"prompt": f"prompt {n} <b>", "reference": "a b c"} for n in range(records)]
            texts = [{"text": " ".join(f"w{i}" for i in range(n)), "tokens": n, "ended": ended(n)} for n in words]
            made.append({
                "setting": {"neftune_noise_alpha": 5.0 * number}, "seed": seed,
                "arguments": {"max_new_tokens": "64"}, "steps": 8, "epochs": 1.0, "train_records": 100,
                "mean_length": 50.0, "snr_db": 20.0 if number else None,
                "curve": [{"step": 4, "held_out": 2.0, "training": 2.0}, {"step": 8, "held_out": 1.9, "training": 1.8}],
                "losses": {"held_out": losses.tolist(), "training": losses.tolist()},
                "prompts": {"held_out": prompts, "training": prompts},
                "completions": {"held_out": texts, "training": texts}, "tasks": {},
            })  # fmt: skip
    return made


def plan_of(made):
    settings = dict.fromkeys(setting_name(run["setting"]) for run in made)
    return {"date": "2026-11-28", "settings": list(settings), "seeds": list(dict.fromkeys(run["seed"] for run in made))}


def summary(made):
    return summarise(made, plan_of(made))


def test_a_planted_difference_is_told_with_its_size():
    results = summary(runs([0, -0.05], length=1.5))
    (verdict,) = results["verdict"]
    held_out = results["metrics"][0]["differences"]["alpha 5"]
    assert held_out.low < -5 < held_out.high < -3
    assert f"held-out loss {held_out.estimate:+.2f} %" in verdict
    assert "completions 1.5" in verdict
    assert "times as long" in verdict


def test_none_is_called_none_where_the_interval_is_narrow():
    (verdict,) = summary(runs([0, 0], noise=0.005))["verdict"]
    assert "no difference in held-out loss beyond 1 %" in verdict
    assert "no difference in completion length found" in verdict


@pytest.mark.parametrize("share", [0.4, 0.6, 1.0])
def test_no_conclusion_on_length_where_the_limit_cut_half_of_the_completions(share, tmp_path):
    made = runs([0, 0], seeds=1, records=100, length=1.5)
    for run in made:
        for n, completion in enumerate(run["completions"]["held_out"]):
            completion["ended"] = n >= 100 * share
    results = summary(made)
    said = write_report(tmp_path, made, plan_of(made))
    assert ("times as long" in said) == (share < 0.5)
    assert (f"no verdict on completion length ({100 * share:.0f} % met the limit of 64 tokens)" in said) == (
        share > 0.5
    )
    page = (tmp_path / "report.html").read_text()
    assert ("Lengths of the completions" in page) == (share < 0.5)
    assert "intervals over records and seeds" not in page  # there is one seed
    assert results["limit_met"] == pytest.approx(share)


def test_the_noise_and_a_change_of_the_training_loss_are_told():
    results = summary(runs([0, -0.05]))
    training = next(metric for metric in results["metrics"] if metric["key"] == "training")["differences"]["alpha 5"]
    assert training.high < 0
    assert f"; training loss {training.estimate:+.2f} % [" in results["verdict"][0]
    assert "training loss" not in summary(runs([0, 0]))["verdict"][0]
    assert results["noise"] == ["alpha 5: noise of 0.1 times the embeddings' RMS, 20.0 dB below it."]


def test_too_little_to_conclude_says_how_precise_it_is():
    results = summary(runs([0, 0.02], records=8, noise=0.3))
    (verdict,) = results["verdict"]
    held_out = results["metrics"][0]["differences"]["alpha 5"]
    assert "cannot tell whether held-out loss differs" in verdict
    assert f"half-width {(held_out.high - held_out.low) / 2:.2f} %" in verdict


def test_each_metric_has_its_value_by_hand():
    made = runs([0, 0.01], records=12)
    metrics = {metric["key"]: metric for metric in summary(made)["metrics"]}
    own = [run for run in made if run["setting"]["neftune_noise_alpha"] == 5]
    assert metrics["held_out"]["values"]["alpha 5"].estimate == pytest.approx(
        np.mean([r["losses"]["held_out"] for r in own])
    )
    tokens = [c["tokens"] for run in own for c in run["completions"]["held_out"]]
    assert metrics["tokens"]["values"]["alpha 5"].estimate == pytest.approx(np.mean(tokens))
    assert metrics["distinct_2"]["values"]["alpha 5"].estimate == 1
    assert metrics["rouge_l training"]["records"] == 12


def test_one_seed_is_reported_and_said_to_be_one(tmp_path):
    made = runs([0, 0.1, -0.1], seeds=1)
    said = write_report(tmp_path, made, plan_of(made))
    page = (tmp_path / "report.html").read_text()
    assert "with one seed they say nothing about another run" in page
    assert said.count("\n") == 4
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["verdict"][0] in page
    assert "prompt 0 &lt;b&gt;" in page  # text from a model or file is escaped
    assert "prompt 0 <b>" not in page
    assert "prompt 0" not in json.dumps(results)


def test_the_page_and_the_markdown_have_the_same_numbers(tmp_path):
    made = runs([0, 0.1], records=12)
    write_report(tmp_path, made, plan_of(made))
    page, markdown = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    rows = [line[2:-2].split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:3]] == ["signal-to-noise ratio, dB", "held-out loss (12 records)"]
    assert all(len(row) == 4 for row in rows)
    assert all(cell in page for row in rows[1:] for cell in row)


def test_completions_are_written_as_alpaca_eval_reads_them(tmp_path):
    made = runs([0, 0.1], seeds=2, records=4)
    write_report(tmp_path, made, plan_of(made))
    files = sorted(file.name for file in (tmp_path / "completions").iterdir())
    assert files == ["alpha-0_seed-0.json", "alpha-0_seed-1.json", "alpha-5_seed-0.json", "alpha-5_seed-1.json"]
    outputs = json.loads((tmp_path / "completions" / files[3]).read_text())
    assert [row["output"] for row in outputs] == [c["text"] for c in made[3]["completions"]["held_out"]]
    assert outputs[1]["instruction"] == "prompt 1 <b>"
    assert {row["generator"] for row in outputs} == {"alpha 5"}


def test_what_was_not_planned_is_told(tmp_path):
    made = runs([0, 0.1], seeds=3, records=4)
    assert summary(made)["plan"]["changes"] == []
    plan = plan_of(made) | {"settings": ["alpha 0", "alpha 15"], "seeds": [0, 1]}
    assert summarise(made, plan)["plan"]["changes"] == [
        "settings added later: alpha 5",
        "settings planned, but not in this report: alpha 15",
        "seeds added later: 2",
    ]
    write_report(tmp_path, made, plan)
    for name in ("report.html", "report.md"):
        page = (tmp_path / name).read_text()
        assert "Settings added later: alpha 5; settings planned, but not in this report: alpha 15; seeds" in page
        assert "not corrected for the number of comparisons" in page


def test_several_settings_are_corrected_for_their_number():
    results = summary(runs([0, 0, 0, 0.5], records=12))
    line, *_ = results["corrected"]
    assert line.startswith("held-out loss: alpha 5 no difference found (p ")
    assert "alpha 15 differs (p " in line
    metric = results["metrics"][0]
    smallest, middle, largest = sorted(interval.p_value for interval in metric["differences"].values())
    corrected = [3 * smallest, min(2 * middle, 1), min(max(2 * middle, largest), 1)]
    assert sorted(metric["holm"].values()) == pytest.approx(corrected)
    assert summary(runs([0, 0.1], records=4))["corrected"] == []


def test_a_task_is_compared_in_points_or_in_its_own_unit(tmp_path):
    made = runs([0, 0.1], records=4)
    for run in made:
        is_noised = run["setting"]["neftune_noise_alpha"] > 0
        run["tasks"] = {
            "maths (exact_match)": [1.0, 0.0, float(is_noised), 1.0],
            "text (chrf)": [20.0, 30.0 + is_noised],
        }
    results = summary(made)
    assert "maths (exact_match) +25.0 points [" in results["verdict"][0]
    assert "text (chrf) +0.5 [" in results["verdict"][0]
    metrics = {metric["key"]: metric for metric in results["metrics"]}
    assert metrics["maths (exact_match)"]["values"]["alpha 0"].estimate == 0.5
    assert metrics["text (chrf)"]["records"] == 2
