"""Check that the algorithm learns SB3's test task for each action space, and two Gymnasium tasks."""

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_adaptive_kl import AdaptiveKLPPO


def mean_return(model, env, n_episodes=20):
    return evaluate_policy(model, env, n_eval_episodes=n_episodes, warn=False)[0]


@pytest.mark.parametrize(
    ("make_env", "best"),
    [
        (lambda: IdentityEnv(4), 100),
        (lambda: IdentityEnvMultiDiscrete(3), 100),
        (lambda: IdentityEnvMultiBinary(3), 100),
        (lambda: IdentityEnvBox(eps=0.5), 100),
    ],
    ids=["discrete", "multidiscrete", "multibinary", "box"],
)
def test_learns_identity(make_env, best):
    """The reward is 1 if the action equals the observation. SB3's own tests require a return of 90 of 100."""
    env = DummyVecEnv([make_env])
    model = AdaptiveKLPPO(
        "MlpPolicy", env, n_steps=512, batch_size=64, learning_rate=2e-3, gamma=0.4, target_kl=0.02, seed=0, device="cpu"
    )
    model.learn(10 * 512)
    assert mean_return(model, env) > 0.9 * best


def test_learns_cartpole():
    env = make_vec_env("CartPole-v1", n_envs=8, seed=0)
    model = AdaptiveKLPPO(
        "MlpPolicy", env, n_steps=256, batch_size=256, learning_rate=1e-3, target_kl=0.02, seed=0, device="cpu"
    )
    model.learn(40_000)
    assert mean_return(model, env) > 475  # Gymnasium's threshold for "solved"


@pytest.mark.parametrize(
    "use_sde", [pytest.param(False, id="gaussian"), pytest.param(True, id="gsde", marks=pytest.mark.slow)]
)
def test_learns_pendulum(use_sde):
    """An untrained policy reaches about −1200, the zoo's tuned PPO −172."""
    env = make_vec_env("Pendulum-v1", n_envs=4, seed=0)
    model = AdaptiveKLPPO(
        "MlpPolicy",
        env,
        n_steps=1024,
        batch_size=256,
        learning_rate=1e-3,
        gamma=0.9,
        target_kl=0.02,
        use_sde=use_sde,
        sde_sample_freq=4,
        seed=0,
        device="cpu",
    )
    model.learn(90_000)
    returns, _ = evaluate_policy(model, env, n_eval_episodes=50, return_episode_rewards=True, warn=False)
    assert np.mean(returns) > -250
