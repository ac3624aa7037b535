"""Test the rules for β: the paper's rule at its edges, and properties of all rules for any numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_adaptive_kl import (
    AdaptiveLearningRate,
    AdaptivePenalty,
    FixedPenalty,
    PenaltyRule,
    PredictivePenalty,
    ProportionalPenalty,
)
from sb3_adaptive_kl.arguments import kl_coef_limits, penalty_rule

RULES = [
    AdaptivePenalty(),
    AdaptivePenalty(0.7, 1.3, 1 / 1.5, 1.5),
    ProportionalPenalty(),
    PredictivePenalty(),
    FixedPenalty(),
]
positive = st.floats(1e-6, 1e6)
divergence = st.one_of(st.floats(0, 1e6), st.just(math.inf))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.0, 0.5),
        (0.0066, 0.5),
        (0.0067, 1.0),
        (0.01, 1.0),
        (0.0149, 1.0),
        (0.0151, 2.0),
        (1.0, 2.0),
        (math.inf, 2.0),
    ],
)
def test_paper_rule(kl, expected):
    """Schulman et al. 2017, section 4, with d_targ = 0.01: the band is [0.00667, 0.015]."""
    assert AdaptivePenalty()(1.0, kl, 0.01) == expected


def test_band_includes_its_edges():
    rule = AdaptivePenalty(low=0.5, high=2.0)
    assert rule(1.0, 0.5, 1.0) == rule(1.0, 2.0, 1.0) == 1.0
    assert rule(1.0, math.nextafter(0.5, 0), 1.0) == 0.5
    assert rule(1.0, math.nextafter(2.0, 3), 1.0) == 2.0


def test_increase_and_decrease_cancel():
    rule = AdaptivePenalty()
    assert rule(rule(1.0, 1.0, 0.01), 0.0, 0.01) == 1.0


def test_named_rule_is_the_papers():
    assert penalty_rule("adaptive") == AdaptivePenalty()


@pytest.mark.parametrize(
    ("mapping", "rule"),
    [
        ({"name": "adaptive", "high": 2.0, "low": 0.5}, AdaptivePenalty(low=0.5, high=2.0)),
        ({"name": "predictive", "segments": 5}, PredictivePenalty(segments=5)),
        ({"name": "fixed"}, FixedPenalty()),
    ],
)
def test_rule_with_numbers_can_be_written_as_a_mapping(mapping, rule):
    assert penalty_rule(mapping) == rule
    assert "name" in mapping  # it is the user's


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"high": 2.0}, "kl_rule: name=None is unknown"),
        ({"name": "adaptiv"}, "kl_rule: name='adaptiv' is unknown, did you mean 'adaptive'"),
        ({"name": "adaptive", "hi": 2.0}, "hi=2.0 is not a number of 'adaptive', which has low, high, decrease, increase"),
        ({"name": "adaptive", "high": "2"}, "high='2' is not a number of 'adaptive'"),
        ({"name": "fixed", "high": 2.0}, "high=2.0 is not a number of 'fixed', which has none"),
        ({"name": "adaptive", "high": 0.5}, "high=0.5 must satisfy"),
    ],
)
def test_wrong_mapping_is_named(mapping, message):
    with pytest.raises(ValueError, match=message):
        penalty_rule(mapping)


def test_rule_that_defines_nothing_says_what_it_must_define():
    with pytest.raises(NotImplementedError, match=r"Empty must define __call__\(kl_coef, kl, target_kl\)"):
        type("Empty", (PenaltyRule,), {})()(1.0, 0.01, 0.01)


@pytest.mark.parametrize(("kl", "expected"), [(0.0, 0.98), (0.009, 0.99), (0.01, 1.0), (0.011, 1.01), (math.inf, 1.02)])
def test_proportional_rule(kl, expected):
    """Ziegler et al. 2019, section 2.2: K = 0.1, relative error clipped at ±0.2."""
    assert ProportionalPenalty()(1.0, kl, 0.01) == pytest.approx(expected)


@pytest.mark.parametrize("rule", RULES)
@given(kl_coef=positive, kl=divergence, target_kl=positive)
def test_beta_moves_in_the_right_direction(rule, kl_coef, kl, target_kl):
    """β never decreases if the KL is above its target and never increases if the KL is below it."""
    after = rule(kl_coef, kl, target_kl)
    assert 0 < after < math.inf
    assert after >= kl_coef if kl >= target_kl else after <= kl_coef


@pytest.mark.parametrize("rule", RULES)
@given(kl_coef=positive, first=divergence, second=divergence, target_kl=positive)
def test_monotone_in_kl(rule, kl_coef, first, second, target_kl):
    low, high = sorted([first, second])
    assert rule(kl_coef, low, target_kl) <= rule(kl_coef, high, target_kl)


@pytest.mark.parametrize("rule", RULES)
@given(kl_coef=positive, kl=divergence, target_kl=positive, exponent=st.integers(-20, 20))
def test_scale_invariance(rule, kl_coef, kl, target_kl, exponent):
    """A rule depends only on KL / target, and scales with β. Multiplication by powers of 2 is exact."""
    scale = 2.0**exponent
    assert rule(kl_coef, scale * kl, scale * target_kl) == rule(kl_coef, kl, target_kl)
    assert rule(scale * kl_coef, kl, target_kl) == scale * rule(kl_coef, kl, target_kl)


def test_default_bounds_do_not_bind_where_the_target_can_be_held():
    """With normalized advantages the optimum at β has a KL of at most 1/(2β²): the bounds are far from the usual targets."""
    low, high = kl_coef_limits(None, normalize_advantage=True)
    assert 1 / (2 * high**2) < 0.001 / 1.5
    assert 1 / (2 * low**2) > 1.5 * 0.1
    assert kl_coef_limits(None, normalize_advantage=False) == (1e-6, 1e6)  # β carries the unit of the rewards then


@pytest.mark.parametrize(
    "numbers",
    [
        {"low": 0},
        {"low": 1.1},
        {"high": 0.9},
        {"decrease": 0},
        {"decrease": 1},
        {"increase": 1},
        {"increase": math.inf},
        {"low": math.nan},
    ],
)
def test_adaptive_penalty_rejects_invalid_numbers(numbers):
    with pytest.raises(ValueError, match=next(iter(numbers))):
        AdaptivePenalty(**numbers)


@pytest.mark.parametrize("numbers", [{"gain": 0}, {"max_error": -0.1}, {"gain": 5.0}, {"gain": math.nan}])
def test_proportional_penalty_rejects_invalid_numbers(numbers):
    with pytest.raises(ValueError, match=next(iter(numbers))):
        ProportionalPenalty(**numbers)


@pytest.mark.parametrize("rule", [AdaptivePenalty, AdaptiveLearningRate])
def test_dead_band_must_end(rule):
    """The KL of an undone update is infinite: without an end of the band nothing would follow from it."""
    with pytest.raises(ValueError, match="high=inf must satisfy 0 < low <= 1 <= high < inf"):
        rule(high=math.inf)
