"""
Plan of a comparison: environments, arms and seeds, with every hyperparameter resolved before the first run.

The resolved plan is written into the results folder. A run depends on nothing else.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sb3_adaptive_kl.compare.arms import Arm, Dumper, Hyperparameters, Loader, PlanError, reported, resolve_hyperparameters
from sb3_adaptive_kl.messages import suggestion

FEW_SEEDS = 5  # with fewer, intervals say little, and no arm is called better
MAX_FOLDER = 235  # characters of a run's folder: a file system's name has 255, and that of a failure is 20 longer


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

    @property
    def budget(self) -> int:
        return int(self.hyperparameters["n_timesteps"])

    def __str__(self) -> str:
        return f"{self.arm} {self.env} seed {self.seed}"


class Plan(BaseModel):
    """
    A comparison: environments, arms and seeds.

    Where ``hyperparameters`` are not given, validation resolves them.
    """

    # A misspelled field would be ignored, and seeds: true be one seed
    model_config = ConfigDict(extra="forbid", strict=True)

    environments: list[str] = Field(min_length=1)
    arms: list[str] = Field(min_length=1)
    seeds: PositiveInt
    n_eval_episodes: PositiveInt = 20
    gym_packages: list[str] = []
    # Environment → arm → hyperparameters of its runs
    hyperparameters: dict[str, dict[str, Hyperparameters]] = {}
    # Choose arms on some seeds, and judge them on others
    first_seed: NonNegativeInt = 0
    sweep: dict[str, Annotated[list[int | FiniteFloat], Field(min_length=2)]] = Field({}, max_length=1)
    # Part of the evaluation alone, so it can be changed after the runs
    protocol: Literal["ppo-paper"] | None = None
    # These three resolve the hyperparameters. In yml, 1.0e6 is a float
    n_timesteps: PositiveInt | None = Field(None, strict=False, exclude=True)
    params: list[str] = Field([], exclude=True)
    own_hyperparameters: bool = Field(False, exclude=True)

    @classmethod
    def create(cls, content: Any, source: str = "") -> "Plan":
        """
        Validate, and report what is wrong in one line.

        :param content: the fields
        :param source: where they come from, for the error
        :raises PlanError: if one is invalid
        """
        try:
            return cls.model_validate(content)
        except ValidationError as invalid:
            raise PlanError(source + "; ".join(map(_in_words, invalid.errors()))) from None

    @classmethod
    def load(cls, path: Path, options: Mapping[str, Any] | None = None) -> "Plan":
        """
        Read a plan from a file.

        :param path: a yml file with the fields
        :param options: fields that replace those of the file
        :raises PlanError: if it does not hold a valid plan
        """
        with reported(f"{path} cannot be read as a plan"):
            content = yaml.load(path.read_text(), Loader)
        if options and isinstance(content, dict):
            if "hyperparameters" in content and {"arms", "sweep"} & options.keys():
                raise PlanError(f"{path} holds the hyperparameters of its arms: remove them from it to give it other arms")
            content |= options
        return cls.create(content, f"{path}: ")

    @model_validator(mode="after")
    def _complete(self) -> "Plan":
        for package in ("rl_zoo3.import_envs", *self.gym_packages):  # the zoo's: ale-py, minigrid, … if installed
            with reported("gym_packages must be installed or on PYTHONPATH"):
                import_module(package)
        for env in self.environments:
            with reported(f"unknown environment {env!r} (--gym-packages names a package that registers your own)"):
                gym.spec(env)
        given = self.n_timesteps, self.own_hyperparameters, self.params
        if "hyperparameters" not in self.model_fields_set:
            resolved = {env: resolve_hyperparameters(self.parsed_arms, env, *given) for env in self.environments}
            self.hyperparameters, self.n_timesteps, self.own_hyperparameters, self.params = resolved, None, False, []
        elif any(given):
            raise PlanError("n_timesteps, own_hyperparameters and params resolve hyperparameters: remove them or the latter")
        # The file may have been edited
        for env, arm in product(self.environments, self.names):
            budget = self.hyperparameters.get(env, {}).get(arm, {}).get("n_timesteps", 0)
            if not isinstance(budget, int | float) or budget < 1:
                raise PlanError(f"hyperparameters.{env}.{arm}: n_timesteps must be a number of at least 1, not {budget!r}")
        for run in self.runs():
            if len(run.folder) > MAX_FOLDER:
                raise PlanError(f"the arm {run.arm!r} is too long for a folder: give it a short name, name={run.algo}:…")
        ((folder, n),) = Counter(run.folder.casefold() for run in self.runs()).most_common(1)
        if n > 1:  # also on file systems that ignore case
            raise PlanError(f"an environment or an arm is given twice: {n} runs would be written to {folder}")
        return self

    def dump(self) -> str:
        """Serialize to yml; ``load`` restores an equal plan."""
        return str(yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False))

    @property
    def parsed_arms(self) -> list[Arm]:
        given = [Arm.parse(arm) for arm in self.arms]
        return [arm.at(key, value) for key, values in self.sweep.items() for arm in given for value in values] or given

    @property
    def families(self) -> dict[str, dict[float, str]]:
        """Arm as it was given → swept value → name of the arm with it. Empty without a sweep."""
        given = [Arm.parse(arm) for arm in self.arms]
        return {arm.name: {n: arm.at(key, n).name for n in values} for key, values in self.sweep.items() for arm in given}

    @property
    def names(self) -> list[str]:
        return [arm.name for arm in self.parsed_arms]

    def runs(self) -> Iterator[Run]:
        """Yield all runs, seed by seed, so that an early stop leaves a balanced comparison."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        for seed, env, arm in product(seeds, self.environments, self.parsed_arms):
            folder = f"runs/{arm.folder}/{arm.algo}/{env.replace('/', '-')}_{seed + 1}"
            hyperparameters, packages = self.hyperparameters[env][arm.name], tuple(self.gym_packages)
            yield Run(env, arm.name, arm.algo, seed, hyperparameters, self.n_eval_episodes, packages, folder)

    def difference(self, other: "Plan") -> list[str]:
        """Describe the differences from another plan, one line each: of hyperparameters only if everything else is equal."""
        # Another protocol does not need other runs
        ours, theirs = (pd.json_normalize(plan.model_dump(exclude={"protocol"})).iloc[0].to_dict() for plan in (self, other))
        changes = changes_between(ours, theirs)
        return [change for change in changes if not change.startswith("hyperparameters.")] or changes


def changes_between(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> list[str]:
    """Describe the differences, one line for each key."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key, 'missing')} → {new.get(key, 'missing')}" for key in keys]


def _in_words(error: ErrorDetails) -> str:
    if error["type"] == "value_error":  # a PlanError
        return str(error["ctx"]["error"])
    name = ".".join(map(str, error["loc"])) or "plan"
    value = "" if error["type"] == "missing" else f"={error['input']!r}"
    hint = suggestion(name, Plan.model_fields) if error["type"] == "extra_forbidden" else ""
    return f"{name}{value}: {error['msg']}{hint}"
