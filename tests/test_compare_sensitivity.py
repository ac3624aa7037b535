"""Sensitivity to a swept hyperparameter: the best single value, and what it loses."""

import numpy as np
import pytest

from sb3_adaptive_kl.compare.sensitivity import _family, phi
from tests.compare_results import compute, computed

pytestmark = pytest.mark.usefixtures("fewer_samples")

FAMILIES = {"a": {1.0: "a1", 2.0: "a2"}, "b": {1.0: "b1", 2.0: "b2"}}


def swept(make, returns):
    """Statistics of a sweep of two values with two seeds, from environment → arm → return."""
    runs = [
        make(final=(final + noise,), env=env, arm=arm, seed=seed)
        for env, arms in returns.items()
        for arm, final in arms.items()
        for seed, noise in enumerate((-0.01, 0.01))
    ]
    return computed(runs, seeds=2, families=FAMILIES)


def test_sensitivity_is_the_loss_by_a_single_value(make):
    """a: 1 and 0.6 on E, 0.2 and 0.8 on F. The best value of each has 0.9 on average, and 2, the best single value, 0.7."""
    returns = {"E": {"a1": 10.0, "a2": 6.0, "b1": 9.0, "b2": 9.5}, "F": {"a1": 0.2, "a2": 0.8, "b1": 0.9, "b2": 1.0}}
    found = swept(make, returns)["sensitivity"]
    assert found["environments"] == ["E", "F"]
    a, b = found["families"]["a"], found["families"]["b"]
    assert [score for score, _, _ in a["scores"]] == pytest.approx([0.6, 0.7])
    assert (a["best"], a["near_best"]) == (2.0, [2.0])
    assert a["phi"][0] == pytest.approx(0.9 - 0.7)
    assert (b["best"], b["near_best"]) == (2.0, [1.0, 2.0])
    assert b["phi"][0] == pytest.approx(0.0)  # 2 is the best value everywhere
    assert 0 <= a["phi"][1] <= a["phi"][0] <= a["phi"][2]


def test_one_environment_is_not_sensitive_to_the_choice_of_a_single_value(make):
    found = swept(make, {"E": {"a1": 10.0, "a2": 6.0, "b1": 9.0, "b2": 2.0}})["sensitivity"]
    assert {family: entry["phi"][0] for family, entry in found["families"].items()} == {"a": 0.0, "b": 0.0}
    assert {family: entry["best"] for family, entry in found["families"].items()} == {"a": 1.0, "b": 1.0}


def test_phi_is_never_negative_and_does_not_depend_on_the_order_of_the_values():
    scores = np.random.default_rng(0).normal(size=(4, 100, 5, 3))
    np.testing.assert_allclose(phi(*scores), phi(*scores[::-1]))
    assert (phi(*scores) >= -1e-12).all()
    assert phi(scores[0]) == pytest.approx(0.0)


def test_arms_of_a_sweep_are_compared_at_the_same_value(make):
    found = swept(make, {env: {"a1": 10.0, "a2": 6.0, "b1": 9.0} for env in "EF"})
    assert [pair["arms"] for pair in found["environments"]["E"]["pairs"]] == [["a1", "b1"]]
    assert [pair["arms"] for pair in found["across"]["probability_of_improvement"]] == [["a1", "b1"]]
    incomplete = found["sensitivity"]["families"]["b"]
    assert (incomplete["values"], incomplete["phi"]) == ([1.0], None)  # b2 has not finished


def test_sensitivity_needs_an_environment_where_some_arm_beats_random(make):
    assert swept(make, {"E": {"a1": -1.0, "a2": -2.0}})["sensitivity"]["families"] == {}
    assert compute(make, {"a1": [1.0, 1.0]})["sensitivity"] is None  # without a sweep


def test_values_near_a_negative_best_score():
    assert _family({1.0: np.full((2, 1), -1.0), 2.0: np.full((2, 1), -1.05)}, True)["near_best"] == [1.0, 2.0]
