"""
Arms: algorithms of the zoo with overrides (``ppo_kl:target_kl=0.1,kl_rule=fixed``), which can be given a short name
(``fixed=ppo_kl:target_kl=0.1,kl_rule=fixed``), and the hyperparameters each one gets.

All arms share the budget. On-policy arms also share the network, the normalization and every hyperparameter they have in
common with PPO: the values of the zoo's tuned entry for PPO, and PPO's defaults. Only the hyperparameters of the trust region
are specific to each algorithm.
"""

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import gymnasium as gym
import yaml
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import is_image_space

from sb3_adaptive_kl import zoo
from sb3_adaptive_kl.messages import suggestion
from sb3_adaptive_kl.presets import HELD

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


class Loader(yaml.SafeLoader):
    """Reads 3e-4 as a number and None as null, which yml 1.1 does not, and keys as strings: an arm may be named 3e-4."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        # YAML forbids what PyYAML accepts: of two values in an edited plan, the first would be ignored
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, n in keys.items() if n > 1]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]!r} is there twice", problem_mark=node.start_mark)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        for key, _ in node.value:
            key.tag = "tag:yaml.org,2002:str"


class Dumper(yaml.SafeDumper):
    """Quotes the strings that ``Loader`` would read as something else."""


for either in (Loader, Dumper):
    numbers = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    either.add_implicit_resolver("tag:yaml.org,2002:float", numbers, list("-+0123456789"))
    either.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None$"), ["N"])


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

        :param text: ``algo`` or ``algo:name=value,name=value``, with or without ``name=`` in front; values are yml. ``held``
            among them stands for the arguments of ``HELD``, and ``target_kl=clip`` for the target that corresponds to the
            clip range of PPO's entry for each environment.
        :raises PlanError: if the algorithm is unknown, or does not have a hyperparameter that is overridden
        """
        name, equals, definition = text.partition("=")
        if not equals or ":" in name:  # the first = is that of an override
            name = definition = text
        # | ends a cell of a table, $ begins a formula in a picture, and .. is another folder
        elif (name in ALGOS and definition != name) or re.search(r"^\s|\s$|^\.*$|[|$\n]", name):
            hint = "choose one that is not an algorithm's, without | and $"
            raise PlanError(f"{text!r}: {name!r} cannot be the name of an arm, {hint}")
        algo, _, assignments = definition.partition(":")
        if algo not in ALGOS:
            raise PlanError(f"unknown algorithm {algo!r}{suggestion(algo, ALGOS)}")
        return cls(name, algo, parse_hyperparameters(algo, _split_outside_brackets(assignments)))

    def at(self, key: str, value: float) -> "Arm":
        """
        Return this arm with another value of a hyperparameter, and the name of an arm with this override.

        :raises PlanError: if the algorithm does not have the hyperparameter, or the arm overrides it itself
        """
        if key in self.overrides:
            raise PlanError(f"{self.name!r} overrides {key}, which is swept: remove one of them")
        name = f"{self.name}{',' if ':' in self.name else ':'}{key}={value}"
        return Arm(name, self.algo, {**self.overrides, **parse_hyperparameters(self.algo, [f"{key}={value}"])})

    @property
    def folder(self) -> str:
        """Folder name, unique because what a shell or a file system might not like is escaped."""
        return quote(self.name.replace(":", "-", 1), safe="=,+")


def parse_hyperparameters(algo: str, assignments: list[str]) -> Hyperparameters:
    """
    Parse hyperparameters as written on the command line.

    :param algo: the algorithm that gets them
    :param assignments: ``name=value`` each, with values in yml, or ``held`` for those of ``HELD``
    :raises PlanError: if the algorithm does not have one of them
    """
    known = (arguments(algo) | ZOO_KEYS) - {"n_timesteps"}
    parsed: Hyperparameters = {}
    for assignment in assignments:
        if assignment == "held" and algo in zoo.ALGORITHMS:
            parsed.update(HELD)
            continue
        key, equals, value = assignment.partition("=")
        if not equals:
            hint = suggestion(assignment, ["held"]) if algo in zoo.ALGORITHMS else ""
            raise PlanError(f"{algo}: {assignment!r} is not of the form name=value{hint}")
        if key == "n_timesteps":
            raise PlanError(f"{algo}: the budget is the same for all arms, set it with n_timesteps of the plan (-n)")
        if key not in known:
            raise PlanError(f"{algo} has no hyperparameter {key!r}{suggestion(key, known)}")
        with reported(f"{algo}: {assignment!r}"):
            parsed[key] = yaml.load(value, Loader)
        if parsed[key] == "clip" and algo not in zoo.ALGORITHMS:
            raise PlanError(f"{algo}: only {', '.join(zoo.ALGORITHMS)} have a target that follows PPO's clip range")
    return parsed


def check_numbers(algo: str, hyperparameters: Hyperparameters) -> None:
    """
    Reject text where a number belongs: some algorithms would notice only in the middle of their first update.

    :raises ValueError: with the value and the remedy
    """
    parameters = inspect.signature(ALGOS[algo]).parameters
    for key, value in hyperparameters.items():
        hint = parameters[key].annotation if key in parameters else object
        quoted = isinstance(value, str) and re.fullmatch(r"[-+.\de]+", value)  # not lin_0.2, which is a schedule
        if quoted or (hint in (int, float, bool) and not isinstance(value, int if hint is int else int | float)):
            kind = "an integer" if hint is int else "a number"
            raise ValueError(f"{key}={value!r} must be {kind}{', without quotes' if quoted else ''}")


def resolve_hyperparameters(
    arms: list[Arm], env: str, n_timesteps: int | None, own: bool, params: list[str]
) -> dict[str, Hyperparameters]:
    """
    Determine all hyperparameters of every arm on an environment.

    :param arms: the arms to compare
    :param env: gymnasium id
    :param n_timesteps: the budget; None for the budget of PPO's entry
    :param own: give each arm the zoo's entry for its own algorithm, and share only the budget
    :param params: ``name=value`` of every arm, unless it overrides the value
    :return: arm → hyperparameters of its runs
    :raises PlanError: if the zoo has no entry for an algorithm
    """
    base = "ppo_lstm" if all(arm.algo.endswith("_lstm") for arm in arms) else "ppo"
    budget = {"n_timesteps": n_timesteps or int(_entry(base, env)["n_timesteps"])}
    resolved = {}
    for arm in arms:
        entry = _entry(arm.algo, env) if own or not issubclass(ALGOS[arm.algo], OnPolicyAlgorithm) else _shared(arm, base, env)
        resolved[arm.name] = {**entry, **budget, **parse_hyperparameters(arm.algo, params), **arm.overrides}
        if resolved[arm.name].get("target_kl") == "clip":
            resolved[arm.name]["target_kl"] = f"clip_{_entry(base, env).get('clip_range', CLIP_RANGE)}"
    return resolved


def _shared(arm: Arm, base: str, env: str) -> Hyperparameters:
    """Take from the base's entry every key that both algorithms have, and the rest from the arm's own entry."""
    # PPO's policy has no memory, and a recurrent one is nothing to PPO
    own_keys = TRUST_REGION | ({"policy"} if arm.algo.endswith("_lstm") != base.endswith("_lstm") else set())
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
    # Without this choice, the table would list every argument that only one algorithm has
    n_algorithms = Counter(key for algo in {arm.algo for arm in arms} for key in arguments(algo))
    compared = TRUST_REGION.union(*given.values(), (key for key, n in n_algorithms.items() if n > 1))
    added = {arm.name: {key: value for key, value in sorted(defaults(arm.algo).items()) if key in compared} for arm in arms}
    return {name: {**values, **given[name]} for name, values in added.items()}


def defaults(algo: str) -> Hyperparameters:
    """Default values of the hyperparameters that have one."""
    parameters = inspect.signature(ALGOS[algo]).parameters
    # Not classes and the like, which yml cannot hold
    values = {name: parameters[name].default for name in arguments(algo)}
    return {name: value for name, value in values.items() if value is None or isinstance(value, int | float | str)}


def arguments(algo: str) -> frozenset[str]:
    """Names of the hyperparameters of an algorithm."""
    return frozenset(inspect.signature(ALGOS[algo]).parameters) - OTHER_ARGUMENTS


def _entry(algo: str, env: str) -> Hyperparameters:
    """The zoo's tuned entry for an environment, or for its previous version: the zoo has no entries for MuJoCo's -v5."""
    base, _, version = env.rpartition("-v")
    previous = [f"{base}-v{number}" for number in (4, 2) if version == "5"]
    atari = ["atari"] if "AtariEnv" in str(gym.registry[env].entry_point) else []
    entries = _entries(algo)
    name = next((name for name in (env, *previous, *atari, "default") if name in entries), None)
    if name is None:
        raise PlanError(f"the zoo has neither hyperparameters of {algo} for {env} nor a default entry")
    entry = dict(entries[name])
    if name == "default":  # its policy is for vectors of numbers, and without a memory even for ppo_lstm
        network = _network(env) + ("Lstm" if algo.endswith("_lstm") else "")
        entry["policy"] = re.sub("^Mlp(Lstm)?", network, entry["policy"])
    return entry


@cache  # a file takes yml's parser a noticeable time, and every arm asks on every environment
def _entries(algo: str) -> dict[str, Hyperparameters]:
    file = zoo.hyperparameter_file(algo) if algo in zoo.ALGORITHMS else files("rl_zoo3") / "hyperparams" / f"{algo}.yml"
    return yaml.safe_load(file.read_text())  # type: ignore[no-any-return]


@cache
def _network(env: str) -> str:
    """How the names of the policies that fit the environment's observations begin."""
    # gymnasium warns of outdated versions here, and again in every run
    with warnings.catch_warnings(), reported(f"{env} cannot be made"):
        warnings.simplefilter("ignore")
        made = gym.make(env)
        made.close()
    if isinstance(made.observation_space, gym.spaces.Dict):
        return "MultiInput"
    return "Cnn" if is_image_space(made.observation_space) else "Mlp"


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
