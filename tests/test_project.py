"""The shape of the project: the order of the rooms, what an import loads, and what README promises."""

import ast
import re
import subprocess
import sys

import pytest

import neftune_hf

from .conftest import ROOT

PACKAGE = ROOT / "neftune_hf"
# fmt: off
ROOMS = ["errors", "config", "noise", "fused", "kernels", "lengths", "embeddings", "hook", "callback", "card",
         "trainer", "patch", "axolotl", "sft", "data"]
# fmt: on
CORE = [room for room in ROOMS if room != "data"]


def imports(source: str) -> tuple[set[str], set[str]]:
    """Rooms and packages that a module imports, anywhere in it."""
    rooms, packages = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            rooms |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
    return rooms, packages


def test_the_reader_of_imports_sees_them():
    assert imports("from .hook import a\nfrom . import noise\ndef f():\n    import trl.x") == (
        {"hook", "noise"},
        {"trl"},
    )


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
    rooms, packages = imports((PACKAGE / f"{room}.py").read_text())
    assert rooms <= set(ROOMS[: ROOMS.index(room)])
    if ROOMS.index(room) < ROOMS.index("sft"):
        assert not packages & {"trl", "peft", "datasets"}


def test_every_module_is_a_room():
    assert {file.stem for file in PACKAGE.glob("*.py")} == {*ROOMS, "__init__", "__main__"}


def test_sizes():
    lines = {file.stem: len(file.read_text().splitlines()) for file in PACKAGE.glob("*.py")}
    assert max(lines.values()) < 400
    assert sum(lines[room] for room in CORE) < 1550


def loaded_by(code: str) -> set[str]:
    heavy = ("torch", "transformers", "accelerate", "trl", "peft", "datasets")
    code += f"\nimport sys; print(*[m for m in {heavy} if m in sys.modules])"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_is_light_and_the_test_can_see_what_is_not():
    assert loaded_by("import neftune_hf") == set()
    assert loaded_by("from neftune_hf import attach, add_noise, NEFTuneConfig") == {"torch"}
    assert {"trl"} <= loaded_by("from neftune_hf import NEFTuneSFTTrainer")


def test_public_names():
    assert sorted(neftune_hf.__all__) == neftune_hf.__all__
    for name in neftune_hf.__all__:
        assert getattr(neftune_hf, name).__doc__.strip()
        assert name in dir(neftune_hf)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = neftune_hf.nothing


def test_readme_names_tests_that_exist():
    readme = (ROOT / "README.md").read_text()
    named = re.findall(r"`(test_\w+)\.(test_\w+)`", readme)
    assert len(named) >= 8
    for module, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"{module}.py").read_text(), f"{module}.{test}"
