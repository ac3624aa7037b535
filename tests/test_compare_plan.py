"""A plan: what is shared and what is not, what is refused, and that the file says all of it."""

from importlib.resources import files

import pytest
import yaml

pytest.importorskip("rl_zoo3", reason="the extra `compare` is not installed")

from sb3_adaptive_kl.compare.plan import Arm, Plan, PlanError
from sb3_adaptive_kl.compare.report import differing, shared


def settle(environments=("CartPole-v1",), arms=("ppo_kl", "ppo"), seeds=2, **kwargs):
    return Plan.settle(list(environments), list(arms), seeds, **kwargs)


def test_only_the_trust_region_differs():
    """Also where the two files of tuned hyperparameters differ in more."""
    plan = settle(["CartPole-v1", "Pendulum-v1", "LunarLander-v3", "Swimmer-v5", "PongNoFrameskip-v4"])
    for env in plan.environments:
        assert set(differing(plan.hyperparameters[env])) <= {"target_kl", "clip_range"}, env
    assert plan.hyperparameters["CartPole-v1"]["ppo"]["n_steps"] == 32  # the zoo's, not that of our own file
    assert plan.hyperparameters["Swimmer-v5"]["ppo"]["gamma"] == 0.9999  # which only our own file has
    assert plan.hyperparameters["PongNoFrameskip-v4"]["ppo_kl"]["frame_stack"] == 4
    assert shared(plan.hyperparameters["Swimmer-v5"])["normalize"] is True


def test_target_kl_is_not_shared_with_algorithms_that_mean_something_else_by_it():
    arms = settle(arms=["ppo_kl:target_kl=0.05", "ppo", "trpo"]).hyperparameters["CartPole-v1"]
    assert arms["ppo_kl:target_kl=0.05"]["target_kl"] == 0.05
    assert "target_kl" not in arms["ppo"]
    assert "target_kl" not in arms["trpo"]
    assert arms["trpo"]["n_steps"] == arms["ppo"]["n_steps"]
    assert "n_epochs" not in arms["trpo"]  # which TRPO does not know


def test_own_hyperparameters():
    arms = settle(own_hyperparameters=True).hyperparameters["CartPole-v1"]
    assert (arms["ppo_kl"]["n_steps"], arms["ppo"]["n_steps"]) == (256, 32)


def test_off_policy_algorithms_keep_their_entry():
    arms = settle(["Pendulum-v1"], ["ppo", "sac"]).hyperparameters["Pendulum-v1"]
    theirs = yaml.safe_load((files("rl_zoo3") / "hyperparams" / "sac.yml").read_text())
    assert arms["sac"] == theirs["Pendulum-v1"]


def test_effective_names_the_defaults_that_are_compared():
    effective = settle(["Pendulum-v1"], ["ppo_kl", "ppo", "ppo_kl:kl_rule=fixed"]).effective("Pendulum-v1")
    assert effective["ppo_kl"]["target_kl"] == 0.01  # not in the file
    assert effective["ppo_kl"]["kl_rule"] == "adaptive"
    assert effective["ppo"]["target_kl"] is None
    assert "kl_rule" not in effective["ppo"]


def test_overrides_are_yml_and_may_hold_brackets():
    arm = Arm.parse("ppo_kl:target_kl=1e-3,kl_rule=fixed,kl_coef_bounds=[0.1, 3],policy_kwargs=dict(net_arch=[8,8],share=1)")
    assert arm.overrides == {
        "target_kl": 0.001,
        "kl_rule": "fixed",
        "kl_coef_bounds": [0.1, 3],
        "policy_kwargs": "dict(net_arch=[8,8],share=1)",
    }


def test_the_file_says_all_of_it(tmp_path):
    plan = settle(arms=["ppo_kl:target_kl=0.1", "a2c"], n_timesteps=1000, n_eval_episodes=3)
    (tmp_path / "plan.yml").write_text(plan.dump())
    loaded = Plan.load(tmp_path / "plan.yml")
    assert loaded == plan
    assert list(loaded.runs()) == list(plan.runs())
    assert loaded.difference(plan) == []
    assert plan.difference(settle(arms=["ppo_kl:target_kl=0.1", "a2c"], n_timesteps=1000, n_eval_episodes=4)) == [
        "n_eval_episodes: 3 → 4"
    ]


def test_runs_have_folders_of_their_own_in_the_zoos_layout():
    plan = settle(["CartPole-v1", "Pendulum-v1"], ["ppo_kl:target_kl=0.1", "ppo_kl:target_kl=0.2", "ppo"], 2)
    folders = [run.folder for run in plan.runs()]
    assert len(set(folders)) == 2 * 3 * 2
    assert folders[0] == "runs/ppo_kl-target_kl=0.1/ppo_kl/CartPole-v1_1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"environments": ["CartPole-v3"]}, "unknown environment 'CartPole-v3', did you mean 'CartPole-v"),
        ({"environments": []}, "environments must be a list of names"),
        ({"arms": ["pppo"]}, "unknown algorithm 'pppo', did you mean 'ppo'"),
        ({"arms": ["ppo_kl:target=0.1"]}, "ppo_kl has no hyperparameter 'target', did you mean 'target_kl'"),
        ({"arms": ["ppo:target_kl"]}, "not of the form name=value"),
        ({"arms": ["ppo", "ppo"]}, "ppo given twice"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, not 0"),
        ({"seeds": 2.5}, "seeds must be a whole number"),
        ({"n_timesteps": -5}, "n_timesteps must be"),
        ({"n_eval_episodes": 0}, "n_eval_episodes must be"),
        ({"gym_packages": ["no_such_package"]}, "gym_packages: No module named 'no_such_package'"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(PlanError, match=message) as error:
        settle(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("environments: [CartPole-v1]\narms: [ppo]", "'seeds' is missing"),
        ("environments: [CartPole-v1]\narms: [ppo]\nseeds: 1\nseed: 2", "'seed' is unknown, did you mean 'seeds'"),
        ("[1, 2]", "is not a plan"),
        ("a: [", "cannot be read as a plan"),
        ("environments: CartPole-v1\narms: [ppo]\nseeds: 1", "environments must be a list of names"),
    ],
)
def test_files_that_are_no_plan(tmp_path, content, message):
    (tmp_path / "plan.yml").write_text(content)
    with pytest.raises(PlanError, match=message) as error:
        Plan.load(tmp_path / "plan.yml")
    assert "\n" not in str(error.value)


def test_a_settled_plan_that_lost_an_arm_is_refused(tmp_path):
    content = yaml.safe_load(settle().dump())
    del content["hyperparameters"]["CartPole-v1"]["ppo"]
    (tmp_path / "plan.yml").write_text(yaml.safe_dump(content))
    with pytest.raises(PlanError, match="no hyperparameters of ppo for CartPole-v1"):
        Plan.load(tmp_path / "plan.yml")
