"""`neftune-hf env`: print versions for a bug report."""

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("neftune_hf", "torch", "transformers", "accelerate", "trl", "datasets", "peft", "bitsandbytes", "triton")


def run(argv: Sequence[str]) -> None:
    """Print the versions of Python and the main packages, and the device."""
    argparse.ArgumentParser(prog="neftune-hf env", description=run.__doc__).parse_args(argv)
    import torch

    print(f"{'platform':14}{platform.platform()}\n{'python':14}{platform.python_version()}")
    for name in _PACKAGES:
        try:
            print(f"{name:14}{version(name)}")
        except PackageNotFoundError:
            print(f"{name:14}not installed")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    print(f"{'device':14}{', '.join(names) or device}")
