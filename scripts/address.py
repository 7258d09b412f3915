"""Write the repository's address into the files that need it; this repository does not know its own.

    python scripts/address.py https://github.com/OWNER/NAME [FILE ...]

By default README.md, whose relative links become absolute for PyPI, pyproject.toml and mkdocs.yml. The workflows do
this before they build; nothing needs to be committed.
"""

import argparse
import re
from pathlib import Path


def readme(text: str, address: str) -> str:
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?://)([^)]+)", rf"\1{address}/raw/main/\2", text)
    return re.sub(r"(?<=\]\()(?!https?://|#)([^)]+)", rf"{address}/blob/main/\1", text)


def pyproject(text: str, address: str) -> str:
    return re.sub(r"(?m)^(Repository = .*\n)?(?=Paper = )", f'Repository = "{address}"\n', text, count=1)


def mkdocs(text: str, address: str) -> str:
    return re.sub(r"(?m)^(repo_url: .*\n)?(?=docs_dir: )", f"repo_url: {address}\n", text, count=1)


FILES = {"README.md": readme, "pyproject.toml": pyproject, "mkdocs.yml": mkdocs}


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
