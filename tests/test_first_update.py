"""
The first full-batch update equals PPO's for any β, because ∇KL(π_old ‖ π_θ) = 0 at θ = θ_old.

At ratio 1, PPO does not clip, and the gradient of the penalty is zero. A comparison with SB3's own `train()` therefore tests
advantages, losses, coefficients, gradient clipping, optimizer, random numbers and the choice of the old policy at once.
"""

import pytest
from stable_baselines3 import PPO

from sb3_adaptive_kl import AdaptiveKLPPO
from tests.conftest import CASES, FAMILIES, logged, parameters

FULL_BATCH = {"n_steps": 128, "batch_size": 128, "n_epochs": 1, "learning_rate": 0.01, "ent_coef": 0.01}


@pytest.mark.parametrize("kl_coef", [0.1, 30.0])
@pytest.mark.parametrize("case", CASES)
def test_first_update_equals_ppo(case, kl_coef):
    ppo = CASES[case].build(PPO, **FULL_BATCH).learn(128)
    ours = CASES[case].build(AdaptiveKLPPO, init_kl_coef=kl_coef, **FULL_BATCH)
    start = parameters(ours)
    ours.learn(128)

    assert (parameters(ours) - start).abs().max() > 1e-3
    assert (parameters(ours) - parameters(ppo)).abs().max() < 1e-6


@pytest.mark.parametrize("divergence", ["reverse", "k3", "pearson"])
@pytest.mark.parametrize("case", FAMILIES)
def test_first_update_equals_ppo_for_every_divergence(case, divergence):
    ppo = FAMILIES[case].build(PPO, **FULL_BATCH).learn(128)
    ours = FAMILIES[case].build(AdaptiveKLPPO, init_kl_coef=1.0, kl_divergence=divergence, **FULL_BATCH).learn(128)
    assert (parameters(ours) - parameters(ppo)).abs().max() < 1e-5


@pytest.mark.parametrize("kwargs", [{"normalize_advantage": False}, {"vf_coef": 2.0, "max_grad_norm": 0.01}])
def test_first_update_equals_ppo_with_options(kwargs):
    ppo = CASES["box"].build(PPO, **FULL_BATCH, **kwargs).learn(128)
    ours = CASES["box"].build(AdaptiveKLPPO, **FULL_BATCH, **kwargs).learn(128)
    assert (parameters(ours) - parameters(ppo)).abs().max() < 1e-6


@pytest.mark.parametrize("case", FAMILIES)
def test_run_with_clipping_and_tiny_beta_equals_ppo(case):
    """With clipping and β = 1e-8, whole runs agree: surrogate, minibatches, epochs and schedules are the same."""
    kwargs = {"n_steps": 128, "batch_size": 32, "n_epochs": 3, "clip_range": 0.02, "clip_range_vf": 0.2, "learning_rate": 3e-3}
    ppo = FAMILIES[case].build(PPO, **kwargs).learn(256)
    assert logged(ppo)["clip_fraction"] > 0.1
    penalty = {"init_kl_coef": 1e-8, "kl_rule": "fixed", "kl_coef_bounds": (1e-9, 1)}
    ours = FAMILIES[case].build(AdaptiveKLPPO, **penalty, **kwargs).learn(256)
    assert (parameters(ours) - parameters(ppo)).abs().max() < 2e-5
