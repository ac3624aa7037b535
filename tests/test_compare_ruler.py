"""The ruler: it changes nothing, agrees with what the algorithm itself measures, and fits every on-policy algorithm."""

import copy
import math

import numpy as np
import pytest
import torch as th
from sb3_contrib import TRPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_adaptive_kl import (
    AdaptiveKLPPO,
    MaskableAdaptiveKLPPO,
    MaskableRecurrentAdaptiveKLPPO,
    RecurrentAdaptiveKLPPO,
)
from sb3_adaptive_kl.compare.ruler import Ruler
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from tests.conftest import CASES, collect, logged, parameters


def cartpole(algorithm, policy="MlpPolicy", **kwargs):
    return algorithm(policy, make_vec_env("CartPole-v1", n_envs=2, seed=0), n_steps=64, seed=0, device="cpu", **kwargs)


def masked(algorithm, policy="MlpPolicy"):
    env = make_vec_env(lambda: InvalidActionEnvDiscrete(6, 11, n_invalid_actions=3), n_envs=2)
    for space in (*env.get_attr("action_space"), *env.get_attr("observation_space")):
        space.seed(0)  # it draws its states and masks from them
    return algorithm(policy, env, n_steps=64, seed=0, device="cpu")


ALGORITHMS = {
    "ppo": lambda: cartpole(PPO),
    "a2c": lambda: cartpole(A2C),
    "trpo": lambda: cartpole(TRPO, batch_size=64),
    "ppo_lstm": lambda: cartpole(RecurrentPPO, "MlpLstmPolicy"),
    "ppo_kl": lambda: cartpole(AdaptiveKLPPO),
    "ppo_kl_k3": lambda: cartpole(AdaptiveKLPPO, kl_divergence="k3"),
    "ppo_kl_lstm": lambda: cartpole(RecurrentAdaptiveKLPPO, "MlpLstmPolicy"),
    "ppo_kl_mask": lambda: masked(MaskableAdaptiveKLPPO),
    "ppo_kl_mask_lstm": lambda: masked(MaskableRecurrentAdaptiveKLPPO, "MlpLstmPolicy"),
    **{name: lambda name=name: CASES[name].build(PPO, n_steps=64) for name in CASES},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_arm_learns_the_same_with_it_and_without(name):
    learned = []
    for callback in (None, Ruler()):
        model = ALGORITHMS[name]()
        model.learn(3 * 64 * model.n_envs, callback=callback)
        learned.append((parameters(model), np.random.random(), th.rand(1)))
    for without, measured in zip(*learned, strict=True):
        np.testing.assert_array_equal(np.asarray(without), np.asarray(measured))
    assert len(callback.updates) == 3
    timesteps, kl, kl_max, *_ = zip(*callback.updates, strict=True)
    assert timesteps == tuple(64 * model.n_envs * i for i in (1, 2, 3))
    assert all(0 < d <= largest < math.inf for d, largest in zip(kl, kl_max, strict=True))


class Logged(BaseCallback):
    """What the algorithm itself wrote for each update."""

    def _on_training_start(self):
        self.rows = []

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        values = self.logger.name_to_value
        if "train/kl" in values:
            self.rows.append([values[f"train/{key}"] for key in ("kl", "kl_max", "kl_coef", "learning_rate")])

    _on_training_end = _on_rollout_start


@pytest.mark.parametrize("name", ["ppo_kl", "ppo_kl_lstm", "ppo_kl_mask", "ppo_kl_mask_lstm"])
def test_it_agrees_with_what_ours_log(name):
    model, ruler, logged = ALGORITHMS[name](), Ruler(), Logged()
    model.target_kl = lambda progress: 0.01 * (1 + progress)
    model.learning_rate_rule = "balanced"
    model.learn(4 * 128, callback=[logged, ruler], log_interval=100)
    np.testing.assert_allclose([[*row[1:4], row[-1]] for row in ruler.updates], logged.rows, rtol=1e-5)
    np.testing.assert_allclose([row[4] for row in ruler.updates], [0.0175, 0.015, 0.0125, 0.01])


def test_it_is_exact_whatever_the_arm_penalizes():
    """And tells how far the step was shortened."""
    model = collect(cartpole(AdaptiveKLPPO, kl_divergence="k3", kl_ceiling=1.0, target_kl=1e-4, learning_rate=0.01))
    ruler, exact = Ruler(), OldPolicy(model.policy, copy.copy(model.rollout_buffer))
    ruler.init_callback(model)
    ruler.on_rollout_end()
    model.train()
    ruler.on_rollout_start()
    (row,) = ruler.updates
    assert row[1] == pytest.approx(exact.kl().mean, rel=1e-5)
    assert row[1] != pytest.approx(logged(model)["kl"], rel=1e-3)
    assert row[5] == model.step_scale < 1


def test_arms_without_a_penalty_have_neither_target_nor_coefficient():
    ruler = Ruler()
    cartpole(PPO, target_kl=0.5).learn(128, callback=ruler)
    assert ruler.updates[0][3:] == (None, None, None, 3e-4)


def test_an_update_that_changes_nothing_measures_zero():
    ruler = Ruler()
    model = cartpole(PPO, learning_rate=0.0)
    model.learn(128, callback=ruler)
    assert ruler.updates[0][1] == pytest.approx(0.0, abs=1e-7)


def test_behind_vec_normalize():
    ruler = Ruler()
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=0))
    PPO("MlpPolicy", env, n_steps=64, seed=0).learn(256, callback=ruler)
    assert len(ruler.updates) == 2
