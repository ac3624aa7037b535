"""
Arms: algorithms of the zoo with overrides (``ppo_kl:target_kl=0.1,kl_rule=fixed``), which can be given a short name
(``fixed=ppo_kl:target_kl=0.1,kl_rule=fixed``), and the hyperparameters each one gets.

All arms share the budget. On-policy arms also share the network, the normalization and every hyperparameter they have in
common with PPO: the values of the zoo's tuned entry for PPO, and PPO's defaults. Only the hyperparameters of the trust region
are specific to each algorithm.
"""

import difflib
import hashlib
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import gymnasium as gym
import yaml
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_adaptive_kl import zoo

Hyperparameters = dict[str, Any]

# Limits on how far an update moves the policy: never shared, even if two algorithms use the same name for them
TRUST_REGION = frozenset({"clip_range", "target_kl"})
# PPO's, where its entry has none
CLIP_RANGE = 0.2
# Keys that the zoo's ExperimentManager removes from an entry before it builds the algorithm; env_kwargs is not among them,
# because all arms share the environment
ZOO_KEYS = frozenset({"n_timesteps", "n_envs", "normalize", "env_wrapper", "vec_env_wrapper", "frame_stack", "callback"})
# Constructor arguments that are not hyperparameters
OTHER_ARGUMENTS = frozenset({"env", "seed", "_init_setup_model", "device", "verbose", "tensorboard_log", "stats_window_size"})


class PlanError(ValueError):
    """A user error, reported in one line."""


@contextmanager
def reported(problem: str) -> Iterator[None]:
    """Report an exception of third-party code, which may be any, in one line."""
    try:
        yield
    except Exception as error:
        raise PlanError(f"{problem}: {type(error).__name__}: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class Arm:
    """
    An algorithm with overrides.

    :param name: the name that the user gave it, or else the whole text
    :param algo: the zoo's name of the algorithm
    :param overrides: hyperparameters that replace those of the plan
    """

    name: str
    algo: str
    overrides: Hyperparameters

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """
        Parse an arm as written on the command line or in a plan.

        :param text: ``algo`` or ``algo:name=value,name=value``, with or without ``name=`` in front; values are yml.
            ``target_kl=clip`` is the target that corresponds to the clip range of PPO's entry for each environment.
        :raises PlanError: if the algorithm is unknown, or does not have a hyperparameter that is overridden
        """
        name, equals, definition = text.partition("=")
        if not equals or ":" in name:
            name = definition = text
        elif not name.strip() or (name in ALGOS and definition != name):
            raise PlanError(f"{text!r}: {name!r} cannot be the name of an arm, choose one that is not an algorithm's")
        algo, _, assignments = definition.partition(":")
        if algo not in ALGOS:
            raise PlanError(f"unknown algorithm {algo!r}{suggestion(algo, ALGOS)}")
        known = (arguments(algo) | ZOO_KEYS) - {"n_timesteps"}
        overrides = {}
        for assignment in _split_outside_brackets(assignments):
            key, equals, value = assignment.partition("=")
            if not equals:
                raise PlanError(f"{text!r}: {assignment!r} is not of the form name=value")
            if key == "n_timesteps":
                raise PlanError(f"{text!r}: the budget is the same for all arms, set it with n_timesteps of the plan (-n)")
            if key not in known:
                raise PlanError(f"{algo} has no hyperparameter {key!r}{suggestion(key, known)}")
            with reported(f"{text!r}: {assignment!r}"):
                overrides[key] = _value(value)
            if overrides[key] == "clip" and algo not in zoo.ALGORITHMS:
                raise PlanError(f"{text!r}: only {' and '.join(zoo.ALGORITHMS)} have a target that follows PPO's clip range")
        return cls(name, algo, overrides)

    def check_penalty(self) -> None:
        """
        Build the algorithm once with the overrides of the KL penalty, on an environment that is always there.

        :raises PlanError: if a value is invalid
        """
        if self.algo in zoo.ALGORITHMS:
            names = TRUST_REGION | {"clip_range_vf"} | arguments(self.algo) - arguments("ppo")
            values = {name: value for name, value in self.overrides.items() if name in names and value != "clip"}
            policy = "MlpLstmPolicy" if self.recurrent else "MlpPolicy"
            with reported(repr(self.name)):
                values = zoo.parse_trust_region(values)
                algorithm: Any = ALGOS[self.algo]
                algorithm(policy, "CartPole-v1", n_steps=8, batch_size=8, device="cpu", **values)

    @property
    def folder(self) -> str:
        """Unique folder name: special characters are replaced, and a hash is added if there were any."""
        name = self.name.replace(":", "-", 1)
        safe = re.sub(r"[^\w.=,+-]", "-", name)
        return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"

    @property
    def recurrent(self) -> bool:
        return self.algo.endswith("_lstm")


def resolve_hyperparameters(arms: list[Arm], env: str, n_timesteps: int | None, own: bool) -> dict[str, Hyperparameters]:
    """
    Determine all hyperparameters of every arm on an environment.

    :param arms: the arms to compare
    :param env: gymnasium id
    :param n_timesteps: the budget; None for the budget of PPO's entry
    :param own: give each arm the zoo's entry for its own algorithm, and share only the budget
    :return: arm → hyperparameters of its runs
    :raises PlanError: if the zoo has no entry for an algorithm
    """
    base = "ppo_lstm" if all(arm.recurrent for arm in arms) else "ppo"
    budget = {"n_timesteps": n_timesteps or int(_entry(base, env)["n_timesteps"])}
    resolved = {}
    for arm in arms:
        entry = _entry(arm.algo, env) if own or not issubclass(ALGOS[arm.algo], OnPolicyAlgorithm) else _shared(arm, base, env)
        resolved[arm.name] = {**entry, **budget, **arm.overrides}
        if arm.overrides.get("target_kl") == "clip":
            resolved[arm.name]["target_kl"] = f"clip_{_entry(base, env).get('clip_range', CLIP_RANGE)}"
    return resolved


def _shared(arm: Arm, base: str, env: str) -> Hyperparameters:
    """Take from the base's entry every key that both algorithms have, and the rest from the arm's own entry."""
    own_keys = TRUST_REGION | ({"policy"} if arm.recurrent != base.endswith("_lstm") else set())
    common = (arguments(arm.algo) & arguments(base) | ZOO_KEYS) - own_keys
    shared = {key: value for key, value in _entry(base, env).items() if key in common}
    rest = {key: value for key, value in _entry(arm.algo, env).items() if key not in common}
    # Keys in neither entry keep their defaults, which can differ between algorithms
    own = defaults(arm.algo)
    default = {key: value for key, value in sorted(defaults(base).items()) if key in common and own[key] != value}
    return {**default, **shared, **rest}


def effective(arms: list[Arm], given: dict[str, Hyperparameters]) -> dict[str, Hyperparameters]:
    """
    Complete hyperparameters with defaults: those that some arm sets, and those that several of the algorithms have.

    :param arms: the arms
    :param given: arm → hyperparameters of its runs
    :return: arm → completed hyperparameters
    """
    n_algorithms = Counter(key for algo in {arm.algo for arm in arms} for key in arguments(algo))
    compared = TRUST_REGION.union(*given.values(), (key for key, n in n_algorithms.items() if n > 1))
    added = {arm.name: {key: value for key, value in sorted(defaults(arm.algo).items()) if key in compared} for arm in arms}
    return {name: {**values, **given[name]} for name, values in added.items()}


def defaults(algo: str) -> Hyperparameters:
    """Default values of the hyperparameters that have one."""
    parameters = inspect.signature(ALGOS[algo]).parameters
    values = {name: parameters[name].default for name in arguments(algo)}
    return {name: value for name, value in values.items() if value is None or isinstance(value, int | float | str)}


def arguments(algo: str) -> frozenset[str]:
    """Names of the hyperparameters of an algorithm."""
    return frozenset(inspect.signature(ALGOS[algo]).parameters) - OTHER_ARGUMENTS


def suggestion(name: str, names: Iterable[str]) -> str:
    """End of an error message: the known name closest to a misspelled one, if any is close."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def _entry(algo: str, env: str) -> Hyperparameters:
    """The zoo's tuned entry for an environment, or for its previous version: the zoo has no entries for MuJoCo's -v5."""
    file = zoo.hyperparameter_file(algo) if algo in zoo.ALGORITHMS else files("rl_zoo3") / "hyperparams" / f"{algo}.yml"
    entries = yaml.safe_load(file.read_text())
    base, _, version = env.rpartition("-v")
    previous = [f"{base}-v{number}" for number in (4, 2) if version == "5"]
    atari = ["atari"] if "AtariEnv" in str(gym.registry[env].entry_point) else []
    candidates = [name for name in (env, *previous, *atari, "default") if name in entries]
    if not candidates:
        raise PlanError(f"the zoo has neither hyperparameters of {algo} for {env} nor a default entry")
    return dict(entries[candidates[0]])


def _value(text: str) -> Any:
    """Parse yml, but read 3e-4 as a number and None as null: in yml 1.1 they are strings."""
    if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text):
        return float(text)
    return None if text == "None" else yaml.safe_load(text)


def _split_outside_brackets(text: str) -> list[str]:
    """Split at commas that are not inside brackets."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
