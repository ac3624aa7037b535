"""
Evaluation under masks, with a memory.

sb3-contrib's maskable ``evaluate_policy`` and ``MaskableEvalCallback`` drop the LSTM's state, and SB3's know no masks. Here
SB3's evaluate a model that asks the environment for its masks.
"""

from typing import Any

from stable_baselines3.common import evaluation
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.type_aliases import GymEnv

from sb3_adaptive_kl.maskable_recurrent.masks import check_masking, masks_of


class UnderMasks:
    """
    What SB3 evaluates: a model whose ``predict`` asks the environment for the masks. All else is the model's.

    :param model: a model with masks
    :param env: the environments that it is evaluated in, with a method ``action_masks()``
    """

    def __init__(self, model: Any, env: GymEnv) -> None:
        self.model, self.env = model, env

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.predict(*args, **kwargs, action_masks=masks_of(self.env))

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # copy() asks for attributes before there are any
            raise AttributeError(name)
        return getattr(self.model, name)


def evaluate_policy(model: Any, env: GymEnv, *args: Any, use_masking: bool = True, **kwargs: Any) -> Any:
    """
    Run episodes under masks, with or without a memory, as SB3's ``evaluate_policy`` does.

    :param model: MaskableRecurrentAdaptiveKLPPO or MaskableAdaptiveKLPPO
    :param env: environment, or several, with a method ``action_masks()``
    :param args: as for SB3's
    :param use_masking: whether to ask for masks
    :param kwargs: as for SB3's
    :return: the mean return and its standard deviation, or what ``return_episode_rewards`` says
    :raises ValueError: if the environments have no masks
    """
    if use_masking:
        check_masking(env)
        model = UnderMasks(model, env)
    return evaluation.evaluate_policy(model, env, *args, **kwargs)


class MaskableEvalCallback(EvalCallback):
    """
    Evaluate during training under masks, with or without a memory, as SB3's ``EvalCallback`` does.

    :param args: as for SB3's
    :param use_masking: whether to ask for masks
    :param kwargs: as for SB3's
    """

    def __init__(self, *args: Any, use_masking: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_masking = use_masking

    def _init_callback(self) -> None:
        super()._init_callback()
        if self.use_masking:
            check_masking(self.eval_env)

    def _on_step(self) -> bool:
        model = self.model
        if self.use_masking:
            self.model = UnderMasks(model, self.eval_env)  # type: ignore[assignment]
        try:
            return super()._on_step()
        finally:
            self.model = model
