"""Run by test_distributed in two processes: logits under FSDP, whose embedding is sharded, against the bare model's."""

import sys

import torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from neftune_hf import attach

from .conftest import VOCAB, leftovers, tiny_llama


def fsdp1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model):
    return fully_shard(model, mesh=distributed.init_device_mesh("cpu", (2,)))


def logits(model):
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with attach(model, neftune_noise_alpha=5) as handle:
        output = model(input_ids=ids, attention_mask=mask).logits
        output.square().mean().backward()
        assert list(handle.noised_forwards.values()) == [1], handle.noised_forwards
    assert leftovers(model) == []
    return output.detach()


def main(kind: str) -> None:
    distributed.init_process_group("gloo")
    expected = logits(tiny_llama(attention_dropout=0.0).train())
    model = {"fsdp1": fsdp1, "fsdp2": fsdp2}[kind](tiny_llama(attention_dropout=0.0).train())
    weight = next(p for name, p in model.named_parameters() if name.endswith("embed_tokens.weight"))
    local = weight.to_local() if kind == "fsdp2" else weight
    sizes = [None, None]
    distributed.all_gather_object(sizes, local.numel())
    assert sizes == ([VOCAB * 16] * 2 if kind == "fsdp2" else [VOCAB * 32, 0]), sizes
    torch.testing.assert_close(logits(model), expected)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
