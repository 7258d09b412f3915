"""TRL's trainers of preferences and rollouts, each with its config, data, settings and arguments."""

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.kto import KTOConfig, KTOTrainer

PREFERENCES = {"prompt": ["one", "two"] * 4, "chosen": [" yes", " good day"] * 4, "rejected": [" no", " bye"] * 4}
RATED = {"prompt": ["one", "two"] * 4, "completion": [" yes", " no"] * 4, "label": [True, False] * 4}
PROMPTS = {"prompt": ["one", "two"] * 4}
ROLLOUTS = {"max_completion_length": 4, "num_generations": 2, "beta": 0.1, "temperature": 1.0}


def by_length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


TRAINERS = {
    "DPO": (DPOTrainer, DPOConfig, PREFERENCES, {}, {}),
    "DPO, precomputed": (DPOTrainer, DPOConfig, PREFERENCES, {"precompute_ref_log_probs": True}, {}),
    "KTO": (KTOTrainer, KTOConfig, RATED, {}, {}),
    "reward": (RewardTrainer, RewardConfig, {k: PREFERENCES[k] for k in ("chosen", "rejected")}, {}, {}),
    "GRPO": (GRPOTrainer, GRPOConfig, PROMPTS, ROLLOUTS, {"reward_funcs": by_length}),
    "GRPO, twice": (GRPOTrainer, GRPOConfig, PROMPTS, ROLLOUTS | {"num_iterations": 2}, {"reward_funcs": by_length}),
    "RLOO": (RLOOTrainer, RLOOConfig, PROMPTS, ROLLOUTS, {"reward_funcs": by_length}),
}
