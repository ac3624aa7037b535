"""
The algorithms in RL Baselines3 Zoo (https://github.com/DLR-RM/rl-baselines3-zoo): `--algo ppo_kl`, `ppo_kl_lstm`,
`ppo_kl_mask` and `ppo_kl_mask_lstm`.

The start-up hook (`zoo_hook/`) registers them as soon as the zoo is imported. `python -m sb3_adaptive_kl.zoo train …` runs the
zoo's scripts without the hook. Nothing in this package imports the zoo before one of its functions is called.
"""

from sb3_adaptive_kl.zoo.hyperparameters import hyperparameter_file
from sb3_adaptive_kl.zoo.launcher import main
from sb3_adaptive_kl.zoo.registry import ALGORITHMS, REGISTRIES, complete_registry
from sb3_adaptive_kl.zoo.trust_region_strings import parse_trust_region

__all__ = ["ALGORITHMS", "REGISTRIES", "complete_registry", "hyperparameter_file", "main", "parse_trust_region"]
