"""LSTM policies with invalid actions: sb3-contrib's recurrent policies, whose action distributions are masked."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch as th
from sb3_contrib.common.maskable.distributions import MaskableDistribution, MaybeMasks, make_masked_proba_distribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.type_aliases import Schedule

from sb3_adaptive_kl.maskable_recurrent.masks import check_shape


class MaskableRecurrentActorCriticPolicy(RecurrentActorCriticPolicy):
    """
    sb3-contrib's LSTM policy for environments with invalid actions.

    The arguments are those of its ``RecurrentActorCriticPolicy``. ``forward``, ``evaluate_actions``, ``get_distribution``
    and ``predict`` take ``action_masks`` besides: shape (B, choices), True where a choice is allowed; ``None``: all are.
    """

    # Of the call in progress: all methods of the base make their distribution in _get_action_dist_from_latent
    _action_masks: MaybeMasks = None

    def _build(self, lr_schedule: Schedule) -> None:
        # SB3's constructor made an unmasked distribution, for which the action network would be too small: a masked
        # MultiBinary needs two outputs per switch
        self.action_dist = make_masked_proba_distribution(self.action_space)
        MaskableActorCriticPolicy._build(self, lr_schedule)  # type: ignore[arg-type]  # it calls what both policies have

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> MaskableDistribution:
        logits = self.action_net(latent_pi)
        distribution: MaskableDistribution = self.action_dist.proba_distribution(logits)  # type: ignore[assignment]
        if self._action_masks is not None:
            masks = th.as_tensor(self._action_masks)
            check_shape(masks.shape, self.action_space, *logits.shape)
            distribution.apply_masking(masks)
        return distribution

    @contextmanager
    def _masked(self, action_masks: MaybeMasks) -> Iterator[None]:
        outer = self._action_masks  # predict() calls get_distribution()
        self._action_masks = outer if action_masks is None else action_masks
        try:
            yield
        finally:
            self._action_masks = outer

    def forward(  # type: ignore[override]  # as contrib's
        self,
        obs: th.Tensor,
        lstm_states: RNNStates,
        episode_starts: th.Tensor,
        deterministic: bool = False,
        action_masks: MaybeMasks = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, RNNStates]:
        """Choose actions as ``RecurrentActorCriticPolicy`` does, under masks."""
        with self._masked(action_masks):
            return super().forward(obs, lstm_states, episode_starts, deterministic)

    def evaluate_actions(  # type: ignore[override]  # as contrib's
        self,
        obs: th.Tensor,
        actions: th.Tensor,
        lstm_states: RNNStates,
        episode_starts: th.Tensor,
        action_masks: MaybeMasks = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Evaluate actions as ``RecurrentActorCriticPolicy`` does, under masks."""
        with self._masked(action_masks):
            return super().evaluate_actions(obs, actions, lstm_states, episode_starts)

    def get_distribution(  # type: ignore[override]  # as contrib's
        self,
        obs: th.Tensor,
        lstm_states: tuple[th.Tensor, th.Tensor],
        episode_starts: th.Tensor,
        action_masks: MaybeMasks = None,
    ) -> tuple[MaskableDistribution, tuple[th.Tensor, ...]]:
        """Get the distribution and the LSTM's new state as ``RecurrentActorCriticPolicy`` does, under masks."""
        with self._masked(action_masks):
            return super().get_distribution(obs, lstm_states, episode_starts)  # type: ignore[return-value]

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: MaybeMasks = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Choose actions as ``RecurrentActorCriticPolicy`` does, under masks.

        :param observation: of one environment or of several
        :param state: what the last call returned, ``None`` where all episodes begin
        :param episode_start: whether an episode begins, shape (n_envs,)
        :param deterministic: whether to take the most likely action
        :param action_masks: shape (choices,) or (n_envs, choices), True where a choice is allowed; ``None``: all are
        :return: the actions, and the state for the next call
        :raises ValueError: if the masks do not fit, or if ``state`` is missing within an episode
        """
        if state is None and episode_start is not None and not np.all(episode_start):
            raise ValueError(
                "predict(state=None) within an episode (episode_start is False) would forget what it has seen: pass the state "
                "that the last call returned. sb3-contrib's maskable evaluate_policy and MaskableEvalCallback do not: take "
                "those of sb3_adaptive_kl.maskable_recurrent instead"
            )
        with self._masked(action_masks):
            return super().predict(observation, state, episode_start, deterministic)


class MaskableRecurrentActorCriticCnnPolicy(MaskableRecurrentActorCriticPolicy, RecurrentActorCriticCnnPolicy):
    """The same for images: sb3-contrib's policy has the constructor, and nothing else."""


class MaskableRecurrentMultiInputActorCriticPolicy(MaskableRecurrentActorCriticPolicy, RecurrentMultiInputActorCriticPolicy):
    """The same for dict observations."""
