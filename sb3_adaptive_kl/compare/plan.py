"""
What is compared: environments, arms and seeds, with every hyperparameter settled before the first run.

The settled plan is written into the results, and is all that a run depends on.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml

from sb3_adaptive_kl.compare.arms import TRUST_REGION, Arm, Hyperparameters, PlanError, arguments, defaults, nearest, settle

PLAN_FILE = "plan.yml"
# With fewer, intervals say little
FEW_SEEDS = 5


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
        environments: list[str],
        arms: list[str],
        seeds: int,
        n_timesteps: int | None = None,
        n_eval_episodes: int = 20,
        own_hyperparameters: bool = False,
        gym_packages: list[str] | None = None,
    ) -> "Plan":
        """
        :param n_timesteps: budget of each run; None for that of the zoo's entry for PPO
        :param own_hyperparameters: give each algorithm the zoo's tuned entry for itself, instead of sharing PPO's
        :raises PlanError: if something in it does not exist or cannot be
        """
        gym_packages = gym_packages or []
        parsed = _check(
            environments, arms, gym_packages, seeds=seeds, n_eval_episodes=n_eval_episodes, n_timesteps=n_timesteps
        )
        hyperparameters = {env: settle(parsed, env, n_timesteps, own_hyperparameters) for env in environments}
        return cls(environments, arms, seeds, n_eval_episodes, gym_packages, hyperparameters)

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
            raise PlanError(f"{path}: {name!r} is {'missing' if name in missing else 'unknown' + nearest(name, known)}")
        plan = make(**content)
        counts = {"seeds": plan.seeds, "n_eval_episodes": plan.n_eval_episodes}
        for arm in _check(plan.environments, plan.arms, plan.gym_packages, **counts):
            for env in plan.environments:
                entry = plan.hyperparameters
                for key in (env, arm.name):
                    entry = entry.get(key, {}) if isinstance(entry, dict) else {}
                if not isinstance(entry, dict) or not entry:
                    raise PlanError(f"{path}: no hyperparameters of {arm.name} for {env}")
                _check_counts(n_timesteps=entry.get("n_timesteps", 0))
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
        """Arm → hyperparameters, with the defaults of what the plan names for some arm or what several algorithms know."""
        algos = {name: Arm.parse(name).algo for name in self.arms}
        known = [arguments(algo) for algo in set(algos.values())]
        compared = TRUST_REGION.union(*self.hyperparameters[env].values())
        compared |= {key for keys in known for key in keys if sum(key in others for others in known) > 1}
        return {
            name: {**{key: value for key, value in sorted(defaults(algo).items()) if key in compared}, **given}
            for (name, algo), given in zip(algos.items(), map(self.hyperparameters[env].get, self.arms), strict=True)
            if given is not None
        }

    def difference(self, other: "Plan") -> list[str]:
        """Where another plan differs, one line each."""
        ours, theirs = _flat(asdict(self)), _flat(asdict(other))
        return [
            f"{key}: {ours.get(key, 'not there')} → {theirs.get(key, 'not there')}"
            for key in {**ours, **theirs}
            if ours.get(key) != theirs.get(key)
        ]


def _check(environments: Any, arms: Any, gym_packages: Any, **counts: Any) -> list[Arm]:
    """
    :return: the arms
    :raises PlanError: if something does not exist or cannot be
    """
    _check_counts(**counts)
    for kind, names in (("environments", environments), ("arms", arms), ("gym_packages", gym_packages)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise PlanError(f"{kind} must be a list of names, not {names!r}")
    if not environments or not arms:
        raise PlanError(f"no {'environments' if not environments else 'arms'} to compare")
    import_module("rl_zoo3.import_envs")  # registers those of ale-py, minigrid, pybullet, … where they are installed
    try:
        for package in gym_packages:
            import_module(package)
    except Exception as error:  # it is somebody else's code
        raise PlanError(f"gym_packages: {type(error).__name__}: {error}") from None
    for env in environments:
        if env not in gym.registry:
            raise PlanError(f"unknown environment {env!r}{nearest(env, gym.registry)}")
    parsed = [Arm.parse(arm) for arm in arms]
    _check_told_apart("environments", [env.replace("/", "-") for env in environments])
    _check_told_apart("arms", [arm.folder for arm in parsed])
    return parsed


def _check_told_apart(kind: str, folders: list[str]) -> None:
    """By their folders, on file systems that ignore case as well."""
    folded = [folder.casefold() for folder in folders]
    twice = sorted({folder for folder in folders if folded.count(folder.casefold()) > 1})
    if twice:
        raise PlanError(f"{kind}: {', '.join(twice)} given twice")


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        whole = isinstance(count, int) and not isinstance(count, bool)
        if name == "n_timesteps" and isinstance(count, float):  # as the zoo's files have it: 1e5
            whole = count.is_integer()
        if count is not None and not (whole and count >= 1):
            raise PlanError(f"{name} must be a whole number of at least 1, not {count!r}")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {key: value for name, below in tree.items() for key, value in _flat(below, f"{prefix}.{name}".lstrip(".")).items()}
