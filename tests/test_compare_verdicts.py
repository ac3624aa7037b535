"""Verdicts: differences are paired, corrected, and no arm is called better without evidence."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from sb3_adaptive_kl.compare import verdicts
from tests.compare_results import compute

pytestmark = pytest.mark.usefixtures("fewer_samples")


def pair(make, a, b):
    (comparison,) = compute(make, {"a": a, "b": b})["environments"]["E"]["pairs"]
    return comparison["final"]


def test_winner_requires_a_clear_difference(make):
    assert pair(make, [10, 11, 12, 13, 14], [1, 2, 4, 3, 5])["winner"] == "a"
    assert pair(make, [1, 2, 4, 3, 5], [10, 11, 12, 13, 14])["winner"] == "b"
    assert pair(make, [1, 2, 3, 4, 5], [2, 1, 4, 3, 5])["winner"] is None
    assert pair(make, [5, 5, 5, 5, 5], [5, 5, 5, 5, 5])["winner"] is None
    assert pair(make, [6, 6, 6, 6, 6], [5, 5, 5, 5, 5])["winner"] == "a"
    # Never with four seeds: that all of them agree is too likely by chance
    assert pair(make, [100, 101, 102, 103], [1, 2, 4, 3])["winner"] is None
    # The bootstrap of few seeds stays within their range: on its own it would call a winner here
    close = pair(make, [2.0, 9.0, 4.0, 1.5, 1.2], [1.0] * 5)
    assert close["mean"][1] > 0 > close["student"][0]
    assert close["winner"] is None


def winners(*differences):
    """Winners of the comparisons of one report between the arms a and b, from the differences of their seeds."""
    entries = [verdicts.difference(pd.Series(values)) for values in differences]
    verdicts.call_winners([(["a", "b"], entry) for entry in entries])
    return [entry and entry["winner"] for entry in entries]


def test_winner_requires_both_intervals_to_exclude_zero(monkeypatch):
    """The bootstrap's, which is given here, and Student's, which does where the p value is small."""
    clear, unclear = [1.0, 1.1, 0.9, 1.0, 1.05], [1.0, 8.0, 3.0, 0.5, 0.2]
    for bootstrap, differences, winner in (
        ([1.0, 0.5, 1.5], clear, "a"),
        ([1.0, -0.5, 1.5], clear, None),
        ([4.0, 0.5, 7.5], unclear, None),
    ):
        monkeypatch.setattr(verdicts, "interval", lambda *_, bootstrap=bootstrap: bootstrap)
        low, high = verdicts.student(differences)
        assert (low > 0 or high < 0) == (differences == clear)
        assert winners(differences) == [winner]


def test_winner_survives_the_correction_for_the_number_of_comparisons():
    clear, close, nothing = [1.0, 1.1, 0.9, 1.0, 1.05], [1.0, 2.0, 0.5, 1.5, 0.2], [1.0, -1.0, 0.5, -0.5, 0.1]
    assert winners(close) == ["a"]
    assert winners(close, nothing) == [None, None]
    assert winners(close, clear) == ["a", "a"]  # Holm's method divides by fewer after each one shown
    assert winners([-x for x in clear], nothing, nothing) == ["b", None, None]
    assert winners(close, [], [1.0], [1.0, 1.1, 1.0, 1.1]) == [
        "a",
        None,
        None,
        None,
    ]  # what is never shown is not a comparison


def test_all_comparisons_of_a_report_are_corrected_together(make):
    """b − a is the same everywhere, and the areas do not differ at all: two comparisons on each environment."""
    arms = {"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [2.0, 3.1, 3.9, 5.0, 6.0]}
    for environments in ("E", "EF"):
        statistics = compute(make, arms, environments)
        assert statistics["comparisons"] == 2 * len(environments)
        (pair,) = statistics["environments"]["E"]["pairs"]
        assert pair["final"]["p_holm"] == pytest.approx(2 * len(environments) * pair["final"]["p"])
        assert pair["area"]["p_holm"] == 1.0


def test_p_value_of_five_seeds_has_a_closed_form():
    """With 4 degrees of freedom and x² = t² / (1 + t² / 4), p = 1 − ¾ x (1 − x² / 12); for 1, 2, 3, 4, 5, t² = 18."""
    x = np.sqrt(18 / 5.5)
    for sign in (1, -1):
        entry = verdicts.difference(sign * pd.Series([1.0, 2.0, 3.0, 4.0, 5.0]))
        assert entry["p"] == pytest.approx(1 - 0.75 * x * (1 - x**2 / 12))


def test_holms_correction():
    """An example of the Wikipedia article on the Holm-Bonferroni method, in another order."""
    assert verdicts.holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert verdicts.holm(np.array([0.6, 0.7])) == pytest.approx([1.0, 1.0])


def test_detectable_difference_agrees_with_its_simulation():
    """80 % of studies with such a true difference show it, within 3 standard errors."""
    generator = np.random.default_rng(0)
    for seeds, comparisons in ((5, 1), (10, 21)):
        draws = generator.normal(loc=verdicts.detectable(seeds, comparisons), size=(4000, seeds))
        p = scipy.stats.ttest_1samp(draws, 0, axis=1).pvalue
        assert (p * comparisons <= 0.05).mean() == pytest.approx(0.8, abs=3 * np.sqrt(0.8 * 0.2 / 4000))
    assert verdicts.detectable(5) == pytest.approx(1.682, abs=1e-3)  # statsmodels' TTestPower
    assert verdicts.detectable(4) is None


def bimodal(generator, size):
    """Runs that have learned or have not, with little noise: what makes few seeds look certain."""
    return generator.integers(0, 2, size) + generator.normal(scale=0.02, size=size)


def simulated(draw, n_environments, n_seeds):
    """P values of 1,000 studies of three equal arms, of final returns and of areas, half of which is the final return."""
    returns = draw(np.random.default_rng(0), size=(1000, n_environments, 2, 3, n_seeds))
    returns[:, :, 1] = returns.mean(axis=2)
    return scipy.stats.ttest_1samp(returns - np.roll(returns, 1, axis=3), 0, axis=4).pvalue.reshape(1000, -1)


@pytest.mark.parametrize("n_environments", [1, 7])
@pytest.mark.parametrize("distribution", ["normal", "exponential", "lognormal"])
def test_equal_arms_are_rarely_called_better(distribution, n_environments):
    """
    A/A test with 5 seeds: 5 % of the studies call any arm better, within 3 standard errors, or fewer.

    Without the intervals, which can only take a verdict away: an upper bound.
    """
    p = simulated(getattr(np.random.Generator, distribution), n_environments, 5)
    assert (p <= 0.05).any(axis=1).mean() > 0.1  # without the correction
    n_called = 0
    for study in p:
        entries = [{"p": value, "mean": [1.0] * 3} for value in study]
        assert verdicts.call_winners([(["a", "b"], entry) for entry in entries]) == 6 * n_environments
        n_called += any(entry["winner"] for entry in entries)
    assert n_called <= 50 + 3 * np.sqrt(1000 * 0.05 * 0.95)


@pytest.mark.parametrize(("n_seeds", "n_called"), [(5, 75), (3, 652)])
def test_equal_arms_that_either_succeed_or_fail(n_seeds, n_called):
    """No correction helps where all seeds agree by chance: why fewer than five never show anything. Seven environments."""
    p = simulated(bimodal, 7, n_seeds)
    assert sum((verdicts.holm(study) <= 0.05).any() for study in p) == pytest.approx(n_called, abs=20)


def test_student_interval_agrees_with_the_t_table():
    """For 1, 2, 3: 2 ± 4.303 · 1/√3, with 2 degrees of freedom."""
    assert verdicts.student([1.0, 2.0, 3.0]) == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5], abs=1e-3)
    assert verdicts.student([1.0]) == [None, None]


def test_differences_are_paired_by_seed(make):
    """Pairing shows a small difference between arms despite large differences between seeds."""
    paired = pair(make, [500.8, 201, 100.5, 401, 300.5], [500, 200, 100, 400, 300])
    assert paired["differences"] == pytest.approx([0.8, 1, 0.5, 1, 0.5])
    assert paired["winner"] == "a"
    assert pair(make, [500.8, 201, 100.5, 401, 300.5], [100, 200, 300, 400, 500])["winner"] is None
    assert pair(make, [3.0, 1.0], [2.0])["differences"] == [1.0]  # only seeds that both arms finished
