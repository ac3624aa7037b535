"""RL Baselines3 Zoo: its own commands, word for word, as child processes, with `--algo ppo_kl`."""

import inspect
import os
import re
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from sb3_adaptive_kl import AdaptiveKLPPO, RecurrentAdaptiveKLPPO
from sb3_adaptive_kl.zoo import hyperparameter_file

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "SDL_VIDEODRIVER": "dummy"}


def run(folder: Path, *arguments: str, expect: int = 0, **environment: str) -> str:
    """Run ``python arguments`` in the folder, and return what it printed."""
    child = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True
    )
    assert child.returncode == expect, child.stdout + child.stderr
    return child.stdout + child.stderr


def zoo(folder: Path, command: str, **kwargs) -> str:
    return run(folder, "-m", *f"rl_zoo3.{command}".split(), **kwargs)


def saved_kl_coef(path: Path) -> float:
    with zipfile.ZipFile(path) as archive:
        return yaml.safe_load(archive.read("data"))["kl_coef"]


def test_train_enjoy_record_continue_and_plot(tmp_path):
    train = "train --algo ppo_kl --env CartPole-v1 --seed 1 -n 6144"
    output = zoo(tmp_path, f"{train} --eval-freq 2048 --eval-episodes 2 --save-freq 2048 -f logs")
    assert "hyperparams/ppo_kl.yml" in output
    folder = tmp_path / "logs" / "ppo_kl" / "CartPole-v1_1"
    agent = folder / "CartPole-v1.zip"
    assert (folder / "evaluations.npz").exists()
    assert len(list(folder.glob("rl_model_*_steps.zip"))) == 3

    assert "Mean reward: " in zoo(tmp_path, "enjoy --algo ppo_kl --env CartPole-v1 -f logs --no-render -n 600")

    zoo(tmp_path, "record_video --algo ppo_kl --env CartPole-v1 -f logs -n 50")
    assert list(folder.glob("videos/*.mp4"))

    # Continued with a fixed β: it is the one that was saved, not the init_kl_coef of the yml
    kl_coef = saved_kl_coef(agent)
    assert kl_coef != 1.0
    zoo(tmp_path, f"{train} --eval-freq -1 -f logs -i {agent} -params kl_rule:'fixed' target_kl:'lin_0.03'")
    assert saved_kl_coef(tmp_path / "logs" / "ppo_kl" / "CartPole-v1_2" / "CartPole-v1.zip") == kl_coef

    zoo(tmp_path, "plots.plot_train -a ppo_kl -e CartPole-v1 -f logs")
    zoo(tmp_path, "plots.all_plots -a ppo_kl -e CartPole-v1 -f logs -o results")
    assert (tmp_path / "results.pkl").exists()


def test_recurrent(tmp_path):
    zoo(tmp_path, "train --algo ppo_kl_lstm --env CartPoleNoVel-v1 -n 512 --eval-freq -1 -f logs --vec-env subproc -P -tb tb")
    assert list(tmp_path.glob("tb/**/events.out.tfevents.*"))
    output = zoo(tmp_path, "enjoy --algo ppo_kl_lstm --env CartPoleNoVel-v1 -f logs --no-render -n 100")
    assert "Mean reward: " in output or "Episode Reward" in output


def test_search_and_replay_of_a_trial(tmp_path):
    """The search space has the penalty in the place of the clip range, and its trials can be trained from the storage."""
    storage = "--storage study.log --study-name kl"
    train = "train --algo ppo_kl --env CartPole-v1 -n 300 --eval-freq -1 -f logs"
    zoo(tmp_path, f"{train} -optimize --n-trials 2 --n-evaluations 1 --no-optim-plots {storage}")
    output = zoo(tmp_path, f"{train} {storage} --trial-id 1")
    assert "Loading from Optuna study" in output
    (config,) = [path.read_text() for path in tmp_path.glob("logs/ppo_kl/CartPole-v1_*/CartPole-v1/config.yml")]
    for name in ("target_kl", "init_kl_coef", "kl_factor", "kl_rule"):
        assert f"- {name}\n" in config
    assert "clip_range" not in config


def test_hook_can_be_switched_off_and_the_launcher_does_without(tmp_path):
    off = {"SB3_ADAPTIVE_KL_ZOO": "0"}
    arguments = "train --algo ppo_kl --env CartPole-v1 -n 2048 --eval-freq -1 -f logs"
    assert "invalid choice: 'ppo_kl'" in zoo(tmp_path, arguments, expect=2, **off)
    output = run(tmp_path, "-m", "sb3_adaptive_kl.zoo", *arguments.split(), **off)
    assert "hyperparams/ppo_kl.yml" in output
    assert (tmp_path / "logs" / "ppo_kl" / "CartPole-v1_1" / "CartPole-v1.zip").exists()
    assert "usage: python -m sb3_adaptive_kl.zoo SCRIPT" in run(tmp_path, "-m", "sb3_adaptive_kl.zoo", expect=1)


def test_hook_costs_next_to_nothing(tmp_path):
    """At interpreter start it is imported in under 1 ms, and nothing else is. The best of three: the machine is shared."""
    times = []
    for _ in range(3):
        lines = run(tmp_path, "-X", "importtime", "-c", "pass").splitlines()
        assert not [line for line in lines if line.rsplit("|")[-1].strip() in ("sb3_adaptive_kl", "torch", "typing")]
        (hook,) = [line for line in lines if line.endswith("sb3_adaptive_kl_zoo_hook")]
        times.append(int(hook.split("|")[1]))
    assert min(times) < 1000  # microseconds, with what it imports


def test_a_broken_installation_leaves_the_zoo_working(tmp_path):
    code = "import sys; sys.modules['sb3_adaptive_kl'] = None; import rl_zoo3; print(sorted(rl_zoo3.ALGOS))"
    output = run(tmp_path, "-W", "always::UserWarning", "-c", code)
    assert "could not register with rl-zoo3" in output
    assert "'ppo'" in output
    assert "ppo_kl" not in output.splitlines()[-1]


def test_a_name_of_the_zoos_own_is_left_to_it(tmp_path):
    code = """
import rl_zoo3.utils as utils
from sb3_adaptive_kl.zoo import complete_registry
utils.ALGOS["ppo_kl"] = "the zoo's own"
complete_registry(utils)
print(utils.ALGOS["ppo_kl"])
"""
    assert "the zoo's own" in run(tmp_path, "-c", code)


@pytest.mark.parametrize(
    ("env", "n_timesteps", "least"),
    [
        ("CartPole-v1", 5000, 500.0),
        ("LunarLander-v3", 8000, 230.0),
        ("LunarLanderContinuous-v3", 6000, 230.0),
        ("Pendulum-v1", 6000, -250.0),
        ("Swimmer-v5", 5000, 250.0),
    ],
)
def test_trained_agent(env, n_timesteps, least):
    """The agents that come along do what docs/results.md says, but for fewer episodes."""
    output = zoo(REPOSITORY, f"enjoy --algo ppo_kl --env {env} -f trained_agents --no-render -n {n_timesteps}")
    mean = float(re.search(r"Mean reward: (-?[\d.]+)", output)[1])
    assert mean >= least
    assert re.search(rf"^\| {env} \| \d", (REPOSITORY / "docs" / "results.md").read_text(), flags=re.MULTILINE)


ZOO_KEYS = {
    "n_timesteps", "n_envs", "normalize", "env_wrapper", "vec_env_wrapper", "frame_stack", "callback", "env_kwargs",
    "monitor_kwargs",
}  # fmt: skip
ALGORITHMS = {"ppo_kl": AdaptiveKLPPO, "ppo_kl_lstm": RecurrentAdaptiveKLPPO}
HYPERPARAMETERS = {algo: yaml.safe_load(hyperparameter_file(algo).read_text()) for algo in ALGORITHMS}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_hyperparameter_is_an_argument(algo):
    arguments = inspect.signature(ALGORITHMS[algo]).parameters.keys()
    for env, hyperparameters in HYPERPARAMETERS[algo].items():
        assert hyperparameters.keys() <= arguments | ZOO_KEYS, env
        assert {"n_timesteps", "policy"} <= hyperparameters.keys(), env
        assert "clip_range" not in hyperparameters, env


@pytest.mark.parametrize(("algo", "host"), [("ppo_kl", "ppo"), ("ppo_kl_lstm", "ppo_lstm")])
def test_every_environment_of_the_zoo_has_an_entry(algo, host):
    theirs = yaml.safe_load((files("rl_zoo3") / "hyperparams" / f"{host}.yml").read_text())
    assert theirs.keys() <= HYPERPARAMETERS[algo].keys()
    assert {f"{name}-v5" for name in ("Ant", "HalfCheetah", "Hopper", "Swimmer", "Walker2d")} <= HYPERPARAMETERS[algo].keys()


INSTALLED = [
    "Acrobot-v1", "BipedalWalker-v3", "CartPole-v1", "LunarLander-v3", "LunarLanderContinuous-v3", "MountainCar-v0",
    "MountainCarContinuous-v0", "Pendulum-v1", "Swimmer-v5", "HalfCheetah-v5", "Hopper-v5", "InvertedPendulum-v5",
    "Reacher-v5",
]  # fmt: skip


@pytest.mark.parametrize("env", INSTALLED)
def test_entry_constructs_and_updates(tmp_path, env):
    """On its environment, with the rollout shortened to 64 steps and 2 environments, since only one update is wanted."""
    shortened = "n_steps:64 n_envs:2 batch_size:32 n_epochs:1"
    output = zoo(tmp_path, f"train --algo ppo_kl --env {env} -n 128 --eval-freq -1 -f logs -params {shortened}")
    assert "Using 'default' hyperparameters" not in output
    assert (tmp_path / "logs" / "ppo_kl" / f"{env}_1" / f"{env}.zip").exists()
