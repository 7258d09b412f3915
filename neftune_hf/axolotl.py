"""NEFTune in axolotl: with this plugin in the YAML, its existing `neftune_noise_alpha` is handled by this library.

```yaml
plugins:
  - neftune_hf.axolotl.NEFTunePlugin
neftune_noise_alpha: 5
```
"""

from axolotl.integrations.base import BasePlugin

from .patch import PatchedCallback


class NEFTunePlugin(BasePlugin):
    """Adds a [`NEFTuneCallback`], which reads alpha from the trainer's args, to axolotl's trainer."""

    def add_callbacks_pre_trainer(self, cfg, model):
        return [PatchedCallback()]
