"""β from one update to the next: the rule within the bounds, and when a bound has stopped it for long."""

import math
import re
import warnings

import numpy as np
import pytest

from sb3_adaptive_kl import AdaptivePenalty
from sb3_adaptive_kl.control import PATIENCE_AT_BOUND, apply_rule, count_at_bound, warn_at_bound


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (2.0, (2.0, 0)),
        (4.0, (4.0, 0)),
        (5.0, (4.0, 1)),
        (math.inf, (4.0, 1)),
        (0.5, (0.5, 0)),
        (0.1, (0.5, -1)),
        (-1, (0.5, -1)),
    ],
)
def test_rule_is_kept_within_bounds(wanted, expected):
    assert apply_rule(lambda *_: wanted, 1.0, 0.01, 0.01, (0.5, 4.0)) == expected


@pytest.mark.parametrize("returned", [math.nan, None, "1.0"])
def test_rule_that_does_not_return_a_number_is_named(returned):
    def broken_rule(kl_coef, kl, target_kl):
        return returned

    with pytest.raises(ValueError, match=r"broken_rule.* returned .* for kl_coef=1.0, kl=0.02, target_kl=0.01"):
        apply_rule(broken_rule, 1.0, 0.02, 0.01, (0.5, 4.0))


def test_only_a_row_at_the_same_bound_is_counted():
    counts = [0]
    for side in (1, 1, 0, 1, -1, -1, -1):
        counts.append(count_at_bound(counts[-1], side))
    assert counts[1:] == [1, 2, 0, 1, -1, -2, -3]


@pytest.mark.parametrize(
    ("sign", "remedy"), [(1, "upper bound.*lower learning_rate"), (-1, "lower bound.*raise learning_rate")]
)
def test_warns_once_with_the_remedy(sign, remedy):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count in range(1, 2 * PATIENCE_AT_BOUND):
            warn_at_bound(sign * count, 32.0, 0.05, 0.01)
    assert [re.search(remedy, str(warning.message)) is not None for warning in caught] == [True]


@pytest.mark.parametrize("rule", [lambda *args: np.float64(3.0), AdaptivePenalty(*np.array([0.5, 2.0, 0.5, 2.0]))])
def test_rules_may_compute_with_numpy(rule):
    kl_coef, side = apply_rule(rule, 1.0, 1.0, 0.01, (0.5, 1.5))
    assert (kl_coef, side) == (1.5, 1)
    assert type(kl_coef) is float
