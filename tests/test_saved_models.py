"""Models saved by version 0.1.0, before the redesign, load and continue. ``saved/`` holds one of each class, and a zoo run."""

import shutil
from pathlib import Path

import gymnasium as gym
import pytest
from sb3_contrib.common.envs import InvalidActionEnvDiscrete

from sb3_adaptive_kl import AdaptiveKLPPO, AdaptivePenalty, MaskableAdaptiveKLPPO, RecurrentAdaptiveKLPPO
from tests.conftest import NEEDS_COMPILER, logged, parameters
from tests.test_zoo import saved_kl_coef, zoo

SAVED = Path(__file__).parent / "saved"


def pendulum():
    return gym.make("Pendulum-v1")


def cartpole():
    return gym.make("CartPole-v1")


def masked():
    return InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3)


@pytest.mark.parametrize(
    ("name", "algorithm", "make_env", "attributes"),
    [
        ("ppo_kl", AdaptiveKLPPO, pendulum, {"kl_rule": AdaptivePenalty(low=0.5, high=2.0), "kl_coef": 0.125}),
        pytest.param(
            "ppo_kl_compile",
            AdaptiveKLPPO,
            cartpole,
            {"compile": True, "kl_cutoff_coef": 10.0, "kl_coef": 1.0},
            marks=NEEDS_COMPILER,
        ),
        ("ppo_kl_mask", MaskableAdaptiveKLPPO, masked, {"kl_rule": "proportional"}),
        ("ppo_kl_lstm", RecurrentAdaptiveKLPPO, cartpole, {"kl_stop_factor": 4.0}),
    ],
)
def test_model_loads_and_continues(name, algorithm, make_env, attributes):
    model = algorithm.load(SAVED / name, env=make_env(), device="cpu")
    assert {key: getattr(model, key) for key in attributes} == attributes
    # Names under which the state of β is saved
    assert all(hasattr(algorithm, state) for state in ("_undone_updates", "_undone_in_a_row", "_rollouts_at_bound"))
    model = algorithm.load(SAVED / name, env=make_env(), device="cpu", compile=False)
    before, n_updates = parameters(model), model._n_updates
    model.learn(64, reset_num_timesteps=False)
    assert not (parameters(model) == before).all()
    assert n_updates < model._n_updates <= n_updates + 2
    assert logged(model)["kl"] > 0


def test_zoo_run_is_evaluated_and_continued(tmp_path):
    shutil.copytree(SAVED / "zoo", tmp_path / "logs")
    run = "--algo ppo_kl --env CartPole-v1 -f logs"
    assert "Mean reward: " in zoo(tmp_path, f"enjoy {run} --no-render -n 300")
    agent = tmp_path / "logs" / "ppo_kl" / "CartPole-v1_1" / "CartPole-v1.zip"
    assert saved_kl_coef(agent) == 0.0625
    zoo(tmp_path, f"train {run} -i {agent} -n 64 --eval-freq -1 -params n_envs:1 kl_rule:'fixed'")
    assert saved_kl_coef(tmp_path / "logs" / "ppo_kl" / "CartPole-v1_2" / "CartPole-v1.zip") == 0.0625
