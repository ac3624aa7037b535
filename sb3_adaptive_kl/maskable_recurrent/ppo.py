"""The host of MaskableRecurrentAdaptiveKLPPO: how sb3-contrib's RecurrentPPO collects rollouts under masks, and predicts."""

from typing import Any, ClassVar

from gymnasium import spaces
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv

from sb3_adaptive_kl.maskable_recurrent.buffers import (
    MaskableRecurrentDictRolloutBuffer,
    MaskableRecurrentRolloutBuffer,
)
from sb3_adaptive_kl.maskable_recurrent.masks import MasksOfRollout, check_masking
from sb3_adaptive_kl.maskable_recurrent.policies import (
    MaskableRecurrentActorCriticCnnPolicy,
    MaskableRecurrentActorCriticPolicy,
    MaskableRecurrentMultiInputActorCriticPolicy,
)


class MaskableRecurrentPPO(RecurrentPPO):
    """
    RecurrentPPO whose policy acts under masks.

    It cannot train: RecurrentPPO's ``train`` evaluates actions without masks, so an algorithm has to bring its own.
    """

    policy: MaskableRecurrentActorCriticPolicy
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": MaskableRecurrentActorCriticPolicy,
        "CnnLstmPolicy": MaskableRecurrentActorCriticCnnPolicy,
        "MultiInputLstmPolicy": MaskableRecurrentMultiInputActorCriticPolicy,
    }

    # Both use only what every on-policy algorithm has; learn() passes use_masking on to collect_rollouts()
    learn = MaskablePPO.learn  # type: ignore[assignment]
    predict = MaskablePPO.predict

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, MaskableRecurrentActorCriticPolicy):
            raise ValueError(f"policy={self.policy_class.__name__} must subclass MaskableRecurrentActorCriticPolicy")
        super()._setup_model()
        # RecurrentPPO has no argument for the class of its buffer
        has_keys = isinstance(self.observation_space, spaces.Dict)
        buffer_class = MaskableRecurrentDictRolloutBuffer if has_keys else MaskableRecurrentRolloutBuffer
        self.rollout_buffer = buffer_class(
            self.n_steps,
            self.observation_space,
            self.action_space,
            self.rollout_buffer.hidden_state_shape,  # type: ignore[attr-defined]
            self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
        )

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int, use_masking: bool = True
    ) -> bool:
        """
        Collect as RecurrentPPO does, under the masks of the environments.

        :param env: the environments, each with a method ``action_masks()``
        :param callback: its calls of ``model.policy(...)`` for all environments, with positional arguments, are masked, too,
            unless they give ``action_masks``
        :param rollout_buffer: to be filled
        :param n_rollout_steps: steps of each environment
        :param use_masking: whether to ask for masks; otherwise everything is allowed
        :return: ``False`` if the callback ended the rollout
        :raises ValueError: if there are no masks, or if they do not fit the action space
        :raises RuntimeError: if a callback replaces ``model.policy``
        """
        rollout_buffer.needs_masks, rollout_buffer.next_masks = use_masking, None
        if not use_masking:
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        check_masking(env)
        masks = MasksOfRollout(env, rollout_buffer)
        hook = self.policy.register_forward_pre_hook(masks, with_kwargs=True)
        try:
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        finally:
            hook.remove()

    def train(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no train() that evaluates actions under masks")
