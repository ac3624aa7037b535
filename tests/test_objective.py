"""The objective of a minibatch, by hand and without a model: what each setting adds to the loss."""

import math

import numpy as np
import pytest
import torch as th

from sb3_adaptive_kl.fast.compiled import as_tensors
from sb3_adaptive_kl.objective import Evaluation, Settings, objective

RATIO = th.tensor([1.5, 0.5, 1.0, 1.0])
NEW = Evaluation(
    values=th.tensor([1.0, 2.0, 3.0, 4.0]),
    log_prob=RATIO.log() - 1.0,
    entropy=th.tensor([0.5, 0.5, 1.5, 1.5]),
    old_values=th.zeros(4),
    old_log_prob=th.full((4,), -1.0),
    advantages=th.tensor([2.0, -2.0, 2.0, -2.0]),
    returns=th.tensor([1.0, 2.0, 3.0, 0.0]),
)
KL = th.tensor([0.0, 0.1, 0.2, 0.1])  # mean 0.1
PLAIN = Settings(
    target_kl=0.02,
    kl_coef=3.0,
    clip_range=None,
    clip_range_vf=None,
    vf_coef=0.5,
    ent_coef=None,
    max_grad_norm=0.5,
    normalize_advantage=False,
    kl_cutoff_coef=None,
)
POLICY_LOSS = -(1.5 * 2 - 0.5 * 2 + 2 - 2) / 4
VALUE_LOSS = 4.0**2 / 4


def test_plain_loss():
    loss, metrics = objective(NEW, KL, PLAIN)
    assert loss.item() == pytest.approx(POLICY_LOSS + 3 * 0.1 + 0.5 * VALUE_LOSS)
    assert metrics.policy_gradient_loss.item() == pytest.approx(POLICY_LOSS)
    assert metrics.value_loss.item() == pytest.approx(VALUE_LOSS)
    assert metrics.kl_loss.item() == pytest.approx(0.3)
    assert metrics.kl.item() == pytest.approx(0.1)
    assert metrics.entropy_loss.item() == pytest.approx(-1.0)
    # (r − 1) − ln r at r = 1.5, 0.5, 1, 1
    assert metrics.approx_kl.item() == pytest.approx((0.5 - math.log(1.5) - 0.5 - math.log(0.5)) / 4)
    assert metrics.clip_fraction == 0


@pytest.mark.parametrize(
    ("change", "added"),
    [
        ({"kl_coef": 5.0}, 2 * 0.1),
        ({"ent_coef": 0.1}, -0.1 * 1.0),
        ({"vf_coef": 1.0}, 0.5 * VALUE_LOSS),
        ({"kl_cutoff_coef": 100.0}, 100 * (0.1 - 2 * 0.02) ** 2),
        ({"kl_cutoff_coef": 100.0, "target_kl": 0.051}, 0.0),
        ({"kl_cutoff_coef": 100.0, "target_kl": 0.04}, 100 * (0.1 - 2 * 0.04) ** 2),
        # r Â = (3, −1, 2, −2) becomes min(3, 1.2 · 2) and min(−1, −0.8 · 2)
        ({"clip_range": 0.2}, (3 - 2.4 + 1.6 - 1) / 4),
        # V moves from 0 by 1 at most: the errors become 0, −1, −2, 1
        ({"clip_range_vf": 1.0}, 0.5 * ((0 + 1 + 4 + 1) / 4 - VALUE_LOSS)),
        # Â / std: 2 / (4 / √3)
        ({"normalize_advantage": True}, POLICY_LOSS * (math.sqrt(3) / 4 - 1)),
    ],
)
def test_each_setting_changes_the_loss_by_its_term(change, added):
    plain, _ = objective(NEW, KL, PLAIN)
    changed, _ = objective(NEW, KL, PLAIN._replace(**change))
    assert (changed - plain).item() == pytest.approx(added, abs=1e-6)


def test_the_hinge_is_a_part_of_the_penalty_that_is_logged():
    _, metrics = objective(NEW, KL, PLAIN._replace(kl_cutoff_coef=100.0))
    assert metrics.kl_loss.item() == pytest.approx(0.3 + 100 * (0.1 - 2 * 0.02) ** 2)


def test_gradients():
    """β for the KL, −Â r for the log-probabilities, 2 (V − R) for the values, each as its share of the mean."""
    kl, log_prob, values = (tensor.clone().requires_grad_() for tensor in (KL, NEW.log_prob, NEW.values))
    loss, _ = objective(NEW._replace(log_prob=log_prob, values=values), kl, PLAIN)
    loss.backward()
    assert kl.grad.tolist() == pytest.approx([3.0 / 4] * 4)
    assert log_prob.grad.tolist() == pytest.approx((-NEW.advantages * RATIO / 4).tolist())
    assert values.grad.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5 * 2 * 4 / 4])


def test_settings_as_tensors_give_the_same_loss():
    settings = PLAIN._replace(clip_range=0.2, clip_range_vf=1.0, ent_coef=0.1, kl_cutoff_coef=100.0, normalize_advantage=True)
    tensors = as_tensors(settings, th.device("cpu"))
    assert objective(NEW, KL, tensors)[0].item() == pytest.approx(objective(NEW, KL, settings)[0].item(), rel=1e-6)
    numbers = [value for value in tensors if not isinstance(value, bool | None)]
    assert len(numbers) == 8
    assert all(isinstance(number, th.Tensor) for number in numbers)
    assert as_tensors(PLAIN, th.device("cpu")).kl_cutoff_coef is None


@pytest.mark.parametrize("vf_coef", [1, 0.5, np.float64(0.5)])
def test_settings_of_any_type_become_the_same_kind_of_tensor(vf_coef):
    """Another type would be compiled again."""
    tensors = as_tensors(PLAIN._replace(vf_coef=vf_coef), th.device("cpu"))
    assert tensors.vf_coef.dtype == th.float32
