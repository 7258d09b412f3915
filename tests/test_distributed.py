"""Every way to wrap or split a model or batch: the noise of the plain model, or an error."""

import json
import warnings

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from neftune_hf import attach

from .conftest import leftovers, tiny_llama
from .helpers import BATCH, torchrun
from .ranks import SCENARIOS


@pytest.fixture(scope="module")
def process_group():
    """This process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def fsdp1(model):
    with warnings.catch_warnings(record=True):
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model):
    mesh = distributed.init_device_mesh("cpu", (1,))
    for layer in model.get_submodule("model.layers"):
        fully_shard(layer, mesh=mesh)
    fully_shard(model.get_input_embeddings(), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def offloaded(model):
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def adapted(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))


WRAPPERS = {
    "DDP": [DistributedDataParallel],
    "FSDP1": [fsdp1],
    "FSDP2": [fsdp2],
    "compiled": [compiled],
    "accelerate's hooks": [offloaded],
    "DDP of compiled": [compiled, DistributedDataParallel],
    "compiled DDP": [DistributedDataParallel, compiled],
    "compiled FSDP2": [fsdp2, compiled],
    "DDP of PEFT": [adapted, DistributedDataParallel],
    "FSDP1 of PEFT": [adapted, fsdp1],
    "DDP of hooks of PEFT": [adapted, offloaded, DistributedDataParallel],
    "compiled DDP of compiled": [compiled, DistributedDataParallel, compiled],
}


def logits_and_gradients(model):
    """Logits and the gradients of the trainable parameters, by name, with noise on."""
    with attach(model, neftune_noise_alpha=5, neftune_seed=3) as handle:
        logits = model(**BATCH).logits
        logits.square().sum().backward()
        assert list(handle.noised_steps.values()) == [1]
    assert leftovers(model) == []
    gradients = [p.grad for p in model.parameters() if p.grad is not None and p.numel()]
    return logits.detach(), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_noise_in_a_wrapper_is_that_of_the_bare_model(wrapper, process_group):
    steps = WRAPPERS[wrapper]
    model, bare = tiny_llama(attention_dropout=0.0), tiny_llama(attention_dropout=0.0)
    for wrap in steps:
        model = wrap(model)
    if adapted in steps:
        bare = adapted(bare)
    logits, gradients = logits_and_gradients(model.train())
    expected, expected_gradients = logits_and_gradients(bare.train())
    torch.testing.assert_close(logits, expected)
    assert len(gradients) == len(expected_gradients) > 0
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.reshape(-1), other.reshape(-1))


# Several processes: two by default. Four, for meshes of two axes, are marked `slow`.

GROUPS = {
    "data parallel": ("data_parallel", "warnings"),
    "tensor parallel": ("tensor_parallel", "ids_that_are_dtensors"),
    "outputs that are DTensors": ("whole_output", "part_of_an_output"),
    "pipelines": ("pipeline",),
    "split sequences": ("context_parallel", "compiled_context_parallel", "ulysses", "split_calls"),
}
DEEPSPEED = ("deepspeed",)
OF_FOUR = ("on_a_mesh-tp_size=2 fsdp_size=2", "on_a_mesh-fsdp_size=2 dp_replicate_size=2", "on_a_mesh-fsdp_size=4")


def run(folder, processes: int, prefixes: tuple[str, ...], **environment: str) -> None:
    names = [name for name in SCENARIOS if name.startswith(prefixes)]
    assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes)
    torchrun(processes, "-m", "tests.ranks", str(folder / "failed"), *names, RANKS_FOLDER=str(folder), **environment)
    for rank in range(processes):
        failed = json.loads((folder / f"failed.{rank}").read_text())
        assert not failed, f"{list(failed)} on rank {rank}; the first: {next(iter(failed.values()))}"


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_two_processes_have_the_bits_of_one(tmp_path, group):
    run(tmp_path, 2, GROUPS[group])


def test_deepspeed_in_two_processes(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: ZeRO, AutoTP and its Ulysses are not tested")
    run(tmp_path, 2, DEEPSPEED, DS_ACCELERATOR="cpu")


@pytest.mark.slow
def test_four_processes_have_the_bits_of_one(tmp_path):
    run(tmp_path, 4, (*OF_FOUR, "context_parallel-", "ulysses"))


def test_every_scenario_is_run():
    prefixes = [prefix for group in GROUPS.values() for prefix in group] + [*OF_FOUR, *DEEPSPEED]
    assert [name for name in SCENARIOS if not name.startswith(tuple(prefixes))] == []
