"""Compare the terms of the loss with values computed by hand."""

import pytest
import torch as th

from sb3_adaptive_kl import objective


def test_surrogate_loss():
    """Equation 6 is −mean(r Â). Equation 7 with ε = 0.2 takes the minimum of r Â and its clipped value."""
    advantages, ratio = th.tensor([1.0, 1.0, -1.0, -1.0]), th.tensor([1.5, 0.5, 1.5, 0.5])
    assert objective.surrogate_loss(advantages, ratio).item() == -(1.5 + 0.5 - 1.5 - 0.5) / 4
    assert objective.surrogate_loss(advantages, ratio, 0.2).item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert objective.clip_fraction(ratio, 0.2).item() == 1.0
    assert objective.clip_fraction(th.tensor([1.0, 1.5]), 0.2).item() == 0.5
    assert objective.clip_fraction(ratio, None) == 0


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.01, 2 * 0.01), (0.02, 2 * 0.02), (0.05, 2 * 0.05 + 1000 * 0.03**2), (0.12, 2 * 0.12 + 1000 * 0.1**2)],
)
def test_penalty_loss_with_hinge(kl, expected):
    """The loss is 2 · KL + 1000 · max(0, KL − 0.02)²."""
    assert objective.penalty_loss(th.tensor(kl), 2.0, cutoff_coef=1000.0, cutoff=0.02).item() == pytest.approx(expected)


def test_penalty_loss_without_hinge():
    assert objective.penalty_loss(th.tensor(0.5), 3.0).item() == 1.5


def test_value_loss():
    values, old_values, returns = th.tensor([2.0, 0.0]), th.tensor([0.0, 0.0]), th.tensor([3.0, 1.0])
    assert objective.value_loss(values, old_values, returns).item() == (1 + 1) / 2
    assert objective.value_loss(values, old_values, returns, clip_range_vf=0.5).item() == (2.5**2 + 1) / 2


def test_entropy_loss():
    log_prob = th.tensor([-1.0, -3.0])
    assert objective.entropy_loss(th.tensor([1.0, 2.0]), log_prob).item() == -1.5
    assert objective.entropy_loss(None, log_prob).item() == -2.0  # Estimated as −E[−log π]


def test_normalize():
    advantages = objective.normalize(th.tensor([1.0, 2.0, 3.0, 6.0]))
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages.std().item() == pytest.approx(1)
    single = th.tensor([5.0])
    assert objective.normalize(single) is single
