"""The KL to a reference policy: what is measured, and what it does to the loss."""

import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.utils import obs_as_tensor

from sb3_adaptive_kl import (
    HELD,
    AdaptiveKLPPO,
    ReferencePolicy,
)
from sb3_adaptive_kl.arguments import settings_at
from sb3_adaptive_kl.rollout.minibatches import minibatches
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.rollout.reference import Reference
from sb3_adaptive_kl.step import minibatch_loss
from tests.conftest import CASES, FAMILIES, collect, logged, parameters

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


def other(case, algorithm=PPO, scale=0.1):
    """A policy for the same environment that acts differently."""
    policy = case.build(algorithm, n_steps=64, batch_size=64).policy
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * th.randn(parameter.shape, generator=th.Generator().manual_seed(1)))
    return policy


def on_rollout(model, reference):
    return OldPolicy(model.policy, model.rollout_buffer, model.kl_divergence, reference)


def summed(divergence):
    return divergence if divergence.dim() == 1 else divergence.sum(dim=1)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("case", [*FAMILIES, "cnn", "dict"])
def test_measured_kl_is_the_divergence_of_the_distributions(case, direction):
    """Compare with SB3's ``kl_divergence``, after the update, on the whole rollout."""
    theirs = other(CASES[case])
    reference = ReferencePolicy(theirs, kl_coef=0.0, direction=direction)
    model = CASES[case].build(AdaptiveKLPPO, reference_policy=reference, **SMALL).learn(64)
    observations = model.rollout_buffer.observations
    observations = obs_as_tensor(observations, "cpu")
    theirs.set_training_mode(False)
    model.policy.set_training_mode(False)
    with th.no_grad():
        pair = [policy.get_distribution(observations) for policy in (model.policy, theirs)]
        expected = summed(kl_divergence(*(pair if direction == "reverse" else reversed(pair)))).mean().item()
    assert expected > 0.01
    assert logged(model)["reference_kl"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("case", ["box", "discrete", "gsde"])
def test_reference_that_is_only_measured_changes_nothing(case, tmp_path):
    """Neither a parameter, nor β, nor a random number; read from a file or given as an object."""
    kwargs = {**SMALL, **HELD}
    alone = CASES[case].build(AdaptiveKLPPO, **kwargs).learn(3 * 64)
    CASES[case].build(PPO, n_steps=64, batch_size=64, seed=1).save(tmp_path / "reference")
    for policy in (str(tmp_path / "reference"), other(CASES[case])):
        model = CASES[case].build(AdaptiveKLPPO, reference_policy=ReferencePolicy(policy, kl_coef=0.0), **kwargs)
        model.learn(3 * 64)
        assert th.equal(parameters(model), parameters(alone))
        assert model.kl_coef == alone.kl_coef
        assert logged(model)["reference_kl"] > 0
        assert logged(model)["reference_kl_coef"] == 0


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("kl_divergence_name", ["forward", "k3"])
def test_loss_gains_the_coefficient_times_the_kl(direction, kl_divergence_name):
    """Its gradient, against that of SB3's ``kl_divergence``."""
    theirs = other(CASES["box"])
    model = collect(CASES["box"].build(AdaptiveKLPPO, kl_divergence=kl_divergence_name, **SMALL))
    old_policy = on_rollout(model, Reference(ReferencePolicy(theirs, direction=direction), model.policy))
    rollout_data, index = next(minibatches(model.rollout_buffer, 32))
    settings = settings_at(model, 1.0)
    weights = [p for name, p in model.policy.named_parameters() if "value" not in name and "vf" not in name.split(".")[0]]

    def gradient(coefficient):
        loss, _ = minibatch_loss(
            model.policy,
            old_policy,
            rollout_data,
            index,
            settings._replace(reference_kl_coef=coefficient),
        )
        gradients = th.autograd.grad(loss, weights, allow_unused=True)
        return loss.item(), th.cat([g.flatten() for g in gradients if g is not None])

    pair = [policy.get_distribution(rollout_data.observations) for policy in (model.policy, theirs)]
    kl = summed(kl_divergence(*(pair if direction == "reverse" else reversed(pair)))).mean()
    expected = th.cat([g.flatten() for g in th.autograd.grad(kl, weights, allow_unused=True) if g is not None])
    (loss, with_it), (loss_without, without) = gradient(3.0), gradient(None)
    assert loss - loss_without == pytest.approx(3 * kl.item(), rel=1e-3)
    difference = (with_it - without)[: len(expected)] if len(with_it) > len(expected) else with_it - without
    difference = difference[difference != 0]
    expected = 3 * expected[expected != 0]
    assert th.allclose(difference, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_distance_before_the_update_is_remembered(direction):
    """The policy moves, its distance from the reference before it moved does not: measured in a sweep of its own, at first."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, kl_divergence="k3", **SMALL))
    old_policy = on_rollout(model, Reference(ReferencePolicy(other(CASES["box"]), direction=direction), model.policy))
    before = old_policy.kl()
    assert before.reference_before == pytest.approx(before.reference, rel=1e-6)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.1)
    after = old_policy.kl()
    assert after.reference != pytest.approx(before.reference, rel=0.01)
    assert after.reference_before == before.reference_before


def test_reference_is_frozen_and_apart():
    """It has no gradients, is in eval mode and not changed, nor is the user's object, which may be trained further."""
    theirs = other(CASES["cnn"])
    theirs.set_training_mode(True)
    before = [parameter.clone() for parameter in theirs.parameters()]
    model = CASES["cnn"].build(AdaptiveKLPPO, reference_policy=theirs, **SMALL)
    with th.no_grad():
        next(theirs.parameters()).add_(1.0)
    model.learn(2 * 64)
    frozen = model._reference.policy
    assert all(map(th.equal, frozen.parameters(), before))
    assert not frozen.training
    assert theirs.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen.parameters())
    assert frozen.optimizer is None
    assert theirs.optimizer is not None
    assert model.reference_policy.policy is frozen  # what save() writes
