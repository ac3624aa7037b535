"""Statistics: learning curves, reproducible intervals, and no winner without evidence."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from sb3_adaptive_kl.compare import intervals, statistics
from sb3_adaptive_kl.compare.intervals import AGGREGATES, interval, mean, probability_of_improvement, profile
from tests.compare_results import compute, computed

pytestmark = pytest.mark.usefixtures("fewer_samples")


def test_learning_curve_is_the_moving_mean_of_finished_episodes(make):
    """With a budget of 1000 there is a point every 10 steps, the mean of the episodes that ended in the last 50 steps."""
    run = make(episodes=[(25, 2.0), (60, 4.0), (61, 6.0), (200, 10.0)])
    curve = dict(zip(range(10, 1001, 10), run.curve, strict=True))
    assert curve[10] == 2.0  # before the end of the first episode: its return
    assert curve[30] == 2.0
    assert curve[60] == 3.0  # episodes that ended at 25 and 60
    assert curve[70] == 4.0  # at 25, 60 and 61
    assert curve[80] == 5.0
    assert curve[110] == 6.0  # at 61
    assert curve[150] == 6.0  # no episode ended: the last mean is repeated
    assert curve[200] == curve[1000] == 10.0
    assert run.curve.mean() == pytest.approx(np.mean(list(curve.values())))
    assert run.steps_to(4.0) == 70.0
    assert run.steps_to(2.0) == 30.0  # not before the end of the first episode
    assert np.isnan(run.steps_to(11.0))
    assert np.isnan(make(episodes=[(1001, 1.0)]).curve).all()  # after the budget


def test_intervals_neither_use_nor_change_the_global_random_state():
    scores = np.random.default_rng(0).normal(size=(6, 2))

    def estimate():
        return interval(mean, scores)

    np.random.seed(1)
    first, following = estimate(), np.random.random()
    np.random.seed(2)
    assert estimate() == first
    np.random.seed(1)
    assert np.random.random() == following
    estimate, low, high = first
    assert low < estimate < high
    assert estimate == pytest.approx(scores.mean())


def test_bootstrap_interval_of_a_mean_agrees_with_the_normal_approximation():
    """The half-width for many scores is 1.96 standard errors."""
    scores = np.random.default_rng(0).normal(size=(400, 1))
    _, low, high = interval(mean, scores)
    assert (high - low) / 2 == pytest.approx(1.96 * scores.std() / 20, rel=0.05)


def test_interval_of_the_area_resamples_runs_not_points(make):
    runs = [make(episodes=[(100, area)], seed=seed) for seed, area in enumerate([1.0, 2.0, 3.0, 4.0])]
    area = computed(runs)["environments"]["E"]["arms"]["a"]["area"]
    assert area == interval(mean, np.array([[1.0], [2.0], [3.0], [4.0]]))


def test_areas_are_compared_like_final_returns(make):
    areas = {"a": 3.0, "b": 1.0}
    runs = [make(episodes=[(100, area + s)], arm=arm, seed=s) for arm, area in areas.items() for s in range(5)]
    (comparison,) = computed(runs)["environments"]["E"]["pairs"]
    assert comparison["area"]["differences"] == pytest.approx([2.0] * 5)
    assert comparison["area"]["winner"] == "a"
    assert comparison["final"]["winner"] is None


def test_mean_median_and_iqm_of_final_returns(make):
    arm = compute(make, {"a": [0.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 1000.0]})["environments"]["E"]["arms"]["a"]["final"]
    assert arm["mean"][0] == pytest.approx(134.375)
    assert arm["median"][0] == pytest.approx(12.5)
    assert arm["iqm"][0] == pytest.approx(12.5)  # mean of the middle four
    assert arm["iqm"][2] < arm["mean"][2]


def test_single_run_does_not_have_an_interval(make):
    environment = compute(make, {"a": [5.0]})["environments"]["E"]
    assert environment["arms"]["a"]["final"]["mean"] == [5.0, None, None]
    assert environment["pairs"] == []


def test_runs_without_a_finished_episode_have_neither_curve_nor_area(make):
    arm = compute(make, {"a": [5.0, 6.0]}, episodes=[(1500, 1.0)])["environments"]["E"]["arms"]["a"]
    assert arm["curve"] is None
    assert arm["area"] is None
    assert arm["reached"] == 0


@pytest.mark.parametrize(
    "finals",
    [[1.0, 2.0, 3.0], [5.1, 4.8, 5.4], [50.0]],
    ids=["worse than random", "within the noise", "one seed, which shows nothing"],
)
def test_no_threshold_and_no_scores_if_no_arm_is_shown_to_beat_random(make, finals):
    statistics = compute(make, {"a": finals, "b": [0.0, 1.0]}, environments=["E", "F"], random=(5.0,))
    environment = statistics["environments"]["E"]
    assert not environment["beats_random"]
    assert environment["threshold"] is None
    assert environment["arms"]["a"]["reached"] == 0
    assert environment["arms"]["a"]["steps_to_threshold"] is None
    assert statistics["across"] is None


def test_arm_that_clearly_beats_random_is_enough(make):
    environment = compute(make, {"a": [9.0, 9.5, 10.0], "b": [0.0, 1.0]}, random=(5.0,))["environments"]["E"]
    assert environment["beats_random"]
    assert environment["threshold"] == pytest.approx(5 + 0.9 * 4.5)


def test_random_policy_of_other_seeds_is_not_the_zero_of_an_arm(make):
    """On average over all runs, a random policy gets more than the best arm: a scale below 0 would turn the order around."""
    runs = [make(final=(-5.0,), random=(-10.0,), arm="a", seed=seed) for seed in range(3)]
    runs += [make(final=(-20.0,), random=(5.0,), arm="b", seed=seed) for seed in (3, 4)]
    environment = computed(runs)["environments"]["E"]
    assert environment["random"] > environment["best"]
    assert not environment["beats_random"]


def test_one_environment_is_not_aggregated(make):
    assert compute(make, {"a": [90, 110], "b": [60, 60]}, random=(20.0,))["across"] is None


def test_normalized_scores(make):
    """0 is a random policy and 1 the best arm, so the best arm's mean is 1."""
    across = compute(make, {"a": [98, 102], "b": [60, 60]}, environments=["E", "F"], random=(20.0,))["across"]
    assert across["arms"]["a"]["mean"][0] == pytest.approx(1.0)
    assert across["arms"]["b"]["mean"] == pytest.approx([0.5, 0.5, 0.5])
    assert across["arms"]["b"]["optimality_gap"][0] == pytest.approx(0.5)
    assert across["probability_of_improvement"][0]["probability"][0] == 1.0
    at, profile = across["profile"]["at"], across["profile"]["arms"]["b"][0]
    assert [share for tau, share in zip(at, profile, strict=True) if tau < 0.49] == [1.0] * sum(tau < 0.49 for tau in at)
    assert profile[-1] == 0.0


def test_kl_statistics_relative_to_the_target(make):
    updates = [(0.01, 0.01), (0.015, 0.01), (0.016, 0.01), (0.04, 0.01)]
    kl = compute(make, {"a": [1.0]}, updates=updates)["environments"]["E"]["arms"]["a"]["kl"]
    assert kl["updates"] == 4
    assert kl["in_band"] == 0.5
    assert kl["above_band"] == 0.5
    assert kl["shortened"] is None  # without a ceiling
    assert kl["worst_overshoot"] == pytest.approx(4.0)
    assert kl["spread"] == pytest.approx(np.log2([1, 1.5, 1.6, 4]).std())
    without = compute(make, {"a": [1.0]}, updates=[(d, None) for d, _ in updates])["environments"]["E"]["arms"]["a"]["kl"]
    assert without["in_band"] is None
    assert without["spread"] == pytest.approx(kl["spread"])


def test_edges_of_the_band_and_quantiles(make):
    def kl_of(updates):
        return compute(make, {"a": [1.0]}, updates=updates)["environments"]["E"]["arms"]["a"]["kl"]

    assert kl_of([(kl, 0.01) for kl in (0.0066, 0.0067, 0.01, 0.015)])["in_band"] == 0.75
    kl = kl_of([(i / 100, 1.0) for i in range(101)])
    assert (kl["median"], kl["95 %"], kl["largest"]) == pytest.approx((0.5, 0.95, 1.0))


def test_random_baseline_is_the_mean_over_seeds(make):
    runs = [make((9.0,), seed=seed, random=(random,)) for seed, random in enumerate((0.0, 1.0, 5.0))]
    assert computed(runs)["environments"]["E"]["random"] == pytest.approx(2.0)


def test_environments_where_no_arm_beats_random_do_not_count_across(make):
    finals = {"E": {"a": 98.0, "b": 60.0}, "F": {"a": 98.0, "b": 60.0}, "G": {"a": 1.0, "b": 2.0}}
    runs = [
        make((final,), env=env, arm=arm, seed=seed, random=(20.0,))
        for env, of_arms in finals.items()
        for arm, final in of_arms.items()
        for seed in (0, 1)
    ]
    assert computed(runs)["across"]["environments"] == ["E", "F"]


def test_how_often_and_how_far_steps_were_shortened(make):
    updates = [(0.01, 0.01, 1.0), (0.0150001, 0.01, 0.2), (0.014, 0.01, 0.5), (0.014, 0.01, 0.4)]
    kl = compute(make, {"a": [1.0]}, updates=updates)["environments"]["E"]["arms"]["a"]["kl"]
    assert (kl["shortened"], kl["shortened_to"]) == (0.75, pytest.approx(0.4))
    assert kl["above_band"] == 0.0  # to float rounding
    untouched = [(0.01, 0.01, 1.0)]
    kl = compute(make, {"a": [1.0]}, updates=untouched)["environments"]["E"]["arms"]["a"]["kl"]
    assert (kl["shortened"], kl["shortened_to"]) == (0.0, None)


# Scores of two arms, shape (runs, environments), with ties. Below is what rliable 1.2.0, since archived, computed of them
A = np.array([[0.1, 0.7, 1.3], [0.4, 0.9, 0.2], [0.4, 1.1, 0.8], [0.9, 0.3, 1.6], [0.6, 0.8, 0.5]])
B = np.array([[0.4, 0.2, 0.8], [0.3, 0.9, 0.1], [0.7, 0.5, 1.4], [0.2, 0.6, 0.3]])


def test_aggregates_agree_with_rliable():
    names = ("iqm", "median", "mean", "optimality_gap")
    assert [AGGREGATES[name](A) for name in names] == pytest.approx([0.6666666666666666, 0.76, 0.7066666666666667, 0.36])
    assert [AGGREGATES[name](B) for name in names] == pytest.approx([0.4666666666666666, 0.55, 0.5333333333333333, 0.5])
    assert profile(A, np.array([0.25, 0.5, 1.0])) == pytest.approx([0.8666666666666667, 0.6, 0.2])
    assert probability_of_improvement(A, B) == pytest.approx(0.65)


def test_bootstrap_agrees_with_rliable(monkeypatch):
    """Its limits are those of 100,000 samples. Another seed of ours moves a limit by up to 0.005, as 20,000 samples do."""
    monkeypatch.setattr(intervals, "SAMPLES", 20_000)
    limits = {
        "iqm": [0.4666666666666667, 0.8777777777777778],
        "median": [0.48, 0.94],
        "mean": [0.5266666666666667, 0.8933333333333332],
        "optimality_gap": [0.22666666666666657, 0.5],
    }
    for name, expected in limits.items():
        assert interval(AGGREGATES[name], A)[1:] == pytest.approx(expected, abs=0.0101), name
    assert interval(probability_of_improvement, A, B)[1:] == pytest.approx([0.425, 0.8583333333333333], abs=0.0101)


def test_probability_of_improvement_of_an_arm_over_itself_is_a_half():
    assert probability_of_improvement(A, A) == pytest.approx(0.5)
    assert probability_of_improvement(A, B) + probability_of_improvement(B, A) == pytest.approx(1.0)


def test_statistics_of_many_samples_are_those_of_each():
    """The bootstrap evaluates all samples at once."""
    samples = np.random.default_rng(0).normal(size=(6, *A.shape))
    at = np.array([0.2, 0.9])
    for statistic in (*AGGREGATES.values(), *intervals.FINALS.values(), lambda scores: profile(scores, at)):
        np.testing.assert_allclose(statistic(samples), [statistic(sample) for sample in samples])
    others = np.random.default_rng(1).normal(size=(6, *B.shape))
    each = [probability_of_improvement(a, b) for a, b in zip(samples, others, strict=True)]
    np.testing.assert_allclose(probability_of_improvement(samples, others), each)


def test_intervals_of_equal_arms_rarely_leave_out_a_half():
    """
    A/A test of what is said across environments: 5 % of studies with seven environments and five seeds (51 of 1,000), within 3
    standard errors. With fewer it is more often: 11 % for a single environment.
    """
    draws = np.random.default_rng(1).normal(size=(400, 2, 5, 7))
    found = np.array([interval(probability_of_improvement, a, b) for a, b in draws])
    left_out = ((found[:, 1] > 0.5) | (found[:, 2] < 0.5)).mean()
    assert left_out == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 400))


def test_probability_of_improvement_while_learning(make):
    """Arm a learns faster on every seed, and ends worse."""
    final, learning = {"a": 1.0, "b": 2.0}, {"a": 5.0, "b": 4.0}
    runs = [
        make([final[arm]], [(100, learning[arm])], env=env, arm=arm, seed=seed)
        for env in "EF"
        for arm in "ab"
        for seed in (7, 8)
    ]
    across = computed(runs)["across"]
    assert across["probability_of_improvement"][0]["probability"][0] == 0.0
    assert across["probability_of_improvement_while_learning"][0]["probability"][0] == 1.0
    assert across["arms"]["a"]["seeds"] == 2


def test_only_seeds_that_finished_on_all_environments_count_across_them(make):
    runs = [make([2.0], env=env, seed=seed) for env, seed in (("E", 0), ("E", 1), ("F", 1), ("F", 2))]
    across = computed(runs)["across"]
    assert across["environments"] == ["E", "F"]
    assert across["arms"]["a"]["seeds"] == 1


def test_threshold_is_gymnasiums_or_90_percent_of_the_way_to_the_best_arm(make):
    of_gymnasium = compute(make, {"a": [100.0]}, threshold=42.0)["environments"]["E"]
    assert (of_gymnasium["threshold"], of_gymnasium["threshold_source"]) == (42.0, "gymnasium")
    assert compute(make, {"a": [99.0, 101.0]}, random=(20.0,))["environments"]["E"]["threshold"] == pytest.approx(92.0)


def test_median_steps_to_threshold_includes_runs_that_never_reach_it(make):
    episodes = [[(100, 1.0)], [(500, 0.0), (600, 1.0)], [(100, 0.0)]]
    runs = [make(episodes=ended, seed=seed, threshold=0.9) for seed, ended in enumerate(episodes)]
    arm = computed(runs)["environments"]["E"]["arms"]["a"]
    assert arm["reached"] == 2
    assert arm["steps_to_threshold"] == 600.0  # of 100, 600 and never
    arm = computed(runs[1:])["environments"]["E"]["arms"]["a"]
    assert arm["steps_to_threshold"] is None


def test_time_to_the_threshold_is_that_of_its_steps(make):
    """Each run takes 1 second for 1000 steps."""
    runs = [make(episodes=ended, seed=seed, threshold=0.9) for seed, ended in enumerate([[(100, 1.0)], [(100, 0.0)]])]
    plan = SimpleNamespace(seeds=2, protocol=None, families={})
    reached, never = statistics.compute(plan, runs)[1]["seconds_to_threshold"]
    assert reached == pytest.approx(0.1)
    assert np.isnan(never)


def test_statistics_contain_neither_nan_nor_timings(make):
    content = json.dumps(compute(make, {"a": [1.0, 2.0], "b": [2.0]}))
    assert "NaN" not in content
    assert "Infinity" not in content
    assert "seconds" not in content
