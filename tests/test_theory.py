"""Recompute the decimal numbers in docs/theory.md that are results, and check its closed forms."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch as th
from scipy import optimize

from sb3_adaptive_kl import AdaptivePenalty, BalancedLearningRate, FixedPenalty, PredictivePenalty
from sb3_adaptive_kl.clip_range import outlier_clip_range
from sb3_adaptive_kl.divergences import categorical_kl, gaussian_kl, k3, pearson
from sb3_adaptive_kl.step_back import MIN_FRACTION, TARGET_FRACTION

THEORY = (Path(__file__).parents[1] / "docs" / "theory.md").read_text()
P, Q = np.array([1 / 3, 1 / 3, 1 / 3]), np.array([1 / 3, 1 / 6, 1 / 2])
RATIO = Q / P


def exact(p, q):
    return categorical_kl(*(th.tensor(np.log([x])) for x in (p, q))).item()


def normal(mean, std):
    return th.tensor([[float(mean)]]), th.tensor([[float(std)]])


def estimate(function):
    return function(th.tensor(np.log(RATIO))).numpy()


def two_actions(c):
    """
    KL to a uniform reference where surrogate and penalty balance: π ∝ e^(Â/c), the advantages of the two actions being
    normalized under π, so that they differ by 1/√(p (1 − p)).
    """
    p = optimize.brentq(lambda p: balanced_coefficient(p) - c, 0.51, 0.9)
    return exact(np.array([p, 1 - p]), np.array([0.5, 0.5]))


def balanced_coefficient(p):
    return 1 / (math.sqrt(p * (1 - p)) * math.log(p / (1 - p)))


BETA = {"12.9": 0.003, "7.1": 0.01, "5.0": 0.02, "4.1": 0.03}
# The number as printed on the page, and its exact value
NUMBERS = {
    "0.0959": exact(P, Q),
    "0.0872": exact(Q, P),
    "0.1155": -1 / 6 * math.log(1 / 2),
    "0.2027": 1 / 2 * math.log(3 / 2),
    "0.4431": gaussian_kl(*normal(0, 1), *normal(1, 2)).item(),
    "1.3069": gaussian_kl(*normal(1, 2), *normal(0, 1)).item(),
    "0.1931": estimate(k3)[1],
    "0.0945": estimate(k3)[2],
    "0.0833": P @ estimate(pearson),
    "2.25": 1.5**2,
    "1.17": math.log2(2.25),
    "1.96": 1.4**2,
    "0.0049": 0.0196 / 2**2,
    "0.405": math.log(1.5),
    "1.65": math.sqrt(math.e),
    "0.3181": gaussian_kl(*normal(0, 1), *normal(0, 2)).item(),
    "0.8069": gaussian_kl(*normal(0, 2), *normal(0, 1)).item(),
    "1.51": optimize.minimize_scalar(balanced_coefficient, bounds=(0.51, 0.999), method="bounded").fun,
    "0.28": two_actions(1.6),
    "0.15": two_actions(2),
    "0.20": 1 / (2 * 1.6**2),
    "0.125": 1 / (2 * 2**2),
    "0.49": outlier_clip_range(0.03),
    **{printed: 1 / math.sqrt(2 * target) for printed, target in BETA.items()},
}
# Settings, not results: the paper's arXiv number, targets, a KL, noise, the paper's tolerance, and those of the defaults
GIVEN = {
    *("1707.06347", "1909.08593", "0.003", "0.01", "0.02", "0.03", "0.0196", "0.5", "1.6"),
    *("1.5", "1.4", "1.15", "1.3", "0.2", "0.3", "0.8", "0.9"),
}


@pytest.mark.parametrize("printed", NUMBERS)
def test_printed_number_is_correct(printed):
    decimals = len(printed.split(".")[1])
    assert f"{NUMBERS[printed]:.{decimals}f}" == printed
    assert printed in THEORY


def test_every_number_is_tested():
    assert set(re.findall(r"\d+\.\d+", THEORY)) == NUMBERS.keys() | GIVEN


def test_settings_on_the_page_are_the_defaults():
    rule, words = PredictivePenalty(), {10: "ten"}
    assert f"cuts an update into {words[rule.segments]} segments" in THEORY
    assert (rule.max_ratio, rule.gain) == (math.e, 0.5)
    assert rf"k + (k - k_\text{{before}}) \cdot \text{{segments left}},\ {rule.floor:g} \, k" in THEORY
    assert r"\mathrm{clip}\left( \frac{\hat d}{d_\text{targ}},\ \frac{1}{e},\ e \right)^{1/2}" in THEORY
    assert f"aims at {TARGET_FRACTION:g} D, first" in THEORY
    actuator, text = BalancedLearningRate(), " ".join(THEORY.split())
    assert f"divides the learning rate by {actuator.decrease:g} after an update with b below {actuator.low:g} whose" in text
    assert f"multiplies it by {actuator.increase:g} where b is above {actuator.high:g}" in text
    assert f"by {actuator.decrease_within:g} within an update at each segment with b below {actuator.low / 2:g}" in text
    assert f"d is between {MIN_FRACTION:g} D and D" in text


def test_closed_forms_of_the_example():
    assert exact(P, Q) == pytest.approx(math.log(4 / 3) / 3)
    assert P @ estimate(pearson) == pytest.approx(1 / 12)
    assert P @ estimate(k3) == pytest.approx(exact(P, Q))
    assert gaussian_kl(*normal(0, 1), *normal(1, 2)).item() == pytest.approx(math.log(2) + (1 + 1) / 8 - 1 / 2)
    assert gaussian_kl(*normal(1, 2), *normal(0, 1)).item() == pytest.approx(-math.log(2) + (4 + 1) / 2 - 1 / 2)


def share_in_band(sigma, rule):
    """Simulate 100,000 updates with ln(d / target) = −2 · ln(β / β*) + σ · noise."""
    noise = sigma * np.random.default_rng(0).standard_normal((100, 1000))
    inside = 0
    for start, row in zip(np.linspace(-0.5, 0.5, 100), noise, strict=True):
        # A rule that multiplies by 2 only reaches some values of β; β* can lie anywhere between them
        kl_coef = 1.0 if isinstance(rule, FixedPenalty) else 2.0**start
        for n in row:
            kl = math.exp(-2 * math.log(kl_coef) + n)
            inside += 1 / 1.5 <= kl <= 1.5
            kl_coef = rule(kl_coef, kl, 1.0)
    return inside / noise.size


@pytest.mark.parametrize(("row", "rule"), [("the best constant β", FixedPenalty()), ("the paper's rule", AdaptivePenalty())])
def test_shares_of_updates_inside_the_band(row, rule):
    printed = [int(share) for share in re.findall(r"(\d+) %", re.search(rf"^\| {row} \|(.*)$", THEORY, flags=re.MULTILINE)[1])]
    sigmas = (0.5, 1.0, 1.6)
    assert printed == [round(100 * share_in_band(sigma, rule)) for sigma in sigmas]
    if isinstance(rule, FixedPenalty):  # the closed form of the text
        assert printed == [round(100 * math.erf(math.log(1.5) / sigma / math.sqrt(2))) for sigma in sigmas]


def test_divergence_is_quadratic_in_the_scale_of_the_step():
    old, step = normal(0, 1), normal(0.1, 0.1)
    kls = [gaussian_kl(*old, old[0] + scale * step[0], old[1] + scale * step[1]).item() for scale in (0.02, 0.01)]
    assert kls[0] / kls[1] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(("f", "c"), [(1.0, 2.0), (0.1, 0.5)])
def test_noise_at_which_the_forward_penalty_balances_the_surrogate(f, c):
    """Normalized advantages √f · (a − μ) / σ + noise have the gradient √f / σ with respect to μ, and 0 with respect to σ."""
    std = 1 / math.sqrt(1 - f / c**2)
    mean, std = normal(math.sqrt(f) * std / c, std)
    mean.requires_grad_()
    std.requires_grad_()
    of_mean, of_std = th.autograd.grad(c * gaussian_kl(*normal(0, 1), mean, std).sum(), (mean, std))
    assert of_mean.item() == pytest.approx(math.sqrt(f) / std.item())
    assert of_std.item() == pytest.approx(0, abs=1e-6)


def test_five_percent_are_outliers():
    assert round(100 * math.erfc(2 / math.sqrt(2))) == 5
    assert outlier_clip_range(0.02) == pytest.approx(0.4)


@pytest.mark.parametrize(("factor", "settles"), [(2.0, False), (1.4, True)])
def test_smaller_factor_stops_oscillation(factor, settles):
    """With KL ∝ β^−2 and 0.0196 at β = 4, the paper's factor alternates between 4 and 8; a smaller factor settles."""
    rule, kl_coef, path = AdaptivePenalty(decrease=1 / factor, increase=factor), 4.0, []
    for _ in range(20):
        kl_coef = rule(kl_coef, 0.0196 * (4.0 / kl_coef) ** 2, 0.01)
        path.append(kl_coef)
    if settles:
        assert path[-1] == path[-2]
    else:
        assert path[:4] == [8.0, 4.0, 8.0, 4.0]
