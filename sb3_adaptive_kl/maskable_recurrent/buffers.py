"""Rollout buffers for sequences with masks: sb3-contrib's two kinds of buffer, combined."""

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.type_aliases import TensorDict

if TYPE_CHECKING:

    class _Host(RecurrentRolloutBuffer, MaskableRolloutBuffer):  # type: ignore[misc]
        """What a subclass of the mixin is."""
else:
    _Host = object


class MaskableRecurrentRolloutBufferSamples(NamedTuple):
    """Those of sb3-contrib's recurrent buffers, and the masks, shape (padded batch size, choices)."""

    observations: th.Tensor | TensorDict
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    lstm_states: RNNStates
    episode_starts: th.Tensor
    mask: th.Tensor  # 1 for a transition, 0 for padding
    action_masks: th.Tensor


class MasksOfSequences(_Host):
    """Mixin before a recurrent and a maskable buffer, in this order: their constructors, ``reset`` and ``add`` cooperate."""

    needs_masks = False
    next_masks: np.ndarray | None = None  # of the transition that is added next: RecurrentPPO does not pass any to ``add``

    def add(self, *args: Any, **kwargs: Any) -> None:
        if self.needs_masks and self.next_masks is None:
            raise RuntimeError(
                "the policy has acted without masks: a callback may give model.policy other parameters during a rollout "
                "(load_state_dict), but not replace it"
            )
        super().add(*args, action_masks=self.next_masks, **kwargs)
        self.next_masks = None

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        if not self.generator_ready:
            self.action_masks = self.swap_and_flatten(self.action_masks)
        yield from super().get(batch_size)

    def _get_samples(self, batch_inds: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        samples = super()._get_samples(batch_inds, *args, **kwargs)
        # Padded as the other fields of this minibatch; padding allows everything
        masks = self.pad(self.action_masks[batch_inds], padding_value=1.0)
        return MaskableRecurrentRolloutBufferSamples(*samples, action_masks=masks.reshape(-1, self.mask_dims))


class MaskableRecurrentRolloutBuffer(MasksOfSequences, RecurrentRolloutBuffer, MaskableRolloutBuffer):
    """Stores LSTM states and masks."""


class MaskableRecurrentDictRolloutBuffer(MasksOfSequences, RecurrentDictRolloutBuffer, MaskableDictRolloutBuffer):
    """The same for dict observations."""
