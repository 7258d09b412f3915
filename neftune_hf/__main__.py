"""`python -m neftune_hf` is `neftune-hf`."""

import sys

from .cli import main

sys.exit(main())
