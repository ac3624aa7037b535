"""The policy while its host collects a rollout: one check of what it gives, instead of several of what it is made of."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.acceleration import NotCompiled
from sb3_adaptive_kl.lean import ACTING, forget, is_hosts, preprocessing_apart, unchecked

Act = Callable[..., tuple[Any, th.Tensor]]
# How torch refuses to draw from categoricals, and from Bernoullis, of NaN
REFUSALS = ("probability tensor contains", "Expected p_in >= 0")


def act(actor: ActorCriticPolicy, observations: Any, *args: Any, **kwargs: Any) -> tuple[Any, th.Tensor]:
    """
    :return: what the policy's own ``forward`` gives: actions, values, log-probabilities and, with a memory, its state; and
        whether a log-probability is NaN. One is wherever an observation or a parameter is, whatever the distribution.
    """
    result = type(actor).forward(actor, observations, *args, **kwargs)
    if th.compiler.is_compiling():
        forget(actor.action_dist)
    return result, result[2].isnan().any()


@contextmanager
def checked_once(policy: ActorCriticPolicy, compiled_act: Act | None) -> Iterator[None]:
    """
    Within, ``policy(observations)`` gives the same actions in less time, and raises a ValueError instead of NaN.

    :param compiled_act: ``act``, where it is to be compiled
    """
    if not all(is_hosts(getattr(policy, name, None)) for name in ACTING):
        yield  # the user's may remember things, which a copy would not
        return
    # A copy for the whole rollout, since to change the policy itself and back takes longer than is gained. It has the same
    # networks, in which a callback may replace what it likes
    actor = copy.copy(policy)
    actor.action_dist = unchecked(policy.action_dist)
    with nullcontext(partial(act, actor)) if compiled_act is None else _compiled(compiled_act, actor) as acting:
        policy.forward = Forward(policy, acting)  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            del policy.forward


class Forward:
    """What stands in for the policy's own ``forward``, and is not copied with the policy: a callback may keep the copy."""

    def __init__(self, policy: ActorCriticPolicy, acting: Act) -> None:
        self.policy = policy
        self.acting = acting

    def __call__(self, observations: Any, *args: Any, **kwargs: Any) -> Any:
        """
        :raises ValueError: where a log-probability is NaN
        """
        try:
            result, is_nan = self.acting(observations, *args, **kwargs)
        except RuntimeError as error:
            if str(error).startswith(REFUSALS):
                raise self._not_a_number() from error
            raise
        if is_nan:
            raise self._not_a_number()
        return result

    def _not_a_number(self) -> ValueError:
        return ValueError(
            "the log-probability of an action is NaN: either an observation is, then wrap the environment in VecCheckNan to "
            "see where it comes from, or the policy's parameters are extreme, then learning_rate="
            f"{self.policy.optimizer.param_groups[0]['lr']:g} is too high"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # What a policy copied or unpickled, and still empty, finds under this name: its class's
        return getattr, (self.policy, "forward")


@contextmanager
def _compiled(compiled_act: Act, actor: ActorCriticPolicy) -> Iterator[Act]:
    """``act`` of this one actor, compiled for as long as that goes well."""
    with preprocessing_apart(actor) as preprocess:

        def acting(observations: Any, *args: Any, **kwargs: Any) -> tuple[Any, th.Tensor]:
            observations = preprocess(observations)
            # Masks: torch compiles functions of tensors only
            kwargs = {name: th.as_tensor(value) if isinstance(value, np.ndarray) else value for name, value in kwargs.items()}
            try:
                return compiled_act(actor, observations, *args, **kwargs)
            except NotCompiled:
                return act(actor, observations, *args, **kwargs)

        yield acting
