"""The report on simulated runs whose true effects are known."""

import json
import re

import numpy as np
import pytest

from neftune_hf.compare.report import summarise, write_report


def runs(effects, seeds=3, records=60, length=1.0, noise=0.02):
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
            asked = [{"prompt": f"prompt {n} <b>", "reference": "a b c"} for n in range(records)]
            texts = [{"text": " ".join(f"w{i}" for i in range(n)), "tokens": n, "ended": n % 2 == 0} for n in words]
            made.append({
                "name": f"alpha {5 * number}", "setting": {"neftune_noise_alpha": 5.0 * number}, "seed": seed,
                "settings": {"max_new_tokens": "64"}, "steps": 8, "epochs": 1.0, "train_records": 100,
                "mean_length": 50.0, "snr_db": 20.0 if number else None,
                "curve": [{"step": 4, "held_out": 2.0, "training": 2.0}, {"step": 8, "held_out": 1.9, "training": 1.8}],
                "losses": {"held_out": losses.tolist(), "training": losses.tolist()},
                "asked": {"held_out": asked, "training": asked}, "completions": {"held_out": texts, "training": texts},
            })  # fmt: skip
    return made


def test_a_planted_difference_is_told_with_its_size():
    results = summarise(runs([0, -0.05], length=1.5))
    (verdict,) = results["verdict"]
    held_out = results["metrics"][0]["differences"]["alpha 5"]
    assert held_out.low < -5 < held_out.high < -3
    assert f"held-out loss {held_out.estimate:+.2f} %" in verdict
    assert "completions 1.5" in verdict
    assert "times as long" in verdict
    assert results["wins"]["alpha 5"]["lower"] > 0.9


def test_none_is_called_none_where_the_interval_is_narrow():
    (verdict,) = summarise(runs([0, 0], noise=0.005))["verdict"]
    assert "no difference in held-out loss beyond 1 %" in verdict
    assert "no difference in completion length found" in verdict


def test_too_little_to_conclude_says_how_much_would_do():
    (verdict,) = summarise(runs([0, 0.02], records=8, noise=0.3))["verdict"]
    assert "cannot tell whether held-out loss differs" in verdict
    assert re.search(r"about \d+ seeds on [\d,]+ records.* would show a difference of this size", verdict)


def test_each_metric_has_its_value_by_hand():
    made = runs([0, 0.01], records=12)
    metrics = {metric["key"]: metric for metric in summarise(made)["metrics"]}
    own = [run for run in made if run["name"] == "alpha 5"]
    assert metrics["held_out"]["values"]["alpha 5"].estimate == pytest.approx(
        np.mean([r["losses"]["held_out"] for r in own])
    )
    tokens = [c["tokens"] for run in own for c in run["completions"]["held_out"]]
    assert metrics["tokens"]["values"]["alpha 5"].estimate == pytest.approx(np.mean(tokens))
    assert metrics["distinct_2"]["values"]["alpha 5"].estimate == 1
    assert metrics["rouge_l training"]["records"] == 12


def test_one_seed_is_reported_and_said_to_be_one(tmp_path):
    said = write_report(tmp_path, runs([0, 0.1, -0.1], seeds=1))
    page = (tmp_path / "report.html").read_text()
    assert "with one seed they say nothing about another run" in page
    assert said.count("\n") == 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["verdict"][0] in page
    assert "prompt 0 &lt;b&gt;" in page  # text from a model or file is escaped
    assert "prompt 0 <b>" not in page
    assert "prompt 0" not in json.dumps(results)
