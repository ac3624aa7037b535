"""The learning rate that follows the KL: its rule, its bounds, and what it does to the user's schedule."""

import math

import pytest
import torch as th
from stable_baselines3.common.utils import LinearSchedule

from sb3_adaptive_kl import AdaptiveKLPPO, AdaptiveLearningRate, objective
from tests.conftest import CASES, collect, logged

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


@pytest.mark.parametrize(
    ("scale", "kl", "expected"),
    [
        (1.0, 0.021, 1 / 1.5),
        (1.0, 0.02, 1.0),  # at the edges of the band nothing moves
        (1.0, 0.005, 1.0),
        (1.0, 0.0049, 1.5),
        (1.0, math.inf, 1 / 1.5),
        (0.012, 1.0, 0.01),
        (9.0, 0.0, 10.0),
    ],
)
def test_rule(scale, kl, expected):
    assert AdaptiveLearningRate()(scale, kl, 0.01) == pytest.approx(expected)


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
    ],
)
def test_invalid_numbers_are_rejected(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AdaptiveLearningRate(**wrong)


def test_it_multiplies_the_users_schedule():
    model = CASES["box"].build(
        AdaptiveKLPPO, learning_rate=LinearSchedule(3e-3, 1e-3, 1.0), learning_rate_rule="adaptive", target_kl=10, **SMALL
    )
    model.learn(2 * 64)  # the second update is at the schedule's end; far below the target: × 1.5 after the first
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 1.5)
    assert logged(model)["learning_rate"] == pytest.approx(1e-3 * 1.5)
    assert logged(model)["learning_rate_scale"] == pytest.approx(1.5)
    assert model.learning_rate_scale == pytest.approx(1.5**2)


def test_it_is_saved_and_continued(tmp_path):
    model = CASES["box"].build(AdaptiveKLPPO, learning_rate_rule="adaptive", target_kl=10, **SMALL).learn(64)
    model.save(tmp_path / "model")
    loaded = AdaptiveKLPPO.load(tmp_path / "model", env=CASES["box"].make_env())
    assert loaded.learning_rate_scale == pytest.approx(1.5)
    loaded.learn(64, reset_num_timesteps=False)
    assert logged(loaded)["learning_rate"] == pytest.approx(3e-4 * 1.5)


def test_without_a_rule_nothing_is_logged_or_changed():
    model = CASES["box"].build(AdaptiveKLPPO, **SMALL).learn(2 * 64)
    assert "learning_rate_scale" not in logged(model)
    assert model.policy.optimizer.param_groups[0]["lr"] == 3e-4


def test_an_update_that_was_undone_lowers_it(monkeypatch):
    monkeypatch.setattr(objective, "surrogate_loss", lambda advantages, ratio, clip_range: ratio.mean() * th.nan)
    model = collect(CASES["box"].build(AdaptiveKLPPO, learning_rate_rule="adaptive", **SMALL))
    with pytest.warns(UserWarning, match="undone"):
        model.train()
    assert model.learning_rate_scale == pytest.approx(1 / 1.5)


def test_it_sees_the_whole_step():
    """After a step back to at most 1.5 times the target, the learning rate would never be lowered."""
    kwargs = {"learning_rate": 0.03, "target_kl": 1e-3, "kl_ceiling": 1.5, "learning_rate_rule": "adaptive"}
    model = collect(CASES["box"].build(AdaptiveKLPPO, **kwargs, **SMALL))
    model.train()
    assert logged(model)["kl"] <= 1.5e-3 < 2e-3 < logged(model)["kl_raw"]
    assert model.learning_rate_scale == pytest.approx(1 / 1.5)


def test_every_group_of_the_optimizer_is_scaled():
    model = collect(CASES["box"].build(AdaptiveKLPPO, learning_rate_rule="adaptive", **SMALL))
    model.policy.optimizer.add_param_group({"params": [th.nn.Parameter(th.zeros(1))]})
    model.learning_rate_scale = 0.5
    model._update_learning_rate(model.policy.optimizer)
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == [1.5e-4, 1.5e-4]


def test_a_factor_is_forgotten_without_its_rule():
    model = collect(CASES["box"].build(AdaptiveKLPPO, learning_rate_rule="adaptive", **SMALL))
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
    def broken(scale, kl, target_kl):
        return returned

    model = collect(CASES["box"].build(AdaptiveKLPPO, learning_rate_rule=broken, **SMALL))
    with pytest.raises(ValueError, match=r"learning_rate_rule=.*broken.* must return a positive number"):
        model.train()


def test_users_rule_is_told_what_an_infinite_kl_means(monkeypatch):
    monkeypatch.setattr(objective, "surrogate_loss", lambda advantages, ratio, clip_range: ratio.mean() * th.nan)

    def rule(scale, kl, target_kl):
        return scale * (target_kl / kl) ** 0.5

    model = collect(CASES["box"].build(AdaptiveKLPPO, learning_rate_rule=rule, **SMALL))
    with pytest.raises(ValueError, match=r"returned 0.0 for kl=inf: .* also for inf, which stands for an undone update"):
        model.train()
