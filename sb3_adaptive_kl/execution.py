"""
How a model collects rollouts and runs its minibatch steps: here in the plain way. ``fast/execution.py`` does the same faster.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.distributed.ranks import is_parallel
from sb3_adaptive_kl.distributed.step import step_of_all_ranks
from sb3_adaptive_kl.objective import Settings
from sb3_adaptive_kl.rollout.minibatches import minibatches
from sb3_adaptive_kl.step import OptimizerStep, StepResult, Update, eager_step, trainable_parameters


class Execution:
    """Collects and trains with the policy and the optimizer as SB3 uses them."""

    def collecting(self, policy: ActorCriticPolicy) -> AbstractContextManager[None]:
        """
        Prepare for collecting a rollout.

        :param policy: the policy that collects
        :return: a context in which the host collects
        """
        return nullcontext()

    def updating(self, policy: ActorCriticPolicy) -> AbstractContextManager[None]:
        """
        Prepare for an update: minibatch steps, and sweeps over the rollout.

        :param policy: the policy to update
        :return: a context for the whole update
        """
        return nullcontext()

    def stepping(self, policy: ActorCriticPolicy) -> AbstractContextManager[None]:
        """
        Prepare for the minibatch steps of an update.

        :param policy: the policy to train
        :return: a context in which steps are taken, and nothing else
        """
        return nullcontext()

    def optimizer_step(self, policy: ActorCriticPolicy) -> OptimizerStep:
        """
        Prepare the policy's optimizer for one update.

        :param policy: the policy to train
        :return: the optimizer's step, for the parameters that are not frozen
        """
        return OptimizerStep(policy.optimizer, trainable_parameters(policy))

    def minibatches(self, buffer: RolloutBuffer, batch_size: int | None) -> Iterator[tuple[Any, th.Tensor]]:
        """
        Draw one epoch of minibatches.

        :param buffer: a full rollout buffer
        :param batch_size: transitions per minibatch, None for all at once
        :return: pairs of the buffer's samples and their indices into the flattened rollout
        """
        return minibatches(buffer, batch_size)

    def take_step(self, update: Update, rollout_data: Any, index: th.Tensor, settings: Settings) -> StepResult:
        """
        Take one step on one minibatch: ``eager_step``, or a function with its signature that does the same faster, or does it
        on all ranks.

        :param update: the policy, the old policy and the optimizer
        :param rollout_data: a minibatch of the host's rollout buffer
        :param index: indices of its B valid transitions in the flattened rollout
        :param settings: the numbers of this step
        :return: metrics and gradient norm
        """
        step = step_of_all_ranks if is_parallel() else eager_step
        return step(update, rollout_data, index, settings)

    def pop_compile_seconds(self) -> float:
        """Return the seconds spent compiling since the last call."""
        return 0.0
