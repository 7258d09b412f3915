"""Completions of prompt files: formats, batches, and a file that is written once, when it is whole."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from neftune_hf import cli
from neftune_hf.cli.generate import complete, complete_tokens, load

from ..conftest import VOCAB, byte_tokenizer, tiny_llama
from ..records import write

PROMPTS = [{"dataset": "d", "instruction": f"Say {word}."} for word in ("one", "twenty-two", "3", "four hundred")]


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", PROMPTS)


def run(model, prompts, output, *more):
    return cli.main(["generate", str(model), "--prompts", prompts, "-o", str(output), "--max_new_tokens", "6", *more])


@pytest.mark.parametrize("chat", [True, False])
def test_a_batch_is_completed_as_each_prompt_alone(chat):
    model, tokenizer = tiny_llama().eval(), byte_tokenizer(chat=chat)
    prompts = [[{"role": "user", "content": row["instruction"]}] if chat else row["instruction"] for row in PROMPTS]
    batched = complete(model, tokenizer, prompts, max_new_tokens=6)
    assert batched == [complete(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]


class EndsAtOnce(torch.nn.Module):
    """Logits with EOS first, and second a token that overtakes EOS once the repetition penalty applies to it."""

    def forward(self, hidden):
        logits = torch.zeros(*hidden.shape[:-1], VOCAB)
        logits[..., 1], logits[..., 40] = 1.0, 0.95
        return logits


def test_padding_with_the_end_of_sequence_is_not_repetition():
    model, tokenizer = tiny_llama().eval(), byte_tokenizer()
    model.lm_head = EndsAtOnce()
    tokenizer.pad_token = tokenizer.eos_token
    assert complete(model, tokenizer, ["Short.", "A prompt that is longer."], max_new_tokens=6) == ["", ""]


def test_a_completion_ends_where_the_model_says(model_folder):
    model, tokenizer = load(model_folder)
    assert len(complete_tokens(model, tokenizer, ["Say one."], max_new_tokens=6)[0]) == 6
    model.generation_config.eos_token_id = list(range(VOCAB))
    assert len(complete_tokens(model, tokenizer, ["Say one."], max_new_tokens=6)[0]) == 1


def test_the_list_that_alpaca_eval_reads(prompts, tmp_path, model_folder):
    out = tmp_path / "sub" / "out.json"
    assert run(model_folder, prompts, out, "--batch_size", "3") == 0
    rows = json.loads(out.read_text())
    model, tokenizer = load(model_folder)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        message = [{"role": "user", "content": prompt["instruction"]}]
        (text,) = complete(model, tokenizer, [message], max_new_tokens=6)
        assert row == prompt | {"output": text, "generator": model_folder}
    assert list(out.parent.iterdir()) == [out]


def test_the_file_is_written_once_when_it_is_whole(prompts, tmp_path, model_folder, monkeypatch, capsys):
    """An earlier file is no answer to a call with another limit or model, and a call that fails leaves none."""
    out, calls = tmp_path / "out.json", []

    def fail(model, tokenizer, batch, **decoding):
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return ["x"] * len(batch)

    with monkeypatch.context() as patch:
        patch.setattr("neftune_hf.cli.generate.complete", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model_folder, prompts, out, "--batch_size", "2")
    assert not out.exists()
    assert run(model_folder, prompts, out) == 0
    first = out.read_text()
    assert run(model_folder, prompts, out, "--max_new_tokens", "3") == 2
    assert f"`--output`: {out} exists. Name a new JSON file." in capsys.readouterr().err
    assert out.read_text() == first


def test_an_adapter_is_loaded_on_its_base(tmp_path, model_folder):
    base, _ = load(model_folder)
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load(str(tmp_path))
    ids = torch.tensor([tokenizer("Say one.")["input_ids"]])
    torch.testing.assert_close(model(ids).logits, adapted(ids).logits)
    assert not torch.allclose(model(ids).logits, load(model_folder)[0](ids).logits)


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (PROMPTS, ["--batch_size", "0"], "`--batch_size` is 0; it must be positive"),
        (PROMPTS, ["--max_new_tokens", "2048"], "the model has 2048 positions. Set it to 2013 or less."),
        (PROMPTS, ["-o", "out.txt"], "`--output`: out.txt is not named .json"),
        ([*PROMPTS, {"instruction": " "}], [], "no prompt in record 5, with the columns dataset, instruction. Give it"),
        ([{"turns": ["a", "b"]}], [], "no prompt in record 1, with the columns turns"),
    ],
)
def test_what_cannot_be_completed_is_refused_before_the_first(rows, words, message, tmp_path, model_folder, capsys):
    assert run(model_folder, write(tmp_path / "rows.jsonl", rows), tmp_path / "out.json", *words) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.json").exists()


def test_a_model_that_is_no_folder_says_so_first(prompts, tmp_path, capsys):
    assert run("no/model", prompts, tmp_path / "out.json") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "`model` is no/model, which cannot be loaded. There is no folder of this name, and on the hub: " in message
