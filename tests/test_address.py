"""scripts/address.py puts the repository's address into copies of the files that need it, once."""

import re
import shutil
import tomllib

import address
import yaml

from .conftest import ROOT

ADDRESS = "https://github.com/someone/something"


def test_each_file_gets_the_address_once(tmp_path, monkeypatch):
    for name in address.FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    address.main([ADDRESS])
    first = {name: (tmp_path / name).read_text(encoding="utf-8") for name in address.FILES}
    address.main([f"{ADDRESS}/"])
    assert first == {name: (tmp_path / name).read_text(encoding="utf-8") for name in address.FILES}

    links = re.findall(r"\]\(([^)]+)", first["README.md"])
    assert len(links) > 20
    assert all(link.startswith("https://") for link in links)
    assert f"]({ADDRESS}/raw/main/docs/figures/noise_by_layout.svg)" in first["README.md"]
    assert f"]({ADDRESS}/blob/main/docs/alpha.md)" in first["README.md"]
    assert tomllib.loads(first["pyproject.toml"])["project"]["urls"]["Repository"] == ADDRESS
    assert re.search(rf"(?m)^repo_url: {ADDRESS}$", first["mkdocs.yml"])
    assert yaml.safe_load("".join(first["mkdocs.yml"].partition("nav:")[:1]))["repo_url"] == ADDRESS


def test_one_file_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    address.main([ADDRESS, "pyproject.toml"])
    assert tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["urls"]["Repository"] == ADDRESS
