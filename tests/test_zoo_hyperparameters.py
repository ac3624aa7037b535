"""hyperparams/*.yml: only valid arguments, an entry for every environment of the zoo, and every entry trains."""

import inspect
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from stable_baselines3.common.utils import FloatSchedule

from sb3_adaptive_kl import HELD, AdaptiveKLPPO, RecurrentAdaptiveKLPPO
from sb3_adaptive_kl.zoo import hyperparameter_file, parse_trust_region

ZOO_KEYS = {
    "n_timesteps", "n_envs", "normalize", "env_wrapper", "vec_env_wrapper", "frame_stack", "callback", "env_kwargs",
    "monitor_kwargs",
}  # fmt: skip
ALGORITHMS = {"ppo_kl": AdaptiveKLPPO, "ppo_kl_lstm": RecurrentAdaptiveKLPPO}
HYPERPARAMETERS = {algo: yaml.safe_load(hyperparameter_file(algo).read_text()) for algo in ALGORITHMS}
AGENTS = Path(__file__).parents[1] / "trained_agents" / "ppo_kl"
# Entries of the zoo that cannot run: gymnasium 1 has no MuJoCo -v2 and no LunarLander-v2, pybullet has no binary wheels
GONE = ("Bullet", "HumanoidStandup-v2", "Pendulum-v2", "Reacher-v2", "NoVel-v2")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_hyperparameter_is_an_argument(algo):
    arguments = inspect.signature(ALGORITHMS[algo]).parameters.keys()
    for env, hyperparameters in HYPERPARAMETERS[algo].items():
        assert hyperparameters.keys() <= arguments | ZOO_KEYS, env
        assert {"n_timesteps", "policy"} <= hyperparameters.keys(), env


@pytest.mark.parametrize(("algo", "host"), [("ppo_kl", "ppo"), ("ppo_kl_lstm", "ppo_lstm")])
def test_every_environment_of_the_zoo_has_an_entry(algo, host):
    theirs = yaml.safe_load((files("rl_zoo3") / "hyperparams" / f"{host}.yml").read_text())
    assert theirs.keys() <= HYPERPARAMETERS[algo].keys()
    assert {f"{name}-v5" for name in ("Ant", "HalfCheetah", "Hopper", "Swimmer", "Walker2d")} <= HYPERPARAMETERS[algo].keys()


@pytest.mark.parametrize(("algo", "host"), [("ppo_kl", "ppo"), ("ppo_kl_lstm", "ppo_lstm")])
def test_targets_are_one_and_a_half_times_what_the_zoos_clip_ranges_mean(algo, host):
    theirs = yaml.safe_load((files("rl_zoo3") / "hyperparams" / f"{host}.yml").read_text())
    for env in theirs.keys() - {"Swimmer-v4"}:  # it is learned faster with smaller steps (docs/results.md)
        means = FloatSchedule(_target({"target_kl": f"clip_{theirs[env].get('clip_range', 0.2)}"}))
        holds = FloatSchedule(_target(HYPERPARAMETERS[algo][env]))
        for progress_remaining in (1.0, 0.3):
            assert holds(progress_remaining) == pytest.approx(1.5 * means(progress_remaining), rel=0.01), env


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_entry_has_the_settings_that_hold_the_target(algo):
    for env, hyperparameters in HYPERPARAMETERS[algo].items():
        settings = {name: hyperparameters.get(name) for name in ("kl_rule", "kl_ceiling", "clip_range")}
        assert settings == {name: value for name, value in HELD.items() if name != "target_kl"}, env


@pytest.mark.parametrize(("algo", "host"), [("ppo_kl", "ppo"), ("ppo_kl_lstm", "ppo_lstm")])
def test_all_other_values_are_the_zoos(algo, host):
    theirs = yaml.safe_load((files("rl_zoo3") / "hyperparams" / f"{host}.yml").read_text())
    theirs["default"]["policy"] = "MlpLstmPolicy" if algo == "ppo_kl_lstm" else "MlpPolicy"  # the zoo's MlpPolicy has no LSTM
    for env, entry in theirs.items():
        assert _without_trust_region(HYPERPARAMETERS[algo][env]) == _without_trust_region(entry), env


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_mujocos_current_tasks_have_the_values_of_the_previous_versions(algo):
    entries = HYPERPARAMETERS[algo]
    for env in filter(lambda env: env.endswith("-v5"), entries):
        previous = next(entries[name] for version in (4, 2) if (name := f"{env[:-1]}{version}") in entries)
        assert entries[env] == previous, env


@pytest.mark.parametrize("folder", sorted(AGENTS.iterdir()), ids=lambda folder: folder.name)
def test_trained_agents_have_the_hyperparameters_of_their_entries(folder):
    env = folder.name.removesuffix("_1")
    config = yaml.unsafe_load((folder / env / "config.yml").read_text())  # the zoo saves an OrderedDict
    assert dict(config) == HYPERPARAMETERS["ppo_kl"][env]


@pytest.mark.filterwarnings("ignore")  # raised by environments, rendering libraries and the zoo
@pytest.mark.parametrize(
    ("algo", "env"),
    [
        (algo, {"atari": "PongNoFrameskip-v4", "default": "FrozenLake-v1"}.get(env, env))
        for algo in ALGORITHMS
        for env in HYPERPARAMETERS[algo]
        if not any(name in env for name in GONE)
    ],
)
def test_entry_constructs_and_updates(tmp_path, monkeypatch, capsys, algo, env):
    """Runs the zoo's train script on the entry's environment, with two short rollouts: schedules have ended at the second."""
    from rl_zoo3.train import train  # not at module level, since it registers environments

    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log into the current folder
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    package = ["--gym-packages", "minigrid"] if env.startswith("MiniGrid") else []
    arguments = f"--algo {algo} --env {env} -n 128 --eval-freq -1 --verbose 0 --num-threads 1 -f {tmp_path}".split()
    shortened = ["-params", "n_steps:32", "n_envs:2", "batch_size:32", "n_epochs:1"]
    monkeypatch.setattr(sys, "argv", ["train", *package, *arguments, *shortened])
    train()
    assert ("Using 'default' hyperparameters" in capsys.readouterr().out) == (env == "FrozenLake-v1")
    assert (tmp_path / algo / f"{env}_1" / f"{env}.zip").exists()


def _target(hyperparameters):
    return parse_trust_region(hyperparameters)["target_kl"]


def _without_trust_region(hyperparameters):
    return {key: hyperparameters[key] for key in hyperparameters.keys() - {"target_kl", "kl_rule", "kl_ceiling", "clip_range"}}
