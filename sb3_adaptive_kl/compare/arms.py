"""
An arm: an algorithm of the zoo with overrides, ``ppo_kl:target_kl=0.1,kl_rule=fixed``, and the hyperparameters that it gets.

All arms share the budget. Those that are on-policy share the network, the normalisation and every hyperparameter that they
have in common with PPO: the values of the zoo's tuned entry for PPO, and PPO's defaults. Only what makes the trust region is
each algorithm's own.
"""

import difflib
import hashlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_adaptive_kl import zoo

Hyperparameters = dict[str, Any]

# How far a policy may move per update: never shared, even where two algorithms give it one name
TRUST_REGION = frozenset({"clip_range", "target_kl"})
# What the zoo's ExperimentManager takes out of an entry before the algorithm sees it
ZOO_KEYS = frozenset(
    {
        "n_timesteps",
        "n_envs",
        "normalize",
        "env_wrapper",
        "vec_env_wrapper",
        "frame_stack",
        "callback",
        "env_kwargs",
        "monitor_kwargs",
    }
)
# Arguments that are no hyperparameters
ADMINISTRATION = frozenset({"env", "seed", "_init_setup_model", "device", "verbose", "tensorboard_log", "stats_window_size"})


class PlanError(ValueError):
    """A mistake of the user's, told in one line."""


@dataclass(frozen=True)
class Arm:
    """
    An algorithm with overrides.

    :param name: as the user wrote it
    :param algo: the zoo's name of the algorithm
    :param overrides: hyperparameters that replace those of the plan
    """

    name: str
    algo: str
    overrides: Hyperparameters

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """
        :param text: ``algo`` or ``algo:name=value,name=value``; values are yml
        :raises PlanError: if there is no such algorithm, or it does not know an override
        """
        algo, _, assignments = text.partition(":")
        if algo not in ALGOS:
            raise PlanError(f"unknown algorithm {algo!r}{nearest(algo, ALGOS)}")
        known = (arguments(algo) | ZOO_KEYS) - {"n_timesteps"}
        overrides = {}
        for assignment in _split_outside_brackets(assignments):
            name, equals, value = assignment.partition("=")
            if not equals:
                raise PlanError(f"{text!r}: {assignment!r} is not of the form name=value")
            if name == "n_timesteps":
                raise PlanError(f"{text!r}: the budget is the same for all arms, and set by n_timesteps of the plan (-n)")
            if name not in known:
                raise PlanError(f"{algo} has no hyperparameter {name!r}{nearest(name, known)}")
            overrides[name] = _value(value)
        return cls(text, algo, overrides)

    @property
    def folder(self) -> str:
        """The name as a file system likes it, and still a name of its own."""
        name = self.name.replace(":", "-", 1)
        liked = re.sub(r"[^\w.=,+-]", "-", name)
        return liked if liked == name else f"{liked}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"

    @property
    def recurrent(self) -> bool:
        return self.algo.endswith("_lstm")

    @property
    def on_policy(self) -> bool:
        return issubclass(ALGOS[self.algo], OnPolicyAlgorithm)


def settle(arms: list[Arm], env: str, n_timesteps: int | None, own: bool) -> dict[str, Hyperparameters]:
    """
    :param n_timesteps: the budget, None for that of PPO's entry
    :param own: give each arm the zoo's entry for its algorithm, and share only the budget
    :return: arm → everything that its runs are given
    :raises PlanError: if the zoo has no entry
    """
    base = "ppo_lstm" if all(arm.recurrent for arm in arms) else "ppo"
    budget = {"n_timesteps": n_timesteps or int(_entry(base, env)["n_timesteps"])}
    settled = {}
    for arm in arms:
        entry = _entry(arm.algo, env) if own or not arm.on_policy else _shared(arm, base, env)
        settled[arm.name] = {**entry, **budget, **arm.overrides}
    return settled


def _shared(arm: Arm, base: str, env: str) -> Hyperparameters:
    """The entry of the base, where the arm knows its keys; the rest from the arm's own entry."""
    own_keys = TRUST_REGION | ({"policy"} if arm.recurrent != base.endswith("_lstm") else set())
    common = (arguments(arm.algo) & arguments(base) | ZOO_KEYS) - own_keys
    shared = {key: value for key, value in _entry(base, env).items() if key in common}
    rest = {key: value for key, value in _entry(arm.algo, env).items() if key not in common}
    # What neither entry names are defaults, which need not be the same
    theirs, mine = defaults(base), defaults(arm.algo)
    for key in sorted(common & theirs.keys() - shared.keys()):
        if mine[key] != theirs[key]:
            shared[key] = theirs[key]
    return {**shared, **rest}


def defaults(algo: str) -> Hyperparameters:
    """The hyperparameters that have a default, and it."""
    signature = inspect.signature(ALGOS[algo]).parameters
    return {
        name: signature[name].default
        for name in arguments(algo)
        if signature[name].default is None or isinstance(signature[name].default, int | float | str)
    }


def arguments(algo: str) -> frozenset[str]:
    return frozenset(inspect.signature(ALGOS[algo]).parameters) - ADMINISTRATION


def nearest(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def _entry(algo: str, env: str) -> Hyperparameters:
    """The tuned entry for an environment; where the zoo has none of its own, such as for MuJoCo's -v5, ours for ppo_kl."""
    theirs = _file(algo)
    family = {"ppo": "ppo_kl", "ppo_lstm": "ppo_kl_lstm"}.get(algo)
    if env not in theirs and family is not None and env in _file(family):
        known = (arguments(algo) | ZOO_KEYS) - TRUST_REGION
        return {key: value for key, value in _file(family)[env].items() if key in known}
    atari = "AtariEnv" in str(gym.registry[env].entry_point)
    name = env if env in theirs else "atari" if atari and "atari" in theirs else "default"
    if name not in theirs:
        raise PlanError(f"the zoo has no hyperparameters of {algo} for {env}, and no default")
    return dict(theirs[name])


def _file(algo: str) -> dict[str, Hyperparameters]:
    ours = zoo.hyperparameter_file(algo)
    path = ours if algo in zoo.ALGORITHMS else Path(str(files("rl_zoo3") / "hyperparams" / f"{algo}.yml"))
    return yaml.safe_load(path.read_text())  # type: ignore[no-any-return]


def _value(text: str) -> Any:
    """yml, but 3e-4 is a number as well, which yml 1.1 takes for a string."""
    try:
        return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _split_outside_brackets(text: str) -> list[str]:
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
