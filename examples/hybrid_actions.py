"""
Train a policy with two kinds of actions at once: which side engine of a lunar lander fires, and how strong its main engine is.

    python examples/hybrid_actions.py -n 300000

Nothing here but the name of the algorithm belongs to this package. The KL penalty knows the distributions of torch in
``self.distribution``, and adds up their divergences: https://github.com/Stable-Baselines-Team/stable-baselines3-contrib/issues/202
"""

import argparse

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Beta, Categorical
from torch.nn import functional as F

from sb3_adaptive_kl import HELD, AdaptiveKLPPO


class HybridLander(gym.ActionWrapper):
    def __init__(self) -> None:
        super().__init__(gym.make("LunarLander-v3", continuous=True))
        # SB3 does not have a space for both: the side (0, 1, 2) and the throttle (from 0 to 1) are columns of one Box
        self.action_space = gym.spaces.Box(np.zeros(2, np.float32), np.array([2, 1], np.float32))

    def action(self, action: np.ndarray) -> np.ndarray:
        return np.array([2 * action[1] - 1, action[0] - 1], np.float32)


class SideAndThrottle(Distribution):
    def proba_distribution_net(self, latent_dim: int) -> th.nn.Module:
        return th.nn.Linear(latent_dim, 3 + 2)

    def proba_distribution(self, parameters: th.Tensor) -> "SideAndThrottle":
        # Above 1, a Beta distribution has one mode (Chou et al. 2017)
        alpha, beta = (1 + F.softplus(parameters[:, 3:])).split(1, dim=1)
        self.distribution = [Categorical(logits=parameters[:, :3]), Beta(alpha, beta)]
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        side, throttle = self.distribution
        return side.log_prob(actions[:, 0]) + throttle.log_prob(actions[:, 1:].clamp(1e-6, 1 - 1e-6)).sum(dim=1)

    def entropy(self) -> th.Tensor:
        side, throttle = self.distribution
        return side.entropy() + throttle.entropy().sum(dim=1)

    def sample(self) -> th.Tensor:
        side, throttle = self.distribution
        return th.cat([side.sample()[:, None], throttle.sample()], dim=1)

    def mode(self) -> th.Tensor:
        side, throttle = self.distribution
        return th.cat([side.mode[:, None], throttle.mean], dim=1)

    def actions_from_params(self, parameters: th.Tensor, deterministic: bool = False) -> th.Tensor:
        return self.proba_distribution(parameters).get_actions(deterministic)

    def log_prob_from_params(self, parameters: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        actions = self.actions_from_params(parameters)
        return actions, self.log_prob(actions)


class HybridPolicy(ActorCriticPolicy):
    def _build(self, lr_schedule) -> None:
        super()._build(lr_schedule)
        self.action_dist = SideAndThrottle()
        self.action_net = self.action_dist.proba_distribution_net(self.mlp_extractor.latent_dim_pi)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        return self.action_dist.proba_distribution(self.action_net(latent_pi))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--n-timesteps", type=int, default=300_000)
    n_timesteps = parser.parse_args().n_timesteps

    env = make_vec_env(HybridLander, n_envs=8, seed=0)
    model = AdaptiveKLPPO(
        HybridPolicy, env, n_steps=512, gamma=0.999, gae_lambda=0.98, ent_coef=0.01, seed=0, device="cpu", **HELD
    )
    model.learn(n_timesteps)
    mean, std = evaluate_policy(model, env, n_eval_episodes=20)
    print(f"return of 20 episodes: {mean:.0f} ± {std:.0f}")
