"""Faster collection: one NaN check per step replaces torch's argument validation, and ``forward`` can be compiled."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.fast.compilation import NotCompiled
from sb3_adaptive_kl.fast.sb3_policies import ACTING, is_stock, preprocessing_outside, unvalidated
from sb3_adaptive_kl.rollout.distributions import forget_distribution

Act = Callable[..., tuple[Any, th.Tensor]]
# How torch's errors begin when it samples from NaN: categoricals, and Bernoullis
NAN_MESSAGES = ("probability tensor contains", "Expected p_in >= 0")


def act(actor: ActorCriticPolicy, observations: Any, *args: Any, **kwargs: Any) -> tuple[Any, th.Tensor]:
    """
    Run the policy's own ``forward``.

    :param actor: the policy, or its copy
    :param observations: batch of observations
    :return: the result of ``forward`` (actions, values, log-probabilities and, with a memory, its state); and whether a
        log-probability is NaN. A NaN observation or parameter always makes one NaN, whatever the distribution.
    """
    result = type(actor).forward(actor, observations, *args, **kwargs)  # the instance's forward may be FastForward
    if th.compiler.is_compiling():
        forget_distribution(actor)  # compiled code cannot leave a new object behind
    return result, result[2].isnan().any()


@contextmanager
def fast_collection(policy: ActorCriticPolicy, compiled_act: Act | None) -> Iterator[None]:
    """
    Make ``policy(observations)`` give the same actions in less time, and raise a ValueError instead of returning NaN.

    :param policy: the policy that collects
    :param compiled_act: ``act``, if it is to be compiled
    """
    if not all(is_stock(policy, name) for name in ACTING):
        yield  # a user's method may write to `self`, and writes to our copy would be lost
        return
    # A copy for the whole rollout, since changing the policy and back at each step takes longer than is gained. It has the
    # same networks, which a callback may replace
    actor = copy.copy(policy)
    actor.action_dist = unvalidated(policy.action_dist)
    with nullcontext(partial(act, actor)) if compiled_act is None else _compiled(compiled_act, actor) as acting:
        policy.forward = fast_forward = FastForward(policy, acting)  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            fast_forward.stop()
            # A callback may have set a wrapper around it, which stays
            if vars(policy).get("forward") is fast_forward:
                del policy.forward


class FastForward:
    """Stands in for a policy's ``forward`` during a rollout. It is not copied with the policy: a callback may keep copies."""

    def __init__(self, policy: ActorCriticPolicy, acting: Act) -> None:
        self.policy = policy
        self.acting = acting

    def __call__(self, observations: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Act on a batch of observations.

        :raises ValueError: if a log-probability is NaN
        """
        try:
            result, is_nan = self.acting(observations, *args, **kwargs)
        except RuntimeError as error:
            if str(error).startswith(NAN_MESSAGES):
                raise self._nan_error() from error
            raise
        if is_nan:
            raise self._nan_error()
        return result

    def stop(self) -> None:
        """Run the policy's own ``forward`` from now on, for a wrapper that a callback has put around this."""
        self.acting = partial(act, self.policy)

    def _nan_error(self) -> ValueError:
        return ValueError(
            "the log-probability of an action is NaN: wrap the environment in VecCheckNan to find a NaN observation; if there "
            "is none, the policy's parameters are extreme: lower learning_rate="
            f"{self.policy.optimizer.param_groups[0]['lr']:g}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A policy that is copied or unpickled finds its class's method under this name
        return getattr, (self.policy, "forward")


@contextmanager
def _compiled(compiled_act: Act, actor: ActorCriticPolicy) -> Iterator[Act]:
    """Compile ``act`` for one actor; run it uncompiled where that fails."""
    with preprocessing_outside(actor, ACTING) as preprocess:

        def acting(observations: Any, *args: Any, **kwargs: Any) -> tuple[Any, th.Tensor]:
            observations = preprocess(observations)
            # Masks: torch compiles functions of tensors only
            kwargs = {name: th.as_tensor(value) if isinstance(value, np.ndarray) else value for name, value in kwargs.items()}
            try:
                return compiled_act(actor, observations, *args, **kwargs)
            except NotCompiled:
                return act(actor, observations, *args, **kwargs)

        yield acting
