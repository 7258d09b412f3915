"""The same noise and the same gradients inside every training wrapper."""

import warnings

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from neftune_hf import attach

from .conftest import VOCAB, leftovers, tiny_llama


@pytest.fixture(scope="module", autouse=True)
def process_group():
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


def run(model):
    """Logits and the gradients of the trainable parameters, by name, with noise on."""
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with attach(model, neftune_noise_alpha=5, neftune_seed=3) as handle:
        logits = model(input_ids=ids, attention_mask=mask).logits
        logits.square().sum().backward()
        assert list(handle.noised_forwards.values()) == [1]
    assert leftovers(model) == []
    gradients = [p.grad for p in model.parameters() if p.grad is not None and p.numel()]
    return logits.detach(), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_noise_is_that_of_the_bare_model(wrapper):
    steps = WRAPPERS[wrapper]
    model, bare = tiny_llama(attention_dropout=0.0), tiny_llama(attention_dropout=0.0)
    for wrap in steps:
        model = wrap(model)
    if adapted in steps:
        bare = adapted(bare)
    logits, gradients = run(model.train())
    expected, expected_gradients = run(bare.train())
    torch.testing.assert_close(logits, expected)
    assert len(gradients) == len(expected_gradients) > 0
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.reshape(-1), other.reshape(-1))
