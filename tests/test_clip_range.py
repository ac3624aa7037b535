"""Clip ranges and KL targets that mean the same step."""

import math

import pytest
import torch as th
from stable_baselines3.common.utils import LinearSchedule

from sb3_adaptive_kl import AdaptiveKLPPO, clip_equivalent_target
from sb3_adaptive_kl.clip_range import outlier_clip_range
from sb3_adaptive_kl.divergences import gaussian_kl
from tests.conftest import CASES, logged

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


def test_target_of_a_clip_range():
    assert clip_equivalent_target(0.2) == pytest.approx(0.02)
    schedule = clip_equivalent_target(LinearSchedule(0.2, 0.0, 1.0))
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([0.02, 0.005, 0.0])
    assert clip_equivalent_target(lambda progress: 0.4 * progress)(0.5) == pytest.approx(0.02)


def test_schedule_that_becomes_negative_is_named():
    with pytest.raises(ValueError, match=r"returned -0.1 at progress_remaining=0.0"):
        clip_equivalent_target(lambda progress: progress - 0.1)(0.0)


def test_clip_range_is_one_standard_deviation_of_the_log_ratio():
    """Measured, for a Gaussian policy that moved by the target."""
    t = clip_equivalent_target(0.2)
    mean, one = th.tensor([[math.sqrt(2 * t)]]), th.ones(1, 1)
    assert gaussian_kl(0 * one, one, mean, one).item() == pytest.approx(t)
    n = 100_000
    actions = th.randn(n, generator=th.Generator().manual_seed(0))
    log_ratio = th.distributions.Normal(mean.item(), 1.0).log_prob(actions) - th.distributions.Normal(0.0, 1.0).log_prob(
        actions
    )
    assert log_ratio.std().item() == pytest.approx(0.2, abs=4 * 0.2 / math.sqrt(2 * n))
    outliers = (log_ratio.abs() > outlier_clip_range(t)).float().mean().item()
    beyond_two = math.erfc(2 / math.sqrt(2))  # of a normal distribution; the log-ratio's mean is not quite 0
    assert outliers == pytest.approx(beyond_two, abs=4 * math.sqrt(beyond_two * (1 - beyond_two) / n))


def test_outlier_clip_range_follows_the_target(tmp_path):
    model = CASES["box"].build(AdaptiveKLPPO, clip_range="outliers", target_kl=LinearSchedule(0.08, 0.02, 1.0), **SMALL)
    model.learn(2 * 64)  # the second update is at the schedule's end
    assert logged(model)["clip_range"] == pytest.approx(0.4)
    assert "clip_fraction" in logged(model)
    model.save(tmp_path / "model")
    loaded = AdaptiveKLPPO.load(tmp_path / "model", env=CASES["box"].make_env())
    assert loaded.clip_range == "outliers"
    loaded.learn(64, reset_num_timesteps=False)


def test_unknown_name_of_a_clip_range():
    with pytest.raises(ValueError, match=r"clip_range='outlier' is unknown, did you mean 'outliers'\?"):
        CASES["box"].build(AdaptiveKLPPO, clip_range="outlier", **SMALL)


def test_equivalent_target_is_saved(tmp_path):
    model = CASES["box"].build(AdaptiveKLPPO, target_kl=clip_equivalent_target(LinearSchedule(0.2, 0.0, 1.0)), **SMALL)
    model.save(tmp_path / "model")
    assert AdaptiveKLPPO.load(tmp_path / "model").target_kl(0.5) == pytest.approx(0.005)


@pytest.mark.parametrize("clip_range", [0.0, -0.2, math.nan, math.inf, 1e200, 1e-200, True, "0.2", None, LinearSchedule])
def test_clip_ranges_without_a_target_are_named(clip_range):
    with pytest.raises(ValueError, match=r"clip_range=.* must be a positive, finite number or a schedule: try 0.2"):
        clip_equivalent_target(clip_range)
