"""The search space of `-optimize`: the zoo's for PPO, with the KL penalty in place of the clip range."""

from collections.abc import Callable
from typing import Any

from sb3_adaptive_kl.penalty import RULES

# Arguments: an Optuna trial, n_actions, n_envs, additional_args. Returns hyperparameters.
Sampler = Callable[[Any, int, int, dict[str, Any]], dict[str, Any]]


class TrialWithoutClipRange:
    """
    Wrap an Optuna trial so that the zoo's PPO sampler cannot suggest a clip range.

    Removing the value afterwards is not enough: the trial would still store it, and ``--trial-id`` would replay it.

    :param trial: the trial that receives all other suggestions
    """

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return None if name == "clip_range" else self._trial.suggest_categorical(name, choices)


def penalty_sampler(sample_ppo_params: Sampler) -> Sampler:
    """
    Replace the clip range by the KL penalty in the zoo's search space for PPO.

    :param sample_ppo_params: the zoo's sampler for PPO
    :return: a sampler for PPO with the penalty. The zoo's converter passes its parameters through under their own names.
    """

    def sample_ppo_kl_params(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        hyperparams = sample_ppo_params(TrialWithoutClipRange(trial), n_actions, n_envs, additional_args)
        del hyperparams["clip_range"]
        # Around the paper's values: 0.01, 1 and 2
        hyperparams["target_kl"] = trial.suggest_float("target_kl", 0.003, 0.1, log=True)
        hyperparams["init_kl_coef"] = trial.suggest_float("init_kl_coef", 0.1, 10.0, log=True)
        hyperparams["kl_rule"] = trial.suggest_categorical("kl_rule", list(RULES))
        if hyperparams["kl_rule"] == "adaptive":  # the others do not have it
            hyperparams["kl_factor"] = trial.suggest_float("kl_factor", 1.2, 2.0)
        return hyperparams

    return sample_ppo_kl_params
