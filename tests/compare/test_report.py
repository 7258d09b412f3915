"""The report on simulated runs whose true effects are known."""

import json
import re

import numpy as np
import pytest

from neftune_hf.compare.report import write_report
from neftune_hf.compare.summary import summarise


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
                "identity": {"arguments": {"max_new_tokens": 64}}, "steps": 8, "epochs": 1.0, "train_records": 100,
                "mean_length": 50.0, "snr_db": 20.0 if number else None,
                "curve": [{"step": 4, "held_out": 2.0, "training": 2.0}, {"step": 8, "held_out": 1.9, "training": 1.8}],
                "losses": {"held_out": losses.tolist(), "training": losses.tolist()},
                "prompts": {"held_out": prompts, "training": prompts},
                "records": {"held_out": "a", "training": "b"},
                "completions": {"held_out": texts, "training": texts}, "tasks": {},
            })  # fmt: skip
    settings, plan = [f"alpha {5 * number}" for number in range(len(effects))], {"seeds": list(range(seeds))}
    return [run | {"plan": plan | {"date": "2026-11-28T12:00:00", "settings": settings}} for run in made]


def reported(made, folder):
    """What is printed, and the differences of the loss."""
    return write_report(folder, made), summarise(made)["metrics"][0]["differences"]


def test_a_planted_difference_is_told_with_its_size(tmp_path):
    said, differences = reported(runs([0, -0.05], length=1.5), tmp_path)
    held_out = differences["alpha 5"]
    assert held_out.low < -5 < held_out.high < -3
    assert said.startswith("alpha 5: signal-to-noise ratio (SNR) 20.0 dB.\n")
    last = said.splitlines()[-1]
    assert f"alpha 5 against alpha 0: a difference in held-out loss, {held_out.estimate:+.2f} %" in last
    assert re.search(r"; training loss -\d\.\d\d % \[.*completions 1\.5\d times as long", last)


def test_none_is_called_none_where_the_interval_is_narrow(tmp_path):
    said, _ = reported([run | {"snr_db": run["snr_db"] and -5.0} for run in runs([0, 0], noise=0.005)], tmp_path)
    assert said.startswith("alpha 5: SNR -5.0 dB: the noise exceeds the embeddings; try a lower alpha.")
    assert "no difference in held-out loss beyond 1 %" in said
    assert "no difference in completion length found" in said
    assert "training loss" not in said


def test_too_little_to_conclude_says_how_precise_it_is(tmp_path):
    said, differences = reported(runs([0, 0.02], records=8, noise=0.3), tmp_path)
    assert "cannot tell whether held-out loss differs" in said
    assert f"half-width {differences['alpha 5'].half_width:.2f} %" in said


@pytest.mark.parametrize("share", [0.4, 0.6, 1.0])
def test_no_conclusion_on_length_where_the_limit_cut_half_of_the_completions(share, tmp_path):
    made = runs([0, 0], seeds=1, records=100, length=1.5)
    for run in made:
        for n, completion in enumerate(run["completions"]["held_out"]):
            completion["ended"] = n >= 100 * share
    said, _ = reported(made, tmp_path)
    assert ("times as long" in said) == (share < 0.5)
    assert (f"no verdict on completion length ({100 * share:.0f} % met the limit of 64 tokens)" in said) == (
        share > 0.5
    )
    page = (tmp_path / "report.html").read_text()
    assert ("Lengths of the completions" in page) == (share < 0.5)
    assert "with one seed they say nothing about another run" in page


def test_each_metric_has_its_value_by_hand():
    made = runs([0, 0.01], records=12)
    metrics = {metric["key"]: metric for metric in summarise(made)["metrics"]}
    own = [run for run in made if run["setting"]["neftune_noise_alpha"] == 5]
    losses = np.mean([run["losses"]["held_out"] for run in own])
    assert metrics["held_out"]["values"]["alpha 5"].estimate == pytest.approx(losses)
    tokens = [c["tokens"] for run in own for c in run["completions"]["held_out"]]
    assert metrics["tokens"]["values"]["alpha 5"].estimate == pytest.approx(np.mean(tokens))
    assert metrics["distinct_2"]["values"]["alpha 5"].estimate == 1
    assert metrics["rouge_l training"]["records"] == 12


@pytest.mark.parametrize("diverged", [0, 1], ids=["the baseline", "another setting"])
def test_a_setting_with_losses_that_are_no_numbers_is_left_out(tmp_path, diverged):
    made = runs([0, 0.1, 0.2], seeds=2, records=12)
    others = summarise([run for run in made if run["setting"]["neftune_noise_alpha"] != 5])["metrics"][0]
    made[2 * diverged]["losses"]["held_out"][4:] = [float("inf"), *[float("nan")] * 7]  # with one of two seeds
    said = write_report(tmp_path, made)
    assert f"alpha {5 * diverged}: diverged with seed 0: losses are not numbers. It is not compared." in said
    assert said.count("cannot tell, without held-out losses of both") == 2 - diverged
    if diverged:
        assert summarise(made)["metrics"][0]["differences"] == others["differences"]


def test_a_record_without_labels_is_left_out_everywhere(tmp_path):
    made = runs([0, 0.1], records=12)
    for run in made:
        run["losses"]["held_out"][0] = float("nan")
    assert summarise(made)["metrics"][0]["records"] == 11
    assert "diverged" not in write_report(tmp_path, made)


def test_settings_with_different_records_are_compared_without_pairs(tmp_path):
    """As two samples: the same means, and wider intervals."""
    made = runs([0, 0.1])
    paired = summarise(made)["metrics"][0]["differences"]["alpha 5"]
    for run in made[3:]:
        run["records"] = {"held_out": "c", "training": "d"}
        run["losses"]["held_out"] = run["losses"]["held_out"][1:]
    said, differences = reported(made, tmp_path)
    assert "measured on different records, so not in pairs" in said
    assert differences["alpha 5"].estimate == pytest.approx(paired.estimate, abs=1)
    assert differences["alpha 5"].half_width > 3 * paired.half_width


def test_the_page_and_the_markdown_have_the_same_numbers(tmp_path):
    made = runs([0, 0.1], records=12)
    write_report(tmp_path, made)
    page, markdown = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    rows = [line[2:-2].split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:3]] == ["signal-to-noise ratio in dB", "held-out loss (12 records)"]
    assert all(len(row) == 4 for row in rows)
    assert all(cell in page for row in rows[1:] for cell in row)
    assert "prompt 0 &lt;b&gt;" in page  # text from a model or file is escaped
    assert "prompt 0 <b>" not in page
    assert "prompt 0" not in (tmp_path / "results.json").read_text()


def test_names_are_shown_as_they_are(tmp_path):
    """Also those that mathtext, a table of Markdown or HTML would read as something else."""
    made = runs([0, 0.1], records=4)
    for run in made:
        run["setting"] = {"dataset_name": f"a|b$\\frac{{$ <i>{run['setting']['neftune_noise_alpha']:g}"}
    write_report(tmp_path, made)
    assert "a|b$\\frac{$ &lt;i&gt;5" in (tmp_path / "report.html").read_text()
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert all(len(re.split(r"(?<!\\)\|", row)) == 6 for row in rows)


def test_completions_are_written_as_alpaca_eval_reads_them(tmp_path):
    made = runs([0, 0.1], seeds=2, records=4)
    write_report(tmp_path, made)
    files = sorted(file.name for file in (tmp_path / "completions").iterdir())
    assert files == [f"setting-{setting}_seed-{seed}.json" for setting in (0, 1) for seed in (0, 1)]
    outputs = json.loads((tmp_path / "completions" / files[3]).read_text())
    assert [row["output"] for row in outputs] == [c["text"] for c in made[3]["completions"]["held_out"]]
    assert outputs[1]["instruction"] == "prompt 1 <b>"
    assert {row["generator"] for row in outputs} == {"alpha 5"}


def test_what_was_not_planned_is_told(tmp_path):
    made = runs([0, 0.1], seeds=3, records=4)
    assert summarise(made)["plan"]["changes"] == []
    first = {"date": "2026-11-27T12:00:00", "settings": ["alpha 0", "alpha 15"], "seeds": [0, 1]}
    made[0] = made[0] | {"plan": first}
    write_report(tmp_path, made)
    changes = "settings added later: alpha 5; settings planned, but not in this report: alpha 15; seeds added later: 2"
    for name in ("report.html", "report.md"):
        page = (tmp_path / name).read_text()
        assert "2026-11-27" in page
        assert f"But {changes}." in page
        assert "Even with no real effect, about 1 interval in 20 excludes 0" in page


@pytest.mark.slow
def test_several_settings_are_corrected_for_their_number(tmp_path):
    made = runs([0, 0, 0, 0.5], records=12)
    write_report(tmp_path, made)
    for name in ("report.html", "report.md"):
        page = (tmp_path / name).read_text()
        assert re.search(r"held-out loss: alpha 5 no difference found \(p .*alpha 15 differs \(p ", page)
    metric = summarise(made)["metrics"][0]
    smallest, middle, largest = sorted(interval.p_value for interval in metric["differences"].values())
    corrected = [3 * smallest, min(2 * middle, 1), min(max(2 * middle, largest), 1)]
    assert sorted(metric["holm"].values()) == pytest.approx(corrected)
    assert summarise(runs([0, 0.1], records=4))["metrics"][0]["holm"] == {}


def test_a_task_is_compared_in_points_or_in_its_own_unit(tmp_path):
    made = runs([0, 0.1], records=4)
    for run in made:
        is_noised = run["setting"]["neftune_noise_alpha"] > 0
        run["tasks"] = {
            "maths (exact_match)": [1.0, 0.0, float(is_noised), 1.0],
            "text (chrf)": [20.0, 30.0 + is_noised],
        }
    said = write_report(tmp_path, made)
    assert "maths (exact_match) +25.0 points [" in said
    assert "text (chrf) +0.5 [" in said
    metrics = {metric["key"]: metric for metric in summarise(made)["metrics"]}
    assert metrics["maths (exact_match)"]["values"]["alpha 0"].estimate == 0.5
    assert metrics["text (chrf)"]["records"] == 2
