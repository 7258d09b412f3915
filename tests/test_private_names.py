"""The private and undocumented names of other libraries that this one uses, each with the module that uses it."""

import ast
import importlib
import inspect
import re

import pytest

from .conftest import ROOT

# Names that must exist.
NAMES = {
    "torch._C._current_graph_task_id": "hooks",
    "torch._C._functorch.is_functorch_wrapped_tensor": "kernels/__init__",
    "torch._dynamo.assume_constant_result": "layout",
    "torch.distributed.tensor.experimental._attention.context_parallel_unshard": "distributed",
    "torch.distributed.tensor.experimental._context_parallel": "distributed",
    "torch.distributed.tensor.experimental._context_parallel._attention._cp_options": "distributed",
    "transformers.trainer_callback.CallbackHandler": "callback",
    "torch.utils.checkpoint.CheckpointFunction.forward": "hooks",
    "transformers.integrations.neftune.neftune_post_forward_hook": "callback",
    "transformers.PreTrainedModel._input_embed_layer": "distributed",
    "accelerate.state.AcceleratorState": "distributed",
    "accelerate.state.is_initialized": "distributed",
    "trl.data_utils.get_dataset_column_names": "cli/data",
    "trl.data_utils.maybe_convert_to_chatml": "cli/data",
    "trl.models.utils.unwrap_model_for_generation": "compare/measure",
    "lm_eval.config.evaluate_config.EvaluatorConfig": "compare/tasks",
    "deepspeed.utils.groups._get_sequence_parallel_group": "distributed",
    "deepspeed.utils.groups._get_sequence_parallel_world_size": "distributed",
    "deepspeed.utils.groups.mesh_device": "distributed",
    "deepspeed.utils.groups.mpu": "distributed",
    "verl.utils.ulysses.get_ulysses_sequence_parallel_world_size": "distributed",
}

# Attributes that only instances have: the source of the host must mention them.
ATTRIBUTES = {
    ("torch.nn.Module", "_forward_hooks"): "hooks",
    ("torch.nn.Module", "_forward_hooks_with_kwargs"): "hooks",
    ("torch.nn.Module", "_modules"): "distributed",
    ("transformers.Trainer", "neftune_noise_alpha"): "callback",
    ("transformers.distributed.pipeline_parallel", "_pp_stage"): "distributed",
    ("transformers.distributed.pipeline_parallel", "pp_is_first_stage"): "distributed",
    ("accelerate.state.AcceleratorState", "device_mesh"): "distributed",
    ("accelerate.state.AcceleratorState", "parallelism_config"): "distributed",
    ("deepspeed.module_inject.layers", "_orig_weight_shape"): "embeddings",
    ("deepspeed.module_inject.layers", "VocabParallelEmbedding"): "embeddings",
    ("deepspeed.module_inject.layers", "HiddenParallelEmbedding"): "embeddings",
}

STANDARD_LIBRARY = {"_actions", "_exit", "_getframe", "_run_exitfuncs"}
NOT_FOR_EVERYONE = ("deepspeed", "lm_eval", "verl")  # skipped if they are not installed


def resolve(dotted: str):
    """The module or attribute of this name."""
    first, *names = dotted.split(".")
    found = importlib.import_module(first)
    for name in names:
        if not hasattr(found, name) and inspect.ismodule(found):
            importlib.import_module(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found


def skip_without_host(dotted: str) -> None:
    if (host := dotted.split(".")[0]) in NOT_FOR_EVERYONE:
        pytest.importorskip(host, reason=f"{host} is not installed: its private names are not tested")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_we_use_exists(name):
    skip_without_host(name)
    try:
        resolve(name)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"{name} is gone ({error}); neftune_hf/{NAMES[name]}.py uses it")


@pytest.mark.parametrize(("host", "attribute"), ATTRIBUTES)
def test_an_attribute_that_we_use_is_in_its_hosts_source(host, attribute):
    skip_without_host(host)
    user = f"neftune_hf/{ATTRIBUTES[host, attribute]}.py uses its `{attribute}`"
    try:
        source = inspect.getsource(resolve(host))
    except (AttributeError, ImportError) as error:
        pytest.fail(f"{host} is gone ({error}); {user}")
    assert re.search(rf"\b{attribute}\b", source), f"{host} no longer mentions `{attribute}`; {user}"


def test_our_modules_mention_the_names():
    uses = {name.rsplit(".", 1)[1]: module for name, module in NAMES.items()}
    uses["CheckpointFunction"] = uses.pop("forward")
    for name, module in (uses | {name: module for (_, name), module in ATTRIBUTES.items()}).items():
        source = (ROOT / "neftune_hf" / f"{module}.py").read_text(encoding="utf-8")
        assert re.search(rf"\b{name}\b", source), f"neftune_hf/{module}.py no longer uses {name}: remove it here"


def test_every_private_name_in_our_modules_is_listed():
    """Attributes with an underscore that this library does not define, and imports from modules with one."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "neftune_hf").rglob("*.py")}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    ours = {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    ours |= {node.id for _, node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    ours |= {
        node.attr
        for _, node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    ours |= {file.stem for file in trees}
    listed = {part for name in NAMES for part in name.split(".")} | {name for _, name in ATTRIBUTES}
    for file, node in nodes:
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        private = {name for name in names if re.match(r"_[^_]", name)} - ours - listed - STANDARD_LIBRARY
        assert not private, f"{file.relative_to(ROOT)}, line {node.lineno}: {private} is in neither table of this file"
