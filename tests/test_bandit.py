"""
Training on a bandit must reach the penalized optimum, which has a closed form.

The bandit has one state, three actions, fixed advantages A, a uniform old policy p and a fixed β. The maximizer of
Σ π_k A_k − β D(p, π) is

* forward KL(p ‖ π):     π_k = β p_k / (λ − A_k), with λ such that Σ π = 1;
* reverse KL(π ‖ p):     π_k ∝ p_k exp(A_k / β);
* k3: the same, since its mean over a rollout with action frequencies p_k is the forward KL;
* pearson ½ (r − 1)²:    π_k = p_k (1 + (A_k − Ā) / β), Ā = Σ p_k A_k.
"""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_adaptive_kl import AdaptiveKLPPO
from tests.conftest import collect

ADVANTAGES = np.array([1.0, 0.0, -0.5])
UNIFORM = np.full(3, 1 / 3)


class Bandit(gym.Env):
    observation_space = spaces.Box(1.0, 1.0, (1,))
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        return np.ones(1, dtype=np.float32), {}

    def step(self, action):
        return np.ones(1, dtype=np.float32), 0.0, True, False, {}


def forward_optimum(kl_coef):
    low, high = ADVANTAGES.max() + 1e-9, ADVANTAGES.max() + kl_coef  # Σ π is ∞ at low, at most 1 at high
    for _ in range(200):
        middle = (low + high) / 2
        if (kl_coef * UNIFORM / (middle - ADVANTAGES)).sum() > 1:
            low = middle
        else:
            high = middle
    return kl_coef * UNIFORM / (high - ADVANTAGES)


def reverse_optimum(kl_coef):
    weights = UNIFORM * np.exp(ADVANTAGES / kl_coef)
    return weights / weights.sum()


def pearson_optimum(kl_coef):
    return UNIFORM * (1 + (ADVANTAGES - UNIFORM @ ADVANTAGES) / kl_coef)


@pytest.mark.parametrize("kl_coef", [1.0, 2.5])
@pytest.mark.parametrize(
    ("divergence", "optimum"),
    [("forward", forward_optimum), ("k3", forward_optimum), ("reverse", reverse_optimum), ("pearson", pearson_optimum)],
)
def test_training_reaches_the_penalized_optimum(divergence, optimum, kl_coef):
    model = AdaptiveKLPPO(
        "MlpPolicy",
        Bandit(),
        n_steps=30,
        batch_size=30,
        n_epochs=600,
        learning_rate=0.01,
        kl_rule="fixed",
        init_kl_coef=kl_coef,
        kl_divergence=divergence,
        normalize_advantage=False,
        vf_coef=0.0,
        policy_kwargs={"net_arch": []},
        seed=0,
        device="cpu",
    )
    with th.no_grad():
        model.policy.action_net.weight.zero_()
    buffer = collect(model).rollout_buffer
    buffer.actions[:, 0, 0] = np.arange(30) % 3
    buffer.log_probs[:] = np.log(1 / 3)
    buffer.advantages[:, 0] = ADVANTAGES[np.arange(30) % 3]

    model.train()

    with th.no_grad():
        policy = model.policy.get_distribution(th.ones(1, 1)).distribution.probs.numpy()[0]
    assert policy == pytest.approx(optimum(kl_coef), abs=2e-3)
    assert abs(policy - UNIFORM).max() > 0.05  # The policy has moved, but not to the unpenalized optimum
