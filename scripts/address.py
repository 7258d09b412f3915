"""Write the repository's address into the files that need it; this repository does not know its own.

    python scripts/address.py https://github.com/OWNER/NAME [FILE ...]

By default README.md, whose relative links become absolute for PyPI, pyproject.toml, mkdocs.yml, and the notebook, which
gets a Colab badge. The workflows do this before they build; nothing needs to be committed.
"""

import argparse
import json
import re
from pathlib import Path


def readme(text: str, address: str) -> str:
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?://)([^)]+)", rf"\1{address}/raw/main/\2", text)
    return re.sub(r"(?<=\]\()(?!https?://|#)([^)]+)", rf"{address}/blob/main/\1", text)


def pyproject(text: str, address: str) -> str:
    return re.sub(r"(?m)^(Repository = .*\n)?(?=Paper = )", f'Repository = "{address}"\n', text, count=1)


def mkdocs(text: str, address: str) -> str:
    return re.sub(r"(?m)^(repo_url: .*\n)?(?=docs_dir: )", f"repo_url: {address}\n", text, count=1)


def notebook(text: str, address: str) -> str:
    content = json.loads(text)
    path = address.removeprefix("https://github.com/")
    url = f"https://colab.research.google.com/github/{path}/blob/main/docs/quickstart.ipynb"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"
    source = [line for line in content["cells"][0]["source"] if "colab-badge" not in line]
    content["cells"][0]["source"] = [f"{badge}\n", *source]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


FILES = {"README.md": readme, "pyproject.toml": pyproject, "mkdocs.yml": mkdocs, "docs/quickstart.ipynb": notebook}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("files", nargs="*", metavar="FILE")
    options = parser.parse_args(argv)
    for name in options.files or FILES:
        path = Path(name)
        path.write_text(FILES[name](path.read_text(encoding="utf-8"), options.address.rstrip("/")), encoding="utf-8")


if __name__ == "__main__":
    main()
