"""A factor of the learning rate: its rules, its limits, and what it does to the user's schedule."""

import math
import warnings

import pytest
import torch as th
from stable_baselines3.common.utils import LinearSchedule

from sb3_adaptive_kl import AdaptiveKLPPO, AdaptiveLearningRate, BalancedLearningRate, LearningRateRule, objective
from sb3_adaptive_kl.control import PATIENCE_AT_BOUND, warn_at_limit
from sb3_adaptive_kl.learning_rate import FunctionLearningRate, limited
from sb3_adaptive_kl.metrics import UpdateMetrics
from sb3_adaptive_kl.objective import MinibatchMetrics
from tests.conftest import CASES, collect, logged

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}
ADAPTIVE = {"learning_rate_rule": "adaptive", "kl_rule": "fixed", **SMALL}
BALANCED = {"learning_rate_rule": "balanced", "kl_rule": "predictive", "n_steps": 256, "batch_size": 32, "n_epochs": 4}


@pytest.mark.parametrize(
    ("scale", "kl", "expected"),
    [
        (1.0, 0.021, 1 / 1.5),
        (1.0, 0.02, 1.0),  # at the edges of the band nothing moves
        (1.0, 0.005, 1.0),
        (1.0, 0.0049, 1.5),
        (1.0, math.inf, 1 / 1.5),
    ],
)
def test_rule(scale, kl, expected):
    assert AdaptiveLearningRate()(scale, kl, 0.01, 1.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rule", "scale", "kl", "balance", "expected"),
    [
        (AdaptiveLearningRate(), 0.012, 1.0, 1.0, (0.01, -1)),
        (AdaptiveLearningRate(), 9.0, 0.0, 1.0, (10.0, 1)),
        (AdaptiveLearningRate(), 9.0, 0.01, 1.0, (9.0, 0)),
        (BalancedLearningRate(), 1.2e-3, 0.01, 0.1, (1e-3, -1)),
        (BalancedLearningRate(), 9.0, 0.01, 10.0, (10.0, 1)),
        (FunctionLearningRate(lambda *_: 1e6), 1.0, 0.01, 1.0, (1e6, 0)),
    ],
)
def test_the_factor_is_kept_within_the_rules_limits(rule, scale, kl, balance, expected):
    assert limited(rule, rule(scale, kl, 0.01, balance), kl) == expected


@pytest.mark.parametrize(("sign", "expected"), [(1, "highest value 10 for"), (-1, "lowest value 10 for")])
def test_warns_once_at_a_limit(sign, expected):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count in range(1, 2 * PATIENCE_AT_BOUND):
            warn_at_limit(sign * count, 10.0, 3e-3)
    (warning,) = caught
    assert expected in str(warning.message)
    assert "learning_rate=0.003" in str(warning.message)
    assert ("while a schedule takes learning_rate to 0" in str(warning.message)) == (sign > 0)


@pytest.mark.parametrize(("clip_range", "warns"), [(None, True), ("outliers", False)])
def test_a_factor_that_stays_at_its_limit_is_told_unless_the_clip_ends_the_updates(clip_range, warns, monkeypatch):
    monkeypatch.setattr(UpdateMetrics, "clip_fraction", lambda metrics: 0.0 if clip_range is None else 0.02)
    rule = BalancedLearningRate(high=2.0, highest=1.0)
    model = CASES["box"].build(
        AdaptiveKLPPO, learning_rate=1e-5, clip_range=clip_range, **{**BALANCED, "learning_rate_rule": rule}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn((PATIENCE_AT_BOUND + 3) * 256)
    told = [warning for warning in caught if "learning_rate_scale has been at its highest value 1 " in str(warning.message)]
    assert len(told) == warns


@pytest.mark.parametrize(
    "wrong",
    [
        {"factor": 1.0},
        {"factor": math.nan},
        {"low": 1.1},
        {"high": 0.9},
        {"lowest": 0.0},
        {"lowest": 2.0},
        {"highest": math.inf},
        {"highest": 0.5},
    ],
)
def test_invalid_numbers_are_rejected(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AdaptiveLearningRate(**wrong)


def test_it_multiplies_the_users_schedule():
    model = CASES["box"].build(AdaptiveKLPPO, learning_rate=LinearSchedule(3e-3, 1e-3, 1.0), target_kl=10, **ADAPTIVE)
    model.learn(2 * 64)  # the second update is at the schedule's end; far below the target: × 1.5 after the first
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 1.5)
    assert logged(model)["learning_rate"] == pytest.approx(1e-3 * 1.5)
    assert logged(model)["learning_rate_scale"] == pytest.approx(1.5)
    assert model.learning_rate_scale == pytest.approx(1.5**2)


def test_it_is_saved_and_continued(tmp_path):
    model = CASES["box"].build(AdaptiveKLPPO, target_kl=10, **ADAPTIVE).learn(64)
    model.save(tmp_path / "model")
    loaded = AdaptiveKLPPO.load(tmp_path / "model", env=CASES["box"].make_env())
    assert loaded.learning_rate_scale == pytest.approx(1.5)
    loaded.learn(64, reset_num_timesteps=False)
    assert logged(loaded)["learning_rate"] == pytest.approx(3e-4 * 1.5)
    numbers = {"learning_rate": 1e-4, "learning_rate_scale": 1.0}  # another rate, from which it begins anew
    loaded = AdaptiveKLPPO.load(tmp_path / "model", env=CASES["box"].make_env(), **numbers)
    loaded.learn(64, reset_num_timesteps=False)
    assert logged(loaded)["learning_rate"] == pytest.approx(1e-4)


def test_without_a_rule_nothing_is_logged_or_changed():
    model = CASES["box"].build(AdaptiveKLPPO, **SMALL).learn(2 * 64)
    assert "learning_rate_scale" not in logged(model)
    assert model.policy.optimizer.param_groups[0]["lr"] == 3e-4


def test_an_update_that_was_undone_lowers_it(monkeypatch):
    monkeypatch.setattr(objective, "surrogate_loss", lambda advantages, ratio, clip_range: ratio.mean() * th.nan)
    model = collect(CASES["box"].build(AdaptiveKLPPO, **ADAPTIVE))
    with pytest.warns(UserWarning, match="undone"):
        model.train()
    assert model.learning_rate_scale == pytest.approx(1 / 1.5)


def test_it_sees_the_whole_step():
    """After a step back to at most 1.5 times the target, the learning rate would never be lowered."""
    kwargs = {"learning_rate": 0.03, "target_kl": 1e-3, "kl_ceiling": 1.5}
    model = collect(CASES["box"].build(AdaptiveKLPPO, **kwargs, **ADAPTIVE))
    model.train()
    assert logged(model)["kl"] <= 1.5e-3 < 2e-3 < logged(model)["kl_raw"]
    assert model.learning_rate_scale == pytest.approx(1 / 1.5)


def test_every_group_of_the_optimizer_is_scaled():
    model = collect(CASES["box"].build(AdaptiveKLPPO, **ADAPTIVE))
    model.policy.optimizer.add_param_group({"params": [th.nn.Parameter(th.zeros(1))]})
    model.learning_rate_scale = 0.5
    model._update_learning_rate(model.policy.optimizer)
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == [1.5e-4, 1.5e-4]


def test_a_factor_is_forgotten_without_its_rule():
    model = collect(CASES["box"].build(AdaptiveKLPPO, **ADAPTIVE))
    model.learning_rate_scale, model.learning_rate_rule = 0.5, None
    model.train()
    assert model.policy.optimizer.param_groups[0]["lr"] == 3e-4


def test_saved_factor_must_be_positive(tmp_path):
    CASES["box"].build(AdaptiveKLPPO, **SMALL).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"learning_rate_scale=-1.0 must be .*> 0"):
        AdaptiveKLPPO.load(tmp_path / "model", learning_rate_scale=-1.0)


def test_instead_of_the_penalty():
    """As in rsl_rl: clipping, a penalty too small to matter, and a learning rate that is lowered until the KL fits."""
    model = CASES["box"].build(
        AdaptiveKLPPO,
        learning_rate=0.3,
        learning_rate_rule="adaptive",
        kl_rule="fixed",
        init_kl_coef=1e-6,
        kl_coef_bounds=(1e-6, 1.0),
        clip_range=0.2,
        **SMALL,
    )
    model.learn(10 * 64)
    assert model.learning_rate_scale < 1
    assert model.kl_coef == 1e-6


@pytest.mark.parametrize("returned", [0.0, -1.0, math.nan, math.inf, None])
def test_users_rule_that_returns_no_factor_is_named(returned):
    def broken(scale, kl, target_kl, balance):
        return returned

    model = collect(CASES["box"].build(AdaptiveKLPPO, learning_rate_rule=broken, **SMALL))
    with pytest.raises(ValueError, match=r"learning_rate_rule=.*broken.* must return a positive number"):
        model.train()


def test_users_rule_is_told_what_an_infinite_kl_means(monkeypatch):
    monkeypatch.setattr(objective, "surrogate_loss", lambda advantages, ratio, clip_range: ratio.mean() * th.nan)

    def rule(scale, kl, target_kl, balance):
        return scale * (target_kl / kl) ** 0.5

    model = collect(CASES["box"].build(AdaptiveKLPPO, learning_rate_rule=rule, **SMALL))
    with pytest.raises(ValueError, match=r"returned 0.0 for kl=inf: .* also for inf, which stands for an undone update"):
        model.train()


@pytest.mark.parametrize("rule", ["adaptive", "balanced"])
def test_a_target_of_0_says_nothing_about_the_learning_rate(rule):
    """Compared with it, any step would be too long."""
    kwargs = {**BALANCED, "learning_rate_rule": rule, "kl_rule": "fixed", "init_kl_coef": 32.0}
    model = collect(CASES["box"].build(AdaptiveKLPPO, learning_rate=0.03, target_kl=LinearSchedule(0.02, 0.0, 1.0), **kwargs))
    assert model._current_progress_remaining == 0
    model.train()
    assert model.learning_rate_scale == 1


def test_kl_within_an_update_is_what_a_rule_may_expect():
    metrics = UpdateMetrics()
    for kl in (1e-3, 0.011, 0.031, 1e-4, math.nan):
        parts = dict.fromkeys(MinibatchMetrics._fields, th.tensor(0.0))
        metrics.add(th.stack(MinibatchMetrics(**{**parts, "kl": th.tensor(kl)})), th.tensor(1.0))
    assert metrics.kl(slice(1, 3)) == pytest.approx(0.02)  # beyond that of the first
    assert metrics.kl(slice(3, 4)) == 0
    assert metrics.kl(slice(2, 5)) == math.inf


def test_two_controllers_of_one_error_are_told():
    with pytest.warns(UserWarning, match=r"learning_rate_rule='adaptive' and kl_rule answer the same error"):
        CASES["box"].build(AdaptiveKLPPO, learning_rate_rule="adaptive", **SMALL)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ({"kl_coef_bounds": (0.5, 2.0)}, "upper bound 2 for 10"),
        ({"kl_rule": "fixed", "learning_rate_rule": AdaptiveLearningRate(lowest=1.0)}, "lowest value 1 for 10"),
    ],
)
def test_the_bounds_of_steps_that_are_too_long_are_told_where_a_clip_acts(bound, message):
    """The clip ends updates below the target, and not above."""
    kwargs = {"clip_range": 0.2, "learning_rate": 0.1, "target_kl": 1e-4, **bound, **SMALL}
    with pytest.warns(UserWarning, match=message):
        CASES["box"].build(AdaptiveKLPPO, **kwargs).learn((PATIENCE_AT_BOUND + 2) * 64)


def test_clip_fraction_is_the_mean_over_minibatches():
    metrics = UpdateMetrics()
    for clipped in (0.03, 0.0):
        metrics.add(th.tensor([0.0] * 7 + [clipped]), th.tensor(1.0))
    assert metrics.clip_fraction() == pytest.approx(0.015)


def test_the_balance_within_an_update_is_that_of_a_segment(monkeypatch):
    seen = []

    def balance(metrics, settings, minibatches=None):
        seen.append(minibatches)
        return math.nan

    monkeypatch.setattr(UpdateMetrics, "balance", balance)
    collect(CASES["box"].build(AdaptiveKLPPO, **BALANCED)).train()
    *within, logged_one, of_the_update = seen
    assert within
    assert None not in within
    assert [logged_one, of_the_update] == [None, None]


class Broken(LearningRateRule):
    def __call__(self, scale, kl, target_kl, balance):
        return scale

    def within_update(self, scale, kl, target_kl, balance):
        return 0.0


class Falling(Broken):
    lowest = 0.5

    def within_update(self, scale, kl, target_kl, balance):
        return 1e-9


def test_the_factor_is_kept_within_the_rules_limits_during_an_update():
    model = collect(CASES["box"].build(AdaptiveKLPPO, **{**BALANCED, "learning_rate_rule": Falling()}))
    model.policy.optimizer.add_param_group({"params": [th.nn.Parameter(th.zeros(1))]})
    model.train()
    # Of the last step; the factor itself is limited once more after the update
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == pytest.approx([0.5 * 3e-4] * 2)


def test_users_rule_that_returns_no_factor_within_an_update_is_named():
    model = collect(CASES["box"].build(AdaptiveKLPPO, **{**BALANCED, "learning_rate_rule": Broken()}))
    with pytest.raises(ValueError, match=r"learning_rate_rule=.*Broken.* returned 0.0 for kl="):
        model.train()
