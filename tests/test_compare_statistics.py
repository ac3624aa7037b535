"""Statistics: learning curves, reproducible intervals, and no winner without evidence."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from sb3_adaptive_kl.compare import intervals, statistics, verdicts
from sb3_adaptive_kl.compare.intervals import AGGREGATES, interval, mean, probability_of_improvement, profile
from sb3_adaptive_kl.compare.plan import Run
from sb3_adaptive_kl.compare.sensitivity import phi
from sb3_adaptive_kl.compare.store import Result


@pytest.fixture(autouse=True)
def _fewer_samples(monkeypatch):
    monkeypatch.setattr(intervals, "SAMPLES", 1000)


@pytest.fixture
def make(tmp_path):
    """Write a finished run to disk: final returns, episodes as (time step, return), updates as (kl, target[, step scale])."""

    def make(
        final=(0.0,), episodes=((100, 1.0),), updates=(), budget=1000, threshold=None, random=(0.0,), env="E", arm="a", seed=0
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "episodes.csv").write_text("timesteps,return,length\n" + "".join(f"{t},{r},1\n" for t, r in episodes))
        rows = "".join(
            f"{i},{kl},{kl},{'' if target is None else 1.0},{target or ''}{''.join(f',{scale}' for scale in scales)}\n"
            for i, (kl, target, *scales) in enumerate(updates)
        )
        columns = "timesteps,kl,kl_max,kl_coef,target_kl" + (",step_scale" if updates and len(updates[0]) == 3 else "")
        (folder / "updates.csv").write_text(f"{columns}\n{rows}")
        summary = {
            "final_returns": list(final),
            "random_returns": list(random),
            "reward_threshold": threshold,
            "timesteps": budget,
            "seconds": 1.0,
            "machine": "here",
        }
        (folder / "run.json").write_text(json.dumps(summary))
        return Result.read(Run(env, arm, "ppo_kl", seed, {"n_timesteps": budget}, 1, (), ""), folder)

    return make


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
    assert run.area == pytest.approx(np.mean(list(curve.values())))
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


def computed(results):
    return statistics.compute(5, results)[0]


def compute(make, arms, environments=("E",), **kwargs):
    """Compute the statistics of arms given as lists of final returns, one per seed, the same on each environment."""
    results = [
        make(final=(final,), arm=arm, seed=seed, env=env, **kwargs)
        for env in environments
        for arm, finals in arms.items()
        for seed, final in enumerate(finals)
    ]
    return computed(results)


def pair(make, a, b):
    (comparison,) = compute(make, {"a": a, "b": b})["environments"]["E"]["pairs"]
    return comparison["final"]


def test_winner_requires_a_clear_difference(make):
    assert pair(make, [10, 11, 12, 13, 14], [1, 2, 4, 3, 5])["winner"] == "a"
    assert pair(make, [1, 2, 4, 3, 5], [10, 11, 12, 13, 14])["winner"] == "b"
    assert pair(make, [1, 2, 3, 4, 5], [2, 1, 4, 3, 5])["winner"] is None
    assert pair(make, [5, 5, 5, 5, 5], [5, 5, 5, 5, 5])["winner"] is None
    assert pair(make, [6, 6, 6, 6, 6], [5, 5, 5, 5, 5])["winner"] == "a"
    assert pair(make, [100, 101], [1, 2])["winner"] is None  # never with two seeds
    # The bootstrap of three seeds stays within their range: on its own it would call a winner here
    close = pair(make, [2.0, 9.0, 4.0], [1.0, 1.0, 1.0])
    assert close["mean"][1] > 0 > close["student"][0]
    assert close["winner"] is None


def winners(*differences):
    """Winners of comparisons of the same kind between the arms a and b, from the differences of their seeds."""
    entries = [verdicts.difference(pd.Series(values)) for values in differences]
    verdicts.call_winners([(["a", "b"], entry) for entry in entries])
    return [entry and entry["winner"] for entry in entries]


def test_winner_requires_both_intervals_to_exclude_zero(monkeypatch):
    """The bootstrap's, which is given here, and Student's, which does where the p value is small."""
    for bootstrap, differences, winner in (
        ([1.0, 0.5, 1.5], [1.0, 1.1, 0.9], "a"),
        ([1.0, -0.5, 1.5], [1.0, 1.1, 0.9], None),
        ([4.0, 0.5, 7.5], [1.0, 8.0, 3.0], None),
    ):
        monkeypatch.setattr(verdicts, "interval", lambda *_, bootstrap=bootstrap: bootstrap)
        low, high = verdicts.student(differences)
        assert (low > 0 or high < 0) == (differences != [1.0, 8.0, 3.0])
        assert winners(differences) == [winner]


def test_winner_survives_the_correction_for_the_number_of_comparisons():
    clear, close, nothing = [1.0, 1.1, 0.9, 1.0, 1.05], [1.0, 2.0, 0.5, 1.5, 0.2], [1.0, -1.0, 0.5, -0.5, 0.1]
    assert winners(close) == ["a"]
    assert winners(close, nothing) == [None, None]
    assert winners(close, clear) == ["a", "a"]  # Holm's method divides by fewer after each one shown
    assert winners([-x for x in clear], nothing, nothing) == ["b", None, None]
    assert winners(close, [], [1.0], [1.0, 2.0]) == ["a", None, None, None]  # what is never shown is not a comparison


def test_comparisons_of_all_environments_are_corrected_together_and_by_kind(make):
    """b − a is the same everywhere: twice the p value with two environments, and the areas do not differ at all."""
    arms = {"a": [1.0, 2.0, 3.0, 4.0], "b": [2.0, 3.1, 3.9, 5.0]}
    for environments in ("E", "EF"):
        statistics = compute(make, arms, environments)
        assert statistics["comparisons"] == {"final": len(environments), "area": len(environments)}
        (pair,) = statistics["environments"]["E"]["pairs"]
        assert pair["final"]["p_holm"] == pytest.approx(len(environments) * pair["final"]["p"])
        assert pair["area"]["p_holm"] == 1.0


def test_p_value_of_three_seeds_has_a_closed_form():
    """With 2 degrees of freedom, p = 1 − t / √(t² + 2); for 1, 2, 3, t = 2√3."""
    for sign in (1, -1):
        entry = verdicts.difference(sign * pd.Series([1.0, 2.0, 3.0]))
        assert entry["p"] == pytest.approx(1 - np.sqrt(12 / 14))


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
    assert verdicts.detectable(2) is None


@pytest.mark.parametrize("n_environments", [1, 7])
@pytest.mark.parametrize("distribution", ["normal", "exponential", "lognormal"])
def test_equal_arms_are_rarely_called_better(distribution, n_environments):
    """
    A/A test: 1,000 studies of three equal arms with 5 seeds. At most 5 % of them call any arm better.

    Without the intervals, which can only take a verdict away: an upper bound.
    """
    returns = getattr(np.random.default_rng(0), distribution)(size=(1000, n_environments, 3, 5))
    p = scipy.stats.ttest_1samp(returns - np.roll(returns, 1, axis=2), 0, axis=3).pvalue.reshape(1000, -1)
    assert (p <= 0.05).any(axis=1).mean() > 0.05  # without the correction
    n_called = 0
    for study in p:
        entries = [{"p": value, "mean": [1.0] * 3, "student": [1.0] * 2} for value in study]
        assert verdicts.call_winners([(["a", "b"], entry) for entry in entries]) == 3 * n_environments
        n_called += any(entry["winner"] for entry in entries)
    assert n_called <= 50


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
    assert kl["shortened"] is None  # not recorded, as in studies of 0.1.0
    assert kl["worst_overshoot"] == pytest.approx(4.0)
    assert kl["spread"] == pytest.approx(np.log2([1, 1.5, 1.6, 4]).std())
    without = compute(make, {"a": [1.0]}, updates=[(d, None) for d, _ in updates])["environments"]["E"]["arms"]["a"]["kl"]
    assert without["in_band"] is None
    assert without["spread"] == pytest.approx(kl["spread"])


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
    assert compute(make, {"a": [100.0]}, threshold=42.0)["environments"]["E"]["threshold"] == 42.0
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
    reached, never = statistics.compute(5, runs)[1]["seconds_to_threshold"]
    assert reached == pytest.approx(0.1)
    assert np.isnan(never)


def test_statistics_contain_neither_nan_nor_timings(make):
    content = json.dumps(compute(make, {"a": [1.0, 2.0], "b": [2.0]}))
    assert "NaN" not in content
    assert "Infinity" not in content
    assert "seconds" not in content


def paper_scores(results):
    return statistics.compute(5, results, protocol="ppo-paper")[0]["protocol"]


def test_scores_of_the_papers_protocol(make):
    """The last 100 of 150 episodes count. In E, random is 10, the best run 50 and the best setting 40."""
    returns = {("E", "a"): (30.0, 50.0), ("E", "b"): (20.0, 20.0), ("F", "a"): (0.0, 0.0), ("F", "b"): (1.0, 2.0)}
    runs = [
        make(
            episodes=[(t, -999.0) for t in range(50)] + [(t, value) for t in range(50, 150)],
            env=env,
            arm=arm,
            seed=seed,
            random=(10.0,) if env == "E" else (0.0,),
        )
        for (env, arm), values in returns.items()
        for seed, value in enumerate(values)
    ]
    scores = paper_scores(runs)
    assert scores["environments"]["E"] == {"random": 10.0, "best_run": 50.0, "best_setting": 40.0}
    assert scores["arms"]["a"]["runs"] == 4
    assert scores["arms"]["a"]["best_run"][0] == pytest.approx((20 / 40 + 40 / 40 + 0 + 0) / 4)
    assert scores["arms"]["a"]["best_setting"][0] == pytest.approx((20 / 30 + 40 / 30 + 0 + 0) / 4)
    assert scores["arms"]["b"]["best_run"][0] == pytest.approx((10 / 40 + 10 / 40 + 1 / 2 + 2 / 2) / 4)
    assert scores["arms"]["b"]["best_setting"][0] == pytest.approx((10 / 30 + 10 / 30 + 1 / 1.5 + 2 / 1.5) / 4)
    # Of four runs in two strata, the mean moves by the two runs of F alone
    assert scores["arms"]["b"]["best_run"][1:] == pytest.approx([(0.5 + 2 / 2) / 4, (0.5 + 4 / 2) / 4])
    assert computed(runs)["protocol"] is None  # by default


def test_papers_scores_do_not_depend_on_the_scale_of_the_returns(make):
    values = np.random.default_rng(0).normal(size=(2, 3))

    def scores(scale, offset):
        transformed = scale * values + offset
        return paper_scores(
            [
                make(episodes=[(1, transformed[i, seed])], arm=arm, seed=seed, random=(offset - 9 * scale,))
                for i, arm in enumerate("ab")
                for seed in range(3)
            ]
        )["arms"]

    for arm, entry in scores(1, 0).items():
        assert entry["best_run"] == pytest.approx(scores(1000, -77)[arm]["best_run"])


def test_papers_scores_leave_out_environments_where_no_arm_beats_random(make):
    runs = [make(episodes=[(1, 1.0)], env=env, random=(zero,)) for env, zero in (("E", 0.0), ("F", 1.0), ("G", 2.0))]
    scores = paper_scores(runs)
    assert list(scores["environments"]) == ["E"]
    assert scores["arms"]["a"]["runs"] == 1
    assert paper_scores(runs[1:])["arms"] == {}
    assert paper_scores([make(episodes=())])["arms"] == {}
    assert paper_scores([]) is None


FAMILIES = {"a": {1.0: "a1", 2.0: "a2"}, "b": {1.0: "b1", 2.0: "b2"}}


def swept(make, returns):
    """Statistics of a sweep of two values with two seeds, from environment → arm → return."""
    runs = [
        make(final=(final + noise,), env=env, arm=arm, seed=seed)
        for env, arms in returns.items()
        for arm, final in arms.items()
        for seed, noise in enumerate((-0.01, 0.01))
    ]
    return statistics.compute(2, runs, families=FAMILIES)[0]


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
    assert found["sensitivity"]["families"]["b"]["values"] == [1.0]  # b2 has not finished


def test_sensitivity_needs_an_environment_where_some_arm_beats_random(make):
    assert swept(make, {"E": {"a1": -1.0, "a2": -2.0}})["sensitivity"]["families"] == {}
    assert compute(make, {"a1": [1.0, 1.0]})["sensitivity"] is None  # without a sweep
