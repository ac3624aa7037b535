"""The search space of `-optimize`: the zoo's for PPO, with the KL penalty in place of the clip range."""

from collections.abc import Callable
from copy import copy
from typing import Any

from sb3_adaptive_kl.penalty import RULES

# From an Optuna trial, and arguments that are passed on, to hyperparameters
Sampler = Callable[..., dict[str, Any]]


def penalty_sampler(sample_ppo_params: Sampler) -> Sampler:
    """
    Replace the clip range by the KL penalty in the zoo's search space for PPO.

    :param sample_ppo_params: the zoo's sampler for PPO
    :return: a sampler for PPO with the penalty. The zoo's converter passes its parameters through under their own names.
    """

    def sample_ppo_kl_params(trial: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        def suggest_categorical(name: str, choices: list[Any]) -> Any:
            return None if name == "clip_range" else trial.suggest_categorical(name, choices)

        # If only the result lost its clip range, the trial would still store one, and --trial-id would replay it
        trial_without_clip_range = copy(trial)
        trial_without_clip_range.suggest_categorical = suggest_categorical
        hyperparams = sample_ppo_params(trial_without_clip_range, *args, **kwargs)
        del hyperparams["clip_range"]
        # Around the paper's values: 0.01 and 1
        hyperparams["target_kl"] = trial.suggest_float("target_kl", 0.003, 0.1, log=True)
        hyperparams["init_kl_coef"] = trial.suggest_float("init_kl_coef", 0.1, 10.0, log=True)
        hyperparams["kl_rule"] = trial.suggest_categorical("kl_rule", list(RULES))
        return hyperparams

    return sample_ppo_kl_params
