"""Runs at startup in each Python process that `neftune-hf run` starts; do not import it.

Python imports a module of this name at startup if it finds one. `neftune-hf run` puts this folder first in PYTHONPATH,
which child processes inherit. It imports only modules that Python has already loaded, since most processes have no
Trainer.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


class PatchOnImport:
    """Calls `patch_transformers()` once `transformers.trainer` has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.trainer":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                patch()

            spec.loader.exec_module = exec_module
        return spec


def patch():
    try:
        from neftune_hf import patch_transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`neftune-hf run` started {sys.executable}, which has transformers but not {error.name}: install "
            "neftune_hf there, or run the command without `neftune-hf run`.",
            name=error.name,
        ) from error
    patch_transformers()


sys.meta_path.insert(0, PatchOnImport())

# This module hides any other sitecustomize, such as a distribution's, so run that too.
sys.path[:] = [folder for folder in sys.path if Path(folder) != Path(__file__).parent]
if (other := PathFinder.find_spec("sitecustomize")) and other.loader:
    sys.modules["sitecustomize"] = module_from_spec(other)
    other.loader.exec_module(sys.modules["sitecustomize"])
