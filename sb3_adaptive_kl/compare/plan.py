"""
What is compared: environments, arms and seeds, with every hyperparameter settled before the first run.

An arm is an algorithm of the zoo with overrides, written ``ppo_kl:target_kl=0.1,kl_rule=fixed``. All arms share seeds, budget,
network, normalisation and every hyperparameter that they have in common, which is the zoo's tuned entry for PPO; only what
makes the trust region is each algorithm's own. The settled plan is written into the results, and is all that a run depends on.
"""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_adaptive_kl import zoo

Hyperparameters = dict[str, Any]

PLAN_FILE = "plan.yml"
# With fewer, intervals say little
FEW_SEEDS = 5
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
            raise PlanError(f"unknown algorithm {algo!r}{_nearest(algo, ALGOS)}")
        overrides = {}
        for assignment in _split_outside_brackets(assignments):
            name, equals, value = assignment.partition("=")
            if not equals:
                raise PlanError(f"{text!r}: {assignment!r} is not of the form name=value")
            if name not in _arguments(algo) | ZOO_KEYS:
                raise PlanError(f"{algo} has no hyperparameter {name!r}{_nearest(name, _arguments(algo) | ZOO_KEYS)}")
            overrides[name] = _value(value)
        return cls(text, algo, overrides)

    @property
    def folder(self) -> str:
        """The name as a file system likes it."""
        return re.sub(r"[^\w.=,+-]", "-", self.name)


@dataclass(frozen=True)
class Run:
    """One training run; plain data, so that it can be sent anywhere."""

    env: str
    arm: str
    algo: str
    seed: int
    hyperparameters: Hyperparameters
    n_eval_episodes: int
    gym_packages: tuple[str, ...]
    folder: str  # relative to the results; the zoo's layout: <log folder>/<algo>/<env>_<id>

    def __str__(self) -> str:
        return f"{self.arm} {self.env} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """
    :param environments: gymnasium ids
    :param arms: as the user wrote them
    :param seeds: number of seeds, from 0
    :param n_eval_episodes: episodes that score a final policy
    :param gym_packages: packages to import so that they register their environments
    :param hyperparameters: environment → arm → everything that the run is given
    """

    environments: list[str]
    arms: list[str]
    seeds: int
    n_eval_episodes: int
    gym_packages: list[str]
    hyperparameters: dict[str, dict[str, Hyperparameters]]

    @classmethod
    def settle(
        cls,
        environments: Sequence[str],
        arms: Sequence[str],
        seeds: int,
        n_timesteps: int | None = None,
        n_eval_episodes: int = 20,
        own_hyperparameters: bool = False,
        gym_packages: Sequence[str] = (),
    ) -> "Plan":
        """
        :param n_timesteps: budget of each run; None for that of the zoo's entry
        :param own_hyperparameters: give each algorithm the zoo's tuned entry for itself, instead of sharing PPO's
        :raises PlanError: if something in it does not exist or cannot be
        """
        parsed = _check(
            environments, arms, gym_packages, seeds=seeds, n_eval_episodes=n_eval_episodes, n_timesteps=n_timesteps
        )
        budget = {} if n_timesteps is None else {"n_timesteps": n_timesteps}
        hyperparameters = {
            env: {arm.name: {**_settle(arm, env, own_hyperparameters), **budget, **arm.overrides} for arm in parsed}
            for env in environments
        }
        return cls(list(environments), list(arms), seeds, n_eval_episodes, list(gym_packages), hyperparameters)

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """
        :param path: a yml file with the arguments of ``settle``, or with a settled plan
        :raises PlanError: if it is neither
        """
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PlanError(f"{path} cannot be read as a plan: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise PlanError(f"{path} is not a plan: it must be a mapping with environments, arms and seeds")
        make = cls if "hyperparameters" in content else cls.settle
        known = inspect.signature(make).parameters
        missing = [name for name, parameter in known.items() if parameter.default is parameter.empty and name not in content]
        for name in [*missing, *(name for name in content if name not in known)]:
            raise PlanError(f"{path}: {name!r} is {'missing' if name in missing else 'unknown' + _nearest(name, known)}")
        plan = make(**content)
        for arm in _check(
            plan.environments, plan.arms, plan.gym_packages, seeds=plan.seeds, n_eval_episodes=plan.n_eval_episodes
        ):
            for env in plan.environments:
                if arm.name not in plan.hyperparameters.get(env, {}):
                    raise PlanError(f"{path}: no hyperparameters of {arm.name} for {env}")
        return plan

    def dump(self) -> str:
        """The plan as yml, from which ``load`` makes an equal one."""
        return str(yaml.safe_dump(asdict(self), sort_keys=False))

    def runs(self) -> Iterator[Run]:
        """All runs, seed by seed, so that an early stop leaves a balanced comparison."""
        for seed in range(self.seeds):
            for env in self.environments:
                for arm in map(Arm.parse, self.arms):
                    yield Run(
                        env,
                        arm.name,
                        arm.algo,
                        seed,
                        self.hyperparameters[env][arm.name],
                        self.n_eval_episodes,
                        tuple(self.gym_packages),
                        f"runs/{arm.folder}/{arm.algo}/{env.replace('/', '-')}_{seed + 1}",
                    )

    def effective(self, env: str) -> dict[str, Hyperparameters]:
        """Arm → hyperparameters, with an algorithm's own default for what the plan leaves to it and gives another arm."""
        arms = self.hyperparameters[env]
        named = TRUST_REGION.union(*arms.values())
        defaults = {name: inspect.signature(ALGOS[Arm.parse(name).algo]).parameters for name in arms}
        return {
            name: {
                **given,
                **{key: defaults[name][key].default for key in sorted(named - given.keys()) if key in defaults[name]},
            }
            for name, given in arms.items()
        }

    def difference(self, other: "Plan") -> list[str]:
        """Where another plan differs, one line each."""
        ours, theirs = _flat(asdict(self)), _flat(asdict(other))
        return [
            f"{key}: {ours.get(key, 'not there')} → {theirs.get(key, 'not there')}"
            for key in {**ours, **theirs}
            if ours.get(key) != theirs.get(key)
        ]


def _check(environments: Sequence[str], arms: Sequence[str], gym_packages: Sequence[str], **counts: int | None) -> list[Arm]:
    """
    :return: the arms
    :raises PlanError: if something does not exist or cannot be
    """
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise PlanError(f"{name} must be a whole number of at least 1, not {count!r}")
    for kind, names in (("environments", environments), ("arms", arms)):
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise PlanError(f"{kind} must be a list of names, not {names!r}")
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise PlanError(f"{kind}: {', '.join(sorted(twice))} given twice")
    import_module("rl_zoo3.import_envs")  # registers those of ale-py, minigrid, pybullet, … where they are installed
    try:
        for package in gym_packages:
            import_module(package)
    except ImportError as error:
        raise PlanError(f"gym_packages: {error}") from None
    for env in environments:
        if env not in gym.registry:
            raise PlanError(f"unknown environment {env!r}{_nearest(env, gym.registry)}")
    return [Arm.parse(arm) for arm in arms]


def _settle(arm: Arm, env: str, own: bool) -> Hyperparameters:
    mine = _entry(arm.algo, env)
    if own or not issubclass(ALGOS[arm.algo], OnPolicyAlgorithm):
        return mine
    base = "ppo_lstm" if arm.algo.endswith("_lstm") else "ppo"
    known_to_both = (_arguments(arm.algo) & _arguments(base) | ZOO_KEYS) - TRUST_REGION
    shared = {key: value for key, value in _entry(base, env).items() if key in known_to_both}
    if arm.algo == base:
        return {**shared, **{key: mine[key] for key in TRUST_REGION & mine.keys()}}
    return {**shared, **{key: value for key, value in mine.items() if key not in known_to_both}}


def _entry(algo: str, env: str) -> Hyperparameters:
    """The tuned entry for an environment; where the zoo has none of its own, such as for MuJoCo's -v5, ours for ppo_kl."""
    theirs = _file(algo)
    family = {"ppo": "ppo_kl", "ppo_lstm": "ppo_kl_lstm"}.get(algo)
    if env not in theirs and family is not None and env in _file(family):
        return {key: value for key, value in _file(family)[env].items() if key in (_arguments(algo) | ZOO_KEYS) - TRUST_REGION}
    atari = "AtariEnv" in str(gym.registry[env].entry_point)
    name = env if env in theirs else "atari" if atari and "atari" in theirs else "default"
    if name not in theirs:
        raise PlanError(f"the zoo has no hyperparameters of {algo} for {env}, and no default")
    return dict(theirs[name])


def _file(algo: str) -> dict[str, Hyperparameters]:
    ours = zoo.hyperparameter_file(algo)
    path = ours if algo in zoo.ALGORITHMS else Path(str(files("rl_zoo3") / "hyperparams" / f"{algo}.yml"))
    return yaml.safe_load(path.read_text())  # type: ignore[no-any-return]


def _arguments(algo: str) -> frozenset[str]:
    return frozenset(inspect.signature(ALGOS[algo]).parameters) - {"env", "seed", "_init_setup_model"}


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


def _nearest(name: str, names: Any) -> str:
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {key: value for name, below in tree.items() for key, value in _flat(below, f"{prefix}.{name}".lstrip(".")).items()}
