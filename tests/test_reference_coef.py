"""How the coefficient of a reference policy moves: a number, a schedule, a target."""

import numpy as np
import pytest

from sb3_adaptive_kl import (
    HELD,
    AdaptiveKLPPO,
    ReferencePolicy,
)
from sb3_adaptive_kl.reference import adapted_kl_coef, reference_kl_coef
from tests.conftest import CASES, logged, pendulum
from tests.test_reference import SMALL, other


def test_pulled_towards_the_reference_one_allowed_step_after_the_other():
    """A target far below the KL at the start raises the coefficient to its bound; no update goes beyond the ceiling."""
    reference = ReferencePolicy(other(CASES["box"], scale=0.3), kl_coef=1.0, target_kl=0.01)
    model = CASES["box"].build(AdaptiveKLPPO, n_steps=128, batch_size=64, reference_policy=reference, **HELD)
    kls, to_reference, coefficients = [], [], []
    for _ in range(8):
        model.learn(128, reset_num_timesteps=False)
        for series, key in ((kls, "kl"), (to_reference, "reference_kl"), (coefficients, "reference_kl_coef")):
            series.append(logged(model)[key])
    assert to_reference[0] > 0.3
    assert max(kls) <= 1.5 * 0.03 * (1 + 1e-5)
    assert coefficients[:6] == [1, 2, 4, 8, 16, 32]  # doubled after each, up to the bound
    assert to_reference[-1] < 0.7 * to_reference[0]
    # Between Gaussians, the root of the KL is a distance: none of these steps is longer than the ceiling allows
    assert np.diff(np.sqrt(to_reference)).min() > -1.2 * np.sqrt(1.5 * 0.03)


def test_coefficient_stays_while_the_policy_is_on_its_way_to_the_target():
    """It was halved, and too low when the policy arrived: on Pendulum, the KL rose to 3.5 times the target."""
    model = CASES["box"].build(AdaptiveKLPPO, **SMALL)
    model.reference_policy = ReferencePolicy(model.policy, target_kl=0.5)
    model.learn(64)
    assert 0 < logged(model)["reference_kl"] < 0.1
    assert model.reference_kl_coef == 1.0


def test_coefficient_of_the_next_update():
    fixed, held = ReferencePolicy("file", kl_coef=0.3), ReferencePolicy("file", target_kl=0.5)
    fading = ReferencePolicy("file", kl_coef=lambda progress: 2 * progress)
    bounds = (1 / 32, 32.0)
    assert reference_kl_coef(fixed, None, bounds, 1.0) == reference_kl_coef(fixed, 7.0, bounds, 1.0) == 0.3
    assert [reference_kl_coef(fading, None, bounds, progress) for progress in (1.0, 0.25, 0.0)] == [2.0, 0.5, 0.0]
    assert reference_kl_coef(ReferencePolicy("file", kl_coef=0), None, bounds, 1.0) is None
    assert reference_kl_coef(held, None, bounds, 1.0) == 1.0
    assert reference_kl_coef(held, 4.0, bounds, 1.0) == 4.0
    # The paper's rule: within a factor of 1.5 of the target it stays
    for kl, factor in ((0.32, 0.5), (0.34, 1), (0.74, 1), (0.76, 2), (np.inf, 2)):
        assert adapted_kl_coef(held, 4.0, kl + 1e-6, kl, bounds) == 4.0 * factor
        # Moving away from the reference: it is not lowered
        assert adapted_kl_coef(held, 4.0, 0.9 * min(kl, 1e9), kl, bounds) == 4.0 * max(factor, 1)
    assert adapted_kl_coef(held, 20.0, 9.0, 9.0, bounds) == 32.0
    assert adapted_kl_coef(held, 0.04, 0.1, 0.0, bounds) == 1 / 32
    assert adapted_kl_coef(held, 4.0, 0.1, 0.1, bounds) == 4.0  # it has not moved: the update was undone
    assert adapted_kl_coef(fixed, 0.3, 9.0, 9.0, bounds) is None


def test_schedule_follows_the_progress():
    reference = ReferencePolicy(other(CASES["box"]), kl_coef=lambda progress: 1 + progress)
    model = CASES["box"].build(AdaptiveKLPPO, reference_policy=reference, **SMALL)
    assert model.reference_kl_coef == 2.0
    model.learn(2 * 64)
    assert logged(model)["reference_kl_coef"] == 1.0


@pytest.mark.parametrize("n_updates", [0, 2])
def test_target_begins_with_its_own_coefficient(n_updates, tmp_path):
    """And not with what a schedule or a number before it has ended at."""
    clone = other(CASES["box"])
    for kl_coef in (lambda progress: progress, 0.3):
        model = CASES["box"].build(AdaptiveKLPPO, reference_policy=ReferencePolicy(clone, kl_coef), **SMALL)
        model.learn(n_updates * 64).save(tmp_path / "faded")
        assert "reference_kl_coef" not in vars(model.get_parameters())["penalty"]
        held = ReferencePolicy(clone, kl_coef=4.0, target_kl=1e-3)
        model = AdaptiveKLPPO.load(tmp_path / "faded", env=pendulum(), reference_policy=held)
        model.learn(64, reset_num_timesteps=False)
        assert logged(model)["reference_kl_coef"] == 4.0
        assert model.reference_kl_coef == 8.0


def test_another_coefficient_may_be_set_later():
    """On the model, of a number and of a target, in turn."""
    clone = other(CASES["box"])
    model = CASES["box"].build(AdaptiveKLPPO, reference_policy=ReferencePolicy(clone, kl_coef=0.003), **SMALL)
    for reference, begins in (
        (ReferencePolicy(clone, kl_coef=4.0, target_kl=1e-3), 4.0),
        (ReferencePolicy(clone, kl_coef=4.0, target_kl=1e-4), 8.0),  # only the target is another
        (ReferencePolicy(clone, kl_coef=2.0, target_kl=1e-4), 2.0),
        (ReferencePolicy(clone, kl_coef=0.1), 0.1),
    ):
        model.reference_policy = reference
        model.learn(64, reset_num_timesteps=False)
        assert logged(model)["reference_kl_coef"] == pytest.approx(begins)


@pytest.mark.parametrize(("bounds", "expected"), [(None, 2.0), ((0.5, 1.5), 1.5)])
def test_undone_update_measures_the_restored_policy(bounds, expected):
    reference = ReferencePolicy(other(CASES["box"], scale=0.3), target_kl=0.01)
    model = CASES["box"].build(AdaptiveKLPPO, reference_policy=reference, learning_rate=1e30, kl_coef_bounds=bounds, **SMALL)
    with pytest.warns(UserWarning, match="undone"):
        model.learn(64)
    assert logged(model)["reference_kl"] > 0.1
    assert model.reference_kl_coef == expected


def test_undone_update_leaves_the_coefficient():
    reference = ReferencePolicy(other(CASES["box"], scale=0.0), target_kl=0.5)
    model = CASES["box"].build(AdaptiveKLPPO, reference_policy=reference, learning_rate=1e30, **SMALL)
    with pytest.warns(UserWarning, match="undone"):
        model.learn(64)
    assert logged(model)["undone_updates"] == 1
    assert logged(model)["reference_kl"] < 1e-5  # of the restored policy, which is the reference
    assert model.reference_kl_coef == 1.0
