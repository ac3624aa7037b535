"""Test the examples: training_curves.py, which plots a TensorBoard log, continue_a_policy.py, and hybrid_actions.py."""

import csv
import runpy
import sys
from pathlib import Path

import pytest
import torch as th
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_adaptive_kl import AdaptiveKLPPO

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "training_curves.py"


@pytest.mark.filterwarnings("ignore")  # From tensorboard and protobuf
def test_log_is_read_and_plotted(tmp_path, monkeypatch, capsys):
    env = make_vec_env("CartPole-v1", seed=0)
    model = AdaptiveKLPPO("MlpPolicy", env, n_steps=256, init_kl_coef=3.0, tensorboard_log=str(tmp_path), seed=0)
    evaluation = EvalCallback(make_vec_env("CartPole-v1", seed=1), eval_freq=600, n_eval_episodes=1)  # Also writes logs
    model.learn(1024, callback=evaluation)

    read_log = runpy.run_path(str(SCRIPT))["read_log"]
    log = read_log(tmp_path / "AdaptiveKLPPO_1", ["rollout/ep_rew_mean", "train/kl", "train/kl_coef"])
    # Updates at 256, 512 and 768 are logged with the next rollout, or with an earlier evaluation
    assert log["train/kl"][0] == log["train/kl_coef"][0] == [512, 600, 1024]
    assert log["train/kl_coef"][1][0] == 3.0
    assert log["rollout/ep_rew_mean"][0] == [256, 512, 768, 1024]

    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "AdaptiveKLPPO_1"), "-o", str(tmp_path / "picture.png")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    for folder, message in ((tmp_path, "has no log of rollout/ep_rew_mean"), (tmp_path / "elsewhere", "is not a folder")):
        monkeypatch.setattr(sys, "argv", ["", str(folder)])
        with pytest.raises(SystemExit, match=message):
            runpy.run_path(str(SCRIPT), run_name="__main__")


def test_clone_is_continued(tmp_path, monkeypatch, capsys):
    """With the clone as the reference, on a task that the expert did not know."""
    output = tmp_path / "runs" / "reference.csv"
    sizes = ["-n", "2048", "--n-transitions", "512", "--eval-every", "1024", "--eval-episodes", "1"]
    changed = ["--env-kwargs", '{"sutton_barto_reward": true}', "--reference", '{"target_kl": 0.5}']
    monkeypatch.setattr(sys, "argv", ["", "--env", "CartPole-v1", "-o", str(output), *sizes, *changed])
    runpy.run_path(str(EXAMPLES / "continue_a_policy.py"), run_name="__main__")
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert [row["timesteps"] for row in rows] == ["0", "1024", "2048"]
    assert all(row["cloned_return"] == rows[0]["return"] for row in rows)
    assert all(-1 <= float(row["return"]) <= 0 for row in rows)  # only a fall costs something
    assert {row["random_return"] for row in rows} == {"-1.0"}  # a policy of random actions always falls
    assert rows[0]["env"] == 'CartPole-v1 {"sutton_barto_reward": true}'
    before = output.stat().st_mtime_ns
    runpy.run_path(str(EXAMPLES / "continue_a_policy.py"), run_name="__main__")
    assert output.stat().st_mtime_ns == before
    assert "is complete: remove it to repeat the run" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["", "--env", "Walker2d-v5"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "continue_a_policy.py"), run_name="__main__")
    assert "pass a saved model with --expert" in capsys.readouterr().err
    # Otherwise it would be trained, and fail when there are no evaluations to write
    monkeypatch.setattr(sys, "argv", ["", "--env", "CartPole-v1", "-o", str(tmp_path / "new.csv"), "-n", "2048"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "continue_a_policy.py"), run_name="__main__")
    assert "--eval-every 10000 must be between 8 environments and 2048 time steps" in capsys.readouterr().err


def test_expert_with_a_memory_is_refused(tmp_path, monkeypatch):
    """PPO loads it, and it would act as if every step were its first."""
    RecurrentPPO("MlpLstmPolicy", "CartPole-v1", device="cpu").save(tmp_path / "lstm.zip")
    expert = ["--expert", str(tmp_path / "lstm.zip"), "-o", str(tmp_path / "runs.csv")]
    monkeypatch.setattr(sys, "argv", ["", "--env", "CartPole-v1", *expert])
    with pytest.raises(ValueError, match=r"lstm\.zip has an LSTM"):
        runpy.run_path(str(EXAMPLES / "continue_a_policy.py"), run_name="__main__")


def test_demonstrations_hold_many_draws_of_the_experts_noise():
    """gSDE's noise is a function of the state until it is drawn again: a clone would learn it as if it were meant."""
    env = make_vec_env("Pendulum-v1", 8, seed=0)
    expert = PPO("MlpPolicy", env, use_sde=True, policy_kwargs={"log_std_init": -2.0}, seed=0)
    observations, actions = runpy.run_path(str(EXAMPLES / "continue_a_policy.py"))["demonstrate"](expert, env, 800)
    with th.no_grad():
        distribution = expert.policy.get_distribution(observations).distribution
    z = (actions - distribution.mean) / distribution.stddev
    assert abs(z.mean()) < 0.2
    assert 0.8 < z.std() < 1.2


@pytest.mark.filterwarnings("ignore")  # From Box2D, which crashes if they are errors
def test_hybrid_actions_are_trained(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "-n", "1"])
    runpy.run_path(str(EXAMPLES / "hybrid_actions.py"), run_name="__main__")
    assert "return of 20 episodes" in capsys.readouterr().out
