"""The plans of our own studies, in benchmarks/."""

from pathlib import Path

import pytest

from sb3_adaptive_kl import HELD
from sb3_adaptive_kl.compare.arms import defaults, effective
from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.report import differing


@pytest.mark.parametrize(("name", "n_arms"), [("study", 5), ("judged", 3)])
def test_plans_of_the_studies_are_valid(name, n_arms):
    """Their arms share everything but the trust region, and compile=True, on each environment."""
    plan = Plan.load(Path(__file__).parents[1] / "benchmarks" / f"{name}.yml")
    assert len(list(plan.runs())) == 7 * n_arms * 5
    trust_region = {"target_kl", "clip_range", "kl_rule", "kl_ceiling", "compile"}
    for env in plan.environments:
        assert set(differing(plan.hyperparameters[env])) == trust_region, env


def test_plan_that_judges_the_default_is_valid():
    """On each environment the default is compared, and the arguments that README recommends, with a rate that follows."""
    plan = Plan.load(Path(__file__).parents[1] / "benchmarks" / "judged_nine.yml")
    assert len(list(plan.runs())) == 9 * 3 * 5
    held = {**HELD, "learning_rate_rule": "balanced"}
    default = {name: value for name, value in defaults("ppo_kl").items() if name in held}
    for env in plan.environments:
        assert set(differing(plan.hyperparameters[env])) == {*held, "compile"}, env
        for arm, expected in (("default", default), ("balanced", held)):
            assert {**default, **plan.hyperparameters[env][arm]}.items() >= expected.items(), env


def test_plan_of_the_papers_table_is_valid():
    """Its hyperparameters use yml's anchors and merge keys."""
    plan = Plan.load(Path(__file__).parents[1] / "benchmarks" / "table1.yml")
    assert len(list(plan.runs())) == 7 * 2 * 3
    assert {run.budget for run in plan.runs()} == {1_000_000}
    for env in plan.environments:
        assert differing(plan.hyperparameters[env])["clip_range"] == {"clip_0.2": 0.2, "adaptive_0.01": None}


@pytest.mark.parametrize(("part", "n_arms"), [("next", 3), ("rest", 6)])
def test_plans_of_the_rest_of_the_papers_table_are_valid(part, n_arms):
    """Nothing of the zoo's own settings for ppo_kl is left, and all that is not said here is as in the first part."""
    plan, first = (Plan.load(Path(__file__).parents[1] / "benchmarks" / f"table1{name}.yml") for name in (f"_{part}", ""))
    assert [plan.environments, plan.seeds, plan.first_seed] == [first.environments, first.seeds, first.first_seed]
    assert len(plan.arms) == n_arms
    for env in plan.environments:
        values = effective(
            [*plan.parsed_arms, *first.parsed_arms], {**plan.hyperparameters[env], **first.hyperparameters[env]}
        )
        own = {"target_kl", "kl_rule", "kl_coef_bounds", "init_kl_coef", *(["clip_range"] if part == "rest" else [])}
        assert set(differing({arm: values[arm] for arm in [*plan.names, "adaptive_0.01"]})) == own, env
        assert {arm["kl_rule"] for arm in values.values() if "kl_rule" in arm} == {"adaptive", "fixed"}


def test_plan_of_the_sensitivity_is_valid():
    """Four values of one hyperparameter, and the trust region is all else that its arms differ in."""
    plan = Plan.load(Path(__file__).parents[1] / "benchmarks" / "sensitivity.yml")
    assert len(list(plan.runs())) == 4 * 3 * 4 * 3
    trust_region = {"target_kl", "clip_range", "kl_rule", "kl_ceiling", "learning_rate_rule", "compile", "learning_rate"}
    for env in plan.environments:
        assert set(differing(plan.hyperparameters[env])) == trust_region, env
