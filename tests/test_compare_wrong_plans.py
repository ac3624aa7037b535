"""Plans that cannot be carried out: what is told, and before the first run."""

import gc
import math
import re

import gymnasium as gym
import pytest
import yaml

from sb3_adaptive_kl.compare.arms import Arm, PlanError
from sb3_adaptive_kl.compare.execute import check
from sb3_adaptive_kl.compare.plan import Plan
from tests.test_compare_plan import create


@pytest.mark.parametrize(
    "arm",
    [
        *("=ppo_kl", " =ppo_kl", "ppo=ppo_kl", "trpo=ppo_kl:target_kl=0.1"),
        *("..=ppo_kl", " ppo=ppo_kl", "a|b=ppo_kl", "a\nb=ppo_kl", "$\\frac$=ppo_kl"),
    ],
)
def test_names_of_arms_do_not_mislead(arm):
    with pytest.raises(PlanError, match="cannot be the name of an arm, choose one that is not an algorithm's"):
        Arm.parse(arm)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"learning_rates": [1, 2]}, "ppo_kl has no hyperparameter 'learning_rates', did you mean 'learning_rate'"),
        ({"n_timesteps": [1, 2]}, "ppo_kl: the budget is the same for all arms"),
        ({"learning_rate": [1e-3]}, "sweep.learning_rate=.*should have at least 2 items"),
        ({"learning_rate": [1e-3, "lin_1e-3"]}, "Input should be a valid number"),
        ({"learning_rate": [1e-3, math.inf]}, "Input should be a finite number"),
        ({"learning_rate": [True, False]}, "Input should be a valid"),
        (["learning_rate=1,2"], "Input should be a valid dictionary"),
        ({"gamma": [0.9, 0.99], "n_epochs": [1, 2]}, "should have at most 1 item"),
        ({"target_kl": [0.1, 0.2]}, "'held' overrides target_kl, which is swept: remove one of them"),
        ({"gamma": [0.9, 0.9]}, "is given twice"),
    ],
)
def test_invalid_sweeps_are_rejected(sweep, message):
    with pytest.raises(PlanError, match=message):
        create(arms=["ppo_kl", "held=ppo_kl:target_kl=0.05"], sweep=sweep)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"environments": ["CartPole-v3"]},
            "unknown environment 'CartPole-v3' .*provides versioned environments: \\[ `v0`, `v1`",
        ),
        ({"environments": ["Rover-v0"]}, "--gym-packages names a package that registers your own"),
        ({"environments": []}, "environments=.*List should have at least 1 item"),
        ({"environments": "CartPole-v1"}, "environments='CartPole-v1': Input should be a valid list"),
        ({"arms": ["pppo"]}, "unknown algorithm 'pppo', did you mean 'ppo'"),
        ({"arms": ["ppo_kl:target=0.1"]}, "ppo_kl has no hyperparameter 'target', did you mean 'target_kl'"),
        ({"arms": ["ppo:target_kl"]}, "not of the form name=value"),
        ({"arms": ["ppo", "ppo"]}, "an environment or an arm is given twice: 2 runs .* runs/ppo/"),
        ({"arms": ["ppo:policy=A", "ppo:policy=a"]}, "given twice"),  # on a file system that ignores case
        ({"arms": ["ppo:n_timesteps=5"]}, "the budget is the same for all arms"),
        ({"arms": []}, "arms=.*List should have at least 1 item"),
        (
            {"arms": [f"ppo:policy_kwargs={{'a': '{250 * 'x'}'}}"]},
            "is too long for a folder: give it a short name, name=ppo:…",
        ),
        ({"params": ["n_evns=8"]}, "ppo_kl has no hyperparameter 'n_evns', did you mean 'n_envs'"),
        ({"arms": ["ppo", "a2c"], "params": ["n_epochs=3"]}, "a2c has no hyperparameter 'n_epochs'"),
        ({"arms": ["ppo:clip_range=[0.1"]}, r"clip_range=\[0.1': ParserError: "),
        (
            {"hyperparameters": {}, "n_timesteps": 5},
            "n_timesteps, own_hyperparameters and params resolve hyperparameters: remove them",
        ),
        ({"seeds": 0}, "seeds=0: Input should be greater than 0"),
        ({"seeds": 2.5}, "seeds=2.5: Input should be a valid integer"),
        ({"seeds": 2.0}, "seeds=2.0: Input should be a valid integer"),
        ({"seeds": True}, "seeds=True: Input should be a valid integer"),
        ({"n_timesteps": float("nan")}, "n_timesteps=nan: Input should be a finite number"),
        ({"n_timesteps": float("inf")}, "n_timesteps=inf: Input should be a finite number"),
        ({"n_timesteps": -5}, "n_timesteps=-5: Input should be greater than 0"),
        ({"n_eval_episodes": 0}, "n_eval_episodes=0: Input should be greater than 0"),
        (
            {"gym_packages": ["no_such_package"]},
            "gym_packages must be installed or on PYTHONPATH: .* No module named 'no_such_package'",
        ),
        ({"gym_packages": "minigrid"}, "gym_packages='minigrid': Input should be a valid list"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(PlanError, match=message) as error:
        create(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("environments: [CartPole-v1]\narms: [ppo]", "seeds: Field required"),
        (
            "environments: [CartPole-v1]\narms: [ppo]\nseeds: 1\nseed: 2",
            "seed=2: Extra inputs are not permitted, did you mean 'seeds'",
        ),
        ("[1, 2]", r"plan=\[1, 2\]: Input should be a valid dictionary"),
        ("a: [", "cannot be read as a plan"),
        ("seeds: 1\nseeds: 3", "cannot be read as a plan: .*'seeds' is there twice"),
        ("environments: CartPole-v1\narms: [ppo]\nseeds: 1", "environments='CartPole-v1': Input should be a valid list"),
    ],
)
def test_files_that_are_not_a_plan_are_rejected(tmp_path, content, message):
    (tmp_path / "plan.yml").write_text(content)
    with pytest.raises(PlanError, match=message) as error:
        Plan.load(tmp_path / "plan.yml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"CartPole-v1": {"ppo_kl": {"n_timesteps": 9}}}, "hyperparameters.CartPole-v1.ppo: n_timesteps must be"),
        (
            {"CartPole-v1": {"ppo_kl": {"n_timesteps": 9}, "ppo": None}},
            "hyperparameters.CartPole-v1.ppo=None: Input should be a valid dictionary",
        ),
        (5, "hyperparameters=5: Input should be a valid dictionary"),
        ({"CartPole-v1": {"ppo_kl": {"n_timesteps": 0}}}, "n_timesteps must be"),
        ({"CartPole-v1": {"ppo_kl": {"n_envs": 1}}}, "n_timesteps must be"),
    ],
)
def test_damaged_plan_file_is_rejected(tmp_path, hyperparameters, message):
    content = {**yaml.safe_load(create().dump()), "hyperparameters": hyperparameters}
    (tmp_path / "plan.yml").write_text(yaml.safe_dump(content))
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan.yml")


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("ppo_kl:kl_ceiling=0.5", "on CartPole-v1: ValueError: kl_ceiling=0.5 must be a finite number >= 1"),
        ("ppo_kl:target_kl=abc", "target_kl='abc': write lin_0.02"),
        ("ppo_kl_lstm:kl_rule=predict", "kl_rule='predict' is unknown, did you mean 'predictive'"),
        ("ppo_kl:clip_range=outlier", "clip_range='outlier' is unknown, did you mean 'outliers'"),
        ("ppo_kl:clip_range_vf=outliers", "clip_range_vf='outliers' must be a positive number or lin_0.2"),
        ("ppo_kl:n_epochs='3'", "n_epochs='3' must be an integer, without quotes"),
        ("ppo_kl:n_epochs=three", "n_epochs='three' must be an integer"),
        ("ppo:n_epochs=3.5", "n_epochs=3.5 must be an integer"),
        ("ppo:gamma=high", "gamma='high' must be a number"),
        ("ppo:clip_range='0.2'", "clip_range='0.2' must be a number, without quotes"),
        ("ppo_kl:target_kl='1e-2'", "target_kl='1e-2' must be a number, without quotes"),
        ("ppo:n_envs='8'", "n_envs='8' must be a number, without quotes"),
        ("ppo:policy=MultiInputPolicy", "'ppo:policy=MultiInputPolicy' on CartPole-v1: AttributeError: "),
        ("sac", "'sac' on CartPole-v1: AssertionError: The algorithm only supports"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the zoo leaves the monitor files of its environments open
def test_arm_that_cannot_be_built_is_found_before_the_first_run(arm, message):
    plan = create(arms=["ppo_kl:target_kl=clip,clip_range=None,kl_ceiling=1.5", arm])
    with pytest.raises(PlanError, match=re.escape(message)):
        check(plan)
    gc.collect()


def test_environment_that_cannot_be_made_is_found_before_the_first_run():
    gym.register("Broken-v0", "no_such_module:Env")
    try:
        with pytest.raises(PlanError, match="Broken-v0 cannot be made: ModuleNotFoundError: No module named 'no_such_module'"):
            create(["CartPole-v1", "Broken-v0"])
    finally:
        del gym.registry["Broken-v0"]
