"""What an import loads, the public names, and README's claims and links."""

import csv
import re
import subprocess
import sys

import pytest
import yaml

import neftune_hf
from neftune_hf import errors

from .conftest import ROOT


def loaded_by(code: str) -> set[str]:
    heavy = ("torch", "transformers", "accelerate", "trl", "peft", "datasets")
    code += f"\nimport sys; print(*[m for m in {heavy} if m in sys.modules])"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.slow
def test_import_is_light_and_the_test_can_see_what_is_not():
    assert loaded_by("import neftune_hf") == set()
    assert loaded_by("from neftune_hf import attach, add_noise, NEFTuneConfig") == {"torch"}
    assert {"trl"} <= loaded_by("from neftune_hf import NEFTuneSFTTrainer")


def test_public_names():
    assert sorted(neftune_hf.__all__) == neftune_hf.__all__
    for name in neftune_hf.__all__:
        assert "```python" in getattr(neftune_hf, name).__doc__, name  # an example, which test_examples runs
        assert name in dir(neftune_hf)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = neftune_hf.nothing


def test_the_tests_that_the_docs_name_exist():
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    named = re.findall(r"`(test_\w+)\.(test_\w+)`", pages)
    assert len(named) >= 15
    for module, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"{module}.py").read_text(), f"{module}.{test}"


def test_readme_is_short_shows_a_figure_first_and_its_links_exist():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 80
    assert "](docs/figures/noise_by_layout.svg)" in "".join(readme.splitlines(keepends=True)[:12])
    linked = re.findall(r"\]\((?!https:)([^)#]+)", readme)
    assert len(linked) > 10
    for file in linked:
        assert (ROOT / file).is_file(), file


def test_the_numbers_of_model_types_are_those_of_the_table():
    with (ROOT / "docs" / "models.csv").open(newline="") as file:
        results = [row["result"].partition(":")[0] for row in csv.DictReader(file)]
    noised, refused = results.count("noised"), results.count("refused")
    rest = len(results) - noised - refused
    page = (ROOT / "docs" / "limits.md").read_text()
    assert f"Of the {len(results)} model types" in page
    assert f"{noised} get the right noise, {refused} are refused, and {rest} could not be tried" in page


def test_workflows_and_templates_parse_and_what_they_name_exists():
    files = [file for file in (ROOT / ".github").rglob("*") if file.is_file()]
    assert {"bug.yml", "PULL_REQUEST_TEMPLATE.md", "SECURITY.md", "nightly.yml"} <= {file.name for file in files}
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert file.suffix == ".md" or isinstance(yaml.safe_load(text), dict)
        for name in re.findall(r"\b(?:scripts|tests)/\w+\.\w+|\.ci/run|CONTRIBUTING\.md", text):
            assert (ROOT / name).is_file(), f"{file.name}: {name}"
        for name in re.findall(r"neftune-hf (\w+)", text):
            assert (ROOT / "neftune_hf" / "cli" / f"{name}.py").is_file(), f"{file.name}: {name}"


def test_the_package_loads_no_pickle_and_no_unsafe_yaml():
    """As .github/SECURITY.md says."""
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "neftune_hf").rglob("*.py"))
    assert "yaml.safe_load" in source
    assert not re.findall(r"pickle\.loads?\(|torch\.load\(|yaml\.load\(", source)


def test_every_public_name_is_on_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in neftune_hf.__all__:
        assert f"::: neftune_hf.{name}\n" in page or name in page.rpartition("members:")[2], name


def test_every_name_of_the_api_page_is_imported_from_where_it_says():
    page = (ROOT / "docs" / "api.md").read_text()
    names = re.findall(r"^::: neftune_hf\.([A-Za-z_]+)\n", page, re.MULTILINE)
    assert set(names) - {"errors"} <= set(neftune_hf.__all__)
    classes = re.search(r"(?s).*members: \[(.*)\]", page)[1].split(", ")
    own = [value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__]
    assert set(classes) == {value.__name__ for value in own}
