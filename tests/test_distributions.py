"""Test the stored parameters of SB3's action distributions, for every family and action space."""

import math

import pytest
import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from torch.distributions import MultivariateNormal, Normal, SigmoidTransform, TransformedDistribution

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.rollout.distributions import Categoricals, DiagGaussian, action_distribution
from tests.conftest import FAMILIES, collect, remember


def gaussian(cls=DiagGaussianDistribution, seed=0, batch=7):
    generator = th.Generator().manual_seed(seed)
    return cls(3).proba_distribution(th.randn(batch, 3, generator=generator), 0.3 * th.randn(3, generator=generator))


def categorical(seed=0, batch=7, logits_scale=1.0):
    logits = logits_scale * th.randn(batch, 4, generator=th.Generator().manual_seed(seed))
    return CategoricalDistribution(4).proba_distribution(logits)


def multi_categorical(seed=0, batch=7):
    logits = th.randn(batch, 5, generator=th.Generator().manual_seed(seed))
    return MultiCategoricalDistribution([2, 3]).proba_distribution(logits)


def bernoulli(seed=0, batch=7):
    logits = th.randn(batch, 3, generator=th.Generator().manual_seed(seed))
    return BernoulliDistribution(3).proba_distribution(logits)


def state_dependent(seed=0, batch=7, squash_output=False):
    generator = th.Generator().manual_seed(seed)
    distribution = StateDependentNoiseDistribution(3, squash_output=squash_output)
    _, log_std = distribution.proba_distribution_net(latent_dim=6)
    mean, latent = th.randn(batch, 3, generator=generator), th.randn(batch, 6, generator=generator)
    return distribution.proba_distribution(mean, log_std, latent)


def squashed(seed=0, batch=7):
    return gaussian(SquashedDiagGaussianDistribution, seed, batch)


def squashed_state_dependent(seed=0, batch=7):
    return state_dependent(seed, batch, squash_output=True)


MAKERS = [gaussian, squashed, categorical, multi_categorical, bernoulli, state_dependent, squashed_state_dependent]


@pytest.mark.parametrize("make", MAKERS)
def test_kl_is_log_prob_difference_in_expectation(make):
    """
    Compare with SB3's own `sample` and `log_prob`, within 4 standard errors. This tests the family, the direction and
    the sums. Squashing is a bijection and does not change the KL.
    """
    old, new = make(seed=0, batch=1), make(seed=1, batch=1)
    kl = action_distribution(old).kl(action_distribution(new))
    th.manual_seed(0)
    if isinstance(old, StateDependentNoiseDistribution):  # Its sample() uses one noise matrix for all actions
        actions = old.distribution.sample((20_000,)).squeeze(1)
        actions = actions if old.bijector is None else old.bijector.forward(actions)
    else:
        actions = th.cat([old.sample() for _ in range(20_000)])
    terms = (old.log_prob(actions) - new.log_prob(actions)).detach().double()
    assert abs(kl.item() - terms.mean().item()) < 4 * terms.std().item() / 20_000**0.5


@pytest.mark.parametrize("make", MAKERS)
def test_shape_indexing_and_assignment(make):
    old, new = action_distribution(make(seed=0)), action_distribution(make(seed=1))
    kl = old.kl(new)
    assert kl.shape == (7,)
    index = th.tensor([6, 0, 3])
    assert th.equal(old[index].kl(new[index]), kl[index])
    again = old.allocate(7)
    for part in (th.arange(3, 7), th.arange(3)):
        again[part] = old[part]
    assert th.equal(again.kl(new), kl)


@pytest.mark.parametrize("case", FAMILIES)
def test_old_policy_is_remembered_when_the_network_moves(case):
    """Two calls of policy.get_distribution() return the same object, so their KL is 0 even if the network moved in between."""
    model = collect(FAMILIES[case].build(AdaptiveKLPPO, n_steps=16, batch_size=16))
    old_policy = remember(model)
    assert old_policy.divergence_on_rollout().abs().max() < 1e-12
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.1 * th.randn(parameter.shape, generator=th.Generator().manual_seed(0)))
    assert old_policy.divergence_on_rollout().min() > 1e-7


def test_gradient_flows_to_the_new_policy_only():
    loc = th.zeros(2, 3, requires_grad=True)
    old = DiagGaussian(th.ones(2, 3), th.ones(2, 3))
    old.kl(DiagGaussian(loc, th.ones(2, 3))).sum().backward()
    assert th.equal(loc.grad, -th.ones(2, 3))


def test_impossible_outcomes_have_finite_log_probs():
    logits = th.tensor([[0.0, -th.inf, 1.0, 2.0]], requires_grad=True)
    parameters = action_distribution(CategoricalDistribution(4).proba_distribution(logits))
    assert isinstance(parameters, Categoricals)
    assert th.isfinite(parameters.log_probs).all()
    (gradient,) = th.autograd.grad(parameters.kl(parameters).sum(), logits)
    assert not th.isnan(gradient).any()


def test_saturated_bernoulli():
    """Float32 rounds the probabilities for logits 18 and 20 to 1. The KL is still that of the unlikely outcome, not inf."""
    old, new = (BernoulliDistribution(1).proba_distribution(th.tensor([[logit]])) for logit in (18.0, 20.0))
    p, q = 1 / (1 + math.exp(18)), 1 / (1 + math.exp(20))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert action_distribution(old).kl(action_distribution(new)).item() == pytest.approx(expected, rel=0.05)


def test_error_for_unknown_family_suggests_k3():
    distribution = DiagGaussianDistribution(2)
    distribution.distribution = MultivariateNormal(th.zeros(1, 2), th.eye(2))
    with pytest.raises(ValueError, match=r"MultivariateNormal.*kl_divergence='k3'"):
        action_distribution(distribution)


def test_bijections_do_not_change_the_kl():
    """Those of the guide's table; Tanh and Affine are trained in test_families.py."""
    plain, squashed = (DiagGaussianDistribution(2) for _ in range(2))
    parameters = {"loc": th.tensor([[0.0, 1.0]]), "scale": th.tensor([[1.0, 2.0]])}
    plain.distribution = Normal(**parameters)
    squashed.distribution = TransformedDistribution(Normal(**parameters), SigmoidTransform())
    assert all(map(th.equal, vars(action_distribution(squashed)).values(), vars(action_distribution(plain)).values()))
