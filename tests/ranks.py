"""Run by test_distributed under torchrun: a model or batch that is split over processes, compared with the plain model.

Each scenario is a function of the world size that asserts on its own rank; errors are written to a file.
"""

import functools
import json
import os
import sys
import traceback
import types
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from neftune_hf import attach
from neftune_hf.errors import NEFTuneError, NEFTuneWarning, NoNoiseError

from .conftest import VOCAB, D, leftovers, tiny_llama

SCENARIOS = {}


def scenario(*arguments):
    """Registers a function, once for each argument."""

    def register(function):
        for argument in arguments or (None,):
            name = function.__name__ + (f"-{argument}" if arguments else "")
            SCENARIOS[name] = functools.partial(function, *([argument] if arguments else []))
        return function

    return register


def batch(rank=0, width=6):
    ids = torch.randint(3, VOCAB, (2, width), generator=torch.Generator().manual_seed(rank))
    mask = torch.ones(2, width, dtype=torch.int64)
    mask[1, width - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def noised(model, backward=True, **inputs):
    """The noised embeddings that the layers get in training step 1 with seed 3, and the logits."""
    seen = []
    with attach(model, neftune_noise_alpha=5, neftune_seed=3) as handle:
        handle.set_step(1)
        for site in handle.sites:
            hook = site.module.register_forward_hook(lambda module, args, output: seen.append(output))
        output = model(**inputs)
        if backward:
            loss = (output.logits if hasattr(output, "logits") else output).float().square().mean()
            loss.backward() if backward is True else backward(loss)
        handle.check_noised()
    if seen:
        hook.remove()
    assert leftovers(model) == []
    return (seen[0].detach() if seen else None), output


def assert_same_bits(found, expected):
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert torch.equal(found, expected), (found - expected).abs().max()


def bare(**overrides):
    return tiny_llama(attention_dropout=0.0, **overrides).train()


def wrapped(kind):
    model = bare()
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if kind == "fsdp1_flat":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))  # its axis has no name
    if kind == "fsdp2_embedding":
        fully_shard(model.get_input_embeddings(), mesh=mesh)
    return fully_shard(model, mesh=mesh)


@scenario("ddp", "fsdp1", "fsdp1_flat", "fsdp2", "fsdp2_embedding")
def data_parallel(kind):
    rank = distributed.get_rank()
    expected, _ = noised(bare(), **batch(rank))
    found, _ = noised(wrapped(kind), **batch(rank))
    assert_same_bits(found, expected)
    others = [torch.empty_like(found) for _ in range(distributed.get_world_size())]
    distributed.all_gather(others, found)
    assert not torch.equal(others[0], others[1])


def distributed_llama(folder=None, **sizes):
    """As transformers loads it: from a folder, onto a mesh."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    tie = sizes.pop("tie_word_embeddings", False)
    folder = Path(os.environ["RANKS_FOLDER"]) / f"llama-{tie}"
    if distributed.get_rank() == 0 and not folder.exists():
        bare(tie_word_embeddings=tie).save_pretrained(folder)
    distributed.barrier()
    model = LlamaForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes), attn_implementation="eager"
    )
    return model.train()


def peers_are_identical(tensor, group=None):
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, tensor.contiguous(), group=group)
    return all(torch.equal(part, parts[0]) for part in parts)


@scenario("trainable", "frozen", "tied")
def tensor_parallel(kind):
    model = distributed_llama(tp_size=2, tie_word_embeddings=kind == "tied")
    reference = bare(tie_word_embeddings=kind == "tied")
    for m in (model, reference):
        m.get_input_embeddings().requires_grad_(kind != "frozen")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for step in range(2):
        expected, clean = noised(reference, **batch(step))
        found, output = noised(model, **batch(step))
        assert peers_are_identical(found)
        if step == 0:
            assert_same_bits(found, expected)
        else:  # the first step's sums over the peers round differently than in one process
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(output.logits, clean.logits, rtol=1e-4, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@scenario("tp_size=2 fsdp_size=2", "fsdp_size=2 dp_replicate_size=2", "fsdp_size=4")
def on_a_mesh(kind):
    """Tensor-parallel peers share a batch and its noise; other processes have their own."""
    sizes = {name: int(size) for name, size in (part.split("=") for part in kind.split())}
    model = distributed_llama(**sizes)
    data_rank = distributed.get_rank() // sizes.get("tp_size", 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        found, _ = noised(model, **batch(data_rank))
        if step == 0:
            expected, _ = noised(bare(), **batch(data_rank))
            assert_same_bits(found, expected)
        others = [torch.empty_like(found) for _ in range(distributed.get_world_size())]
        distributed.all_gather(others, found)
        for rank, other in enumerate(others):
            assert torch.equal(other, found) == (rank // sizes.get("tp_size", 1) == data_rank)
        optimizer.step()
        optimizer.zero_grad()


class Embeds(nn.Module):
    """An embedding and nothing after it, for outputs that no layer would accept."""

    def __init__(self, d=D, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCAB, d, dtype=dtype)

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids, attention_mask=None):
        return self.embed_tokens(input_ids)


OUTPUTS = {"rows": Shard(0), "columns": Shard(1), "channels": Shard(-1)}


def parallelized(output, where, d=D, dtype=torch.float32):
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    model = Embeds(d, dtype).train()
    style = ColwiseParallel if output == Shard(-1) else RowwiseParallel
    style = style(input_layouts=Replicate(), output_layouts=output, use_local_output=where == "local")
    return parallelize_module(model, mesh, {"embed_tokens": style})


@scenario("dtensor", "local")
def whole_output(where):
    for dtype, d, frozen in ((torch.float32, D, False), (torch.bfloat16, 33, True)):
        expected, _ = noised(Embeds(d, dtype).train(), backward=False, **batch())
        model = parallelized(Replicate(), where, d, dtype).requires_grad_(not frozen)
        found, _ = noised(model, backward=not frozen, **batch())
        assert isinstance(found, DTensor) == (where == "dtensor")
        assert_same_bits(found.full_tensor() if where == "dtensor" else found, expected)
        if not frozen:
            assert model.embed_tokens.weight.grad.full_tensor().abs().sum() > 0


@scenario(*(f"{name} {where}" for name in OUTPUTS for where in ("dtensor", "local")), "partial dtensor")
def part_of_an_output_is_refused(kind):
    name, where = kind.split()
    model = parallelized(OUTPUTS.get(name, Replicate()), where)
    if name == "partial":
        model.embed_tokens.register_forward_hook(
            lambda module, args, output: DTensor.from_local(
                output.to_local(), output.device_mesh, [Partial()], run_check=False
            )
        )
    with pytest.raises(NEFTuneError, match=r"embed_tokens .*it is sharded\. .* the placement Replicate\(\)"):
        noised(model, **batch())


@scenario("Replicate", "Shard")
def ids_that_are_dtensors(kind):
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    expected, _ = noised(Embeds().train(), **batch())
    model = Embeds().train()
    model.embed_tokens.weight = nn.Parameter(
        DTensor.from_local(model.embed_tokens.weight.detach(), mesh, [Replicate()], run_check=False)
    )
    placement = Replicate() if kind == "Replicate" else Shard(1)
    inputs = {name: distributed.tensor.distribute_tensor(value, mesh, [placement]) for name, value in batch().items()}
    if kind == "Shard":
        with pytest.raises(NEFTuneError, match="it is sharded"):
            noised(model, **inputs)
        return
    found, _ = noised(model, **inputs)
    assert_same_bits(found.full_tensor(), expected)


@scenario("untied", "tied", "transformers untied", "transformers tied")
def pipeline(kind):
    tied, first = kind.split()[-1] == "tied", distributed.get_rank() == 0
    if kind.startswith("transformers"):
        model = distributed_llama(pp_size=2, tie_word_embeddings=tied)
        found, _ = noised(model, backward=False, **batch())
    elif first or tied:
        model = bare(tie_word_embeddings=tied)
        if not first:
            model._pp_stage = types.SimpleNamespace(pp_is_first_stage=False)
        found, _ = noised(model, **batch())
    else:
        model = bare()
        model.model.embed_tokens = None
        found, _ = noised(model, inputs_embeds=torch.zeros(2, 6, D))
    assert (found is not None) == first
    if first:
        expected, _ = noised(bare(tie_word_embeddings=tied), **batch())
        assert_same_bits(found, expected)
        with pytest.raises(NoNoiseError):  # a model without an embedding is still an error
            noised(bare(), inputs_embeds=torch.zeros(2, 6, D))


# A call's arguments besides the ids, for two rows of `width`.
SPLIT_CALLS = {
    "right": lambda width: {"attention_mask": torch.arange(width).expand(2, -1) < torch.tensor([[width], [width - 3]])},
    "left": lambda width: {"attention_mask": torch.arange(width).expand(2, -1) >= torch.tensor([[0], [3]])},
    "no mask": lambda width: {},
    "packed": lambda width: {"position_ids": torch.cat([torch.arange(3), torch.arange(width - 3)]).repeat(2, 1)},
    "packed, one row of positions": lambda width: {
        "position_ids": torch.cat([torch.arange(width - 1), torch.arange(1)])[None]
    },
    "padding-free": lambda width: {"cu_seq_lens_q": torch.tensor([0, 3, width + 2, 2 * width - 1])},
    "4-dimensional": lambda width: {
        "attention_mask": torch.block_diag(torch.ones(3, 3), torch.ones(width - 3, width - 3)).tril()[None, None].bool()
    },
}


class EmbedsCall(Embeds):
    def forward(self, input_ids, attention_mask=None, position_ids=None, cu_seq_lens_q=None):
        return self.embed_tokens(input_ids)


def split_call(name, width, seed=0):
    """Ids and layout arguments as the Trainer creates them for context parallelism, always with positions."""
    ids = torch.randint(3, VOCAB, (2, width), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "position_ids": torch.arange(width).repeat(2, 1)} | SPLIT_CALLS[name](width)


def accelerator_on_cpu(**sizes):
    """accelerate supports this parallelism on accelerators only, so tell it that the processes are GPUs, on gloo."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    AcceleratorState._reset_state(reset_partial_state=True)
    if not sizes:
        return None
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    return Accelerator(parallelism_config=ParallelismConfig(**sizes), fsdp_plugin=plugin)


@scenario(*(f"{name}; {width}" for name in SPLIT_CALLS for width in (8, 10)))
def context_parallel(kind):
    """8 columns are split head and tail, 10 contiguously. Four processes form two groups."""
    name, width = kind.split("; ")
    group = distributed.get_rank() // 2
    model, inputs = EmbedsCall().train(), split_call(name, int(width), group)
    expected, _ = noised(EmbedsCall().train(), **{key: value.clone() for key, value in inputs.items()})
    accelerator = accelerator_on_cpu(cp_size=2, dp_shard_size=distributed.get_world_size() // 2)
    accelerator._prepare_cp(model)
    buffers = [value for value in inputs.values() if value.dim() == 2]
    with accelerator.maybe_context_parallel(
        buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
    ):
        found, _ = noised(model, **inputs)
    rank = accelerator.state.device_mesh["cp"].get_local_rank()
    columns = {8: [[0, 1, 6, 7], [2, 3, 4, 5]], 10: [range(5), range(5, 10)]}
    assert_same_bits(found, expected[:, list(columns[int(width)][rank])])
    # nothing is split outside of it
    found, _ = noised(model, **split_call(name, int(width), group))
    assert_same_bits(found, expected)
    accelerator_on_cpu()


@scenario("right; 8", "packed; 10")
def compiled_context_parallel(kind):
    name, width = kind.split("; ")
    inputs = split_call(name, int(width), distributed.get_rank() // 2)
    expected, _ = noised(EmbedsCall().train(), **{key: value.clone() for key, value in inputs.items()})
    accelerator = accelerator_on_cpu(cp_size=2, dp_shard_size=distributed.get_world_size() // 2)
    model = EmbedsCall().train()
    accelerator._prepare_cp(model)
    buffers = list(inputs.values())
    with accelerator.maybe_context_parallel(
        buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
    ):
        found, _ = noised(torch.compile(model, backend="aot_eager"), **inputs)
    rank = accelerator.state.device_mesh["cp"].get_local_rank()
    columns = {8: [[0, 1, 6, 7], [2, 3, 4, 5]], 10: [range(5), range(5, 10)]}
    torch.testing.assert_close(found, expected[:, list(columns[int(width)][rank])], rtol=0, atol=1e-6)
    accelerator_on_cpu()


@scenario()
def context_parallel_without_accelerate_is_refused():
    from torch.distributed.tensor.experimental import context_parallel

    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    inputs = split_call("right", 8)
    with (
        context_parallel(mesh, buffers=list(inputs.values()), buffer_seq_dims=[1] * len(inputs)),
        pytest.raises(NEFTuneError, match="ParallelismConfig"),
    ):
        noised(EmbedsCall().train(), **inputs)


@scenario("flat ids", "virtual tokens", "a decoder", "unequal parts")
def split_calls_that_are_refused(kind):
    from transformers import T5Config, T5ForConditionalGeneration

    model, inputs, message = EmbedsCall().train(), split_call("right", 8), r"ids of shape \(8,\)"
    if kind == "virtual tokens":
        inputs["attention_mask"] = torch.ones(2, 11)
        message = "`attention_mask` has width 11 under context parallelism"
    elif kind == "unequal parts":
        inputs, message = split_call("right", 9), r"parts of \[5, 4\] tokens.*`pad_to_multiple_of=4`"
    elif kind == "a decoder":
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=VOCAB, d_model=D, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0
        )
        config._attn_implementation = "eager"  # which torch leaves alone
        model, message = T5ForConditionalGeneration(config).train(), "a decoder's inputs"
        inputs = {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"].clone()}
    accelerator = accelerator_on_cpu(cp_size=2, dp_shard_size=distributed.get_world_size() // 2)
    accelerator._prepare_cp(nn.Module())
    buffers = [inputs["input_ids"]]
    with accelerator.maybe_context_parallel(buffers=buffers, buffer_seq_dims=[1], no_restore_buffers=set(buffers)):
        if kind == "flat ids":
            inputs = {"input_ids": inputs["input_ids"].flatten()}
        with pytest.raises(NEFTuneError, match=message):
            noised(model, **inputs)
    accelerator_on_cpu()


@scenario()
def warnings_come_from_one_rank():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        noised(EmbedsCall().train(), input_ids=batch()["input_ids"])
    seen = [warning for warning in caught if issubclass(warning.category, NEFTuneWarning)]
    assert bool(seen) == (distributed.get_rank() == 0)


@scenario(*(f"{name}; {width}" for name in ("right", "packed", "no mask") for width in (8, 10)))
def ulysses(kind):
    """With a stub for DeepSpeed's groups; each row is cut into equal slices, positions included."""
    name, width = kind.split("; ")
    inputs = split_call(name, int(width), seed=distributed.get_rank() // 2)
    expected, _ = noised(EmbedsCall().train(), **inputs)
    mesh, size = distributed.init_device_mesh("cpu", (distributed.get_world_size() // 2, 2)), 2
    group, rank = mesh.get_group(1), mesh.get_local_rank(1)
    stand_in = types.SimpleNamespace(
        mpu=group,
        mesh_device=None,
        _get_sequence_parallel_world_size=lambda: size,
        _get_sequence_parallel_group=lambda: group,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed.utils.groups", stand_in)
        sliced = {key: value.chunk(size, dim=1)[rank] for key, value in inputs.items()}
        found, _ = noised(EmbedsCall().train(), **sliced)
        model = torch.compile(EmbedsCall().train(), backend="aot_eager")
        torch.testing.assert_close(noised(model, **sliced)[0], found, rtol=0, atol=1e-6)
    parts = [torch.empty_like(found) for _ in range(size)]
    distributed.all_gather(parts, found, group=group)
    assert_same_bits(torch.cat(parts, dim=1), expected)


@scenario("zero2", "zero3", "autotp", "autotp tied")
def deepspeed(kind):
    """On gloo. Tensor-parallel peers have the same batch."""
    import deepspeed

    tied, config = kind.endswith("tied"), {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
    model, data_rank = bare(tie_word_embeddings=tied), distributed.get_rank()
    if kind.startswith("autotp"):
        model, data_rank = deepspeed.tp_model_init(model, tp_size=2, dtype=torch.float32), 0
        config |= {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 0}}
    else:
        config |= {"zero_optimization": {"stage": int(kind[-1])}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    found, _ = noised(engine, backward=engine.backward, **batch(data_rank))
    expected, _ = noised(bare(tie_word_embeddings=tied), **batch(data_rank))
    assert_same_bits(found, expected)
    assert peers_are_identical(found) == kind.startswith("autotp")


@scenario()
def deepspeed_ulysses():
    """DeepSpeed's own groups and data loader, as set up by accelerate."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter
    from deepspeed.utils import groups

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    rank = distributed.get_rank()
    parallel_state_sp.initialize_sequence_parallel(2)
    group = parallel_state_sp.get_sequence_parallel_group()
    call = split_call("packed", 8, seed=rank)
    expected = [noised(EmbedsCall().train(), **split_call("packed", 8, seed=seed))[0] for seed in (0, 1)]
    loader = UlyssesSPDataLoaderAdapter([call | {"labels": call["input_ids"]}], rank, group, 2, torch.device("cpu"))
    groups.mpu = parallel_state_sp  # as `deepspeed.initialize(mpu=...)` does
    try:
        for inputs, whole in zip(loader, expected, strict=True):
            found, _ = noised(EmbedsCall().train(), **{name: inputs[name] for name in ("input_ids", "position_ids")})
            assert_same_bits(found, whole[:, 4 * rank : 4 * rank + 4])
    finally:
        groups.mpu = None


def main(file: str, *names: str) -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, failed = distributed.get_rank(), {}
    for name in names:
        try:
            SCENARIOS[name]()
        except (Exception, pytest.fail.Exception):
            failed[name] = traceback.format_exc()
    Path(f"{file}.{rank}").write_text(json.dumps(failed))
    distributed.barrier()
    os._exit(0)  # gloo may hang when the interpreter tears it down


if __name__ == "__main__":
    main(*sys.argv[1:])
