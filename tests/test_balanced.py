"""The second actuator: what the KL buys, and the learning rate that follows it."""

import math
import warnings

import pytest
import torch as th

from sb3_adaptive_kl import AdaptiveKLPPO, BalancedLearningRate, RecurrentAdaptiveKLPPO, objective
from sb3_adaptive_kl.arguments import settings_at
from sb3_adaptive_kl.metrics import UpdateMetrics
from sb3_adaptive_kl.objective import MinibatchMetrics
from tests import test_recurrent
from tests.conftest import CASES, NEEDS_COMPILER, collect, logged

BALANCED = {"learning_rate_rule": "balanced", "kl_rule": "predictive", "n_steps": 256, "batch_size": 32, "n_epochs": 4}


@pytest.mark.parametrize(
    ("kl", "balance", "expected"),
    [
        (0.01, 0.99, 1 / 1.5),
        (0.01, 1.0, 1.0),  # within the range nothing moves
        (0.01, 3.0, 1.0),
        (0.01, 3.01, 1.3),
        (0.01, -5.0, 1 / 1.5),  # the surrogate was lost
        (0.01, math.inf, 1.3),  # there was no penalty
        (0.0067, 0.99, 1 / 1.5),
        (0.0066, 0.99, 1.0),  # the KL is below its band, so none of it needs to be saved
        (1e-6, -100.0, 1.3),  # next to no KL: it measures nothing
        (math.inf, 10.0, 1 / 1.5),  # undone
        (0.01, math.nan, 1.0),
        (math.inf, math.nan, 1 / 1.5),
    ],
)
def test_balanced_rule(kl, balance, expected):
    assert BalancedLearningRate()(1.0, kl, 0.01, balance) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kl", "balance", "expected"), [(0.01, 0.49, 0.5), (0.01, 0.5, 1.0), (0.01, 100.0, 1.0), (0.0066, 0.49, 1.0)]
)
def test_balanced_rule_within_an_update_only_lowers(kl, balance, expected):
    assert BalancedLearningRate(decrease_within=2.0).within_update(1.0, kl, 0.01, balance) == expected


def update_of(gradient, steps, settings, kl_at_rest=0.0):
    """An update of one parameter, whose surrogate is g·Δ and whose KL is Δ²/2."""
    metrics = UpdateMetrics()
    for step in steps:
        kl = th.tensor(kl_at_rest + step**2 / 2)
        kl_loss = objective.penalty_loss(kl, settings.kl_coef, settings.kl_cutoff_coef, objective.CUTOFF * settings.target_kl)
        zero = th.tensor(0.0)
        parts = MinibatchMetrics(zero, th.tensor(-gradient * step), zero, zero, kl_loss, kl, kl, zero)
        metrics.add(th.stack(parts), th.tensor(1.0))
    return metrics


@pytest.fixture
def settings():
    return settings_at(CASES["box"].build(AdaptiveKLPPO, init_kl_coef=0.7, target_kl=0.01), 1.0)


def test_balance_is_the_gain_over_twice_the_penalty(settings):
    """Of the optimum of g·Δ − β/2 Δ², which is Δ = g/β: a gain of g²/β and a penalty of half of it."""
    optimum = 0.3 / 0.7
    metrics = update_of(0.3, (0.0, optimum / 2, optimum), settings)
    assert metrics.balance(settings, slice(2, 3)) == pytest.approx(1.0)
    assert metrics.balance(settings, slice(1, 3)) == pytest.approx((0.5 + 1) / (0.25 + 1))
    assert metrics.balance(settings) == pytest.approx(2.0)  # half way there
    assert metrics.balance(settings, slice(0, 1)) == math.inf


@pytest.mark.parametrize("kl_over_cutoff", [0.5, 1.1, 3.0])
def test_balance_is_1_where_a_hinge_holds_the_kl(settings, kl_over_cutoff):
    settings = settings._replace(kl_cutoff_coef=1000.0)
    cutoff = objective.CUTOFF * settings.target_kl
    optimum = math.sqrt(2 * kl_over_cutoff * cutoff)
    gradient = optimum * (0.7 + 2 * 1000 * max(kl_over_cutoff - 1, 0) * cutoff)  # what the penalty's has to be
    assert update_of(gradient, (0.0, optimum), settings).balance(settings) == pytest.approx(1.0, rel=1e-4)


def test_no_gain_is_owed_for_the_kl_at_rest(settings):
    """Dropout and batch normalization add to the KL of every minibatch."""
    metrics = update_of(0.3, (0.0, 0.3 / 0.7), settings, kl_at_rest=0.1)
    assert metrics.balance(settings) == pytest.approx(1.0)


def test_balance_of_a_diverged_update_is_unknown(settings):
    assert math.isnan(update_of(0.3, (0.0, math.nan), settings).balance(settings))


def test_the_way_back_to_a_reference_policy_is_not_noise():
    """It costs KL, and gains nothing in the surrogate."""
    reference = CASES["box"].build(AdaptiveKLPPO).policy
    with th.no_grad():
        reference.action_net.bias += 3.0
    model = CASES["box"].build(AdaptiveKLPPO, learning_rate=3e-3, reference_policy=reference, target_kl=0.01, **BALANCED)
    model.learn(256)
    assert logged(model)["kl"] > 0.01 / 1.5
    assert math.isnan(logged(model)["balance"])
    assert model.learning_rate_scale == 1


def test_balance_of_a_single_minibatch_is_unknown_and_moves_nothing():
    model = CASES["box"].build(AdaptiveKLPPO, **{**BALANCED, "batch_size": 256, "n_epochs": 1}).learn(256)
    assert math.isnan(logged(model)["balance"])
    assert model.learning_rate_scale == 1


def test_within_an_update_that_diverges_it_falls():
    assert BalancedLearningRate().within_update(1.15, math.inf, 0.01, -1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "wrong",
    [{"low": 3.1}, {"high": math.inf}, {"increase": 1.0}, {"decrease": 0.5}, {"decrease_within": 0.9}, {"lowest": 2.0}],
)
def test_invalid_numbers_of_the_balanced_rule_are_rejected(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BalancedLearningRate(**wrong)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("learning_rate", "direction"), [(0.03, -1), (1e-6, 1)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_COMPILER)])
def test_balanced_learning_rate_goes_where_the_kl_buys_what_it_should(learning_rate, direction, compiled):
    model = CASES["box"].build(AdaptiveKLPPO, learning_rate=learning_rate, compile=compiled, **BALANCED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # β reaches its bounds on the way
        model.learn(8 * 256)
    assert direction * math.log(model.learning_rate_scale) > math.log(1.3**3)


def test_balanced_learning_rate_reacts_within_the_first_update():
    model = collect(CASES["box"].build(AdaptiveKLPPO, learning_rate=0.03, **BALANCED))
    model.train()
    used = model.policy.optimizer.param_groups[0]["lr"]
    assert used < 0.03 / 1.15
    assert logged(model)["learning_rate"] == used
    n_lowered = math.log(logged(model)["learning_rate_scale"]) / math.log(1 / 1.15)
    assert n_lowered == pytest.approx(round(n_lowered))
    # After it, once more
    assert logged(model)["balance"] < 1
    assert model.learning_rate_scale == pytest.approx(used / 0.03 / 1.5)


def test_after_an_undone_update_the_logged_learning_rate_is_the_schedules_times_the_factor(monkeypatch):
    monkeypatch.setattr(UpdateMetrics, "finite", lambda metrics: False)
    model = collect(CASES["box"].build(AdaptiveKLPPO, learning_rate=0.03, **BALANCED))
    with pytest.warns(UserWarning, match=r"undone.*learning_rate=0.0[012]\d* is too high"):
        model.train()
    assert logged(model)["learning_rate_scale"] < 1 / 1.15**1.5  # lowered more than once before it was undone
    assert logged(model)["learning_rate"] == pytest.approx(0.03 * logged(model)["learning_rate_scale"])
    assert model.learning_rate_scale == pytest.approx(logged(model)["learning_rate_scale"] / 1.5)


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_balanced_learning_rate_needs_a_surrogate_that_begins_at_0():
    with pytest.raises(
        ValueError, match=r"learning_rate_rule='balanced' .* normalize_advantage=True.* learning_rate_rule=None$"
    ):
        CASES["box"].build(AdaptiveKLPPO, normalize_advantage=False, **BALANCED)
    with pytest.raises(ValueError, match=r"batch_size=21 leaves 1 of n_steps \* n_envs = 64 .* change batch_size or n_steps$"):
        CASES["box"].build(AdaptiveKLPPO, **{**BALANCED, "n_steps": 64, "batch_size": 21})
    model = CASES["box"].build(AdaptiveKLPPO, **BALANCED)
    model.batch_size = 51  # by a callback
    with pytest.raises(ValueError, match=r"batch_size=51 leaves 1 of n_steps \* n_envs = 256 "):
        model.learn(256)


def test_balanced_model_is_loaded_without_environments(tmp_path):
    """To act. Its minibatches are not known then."""
    case = test_recurrent.CASES["box"]
    case.build(RecurrentAdaptiveKLPPO, **{**BALANCED, "n_steps": 64, "batch_size": None}).save(tmp_path / "model")
    assert RecurrentAdaptiveKLPPO.load(tmp_path / "model").learning_rate_rule == "balanced"
