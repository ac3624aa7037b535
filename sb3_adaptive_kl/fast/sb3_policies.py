"""
SB3's policies with less around their arithmetic: no argument validation, preprocessing outside, nothing torch cannot compile.

Everything here changes one object for a time, or makes another one that shares its state. Only code written in SB3 or
sb3-contrib is treated this way: a method of the user's may rely on what would be left out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import inf
from types import FunctionType, MethodType
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs

from sb3_adaptive_kl.rollout.distributions import forget_distribution

# The methods of a policy that act, and those that evaluate actions
ACTING = ("forward", "extract_features", "_get_action_dist_from_latent")
EVALUATING = ("evaluate_actions", "extract_features", "_get_action_dist_from_latent")
STOCK_PACKAGES = ("stable_baselines3.", "sb3_contrib.")
# Observations of this space are only converted to float by SB3's preprocess_obs
PREPROCESSED = spaces.Box(-inf, inf, (1,))


def is_stock(owner: Any, name: str, packages: tuple[str, ...] = STOCK_PACKAGES) -> bool:
    """
    Tell SB3's code from the user's.

    :param owner: a policy, an action distribution, or a buffer
    :param name: name of a method
    :param packages: prefixes of the modules that count as SB3's
    :return: whether the method is written in one of them, and not overridden, wrapped or replaced on the instance
    """
    function = getattr(type(owner), name, None)
    # Not by its __module__, which functools.wraps copies to a wrapper
    if not isinstance(function, FunctionType) or not function.__globals__.get("__name__", "").startswith(packages):
        return False
    # On the instance there may be the class's own method: in a policy that was copied during a rollout (see FastForward)
    return bool(getattr(owner, name) == MethodType(function, owner))


# ---------------------------------------------------------------- validation


@contextmanager
def without_validation(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    Replace ``policy.action_dist`` by one that does not validate its arguments.

    :param policy: the model's policy; the caller checks for NaN in the end
    """
    if not hasattr(policy, "action_dist"):
        yield
        return
    action_dist = policy.action_dist
    policy.action_dist = unvalidated(action_dist)
    try:
        yield
    finally:
        policy.action_dist = action_dist


def unvalidated(action_dist: Any) -> Any:
    """
    Make torch's distributions skip their argument validation, which costs as much as evaluating them.

    torch's own switch is global. Here one method looks up ``Normal`` and its like in a namespace of its own.

    :param action_dist: ``policy.action_dist``
    :return: another object with the same ``__dict__``, or ``action_dist`` itself if it is not SB3's or sb3-contrib's
    """
    if not is_stock(action_dist, "proba_distribution"):
        return action_dist
    lenient: Any = object.__new__(_unvalidated_family(type(action_dist)))  # type: ignore[arg-type]
    lenient.__dict__ = action_dist.__dict__  # shared: gSDE draws its matrices into the original
    return lenient


@cache
def _unvalidated_family(family: type) -> type:
    make = family.proba_distribution  # type: ignore[attr-defined]
    namespace = {
        name: partial(value, validate_args=False)
        if isinstance(value, type) and issubclass(value, th.distributions.Distribution)
        else value
        for name, value in make.__globals__.items()
        if name != "__name__"  # torch's compiler would look up the original by it
    }
    method = FunctionType(make.__code__, namespace, closure=make.__closure__)
    return type(family.__name__, (family,), {"proba_distribution": method})


# ---------------------------------------------------------------- for torch's compiler


@contextmanager
def preprocessing_outside(policy: ActorCriticPolicy, methods: tuple[str, ...]) -> Iterator[Callable[[Any], Any]]:
    """
    Let the policy expect preprocessed observations. torch cannot compile SB3's ``preprocess_obs``, which reads NumPy arrays.

    :param policy: the policy, changed for the time of the context
    :param methods: the methods that will be called, ``ACTING`` or ``EVALUATING``
    :return: the function that preprocesses them; the identity for a policy with methods of the user's, which may ask for the
        space
    """
    if not all(is_stock(policy, name) for name in methods):
        yield lambda observations: observations
        return
    space = policy.observation_space
    keys = space.spaces if isinstance(space, spaces.Dict) else None
    policy.observation_space = PREPROCESSED if keys is None else spaces.Dict(dict.fromkeys(keys, PREPROCESSED))
    try:
        yield lambda observations: preprocess_obs(observations, space, normalize_images=policy.normalize_images)
    finally:
        policy.observation_space = space


def make_compilable(policy: ActorCriticPolicy) -> None:
    """
    Remove what torch cannot compile from a policy, or would compile twice: with and without a distribution evaluated before.

    :param policy: the policy, changed in place; it computes the same
    """
    forget_distribution(policy)
    action_dist: Any = getattr(policy, "action_dist", None)
    # SB3 takes the choices of MultiDiscrete from a NumPy array; torch cannot compile a split by NumPy's integers
    if isinstance(n_choices := getattr(action_dist, "action_dims", None), list):
        action_dist.action_dims = [int(n) for n in n_choices]
