"""The policy while its host collects a rollout: one check of what it gives, instead of several of what it is made of."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.distributions import unchecked


@contextmanager
def checked_once(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    Within, ``policy(observations)`` gives the same actions in less time: not every argument of a distribution is checked,
    but the log-probability. It is NaN wherever an observation or a parameter is, whatever the distribution.
    """
    if "forward" in vars(policy):  # the user's
        yield
        return
    # A method, so that a copy of the policy, made meanwhile by a callback, has its own
    policy.forward = MethodType(_forward, policy)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del policy.forward


def _forward(policy: ActorCriticPolicy, *args: Any, **kwargs: Any) -> Any:
    """
    :return: what the policy's own ``forward`` gives: actions, values, log-probabilities and, with a memory, its state
    :raises ValueError: where a log-probability is NaN
    """
    with unchecked(getattr(policy, "action_dist", None)):
        result = type(policy).forward(policy, *args, **kwargs)
    if result[2].isnan().any():
        raise ValueError(
            "the log-probability of an action is NaN: either an observation is, then wrap the environment in VecCheckNan to "
            "see where it comes from, or the policy's parameters are extreme, then learning_rate="
            f"{policy.optimizer.param_groups[0]['lr']:g} is too high"
        )
    return result
