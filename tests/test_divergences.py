"""Compare the divergences with independent estimates, and test their limits and float32 edge cases."""

import math

import pytest
import torch as th
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional as F

from sb3_adaptive_kl.divergences import categorical_kl, gaussian_kl, k3, pearson

N_SAMPLES = 200_000


def gaussians(seed: int, batch: int = 5, dims: int = 3) -> tuple[th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(seed)
    return th.randn(batch, dims, generator=generator), th.rand(batch, dims, generator=generator) + 0.3


def log_probs(seed: int, splits: tuple[int, ...] = (4,), batch: int = 5, spread: float = 1.0) -> th.Tensor:
    logits = spread * th.randn(batch, sum(splits), generator=th.Generator().manual_seed(seed))
    return th.cat([F.log_softmax(part, dim=1) for part in logits.split(splits, dim=1)], dim=1)


class TestAgainstMonteCarlo:
    """Compare with E_p[log p(a) − log q(a)] over sampled actions, within 4 standard errors, using torch's distributions."""

    @staticmethod
    def check(exact: th.Tensor, log_p: th.Tensor, log_q: th.Tensor) -> None:
        terms = (log_p - log_q).double()
        standard_error = terms.std(dim=0) / math.sqrt(N_SAMPLES)
        assert exact.shape == standard_error.shape
        assert ((exact - terms.mean(dim=0)).abs() < 4 * standard_error).all()

    @pytest.mark.parametrize("seeds", [(0, 1), (1, 0)], ids=["forward", "reverse"])
    def test_gaussian(self, seeds):
        p, q = (gaussians(seed) for seed in seeds)
        th.manual_seed(2)
        actions = Normal(*p).sample((N_SAMPLES,))
        self.check(gaussian_kl(*p, *q), Normal(*p).log_prob(actions).sum(-1), Normal(*q).log_prob(actions).sum(-1))

    @pytest.mark.parametrize("seeds", [(0, 1), (1, 0)], ids=["forward", "reverse"])
    def test_categorical(self, seeds):
        p, q = (log_probs(seed) for seed in seeds)
        th.manual_seed(3)
        actions = Categorical(logits=p).sample((N_SAMPLES,))
        self.check(categorical_kl(p, q), Categorical(logits=p).log_prob(actions), Categorical(logits=q).log_prob(actions))

    @pytest.mark.parametrize("seeds", [(0, 1), (1, 0)], ids=["forward", "reverse"])
    def test_multi_categorical(self, seeds):
        splits = (2, 5, 3)
        p, q = (log_probs(seed, splits) for seed in seeds)
        th.manual_seed(4)
        log_p, log_q = 0.0, 0.0
        for part_p, part_q in zip(p.split(splits, dim=1), q.split(splits, dim=1), strict=True):
            actions = Categorical(logits=part_p).sample((N_SAMPLES,))
            log_p = log_p + Categorical(logits=part_p).log_prob(actions)
            log_q = log_q + Categorical(logits=part_q).log_prob(actions)
        self.check(categorical_kl(p, q), log_p, log_q)

    @pytest.mark.parametrize("seeds", [(0, 1), (1, 0)], ids=["forward", "reverse"])
    def test_bernoulli(self, seeds):
        p, q = (th.randn(5, 3, generator=th.Generator().manual_seed(seed)) for seed in seeds)
        th.manual_seed(5)
        actions = Bernoulli(logits=p).sample((N_SAMPLES,))
        exact = categorical_kl(*(th.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=1) for logits in (p, q)))
        self.check(exact, Bernoulli(logits=p).log_prob(actions).sum(-1), Bernoulli(logits=q).log_prob(actions).sum(-1))

    def test_expectation_of_estimators(self):
        """With samples of the old policy, k3 is unbiased for KL(old ‖ new) and pearson for half the χ² divergence."""
        old, new = log_probs(0, spread=0.3), log_probs(1, spread=0.3)
        th.manual_seed(6)
        actions = Categorical(logits=old).sample((N_SAMPLES,))
        log_ratio = (Categorical(logits=new).log_prob(actions) - Categorical(logits=old).log_prob(actions)).double()
        chi_square = (new.double().exp().square() / old.double().exp()).sum(dim=1) - 1
        for estimate, expected in ((k3(log_ratio), categorical_kl(old, new)), (pearson(log_ratio), 0.5 * chi_square)):
            standard_error = estimate.std(dim=0) / math.sqrt(N_SAMPLES)
            assert ((estimate.mean(dim=0) - expected).abs() < 4 * standard_error).all()


class TestIdentities:
    def test_zero_at_equality_with_zero_gradient(self):
        loc, scale = gaussians(0)
        p = log_probs(0)
        parameters = [loc.clone().requires_grad_(), scale.clone().requires_grad_(), p.clone().requires_grad_()]
        kl = th.stack([gaussian_kl(loc, scale, *parameters[:2]), categorical_kl(p, parameters[2])])
        assert (kl == 0).all()
        for gradient in th.autograd.grad(kl.sum(), parameters):
            assert (gradient == 0).all()

    @pytest.mark.parametrize("splits", [(4,), (2, 3, 4)])
    def test_positive_per_state_if_distributions_differ(self, splits):
        kl = categorical_kl(log_probs(0, splits), log_probs(1, splits))
        assert kl.shape == (5,)
        assert (kl > 0).all()
        kl = gaussian_kl(*gaussians(0), *gaussians(1))
        assert kl.shape == (5,)
        assert (kl > 0).all()

    def test_summed_over_action_dimensions(self):
        """Two independent copies of the same action have twice the KL, unlike with the mean of SB3 and sb3-contrib."""
        p, q = gaussians(0), gaussians(1)
        twice = gaussian_kl(*(th.cat([tensor, tensor], dim=1) for tensor in (*p, *q)))
        assert th.allclose(twice, 2 * gaussian_kl(*p, *q))

    def test_invariant_to_action_scale(self):
        p, q = gaussians(0), gaussians(1)
        scaled = gaussian_kl(*(1000 * tensor for tensor in (*p, *q)))
        assert th.allclose(scaled, gaussian_kl(*p, *q), rtol=1e-5)

    def test_second_order_expansions_agree(self):
        """All are ½ δ² Var near equality, where the choice of the penalized divergence does not matter."""
        p = log_probs(0, spread=0.5).double()
        direction = th.randn(p.shape, generator=th.Generator().manual_seed(9), dtype=th.float64)
        q = F.log_softmax(p + 1e-4 * direction, dim=1)
        forward = categorical_kl(p, q)
        sampled = [(p.exp() * estimate(q - p)).sum(dim=1) for estimate in (k3, pearson)]
        for other in (categorical_kl(q, p), *sampled):
            assert th.allclose(forward, other, rtol=1e-3, atol=0)

    def test_gradcheck(self):
        loc, scale = (tensor.double() for tensor in gaussians(0))
        other = [tensor.double().requires_grad_() for tensor in gaussians(1)]
        assert th.autograd.gradcheck(lambda *q: gaussian_kl(loc, scale, *q), other)
        assert th.autograd.gradcheck(lambda *q: gaussian_kl(*q, loc, scale), other)
        p = log_probs(0).double()
        logits = th.randn(5, 4, dtype=th.float64, requires_grad=True)
        assert th.autograd.gradcheck(lambda z: categorical_kl(p, F.log_softmax(z, dim=1)), [logits])
        assert th.autograd.gradcheck(lambda z: categorical_kl(F.log_softmax(z, dim=1), p), [logits])
        log_ratio = th.randn(5, dtype=th.float64, requires_grad=True)
        assert th.autograd.gradcheck(k3, [log_ratio])
        assert th.autograd.gradcheck(pearson, [log_ratio])


class TestNumericalEdgeCases:
    """Values and gradients are finite in float32 if the true value is finite."""

    @staticmethod
    def bernoulli(logit: float, requires_grad: bool = False) -> tuple[th.Tensor, th.Tensor]:
        logits = th.tensor([[logit]], requires_grad=requires_grad)
        return logits, th.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=1)

    def test_saturated_bernoulli(self):
        """With logits 16 and 18, float32 probabilities round to 1, and torch's kl_divergence returns inf."""
        _, p = self.bernoulli(16.0)
        logits, q = self.bernoulli(18.0, requires_grad=True)
        kl = categorical_kl(p, q)
        p1, q1 = 1 / (1 + math.exp(-16)), 1 / (1 + math.exp(-18))
        expected = p1 * math.log(p1 / q1) + (1 - p1) * math.log((1 - p1) / (1 - q1))
        assert kl.item() == pytest.approx(expected, rel=0.05)
        (gradient,) = th.autograd.grad(kl.sum(), logits)
        assert th.isfinite(gradient).all()

    @pytest.mark.parametrize("gap", [20.0, 100.0, 1000.0, 1e5])
    def test_nearly_deterministic_opposites(self, gap):
        """If p always gives the first outcome and q the second, KL = gap + o(1) in both directions."""
        p = F.log_softmax(th.tensor([[gap, 0.0]]), dim=1)
        logits = th.tensor([[0.0, gap]], requires_grad=True)
        q = F.log_softmax(logits, dim=1)
        for kl in (categorical_kl(p, q), categorical_kl(q, p)):
            assert kl.item() == pytest.approx(gap, rel=1e-5)
            (gradient,) = th.autograd.grad(kl.sum(), logits, retain_graph=True)
            assert th.isfinite(gradient).all()

    def test_never_negative_beyond_rounding(self):
        for spread in (1e-4, 1e-2, 1.0, 30.0):
            p = log_probs(0, splits=(6,), batch=1000, spread=10.0)
            q = F.log_softmax(p + spread * th.randn(p.shape, generator=th.Generator().manual_seed(1)), dim=1)
            assert categorical_kl(p, q).min() > -1e-7

    def test_impossible_outcomes_contribute_exactly_zero(self):
        lowest = th.finfo(th.float32).min
        p, q = log_probs(0), log_probs(1)
        masked = [th.cat([log_prob, th.full((5, 2), lowest)], dim=1) for log_prob in (p, q)]
        masked[1].requires_grad_()
        kl = categorical_kl(*masked)
        assert th.equal(kl, categorical_kl(p, q))
        (gradient,) = th.autograd.grad(kl.sum(), masked[1])
        assert th.isfinite(gradient).all()
        assert (gradient[:, 4:] == 0).all()

    @pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
    def test_tiny_and_large_scales(self, scale):
        old = (th.zeros(2, 3), th.full((2, 3), scale))
        new = (th.full((2, 3), scale, requires_grad=True), th.full((2, 3), 2 * scale, requires_grad=True))
        per_dimension = math.log(2) + (1 + 1) / (2 * 4) - 0.5  # log(σ_q/σ_p) + (σ_p² + Δ²) / 2σ_q² − ½
        kl = gaussian_kl(*old, *new)
        assert th.allclose(kl, th.full((2,), 3 * per_dimension), rtol=1e-5)
        for gradient in th.autograd.grad(kl.sum(), new):
            assert th.isfinite(gradient).all()

    def test_nearly_equal_scales_keep_precision(self):
        """If log σ differs by δ = 1e-4, the KL is δ² = 1e-8, which `x − 1 − log x` would lose in float32."""
        scale, delta = th.ones(1, 1), 1e-4
        kl = gaussian_kl(scale, scale, scale, scale * math.exp(delta))
        assert kl.item() == pytest.approx(delta**2, rel=0.02)
