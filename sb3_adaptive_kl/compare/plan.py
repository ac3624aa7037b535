"""
Plan of a comparison: environments, arms and seeds, with every hyperparameter resolved before the first run.

The resolved plan is written into the results folder. A run depends on nothing else.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml

from sb3_adaptive_kl.compare.arms import (
    TRUST_REGION,
    Arm,
    Hyperparameters,
    PlanError,
    arguments,
    defaults,
    resolve_hyperparameters,
    split_name,
    suggestion,
)

PLAN_FILE = "plan.yml"
FEW_SEEDS = 5  # with fewer seeds the intervals say little

Files = dict[str, bytes]  # content of a finished run's folder, by relative path


@dataclass(frozen=True)
class Run:
    """One training run. It is plain data, so it can be sent to other processes and machines."""

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
    A comparison with all hyperparameters resolved.

    :param environments: gymnasium ids
    :param arms: arms as the user wrote them; results are listed under their ``names``
    :param seeds: number of seeds
    :param n_eval_episodes: number of episodes that score a final policy
    :param gym_packages: packages to import because they register environments
    :param hyperparameters: environment → arm → hyperparameters of its runs
    :param first_seed: where seeds are counted from: choose arms on some seeds, and judge them on others
    """

    environments: list[str]
    arms: list[str]
    seeds: int
    n_eval_episodes: int
    gym_packages: list[str]
    hyperparameters: dict[str, dict[str, Hyperparameters]]
    first_seed: int = 0

    @classmethod
    def create(
        cls,
        environments: list[str],
        arms: list[str],
        seeds: int,
        n_timesteps: int | None = None,
        n_eval_episodes: int = 20,
        own_hyperparameters: bool = False,
        gym_packages: list[str] | None = None,
        first_seed: int = 0,
    ) -> "Plan":
        """
        Check the arguments and resolve the hyperparameters.

        :param environments: gymnasium ids
        :param arms: ``algo`` or ``algo:name=value,name=value``, with or without ``name=`` in front
        :param seeds: number of seeds
        :param n_timesteps: budget of each run; None for the budget of the zoo's entry for PPO
        :param n_eval_episodes: number of episodes that score a final policy
        :param own_hyperparameters: give each algorithm the zoo's entry tuned for it, instead of sharing PPO's
        :param gym_packages: packages to import because they register environments
        :param first_seed: where seeds are counted from
        :raises PlanError: if an argument is invalid
        """
        gym_packages = gym_packages or []
        parsed = _check(
            environments, arms, gym_packages, seeds=seeds, n_eval_episodes=n_eval_episodes, n_timesteps=n_timesteps
        )
        hyperparameters = {env: resolve_hyperparameters(parsed, env, n_timesteps, own_hyperparameters) for env in environments}
        _check_first_seed(first_seed)
        return cls(environments, arms, seeds, n_eval_episodes, gym_packages, hyperparameters, first_seed)

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """
        Read a plan from a file.

        :param path: a yml file with the arguments of ``create``, or with a resolved plan
        :raises PlanError: if it is neither
        """
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PlanError(f"{path} cannot be read as a plan: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise PlanError(f"{path} is not a plan: it must be a mapping with environments, arms and seeds")
        make = cls if "hyperparameters" in content else cls.create
        known = inspect.signature(make).parameters
        missing = [name for name, parameter in known.items() if parameter.default is parameter.empty and name not in content]
        for name in [*missing, *(name for name in content if name not in known)]:
            raise PlanError(f"{path}: {name!r} is {'missing' if name in missing else 'unknown' + suggestion(name, known)}")
        plan = make(**content)
        _check_first_seed(plan.first_seed)
        counts = {"seeds": plan.seeds, "n_eval_episodes": plan.n_eval_episodes}
        for arm in _check(plan.environments, plan.arms, plan.gym_packages, **counts):
            for env in plan.environments:
                entry = plan.hyperparameters
                for key in (env, arm.name):
                    entry = entry.get(key, {}) if isinstance(entry, dict) else {}
                if not isinstance(entry, dict) or not entry:
                    raise PlanError(f"{path}: missing hyperparameters of {arm.name} for {env}")
                _check_counts(n_timesteps=entry.get("n_timesteps", 0))
        return plan

    def check(self) -> None:
        """
        Make every environment and every arm's penalty once, so that a missing dependency or an invalid value is found before
        the first run, and not hours later.

        :raises PlanError: if one cannot be made
        """
        for env in self.environments:
            _make(env)
        for arm in map(Arm.parse, self.arms):
            arm.check_penalty()

    def dump(self) -> str:
        """Serialize to yml; ``load`` restores an equal plan."""
        return str(yaml.safe_dump(asdict(self), sort_keys=False))

    @property
    def names(self) -> list[str]:
        return [split_name(arm)[0] for arm in self.arms]

    @property
    def seed_numbers(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def runs(self) -> Iterator[Run]:
        """Yield all runs, seed by seed, so that an early stop leaves a balanced comparison."""
        for seed in self.seed_numbers:
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
        """
        Arm → hyperparameters, completed with defaults.

        A default is included if some arm sets the hyperparameter, or if several of the algorithms have it.
        """
        algos = {arm.name: arm.algo for arm in map(Arm.parse, self.arms)}
        known = [arguments(algo) for algo in set(algos.values())]
        compared = TRUST_REGION.union(*self.hyperparameters[env].values())
        compared |= {key for keys in known for key in keys if sum(key in others for others in known) > 1}
        return {
            name: {**{key: value for key, value in sorted(defaults(algo).items()) if key in compared}, **given}
            for (name, algo), given in zip(algos.items(), map(self.hyperparameters[env].get, algos), strict=True)
            if given is not None
        }

    def difference(self, other: "Plan") -> list[str]:
        """Describe the differences from another plan, one line each: of hyperparameters only if everything else is equal."""
        ours, theirs = _flat(asdict(self)), _flat(asdict(other))
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        keys = [key for key in keys if not key.startswith("hyperparameters.")] or keys
        return [f"{key}: {ours.get(key, 'missing')} → {theirs.get(key, 'missing')}" for key in keys]


def _check(environments: Any, arms: Any, gym_packages: Any, **counts: Any) -> list[Arm]:
    """
    Check the arguments of a plan and import the packages that register environments.

    :return: the parsed arms
    :raises PlanError: if an argument is invalid
    """
    _check_counts(**counts)
    for kind, names in (("environments", environments), ("arms", arms), ("gym_packages", gym_packages)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise PlanError(f"{kind} must be a list of names, not {names!r}")
    if not environments or not arms:
        raise PlanError(f"no {'environments' if not environments else 'arms'} to compare")
    import_module("rl_zoo3.import_envs")  # registers ale-py, minigrid, pybullet, … if installed
    for package in gym_packages:
        _import(package)
    for env in environments:
        if env not in gym.registry:
            own = "" if gym_packages else " (--gym-packages names a package that registers your own)"
            raise PlanError(f"unknown environment {env!r}{suggestion(env, gym.registry)}{own}")
    parsed = [Arm.parse(arm) for arm in arms]
    _check_distinct_folders("environments", [env.replace("/", "-") for env in environments])
    _check_distinct_folders("arms", [arm.folder for arm in parsed])
    return parsed


def _import(package: str) -> None:
    try:
        import_module(package)
    except Exception as error:  # third-party code may raise anything
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == package
        hint = ": install it, or add the folder that contains it to PYTHONPATH" if is_missing else ""
        raise PlanError(f"gym_packages: {type(error).__name__}: {error}{hint}") from None


def _make(env: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gym.make(env).close()
    except Exception as error:
        raise PlanError(f"{env} cannot be made: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _check_distinct_folders(kind: str, folders: list[str]) -> None:
    """Reject names with the same folder, also on file systems that ignore case."""
    folded = [folder.casefold() for folder in folders]
    duplicates = sorted({folder for folder in folders if folded.count(folder.casefold()) > 1})
    if duplicates:
        raise PlanError(f"{kind}: {', '.join(duplicates)} given twice")


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        is_integer = isinstance(count, int) and not isinstance(count, bool)
        if name == "n_timesteps" and isinstance(count, float):  # the zoo's files contain 1e5
            is_integer = count.is_integer()
        if count is not None and not (is_integer and count >= 1):
            raise PlanError(f"{name} must be an integer of at least 1, not {count!r}")


def _check_first_seed(first_seed: Any) -> None:
    if not isinstance(first_seed, int) or isinstance(first_seed, bool) or first_seed < 0:
        raise PlanError(f"first_seed must be an integer of at least 0, not {first_seed!r}")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {key: value for name, below in tree.items() for key, value in _flat(below, f"{prefix}.{name}".lstrip(".")).items()}
