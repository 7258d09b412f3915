"""Started by torchrun in test_sharded: `neftune-hf compare` with FSDP2 or DeepSpeed on CPU processes.

python -m tests.compare.sharded [OPTION ...]
"""

import sys

from neftune_hf.cli import main

from ..ranks import accelerator_on_cpu

if __name__ == "__main__":
    accelerator_on_cpu()
    sys.exit(main(["compare", *sys.argv[1:]]))  # on success, the command itself exits, as gloo may hang
