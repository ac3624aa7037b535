"""
SB3's policies without what they do beside their arithmetic: argument checks, preprocessing, and what torch cannot compile.

Everything here changes one object, for a time, or makes another that shares its state. What is in the user's classes stays as
it is: only what SB3 and sb3-contrib wrote is known well enough.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import inf
from types import FunctionType
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs

# The methods of a policy that act, and those that evaluate what was done
ACTING = ("forward", "extract_features", "_get_action_dist_from_latent")
EVALUATING = ("evaluate_actions", "extract_features", "_get_action_dist_from_latent")
# Of what is in this space, SB3's preprocess_obs only makes floats
PREPROCESSED = spaces.Box(-inf, inf, (1,))


def is_hosts(method: Any) -> bool:
    """Whether a method is SB3's or sb3-contrib's, and not the user's."""
    return str(getattr(method, "__module__", "")).startswith(("stable_baselines3.", "sb3_contrib."))


# ---------------------------------------------------------------- argument checks


def unchecked(action_dist: Any) -> Any:
    """
    The same action distribution with the same state, but the distributions of torch that it makes do not check their
    arguments, which costs as much as evaluating them. Whoever uses this looks for NaN in the end.

    torch's own switch is global. Here one method looks up ``Normal`` and its like in a namespace of its own.

    :param action_dist: ``policy.action_dist``
    :return: another object with the same ``__dict__``; or ``action_dist`` itself, if it is not SB3's or sb3-contrib's
    """
    make = getattr(type(action_dist), "proba_distribution", None)
    if not isinstance(make, FunctionType) or not is_hosts(make) or "proba_distribution" in vars(action_dist):
        return action_dist
    lenient: Any = object.__new__(_lenient(type(action_dist)))  # type: ignore[arg-type]
    lenient.__dict__ = action_dist.__dict__  # shared: gSDE draws its matrices into the original
    return lenient


@cache
def _lenient(family: type) -> type:
    make = family.proba_distribution  # type: ignore[attr-defined]
    namespace = {
        name: partial(value, validate_args=False)
        if isinstance(value, type) and issubclass(value, th.distributions.Distribution)
        else value
        for name, value in make.__globals__.items()
        if name != "__name__"  # by which torch's compiler would look up the original
    }
    method = FunctionType(make.__code__, namespace, closure=make.__closure__)
    return type(family.__name__, (family,), {"proba_distribution": method})


@contextmanager
def checks_apart(policy: ActorCriticPolicy) -> Iterator[None]:
    """Within, ``policy.action_dist`` is ``unchecked``."""
    if not hasattr(policy, "action_dist"):
        yield
        return
    action_dist = policy.action_dist
    policy.action_dist = unchecked(action_dist)
    try:
        yield
    finally:
        policy.action_dist = action_dist


# ---------------------------------------------------------------- for torch's compiler


@contextmanager
def preprocessing_apart(policy: ActorCriticPolicy) -> Iterator[Callable[[Any], Any]]:
    """
    Within, the policy expects observations that have been preprocessed by the function that this gives.

    torch cannot compile SB3's ``preprocess_obs``, which asks the space's NumPy arrays what to do.
    """
    # The user's may ask for the space
    if not all(is_hosts(getattr(policy, name)) for name in EVALUATING):
        yield lambda observations: observations
        return
    space = policy.observation_space
    keys = space.spaces if isinstance(space, spaces.Dict) else None
    policy.observation_space = PREPROCESSED if keys is None else spaces.Dict(dict.fromkeys(keys, PREPROCESSED))
    try:
        yield lambda observations: preprocess_obs(observations, space, normalize_images=policy.normalize_images)
    finally:
        policy.observation_space = space


def forget(action_dist: Any) -> None:
    """
    Let ``action_dist`` hold nothing: what it evaluated holds the whole graph, and compiled code must not leave one behind.

    :param action_dist: ``policy.action_dist``, or None
    """
    if action_dist is not None:
        action_dist.distribution = None
    if hasattr(action_dist, "distributions"):  # sb3-contrib's masked MultiDiscrete and MultiBinary
        action_dist.distributions = None


def prepare(action_dist: Any) -> None:
    """
    Take away what torch cannot compile, or would compile again after the first evaluation.

    :param action_dist: ``policy.action_dist`` of a new policy, or None
    """
    forget(action_dist)
    # SB3 takes the choices of MultiDiscrete from a NumPy array; torch cannot compile a split by NumPy's integers
    if isinstance(n_choices := getattr(action_dist, "action_dims", None), list):
        action_dist.action_dims = [int(n) for n in n_choices]
