"""Plans: which hyperparameters arms share, and that the file is complete."""

import re
from importlib.resources import files

import gymnasium as gym
import numpy as np
import pytest
import yaml

from sb3_adaptive_kl import HELD
from sb3_adaptive_kl.compare import arms, cli
from sb3_adaptive_kl.compare.arms import Arm, PlanError, effective
from sb3_adaptive_kl.compare.cli import sweep
from sb3_adaptive_kl.compare.execute import check
from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.report import differing


def create(environments=("CartPole-v1",), arms=("ppo_kl", "ppo"), seeds=2, **kwargs):
    lists = [list(names) if isinstance(names, tuple) else names for names in (environments, arms)]
    return Plan.create({"environments": lists[0], "arms": lists[1], "seeds": seeds, **kwargs})


def completed(plan, env):
    return effective(plan.parsed_arms, plan.hyperparameters[env])


def test_only_the_trust_region_differs():
    """Even on environments for which the two files of tuned hyperparameters differ in other ways."""
    plan = create(["CartPole-v1", "Pendulum-v1", "LunarLander-v3", "Swimmer-v5", "PongNoFrameskip-v4"])
    for env in plan.environments:
        trust_region = {"target_kl", "clip_range", "kl_rule", "kl_ceiling"}
        assert set(differing(plan.hyperparameters[env])) == trust_region, env
    assert plan.hyperparameters["CartPole-v1"]["ppo"]["n_steps"] == 32  # the zoo's value, not the one in our file
    assert plan.hyperparameters["Swimmer-v5"]["ppo"]["gamma"] == 0.9999  # the zoo has Swimmer-v4
    assert plan.hyperparameters["PongNoFrameskip-v4"]["ppo_kl"]["frame_stack"] == 4


def test_current_mujoco_tasks_have_the_zoos_entry_for_the_previous_version():
    arms = create(["HalfCheetah-v5"], ["ppo_kl", "ppo_kl:target_kl=clip", "ppo", "sac"]).hyperparameters["HalfCheetah-v5"]
    assert arms["ppo"]["clip_range"] == 0.1
    assert arms["ppo_kl:target_kl=clip"]["target_kl"] == "clip_0.1"
    assert arms["ppo_kl"]["target_kl"] == pytest.approx(1.5 * 0.1**2 / 2)
    assert arms["sac"]["learning_starts"] == 10000  # not SAC's default of 100


def test_target_that_corresponds_to_the_clip_range_of_each_environment():
    plan = create(["CartPole-v1", "Pendulum-v1", "LunarLander-v3"], ["ppo_kl:target_kl=clip", "ppo"])
    targets = {env: arms["ppo_kl:target_kl=clip"]["target_kl"] for env, arms in plan.hyperparameters.items()}
    assert targets == {"CartPole-v1": "clip_lin_0.2", "Pendulum-v1": "clip_0.2", "LunarLander-v3": "clip_0.2"}
    with pytest.raises(PlanError, match=r"only ppo_kl, ppo_kl_lstm, .* have a target"):
        Arm.parse("trpo:target_kl=clip")


def test_held_stands_for_the_preset_and_its_numbers_can_be_overridden():
    assert Arm.parse("ppo_kl:held").overrides == dict(HELD)
    assert Arm.parse("own=ppo_kl_lstm:held,target_kl=0.1").overrides == {**HELD, "target_kl": 0.1}
    with pytest.raises(PlanError, match=r"ppo: 'held' is not of the form name=value$"):
        Arm.parse("ppo:held")
    with pytest.raises(PlanError, match=r"ppo_kl: 'hold' .*, did you mean 'held'"):
        Arm.parse("ppo_kl:hold")


def test_arms_can_be_named(tmp_path):
    plan = create(arms=["held=ppo_kl:target_kl=0.05,kl_rule=predictive", "ppo"])
    assert plan.names == ["held", "ppo"]
    assert plan.hyperparameters["CartPole-v1"]["held"]["kl_rule"] == "predictive"
    assert {(run.arm, run.algo, run.folder.split("/")[1]) for run in plan.runs()} == {
        ("held", "ppo_kl", "held"),
        ("ppo", "ppo", "ppo"),
    }
    assert completed(plan, "CartPole-v1").keys() == {"held", "ppo"}
    (tmp_path / "plan.yml").write_text(plan.dump())
    assert Plan.load(tmp_path / "plan.yml") == plan


def test_seeds_can_be_counted_from_another_one(tmp_path):
    plan = create(first_seed=100)
    assert [run.seed for run in plan.runs() if run.arm == "ppo"] == [100, 101]
    (tmp_path / "plan.yml").write_text(plan.dump())
    assert Plan.load(tmp_path / "plan.yml") == plan
    (tmp_path / "plan.yml").write_text(create().dump().replace("first_seed: 0\n", ""))
    assert Plan.load(tmp_path / "plan.yml") == create()  # a plan of 0.1.0
    for wrong in (-1, 1.5, True, "1"):
        with pytest.raises(PlanError, match="first_seed="):
            create(first_seed=wrong)


def test_protocol_can_be_changed_after_the_runs():
    plan = create(protocol="ppo-paper")
    assert create().protocol is None
    assert plan.difference(create()) == []
    assert list(plan.runs()) == list(create().runs())
    with pytest.raises(PlanError, match="protocol='ppo': Input should be 'ppo-paper'"):
        create(protocol="ppo")


RATES = [1e-4, 3e-4, 1e-3]


def test_sweep_of_the_command_line_keeps_whole_numbers():
    assert repr(sweep("sde_sample_freq=-1, 4")) == "{'sde_sample_freq': [-1, 4]}"


def test_sweep_gives_every_arm_every_value(tmp_path):
    given = sweep("learning_rate=1e-4,3e-4,1e-3")
    assert given == {"learning_rate": RATES}
    plan = create(arms=["held=ppo_kl:target_kl=0.05", "ppo:n_epochs=2", "ppo"], params=["learning_rate=0.1"], sweep=given)
    assert plan.families == {
        "held": {value: f"held:learning_rate={value}" for value in RATES},
        "ppo:n_epochs=2": {value: f"ppo:n_epochs=2,learning_rate={value}" for value in RATES},
        "ppo": {value: f"ppo:learning_rate={value}" for value in RATES},
    }
    assert plan.names == [name for family in plan.families.values() for name in family.values()]
    resolved = plan.hyperparameters["CartPole-v1"]
    assert [resolved[name]["learning_rate"] for name in plan.names] == 3 * RATES
    assert [resolved[name]["n_epochs"] for name in plan.families["ppo:n_epochs=2"].values()] == [2, 2, 2]
    assert len({run.folder for run in plan.runs()}) == 3 * 3 * 2
    (tmp_path / "plan.yml").write_text(plan.dump())
    loaded = Plan.load(tmp_path / "plan.yml")
    assert loaded == plan
    assert list(loaded.runs()) == list(plan.runs())


def test_options_replace_fields_of_a_plan(tmp_path):
    file = tmp_path / "plan.yml"
    file.write_text(create().dump())
    replaced = Plan.load(file, {"seeds": 3, "protocol": "ppo-paper"})
    assert (replaced.seeds, replaced.protocol) == (3, "ppo-paper")
    args = cli.parser().parse_args(["--plan", str(file), "--first-seed", "7", "-o", "results"])
    assert cli._plan(args).first_seed == 7
    with pytest.raises(PlanError, match="holds the hyperparameters of its arms: remove them from it"):
        Plan.load(file, {"arms": ["ppo_kl:target_kl=0.1"]})


def test_names_and_texts_that_yml_takes_for_numbers_are_restored(tmp_path):
    plan = create(arms=["3e-4=ppo:learning_rate=3e-4", "None=ppo:policy_kwargs={activation: 'None', 1: 64}"])
    (tmp_path / "plan.yml").write_text(plan.dump())
    assert Plan.load(tmp_path / "plan.yml") == plan
    text = yaml.safe_dump(plan.model_dump(), sort_keys=False)  # as older versions wrote it
    (tmp_path / "plan.yml").write_text(text)
    assert Plan.load(tmp_path / "plan.yml").names == ["3e-4", "None"]


def test_numbers_in_a_file_are_read_as_on_the_command_line(tmp_path):
    """Where yml 1.1 reads 1e-4 as a string, also within lists and mappings."""
    fields = ("environments: [CartPole-v1]", "arms: [ppo]", "seeds: 2", "sweep: {learning_rate: [1e-4, 3e-4]}")
    (tmp_path / "plan.yml").write_text("\n".join(fields))
    assert Plan.load(tmp_path / "plan.yml").sweep == {"learning_rate": [1e-4, 3e-4]}
    (arm,) = create(arms=["ppo_kl:kl_rule={name: adaptive, high: 2e0}"]).parsed_arms
    assert arm.overrides == {"kl_rule": {"name": "adaptive", "high": 2.0}}


def test_runs_of_a_sweep_are_those_of_arms_with_overrides():
    swept, given = create(arms=["ppo"], sweep=sweep("n_epochs=2,4")), create(arms=["ppo:n_epochs=2", "ppo:n_epochs=4"])
    assert list(swept.runs()) == list(given.runs())
    assert given.families == {}


def test_target_kl_is_not_shared_between_algorithms():
    arms = create(arms=["ppo_kl:target_kl=0.05", "ppo", "trpo"]).hyperparameters["CartPole-v1"]
    assert arms["ppo_kl:target_kl=0.05"]["target_kl"] == 0.05
    assert "target_kl" not in arms["ppo"]
    assert "target_kl" not in arms["trpo"]
    assert arms["trpo"]["n_steps"] == arms["ppo"]["n_steps"]
    assert "n_epochs" not in arms["trpo"]  # TRPO does not have it


def test_own_hyperparameters_are_the_entry_of_each_algorithm():
    arms = create(arms=["trpo", "ppo"], own_hyperparameters=True).hyperparameters["CartPole-v1"]
    assert (arms["trpo"]["n_steps"], arms["ppo"]["n_steps"]) == (512, 32)


def test_off_policy_algorithms_keep_their_own_entry():
    arms = create(["Pendulum-v1"], ["ppo", "sac"]).hyperparameters["Pendulum-v1"]
    entries = yaml.safe_load((files("rl_zoo3") / "hyperparams" / "sac.yml").read_text())
    assert arms["sac"] == {**entries["Pendulum-v1"], "n_timesteps": 100_000}  # except for the budget, which is PPO's


def test_all_arms_share_the_budget():
    for kwargs in ({}, {"own_hyperparameters": True}, {"n_timesteps": 300}):
        arms = create(arms=["ppo", "ppo_lstm", "dqn", "trpo", "ppo_kl"], **kwargs).hyperparameters["CartPole-v1"]
        assert {entry["n_timesteps"] for entry in arms.values()} == {kwargs.get("n_timesteps", 100_000)}


def test_recurrent_arms_get_ppos_entry_next_to_ppo_and_ppo_lstms_entry_otherwise():
    next_to_ppo = create(arms=["ppo", "ppo_kl_lstm"]).hyperparameters["CartPole-v1"]
    assert next_to_ppo["ppo_kl_lstm"]["n_steps"] == next_to_ppo["ppo"]["n_steps"] == 32
    assert next_to_ppo["ppo_kl_lstm"]["policy"] == "MlpLstmPolicy"
    recurrent_only = create(["CartPoleNoVel-v1"], ["ppo_lstm", "ppo_kl_lstm"]).hyperparameters["CartPoleNoVel-v1"]
    assert set(differing(recurrent_only)) == {"target_kl", "clip_range", "kl_rule", "kl_ceiling"}
    assert "lstm_hidden_size" in recurrent_only["ppo_lstm"]["policy_kwargs"]


def test_defaults_of_ppo_are_shared():
    """LunarLander's entry does not set the learning rate, and TRPO's and A2C's defaults differ from PPO's."""
    plan = create(["LunarLander-v3"], ["ppo_kl", "trpo", "a2c"])
    values = completed(plan, "LunarLander-v3")
    assert {arm["learning_rate"] for arm in values.values()} == {3e-4}
    assert {arm["normalize_advantage"] for arm in values.values()} == {True}
    assert not {"learning_rate", "n_steps", "gae_lambda"} & differing(values).keys()
    assert differing(values)["batch_size"] == {"ppo_kl": 64, "trpo": 64, "a2c": "–"}  # A2C does not have it


def test_differing_defaults_are_listed():
    values = completed(create(["LunarLander-v3"], ["ppo", "a2c"], own_hyperparameters=True), "LunarLander-v3")
    assert differing(values)["normalize_advantage"] == {"ppo": True, "a2c": False}


def test_runs_are_ordered_by_seed():
    runs = list(create(["CartPole-v1", "Pendulum-v1"]).runs())
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
    assert [(run.env, run.arm) for run in runs[:4]] == [
        (env, arm) for env in ("CartPole-v1", "Pendulum-v1") for arm in ("ppo_kl", "ppo")
    ]


def test_effective_hyperparameters_include_compared_defaults():
    """A default is compared where another arm sets the argument, and left out where the algorithm does not have it."""
    values = completed(create(["Pendulum-v1"], ["ppo_kl", "ppo", "ppo_kl:init_kl_coef=2"]), "Pendulum-v1")
    assert values["ppo_kl"]["init_kl_coef"] == 1.0
    assert values["ppo"]["target_kl"] is None
    assert "init_kl_coef" not in values["ppo"]


def test_overrides_are_yml_and_may_contain_brackets():
    arm = Arm.parse("ppo_kl:target_kl=1e-3,kl_rule=fixed,kl_coef_bounds=[1e-9, 3],policy_kwargs=dict(net_arch=[8,8],share=1)")
    assert arm.overrides == {
        "target_kl": 0.001,
        "kl_rule": "fixed",
        "kl_coef_bounds": [1e-9, 3],
        "policy_kwargs": "dict(net_arch=[8,8],share=1)",
    }
    assert Arm.parse("ppo_kl:kl_ceiling=null,clip_range=None").overrides == {"kl_ceiling": None, "clip_range": None}


def test_load_restores_a_dumped_plan(tmp_path):
    plan = create(arms=["ppo_kl:target_kl=0.1", "a2c"], n_timesteps=1000, n_eval_episodes=3)
    (tmp_path / "plan.yml").write_text(plan.dump())
    loaded = Plan.load(tmp_path / "plan.yml")
    assert loaded == plan
    assert list(loaded.runs()) == list(plan.runs())
    assert loaded.difference(plan) == []
    assert plan.difference(create(arms=["ppo_kl:target_kl=0.1", "a2c"], n_timesteps=1000, n_eval_episodes=4)) == [
        "n_eval_episodes: 3 → 4"
    ]
    (difference,) = plan.difference(create(arms=["ppo_kl:target_kl=0.2", "a2c"], n_timesteps=1000, n_eval_episodes=3))
    assert difference.startswith("arms: ")  # without the hyperparameters, which follow from it


def test_run_folders_are_unique_and_follow_the_zoos_layout():
    plan = create(["CartPole-v1", "Pendulum-v1"], ["ppo_kl:target_kl=0.1", "ppo_kl:target_kl=0.2", "ppo"], 2)
    folders = [run.folder for run in plan.runs()]
    assert len(set(folders)) == 2 * 3 * 2
    assert folders[0] == "runs/ppo_kl-target_kl=0.1/ppo_kl/CartPole-v1_1"
    brackets = [Arm.parse(f"ppo:policy_kwargs=dict(net_arch={size})").folder for size in ("[8]", "(8)", "{8}")]
    assert len(set(brackets)) == 3
    assert all(re.fullmatch(r"[\w.=,+%-]+", folder) for folder in brackets)


@pytest.fixture
def register():
    """Register an environment that has these observations, and remove it after the test."""
    names = []

    def register(space, name="Observing-v0"):
        class Observing(gym.Env):
            observation_space, action_space = space, gym.spaces.Discrete(2)

            def reset(self, *, seed=None, options=None):
                return self.observation_space.sample(), {}

        gym.register(name, Observing)
        names.append(name)
        return name

    yield register
    for name in names:
        del gym.registry[name]
    arms._network.cache_clear()


IMAGE = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
VECTOR = gym.spaces.Box(-1.0, 1.0, (3,))


@pytest.mark.parametrize(
    ("space", "policy"),
    [(VECTOR, "MlpPolicy"), (IMAGE, "CnnPolicy"), (gym.spaces.Dict(image=IMAGE, vector=VECTOR), "MultiInputPolicy")],
)
def test_policy_fits_the_observations_of_an_environment_without_an_entry(register, space, policy):
    recurrent = policy.replace("Policy", "LstmPolicy")
    plan = create([register(space)], ["ppo_kl", "ppo", "trpo", "ppo_lstm"], params=["n_steps=64"])
    policies = [arm["policy"] for arm in plan.hyperparameters["Observing-v0"].values()]
    assert policies == [policy, policy, policy, recurrent]
    check(plan)


def test_params_are_hyperparameters_of_all_arms_that_do_not_override_them(tmp_path):
    plan = create(arms=["ppo_kl", "ppo:n_envs=2", "a2c"], params=["n_envs=4", "normalize=true"])
    values = plan.hyperparameters["CartPole-v1"]
    assert [arm["n_envs"] for arm in values.values()] == [4, 2, 4]
    assert {arm["normalize"] for arm in values.values()} == {True}
    (tmp_path / "plan.yml").write_text(plan.dump())
    assert Plan.load(tmp_path / "plan.yml") == plan
