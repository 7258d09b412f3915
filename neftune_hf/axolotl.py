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
    """Adds a [`NEFTuneCallback`] to axolotl's trainer.

    It reads alpha from axolotl's config, because axolotl's builders for `rl` do not pass it on to the trainer's args.
    """

    def add_callbacks_pre_trainer(self, cfg, model):
        return [PatchedCallback(neftune_noise_alpha=cfg.neftune_noise_alpha)]
