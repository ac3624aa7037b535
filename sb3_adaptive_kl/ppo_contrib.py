"""The variants whose hosts are sb3-contrib's: invalid action masking, LSTM policies, and both."""

from pathlib import Path
from typing import Any

import torch as th
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_adaptive_kl.algorithm import constructor_arguments
from sb3_adaptive_kl.learning_rate import LearningRateRule
from sb3_adaptive_kl.maskable_recurrent.masks import check_shape, masks_of
from sb3_adaptive_kl.maskable_recurrent.policies import MaskableRecurrentActorCriticPolicy
from sb3_adaptive_kl.maskable_recurrent.ppo import MaskableRecurrentPPO
from sb3_adaptive_kl.penalty import PenaltyRule
from sb3_adaptive_kl.reference import ReferencePolicy
from sb3_adaptive_kl.training import KLPenaltyTraining


class MaskableAdaptiveKLPPO(KLPenaltyTraining, MaskablePPO):  # type: ignore[misc]  # as for AdaptiveKLPPO
    """
    Proximal Policy Optimization algorithm (PPO) (adaptive KL penalty version) with invalid action masking

    Papers: https://arxiv.org/abs/1707.06347, section 4, and https://arxiv.org/abs/2006.14171

    The KL divergence is that of the masked distributions: an action that is masked contributes exactly nothing. Where a mask
    leaves no action at all, sb3-contrib draws from all of them, and so does this.

    The arguments are those of sb3-contrib's MaskablePPO and, for the penalty, those of
    :class:`~sb3_adaptive_kl.AdaptiveKLPPO`, where all of them are described.

    :raises ValueError: if an argument is out of its range
    """

    def __init__(
        self,
        policy: str | type[MaskableActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int | None = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | str | Schedule | None = None,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float | Schedule = 0.5,
        max_grad_norm: float = 0.5,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | Schedule = 0.02,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        init_kl_coef: float = 1.0,
        kl_rule: str | dict[str, Any] | PenaltyRule = "adaptive",
        kl_coef_bounds: tuple[float, float] | None = None,
        kl_ceiling: float | None = None,
        learning_rate_rule: str | dict[str, Any] | LearningRateRule | None = None,
        kl_divergence: str = "forward",
        kl_cutoff_coef: float = 0.0,
        kl_stop_factor: float | None = None,
        reference_policy: BasePolicy | str | Path | dict[str, Any] | ReferencePolicy | None = None,
        compile: bool = False,
        _init_setup_model: bool = True,
    ):
        super().__init__(**constructor_arguments(locals()))

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
        use_masking: bool = True,
    ) -> bool:
        """
        Collect as MaskablePPO does.

        :raises ValueError: if the masks do not fit the action space
        """
        try:
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps, use_masking)
        except (RuntimeError, TypeError):  # torch's, about shapes or types of arrays
            if use_masking:
                n_choices = rollout_buffer.mask_dims  # type: ignore[attr-defined]  # of a MaskableRolloutBuffer
                check_shape(masks_of(env).shape, self.action_space, env.num_envs, n_choices)
            raise


class RecurrentAdaptiveKLPPO(KLPenaltyTraining, RecurrentPPO):  # type: ignore[misc]  # as for AdaptiveKLPPO
    """
    Proximal Policy Optimization algorithm (PPO) (adaptive KL penalty version) with support for recurrent policies (LSTM)

    Paper: https://arxiv.org/abs/1707.06347, section 4

    The hidden states are those of collection. Padded steps of a minibatch are dropped before anything is computed from them.

    The arguments are those of sb3-contrib's RecurrentPPO and, for the penalty, those of
    :class:`~sb3_adaptive_kl.AdaptiveKLPPO`, where all of them are described.

    :raises ValueError: if an argument is out of its range
    """

    policy: RecurrentActorCriticPolicy

    def __init__(
        self,
        policy: str | type[RecurrentActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 128,
        batch_size: int | None = 128,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | str | Schedule | None = None,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float | Schedule = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        target_kl: float | Schedule = 0.02,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        init_kl_coef: float = 1.0,
        kl_rule: str | dict[str, Any] | PenaltyRule = "adaptive",
        kl_coef_bounds: tuple[float, float] | None = None,
        kl_ceiling: float | None = None,
        learning_rate_rule: str | dict[str, Any] | LearningRateRule | None = None,
        kl_divergence: str = "forward",
        kl_cutoff_coef: float = 0.0,
        kl_stop_factor: float | None = None,
        reference_policy: BasePolicy | str | Path | dict[str, Any] | ReferencePolicy | None = None,
        compile: bool = False,
        _init_setup_model: bool = True,
    ):
        super().__init__(**constructor_arguments(locals()))


class MaskableRecurrentAdaptiveKLPPO(RecurrentAdaptiveKLPPO, MaskableRecurrentPPO):  # type: ignore[misc]  # as for AdaptiveKLPPO
    """
    Proximal Policy Optimization algorithm (PPO) (adaptive KL penalty version) with invalid action masking and support for
    recurrent policies (LSTM)

    Papers: https://arxiv.org/abs/1707.06347, section 4, and https://arxiv.org/abs/2006.14171

    The KL divergence is that of the masked distributions: an action that is masked contributes exactly nothing, nor does a
    padded step. The hidden states are those of collection. The LSTM does not see the masks: what it has to remember of them
    belongs in the observation.

    The arguments are those of :class:`~sb3_adaptive_kl.RecurrentAdaptiveKLPPO`. (gSDE needs continuous actions, which cannot
    be masked.)

    :raises ValueError: if an argument is out of its range
    """

    policy: MaskableRecurrentActorCriticPolicy
