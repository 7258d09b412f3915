"""NEFTune in axolotl: name the plugin in its YAML, and the `neftune_noise_alpha` that is there already becomes ours.

```yaml
plugins:
  - neftune_hf.axolotl.NEFTunePlugin
neftune_noise_alpha: 5
```
"""

from axolotl.integrations.base import BasePlugin

from .patch import PatchedCallback


class NEFTunePlugin(BasePlugin):
    """Gives axolotl's trainer a [`NEFTuneCallback`], which reads alpha from the trainer's args."""

    def add_callbacks_pre_trainer(self, cfg, model):
        return [PatchedCallback()]
