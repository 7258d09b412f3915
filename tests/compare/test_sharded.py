"""`neftune-hf compare` on two processes that share a model: the measurements of one process, up to rounding."""

import pytest
import yaml

from neftune_hf.cli import main

from ..cli.test_compare import SETTINGS, runs_of
from ..conftest import byte_tokenizer, tiny_llama
from ..helpers import torchrun
from ..records import records, write
from .test_tasks import write_choices

pytestmark = pytest.mark.slow

ZERO = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}  # fmt: skip


def sharding(setup):
    if setup == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2, "sync_module_states": False}}, {}
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: comparisons with ZeRO are not tested")
    deepspeed = ZERO | {"zero_optimization": {"stage": int(setup[-1])}}
    return {"deepspeed": deepspeed}, {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize("setup", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_sharded_runs_measure_what_one_process_does(tmp_path, setup, adapter):
    more, environment = sharding(setup)
    model = tmp_path / "model"
    tiny_llama(attention_dropout=0.0).save_pretrained(model)  # each process draws the dropout of its rows
    byte_tokenizer().save_pretrained(model)
    data = write(tmp_path / "train.json", records("tatsu-lab/alpaca", 24))
    alone = yaml.safe_load(
        SETTINGS.format(data=data, model=model, output=tmp_path / "alone", evaluation="epoch", steps=6)
    )
    alone |= {"packing": False, "use_peft": adapter, "lora_dropout": 0.0}
    # Five records for two processes: one of them repeats a record, whose result is not counted twice.
    words = ["--records", "5", "--max_new_tokens", "6", "--alphas", "0", "500", "--seeds", "0"]
    words += ["--tasks", write_choices(tmp_path)]
    shared = alone | more | {"use_cpu": False, "per_device_train_batch_size": 1, "output_dir": str(tmp_path / "shared")}
    for name, settings in {"alone": alone, "shared": shared}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["compare", "--config", str(tmp_path / "alone.yaml"), *words]) == 0
    torchrun(2, "-m", "tests.compare.sharded", "--config", str(tmp_path / "shared.yaml"), *words, **environment)
    alone, shared = (runs_of(tmp_path / name) for name in ("alone", "shared"))
    assert shared.keys() == alone.keys()
    for key, found in shared.items():
        for name, losses in found["losses"].items():
            assert len(losses) == 5
            assert losses == pytest.approx(alone[key]["losses"][name], rel=1e-5)
        assert found["completions"] == alone[key]["completions"]
        assert found["tasks"] == alone[key]["tasks"]
