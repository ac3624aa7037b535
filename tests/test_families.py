"""Policies of the user's: Beta distributions, squashed Gaussians, and hybrid actions have an exact KL, too."""

import gymnasium as gym
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.distributions import Distribution, SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import AffineTransform, Beta, Categorical, Independent, Normal, TanhTransform, TransformedDistribution
from torch.distributions import kl_divergence as torch_kl
from torch.nn import functional as F

from sb3_adaptive_kl import HELD, AdaptiveKLPPO, ReferencePolicy
from sb3_adaptive_kl.divergences import beta_kl
from sb3_adaptive_kl.rollout.distributions import action_distribution
from tests.conftest import NEEDS_COMPILER, collect, logged, parameters, remember
from tests.test_users_networks import Sharper

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "device": "cpu", **HELD}


class BetaDistribution(Distribution):
    """Two actions between 0 and 1."""

    low, high = 0.0, 1.0

    def proba_distribution_net(self, latent_dim):
        return th.nn.Linear(latent_dim, 4)

    def proba_distribution(self, parameters):
        self.distribution = Beta(*(0.2 + F.softplus(parameters)).chunk(2, dim=1))  # below 1: many actions at the ends
        return self

    def log_prob(self, actions):
        return self.distribution.log_prob(actions.clamp(self.low + 1e-4, self.high - 1e-4)).flatten(1).sum(dim=1)

    def entropy(self):
        return None

    def sample(self):
        return self.distribution.sample()

    def mode(self):
        return self.distribution.mean

    def actions_from_params(self, parameters, deterministic=False):
        return self.proba_distribution(parameters).get_actions(deterministic)

    def log_prob_from_params(self, parameters):
        actions = self.actions_from_params(parameters)
        return actions, self.log_prob(actions)


class Rescaled(BetaDistribution):
    low, high = -2.0, 3.0

    def proba_distribution(self, parameters):
        base = super().proba_distribution(parameters).distribution
        self.distribution = TransformedDistribution(base, AffineTransform(th.tensor([-2.0, -2.0]), 5.0))
        return self


class Squashed(BetaDistribution):
    low = -1.0

    def proba_distribution(self, parameters):
        mean, log_std = (3 * parameters).chunk(2, dim=1)
        self.distribution = Independent(TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform()), 1)
        return self

    def log_prob(self, actions):
        return self.distribution.log_prob(actions.clamp(-1 + 1e-4, 1 - 1e-4))


class Hybrid(BetaDistribution):
    """One of two, and a number."""

    low = high = None

    def proba_distribution(self, parameters):
        choice = Categorical(logits=parameters[:, :2], validate_args=False)
        self.distribution = [choice, Normal(parameters[:, 2], parameters[:, 3].exp(), validate_args=False)]
        return self

    def log_prob(self, actions):
        choice, amount = self.distribution
        return choice.log_prob(actions[:, 0]) + amount.log_prob(actions[:, 1])

    def sample(self):
        return th.stack([head.sample() for head in self.distribution], dim=1)


USERS = [BetaDistribution, Rescaled, Squashed, Hybrid]


class UsersPolicy(ActorCriticPolicy):
    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.action_dist = self.family()
        self.action_net = self.action_dist.proba_distribution_net(self.mlp_extractor.latent_dim_pi)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1))

    def _get_action_dist_from_latent(self, latent_pi):
        return self.action_dist.proba_distribution(self.action_net(latent_pi))


class TwoNumbers(gym.Env):
    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Box(-9, 9, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), -abs(float(action.sum())), self.np_random.random() < 0.1, False, {}


def build(family, seed=0, **kwargs):
    policy = type("UsersPolicy", (UsersPolicy,), {"family": family})
    TwoNumbers.observation_space.seed(0)
    return AdaptiveKLPPO(policy, TwoNumbers(), seed=seed, **{**SMALL, **kwargs})


@pytest.mark.parametrize("family", USERS)
def test_kl_is_torchs_and_that_of_samples(family):
    """Within 4 standard errors of the mean difference of log-probabilities."""
    th.manual_seed(1)
    old, new = (family().proba_distribution(th.randn(1, 4).expand(20_000, 4)) for _ in range(2))
    kl = action_distribution(old).kl(action_distribution(new))
    pairs = zip(*(held.distribution if family is Hybrid else [held.distribution] for held in (old, new)), strict=True)
    assert th.allclose(kl, sum(torch_kl(*pair).reshape(20_000, -1).sum(dim=1) for pair in pairs), rtol=1e-5)
    actions = old.sample()
    terms = (old.log_prob(actions) - new.log_prob(actions)).double()
    assert abs(kl[0].item() - terms.mean().item()) < 4 * terms.std().item() / 20_000**0.5


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e4, 1e8, 1e30])
def test_extreme_concentrations(scale):
    """In float32 the KL is that of float64, not negative, and 0 without a gradient where both agree."""
    th.manual_seed(0)
    alpha, beta = scale * th.rand(2, 1000, 1)
    assert beta_kl(alpha, beta, alpha * (1 + 1e-6 * th.randn(1000, 1)), beta).min() >= 0  # where only rounding is left
    old = scale * th.tensor([[1.0, 2.0, 0.1]]), scale * th.tensor([[0.1, 2.0, 1.0]])
    for factor in (1.0, 1.001, 0.5, 30.0):
        new = (old[0] * factor).requires_grad_(), (old[1] / factor).requires_grad_()
        kls = beta_kl(*old, *new), beta_kl(*new, *old)
        gradients = [gradient for kl in kls for gradient in th.autograd.grad(kl.sum(), new)]
        assert min(kls) >= 0
        assert all(gradient.isfinite().all() for gradient in gradients)
        if factor == 1.0:
            assert not any(tensor.any() for tensor in (*kls, *gradients))
        elif scale <= 1e4:
            expected = torch_kl(*(Beta(alpha.double(), beta.double()) for alpha, beta in (old, new))).sum()
            assert kls[0].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("family", USERS)
def test_policy_of_the_users_learns_beside_a_reference(family):
    model = build(family, reference_policy=ReferencePolicy(build(family, seed=1).policy, kl_coef=0.1)).learn(3 * 64)
    assert logged(model)["undone_updates"] == 0
    assert 0 < logged(model)["kl"] <= 1.5 * model.target_kl
    assert logged(model)["reference_kl"] > 0
    old_policy = remember(collect(model))
    assert (old_policy.divergence_on_rollout() == 0).all()


@NEEDS_COMPILER
def test_compiled_kl_of_several_heads(monkeypatch):
    """torch compiles its distributions only while their validation is off."""
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", True)  # torch's compiler turns it off forever
    old, index = action_distribution(Hybrid().proba_distribution(th.randn(9, 4))), th.tensor([5, 0, 7])

    def kl(parameters):
        return old[index].kl(action_distribution(Hybrid().proba_distribution(parameters)))

    parameters = th.randn(3, 4)
    assert th.allclose(th.compile(kl, backend="eager", fullgraph=True)(parameters), kl(parameters))


@NEEDS_COMPILER
def test_what_torch_cannot_compile_is_trained_uncompiled():
    with pytest.warns(UserWarning, match="torch.compile cannot be used, training goes on without it"):
        model = build(BetaDistribution, compile=True).learn(64)
    assert th.equal(parameters(model), parameters(build(BetaDistribution).learn(64)))


def test_reference_with_other_transforms_is_refused():
    class Wider(Rescaled):
        def proba_distribution(self, parameters):
            base = BetaDistribution.proba_distribution(self, parameters).distribution
            self.distribution = TransformedDistribution(base, AffineTransform(-2.0, 4.0))
            return self

    with pytest.raises(ValueError, match=r"Betas.*AffineTransform.* same action distribution"):
        build(Wider, reference_policy=build(Rescaled).policy).learn(64)


@pytest.mark.parametrize("reference_is_squashed", [False, True])
def test_gaussian_that_sb3_squashes_is_another_family(reference_is_squashed):
    """Its torch distribution is a Normal, too, but the KL between the two is not that of the Normals."""

    class SquashedBySB3(ActorCriticPolicy):
        def _build(self, lr_schedule):
            super()._build(lr_schedule)
            self.action_dist = SquashedDiagGaussianDistribution(1)

    plain, squashed = (PPO(policy, "Pendulum-v1", device="cpu").policy for policy in ("MlpPolicy", SquashedBySB3))
    of_training, reference = ("MlpPolicy", squashed) if reference_is_squashed else (SquashedBySB3, plain)
    model = AdaptiveKLPPO(of_training, "Pendulum-v1", **SMALL, reference_policy=reference)
    with pytest.raises(ValueError, match=r"TanhTransform.* there is no KL divergence between them"):
        model.learn(64)
    AdaptiveKLPPO(SquashedBySB3, "Pendulum-v1", **SMALL, reference_policy=squashed).learn(64)


class Conditional(Hybrid):
    """The number only counts with the second choice: the divergences of the heads do not add up."""

    def log_prob(self, actions):
        choice, amount = self.distribution
        return choice.log_prob(actions[:, 0]) + actions[:, 0] * amount.log_prob(actions[:, 1])


class Reversed(Hybrid):
    def log_prob(self, actions):
        return super().log_prob(actions.flip(1))

    def sample(self):
        return super().sample().flip(1)


class OtherFamilyInside(BetaDistribution):
    low, high = -9.0, 9.0

    def proba_distribution(self, parameters):
        self.distribution = TransformedDistribution(Sharper(parameters[:, :2], 1.0), AffineTransform(0.0, 1.0))
        return self


class StateDependent(OtherFamilyInside):
    """The transform moves with the network, whose gradient a user may have cut off."""

    def proba_distribution(self, parameters):
        zero = th.zeros_like(parameters[:, :2])
        self.distribution = TransformedDistribution(Normal(zero, 1.0), AffineTransform(parameters[:, :2].detach(), 1.0))
        return self


class Learned(OtherFamilyInside):
    shift = th.nn.Parameter(th.zeros(()))

    def proba_distribution(self, parameters):
        self.distribution = TransformedDistribution(Normal(parameters[:, :2], 1.0), AffineTransform(self.shift, 1.0))
        return self


@pytest.mark.parametrize("family", [Conditional, Reversed, OtherFamilyInside, StateDependent, Learned])
def test_a_part_that_the_kl_would_miss_is_refused(family):
    with pytest.raises(ValueError, match=rf"no closed-form KL .* {family.__name__} .* pass kl_divergence='k3'"):
        build(family).learn(64)


@pytest.mark.parametrize("family", [Conditional, Reversed, OtherFamilyInside, StateDependent, Learned])
def test_the_remedy_for_a_part_that_the_kl_would_miss(family):
    assert logged(build(family, kl_divergence="k3").learn(64))["kl"] > 0
