"""Shuffle a JSON file of records with random.Random(0), and write the given ranges as train.json and test.json.

python scripts/split.py alpaca.json outputs/data --train 0 128 --test 128 178
"""

import argparse
import json
import random
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    for part in ("train", "test"):
        parser.add_argument(f"--{part}", type=int, nargs=2, metavar=("FROM", "TO"), required=True)
    options = parser.parse_args()
    records = json.loads(options.file.read_text(encoding="utf-8"))
    random.Random(0).shuffle(records)
    options.folder.mkdir(parents=True, exist_ok=True)
    for part, (start, end) in {"train": options.train, "test": options.test}.items():
        if end > len(records):
            parser.error(f"`--{part}` asks for record {end}; {options.file} has {len(records)}.")
        (options.folder / f"{part}.json").write_text(json.dumps(records[start:end]), encoding="utf-8")


if __name__ == "__main__":
    main()
