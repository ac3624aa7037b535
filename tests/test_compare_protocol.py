"""Scores by the protocol of PPO's paper."""

import numpy as np
import pytest

from tests.compare_results import computed

pytestmark = pytest.mark.usefixtures("fewer_samples")


def paper_scores(results):
    return computed(results, protocol="ppo-paper")["protocol"]


def test_scores_of_the_papers_protocol(make):
    """The last 100 of 150 episodes count. In E, random is 10, the best run 50 and the best setting 40."""
    returns = {("E", "a"): (30.0, 50.0), ("E", "b"): (20.0, 20.0), ("F", "a"): (0.0, 0.0), ("F", "b"): (1.0, 2.0)}
    runs = [
        make(
            episodes=[(t, -999.0) for t in range(50)] + [(t, value) for t in range(50, 150)],
            env=env,
            arm=arm,
            seed=seed,
            random=(8.0 + 4.0 * seed,) if env == "E" else (0.0,),
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
