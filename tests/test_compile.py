"""Noise in compiled models: the same bits, as many graphs as without, and on only while the handle is attached."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin, compile_regions
from torch._dynamo.testing import CompileCounterWithBackend

from neftune_hf import NEFTuneCallback, NEFTuneError, attach
from neftune_hf.errors import NEFTuneWarning

from .conftest import VOCAB, leftovers, tiny_llama
from .helpers import BATCH, losses, make, noise_of, train


def graphs(shapes, between=None, steps=1, **fields):
    """The graphs that torch.compile creates for training forwards over the shapes, and the handle."""
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=1).train()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    with attach(compiled, max_steps=steps, **fields) as handle:
        for step in range(steps):
            for batch, length in shapes:
                ids = torch.randint(3, VOCAB, (batch, length))
                if between:
                    handle.remove()
                    handle.set_step(step)
                    handle.attach()
                compiled(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    return counter.frame_count, handle


def test_compiled_model_is_noised_and_not_compiled_anew_step_after_step():
    """Steps, an alpha schedule, and removing and re-attaching the handle do not recompile."""
    fields = {"neftune_noise_alpha": 5, "neftune_schedule": "linear"}
    first, handle = graphs([(2, 6)], **fields)
    assert [site.path for site in handle.sites] == ["model.embed_tokens"]
    assert list(handle.noised_steps.values()) == [1]
    again, handle = graphs([(2, 6)], between=True, steps=6, **fields)
    assert list(handle.noised_steps.values()) == [6]
    assert again == first


def test_compiled_model_computes_the_same_noise():
    torch._dynamo.reset()
    model, ids = tiny_llama(attention_dropout=0.0).train(), torch.randint(3, VOCAB, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager")):
        with attach(model, neftune_noise_alpha=5):
            model.zero_grad()
            logits = forward(input_ids=ids, attention_mask=mask).logits
            logits.square().sum().backward()
            results.append((logits.detach(), model.model.embed_tokens.weight.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"fullgraph": True, "dynamic": True}])
def test_noise_breaks_no_graph_and_adds_none(settings):
    """Over seven shapes: as many graphs as the model has without noise."""
    shapes, sizes = [(2, 6), (2, 9), (3, 9), (1, 5), (4, 12), (2, 17), (3, 30)], {}
    for noisy in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, sizes[noisy] = tiny_llama(num_hidden_layers=1).train(), []
        handle = attach(model, neftune_noise_alpha=5 if noisy else None)

        def backend(graph, inputs, noisy=noisy):
            sizes[noisy].append(sum(node.op.startswith("call") for node in graph.graph.nodes))
            return graph

        compiled = torch.compile(model, backend=backend, **settings)
        for batch, length in shapes:
            ids = torch.randint(3, VOCAB, (batch, length))
            compiled(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert not torch._dynamo.utils.counters["graph_break"]
        assert set(handle.noised_steps.values()) == ({1} if noisy else set())
    assert len(sizes[True]) == len(sizes[False])


@pytest.mark.slow
def test_on_and_off_whatever_was_compiled_before():
    """Dynamo has no guards on hooks: code compiled without noise must not run with it, nor vice versa."""
    torch._dynamo.reset()
    model, other = tiny_llama(attention_dropout=0.0).train(), tiny_llama(attention_dropout=0.0).train()
    counter = CompileCounterWithBackend("eager")
    compiled, another = torch.compile(model, backend=counter), torch.compile(other, backend=counter)
    clean = compiled(**BATCH).logits.detach()
    assert torch.equal(another(**BATCH).logits, clean)
    for _ in range(3):
        handle = attach(model, neftune_noise_alpha=5, neftune_seed=0)
        noised = compiled(**BATCH).logits.detach()
        assert not torch.equal(noised, clean)
        assert torch.equal(another(**BATCH).logits, clean)
        assert handle.noised_steps == {"model.embed_tokens": 1}
        handle.remove()
        assert torch.equal(compiled(**BATCH).logits, clean)
        handle.attach()
        assert torch.equal(compiled(**BATCH).logits, noised)
        handle.remove()
    assert counter.frame_count <= 1 + 3  # one graph without noise, and one of each handle
    assert leftovers(model) == []


@pytest.mark.slow
def test_a_baseline_run_and_then_a_noised_one(tmp_path):
    """Two compiled models of one class in one process."""
    torch._dynamo.reset()
    settings = {
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
        "max_steps": 2,
        "dataloader_drop_last": True,
    }
    plain = make(tmp_path, **settings)
    train(plain)
    noised = make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)], **settings)
    train(noised)
    again = make(tmp_path, **settings)
    train(again)
    assert losses(plain) == losses(again) != losses(noised)


@pytest.mark.slow
def test_a_compiler_warns_of_the_width_too():
    torch._dynamo.reset()
    with (
        attach(model := tiny_llama().train(), neftune_noise_alpha=5),
        pytest.warns(NEFTuneWarning, match="padded width"),
    ):
        torch.compile(model, backend="eager")(BATCH["input_ids"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_compilation_on_a_gpu(mode):
    torch._dynamo.reset()
    model = tiny_llama(attention_dropout=0.0, num_hidden_layers=1).cuda().train()
    given = {name: tensor.cuda() for name, tensor in BATCH.items()}
    compiled = torch.compile(model, mode=mode)
    with attach(model, neftune_noise_alpha=5) as handle:
        for step in range(4):
            handle.set_step(step)
            expected = model(**given).logits
            torch.testing.assert_close(compiled(**given).logits.clone(), expected)


def test_an_embedding_compiled_without_its_parents_has_their_mask():
    """As by `model.bert.embeddings.compile()`."""
    torch._dynamo.reset()
    model = tiny_llama().train()
    eager = copy.deepcopy(model)
    model.model.embed_tokens.compile(backend="aot_eager")
    noises = []
    for each in (model, eager):
        with warnings.catch_warnings(), attach(each, neftune_noise_alpha=5, neftune_seed=1):
            warnings.simplefilter("error", NEFTuneWarning)
            noises.append([noise_of(each, **BATCH), noise_of(each, **{k: v[:, 1:] for k, v in BATCH.items()})])
    for compiled, expected in zip(*noises, strict=True):
        assert expected[0].any()
        assert torch.equal(compiled, expected)


@pytest.mark.parametrize("how", ["by hand", "by accelerate", "in a Trainer"])
def test_regional_compilation_is_refused(how, tmp_path):
    """It calls the embedding from copies of the modules that call it, whose arguments are not recorded."""
    torch._dynamo.reset()
    model = tiny_llama()
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)

    def run():
        if how == "by hand":
            attach(compile_regions(model, backend="eager"), neftune_noise_alpha=5)
        elif how == "by accelerate":
            attach(Accelerator(cpu=True, dynamo_plugin=plugin).prepare(model), neftune_noise_alpha=5)
        else:
            trainer = make(tmp_path, model=model, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)])
            trainer.accelerator.state.dynamo_plugin = plugin
            train(trainer)

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(NEFTuneError, match="`use_regional_compilation` compiles the embedding of Llama"):
            run()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert leftovers(model) == []
