"""NEFTune in axolotl: name the plugin in its YAML, and the `neftune_noise_alpha` that is there already becomes ours.

```yaml
plugins:
  - neftune_hf.axolotl.NEFTunePlugin
neftune_noise_alpha: 5
```
"""

from axolotl.integrations.base import BasePlugin

from .callback import NEFTuneCallback


class NEFTunePlugin(BasePlugin):
    """Adds a [`NEFTuneCallback`] to axolotl's trainer, which reads alpha from the trainer's args."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        callback = NEFTuneCallback()
        callback.on_init_end(trainer.args, trainer.state, trainer.control)
        return [callback]
