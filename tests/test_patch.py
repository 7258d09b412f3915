"""Tools that only pass `neftune_noise_alpha` on: the patch, TRL's command with it, and axolotl's plugin."""

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers.trainer
from transformers import DefaultFlowCallback

import neftune_hf
from neftune_hf import NEFTuneCallback

from .conftest import ROOT, leftovers, tiny_llama
from .helpers import MixedTrainer, losses, make, train


@pytest.fixture
def patched():
    undo = neftune_hf.patch_transformers()
    yield undo
    undo()


def test_the_patch_replaces_the_built_in_and_can_be_taken_back(tmp_path, patched):
    assert neftune_hf.patch_transformers() is patched
    ours, reference = make(tmp_path, alpha=5), make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)])
    mixed, off = make(tmp_path, MixedTrainer, alpha=5), make(tmp_path)
    for trainer in (ours, reference, mixed, off):
        train(trainer)
    assert losses(ours) == losses(reference) == losses(mixed) != losses(off)
    assert not any(isinstance(callback, NEFTuneCallback) for callback in ours.callback_handler.callbacks)
    patched()
    built_in = make(tmp_path, alpha=5)
    train(built_in)
    assert losses(built_in) != losses(ours)
    patched()


def test_a_tool_may_replace_the_list_of_default_callbacks(tmp_path, patched, monkeypatch):
    """As ms-swift does on import, before or after the patch."""
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [DefaultFlowCallback])
    ours, reference = make(tmp_path, alpha=5), make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)])
    train(ours)
    train(reference)
    assert losses(ours) == losses(reference)
    assert all("neftune/alpha" in entry for entry in ours.state.log_history if "loss" in entry)


def test_after_a_fault_the_patchs_next_run_is_right(tmp_path, patched):
    model = tiny_llama()
    fault = model.lm_head.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(make(tmp_path, model=model, alpha=5))
    fault.remove()
    again, fresh = make(tmp_path, model=model, alpha=5), make(tmp_path, alpha=5)
    train(again)
    train(fresh)
    assert losses(again) == losses(fresh)
    assert leftovers(model) == []


@pytest.mark.slow
def test_trls_own_command_with_the_patch(tmp_path, model_folder):
    rows = [{"prompt": "Say one.", "completion": " one"}, {"prompt": "Say twenty.", "completion": " twenty"}] * 4
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = (
        "import runpy, neftune_hf; neftune_hf.patch_transformers(); "
        "runpy.run_module('trl.scripts.sft', run_name='__main__')"
    )
    settings = {
        "model_name_or_path": model_folder, "dataset_name": str(folder), "output_dir": str(tmp_path / "out"),
        "neftune_noise_alpha": 5, "max_steps": 2, "bf16": "false", "dtype": "float32", "report_to": "none",
        "use_cpu": "true", "logging_steps": 1,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "on model.embed_tokens (Embedding, d=32); replaces transformers' built-in" in result.stderr


@pytest.mark.parametrize("in_args", [5, None])
def test_axolotls_plugin_trains_as_the_callback(in_args, tmp_path, monkeypatch):
    """Alpha comes from axolotl's config, since its builders for `rl` do not put it into the args.

    With axolotl's base class if it is installed, else with a stub that has the one method used.
    """
    try:
        from axolotl.integrations.base import BasePlugin
    except ImportError:
        BasePlugin = type("BasePlugin", (), {})
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    monkeypatch.delitem(sys.modules, "neftune_hf.axolotl", raising=False)
    from neftune_hf.axolotl import NEFTunePlugin

    assert issubclass(NEFTunePlugin, BasePlugin)
    cfg = SimpleNamespace(neftune_noise_alpha=5, rl="dpo" if in_args is None else None)
    trainer = make(tmp_path, alpha=in_args, callbacks=NEFTunePlugin().add_callbacks_pre_trainer(cfg, None))
    reference = make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)])
    train(trainer)
    train(reference)
    assert losses(trainer) == losses(reference)
    assert torch.isfinite(torch.tensor(losses(trainer))).all()
