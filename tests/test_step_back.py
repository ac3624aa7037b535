"""The ceiling: where an update goes too far, the actor's step is shortened, or else the update is undone."""

import copy
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sb3_contrib.common.envs import InvalidActionEnvDiscrete

from sb3_adaptive_kl import AdaptiveKLPPO, MaskableAdaptiveKLPPO, RecurrentAdaptiveKLPPO, training
from sb3_adaptive_kl.rollout.old_policy import RolloutKL
from sb3_adaptive_kl.snapshot import Snapshot
from sb3_adaptive_kl.step_back import (
    MAX_TRIES,
    MIN_FRACTION,
    TARGET_FRACTION,
    critic_parameters,
    longest_allowed,
    shorten_step,
)
from tests.conftest import CASES, Case, collect, logged, parameters, pendulum, remember

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 4}
TOO_FAR = {"target_kl": 1e-3, "kl_ceiling": 1.5, "learning_rate": 0.03, **SMALL}
ROUNDING = 1 + 1e-4  # of two sweeps over the same rollout

SET_UPS = {
    **{name: (AdaptiveKLPPO, case) for name, case in CASES.items()},
    "masked": (MaskableAdaptiveKLPPO, Case("MlpPolicy", lambda: InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3))),
    "lstm": (RecurrentAdaptiveKLPPO, Case("MlpLstmPolicy", pendulum)),
    "shared lstm": (
        RecurrentAdaptiveKLPPO,
        Case("MlpLstmPolicy", pendulum, {"policy_kwargs": {"shared_lstm": True, "enable_critic_lstm": False}}),
    ),
}


def shortened(case, algorithm=AdaptiveKLPPO, **kwargs):
    """A model whose update was shortened, its parameters before, and those that the whole step would have led to."""
    model = collect(case.build(algorithm, **{**TOO_FAR, **kwargs}))
    before = copy.deepcopy(dict(model.policy.named_parameters()))
    ceiling, model.kl_ceiling = model.kl_ceiling, None
    state, rollout = copy.deepcopy(model.policy.state_dict()), copy.deepcopy(model.rollout_buffer)
    th.manual_seed(0), np.random.seed(0)
    model.train()
    whole = copy.deepcopy(dict(model.policy.named_parameters()))
    model.policy.load_state_dict(state)
    model.policy.optimizer.state.clear()
    model.rollout_buffer, model.kl_ceiling, model.kl_coef = rollout, ceiling, model.init_kl_coef
    th.manual_seed(0), np.random.seed(0)
    model.train()
    assert 0 < model.step_scale < 1
    return model, before, whole


@pytest.mark.parametrize("name", SET_UPS)
def test_the_actor_is_scaled_and_the_critic_keeps_its_step(name):
    algorithm, case = SET_UPS[name]
    model, before, whole = shortened(case, algorithm)
    assert logged(model)["kl"] <= 1.5e-3 < logged(model)["kl_raw"]
    assert logged(model)["step_scale"] == model.step_scale
    scaled, kept = set(), set()
    for key, parameter in model.policy.named_parameters():
        step = whole[key] - before[key]
        if step.abs().max() == 0:
            continue
        if th.equal(parameter, whole[key]):
            kept.add(key)
        else:
            assert th.allclose(parameter, before[key] + model.step_scale * step, atol=1e-6), key
            scaled.add(key)
    critic = {key for key in kept | scaled if "value_net" in key or "vf_features" in key or "critic" in key}
    assert kept == critic
    assert any("action_net" in key for key in scaled)


def test_nothing_happens_below_the_ceiling():
    kwargs = {"learning_rate": 1e-5, "target_kl": 0.01, **SMALL}
    with_ceiling, without = (
        CASES["box"].build(AdaptiveKLPPO, kl_ceiling=ceiling, **kwargs).learn(128) for ceiling in (1.5, None)
    )
    assert th.equal(parameters(with_ceiling), parameters(without))
    assert logged(with_ceiling)["step_scale"] == 1.0
    assert logged(with_ceiling)["kl_raw"] == logged(with_ceiling)["kl"]
    assert logged(with_ceiling).keys() - logged(without).keys() == {"kl_raw", "step_scale"}


def test_the_rule_sees_the_whole_step():
    """After the step back d is within the band, and β would never rise."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, **TOO_FAR))
    model.train()
    assert logged(model)["kl"] < 1.5e-3 < logged(model)["kl_raw"]
    assert model.kl_coef == 2.0


def test_the_policy_is_left_as_training_leaves_it():
    """No graph, which could not be copied, and no other random numbers."""
    random = []
    for ceiling in (None, 1.5):
        model = collect(CASES["box"].build(AdaptiveKLPPO, **{**TOO_FAR, "kl_ceiling": ceiling}))
        model.train()
        random.append((np.random.random(), th.rand(1).item()))
        copy.deepcopy(model.policy)
        assert model.policy.training
    assert random[0] == random[1]
    assert model.step_scale < 1


def test_the_scale_is_of_the_last_update():
    """Shortened, then untouched, then undone."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, **TOO_FAR))
    scales = []
    for learning_rate in (0.03, 1e-6, math.nan):
        model.lr_schedule = lambda progress, learning_rate=learning_rate: learning_rate
        collect(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.train()
        scales.append(model.step_scale)
    assert 0 < scales[0] < 1
    assert scales[1:] == [1.0, 0.0]


def test_an_update_whose_shortened_step_cannot_be_measured_is_undone(monkeypatch):
    monkeypatch.setattr(training, "shorten_step", lambda *_: (0.5, RolloutKL(math.nan, math.nan)))
    model = collect(CASES["box"].build(AdaptiveKLPPO, **TOO_FAR))
    before = parameters(model)
    with pytest.warns(UserWarning, match="above kl_ceiling"):
        model.train()
    assert th.equal(parameters(model), before)


def test_the_policy_is_left_at_the_longest_allowed_step_and_not_at_the_last_try():
    """With a jump in d, no try comes close to the limit, and the last one may be too far."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, **SMALL))
    critics, snapshot = critic_parameters(remember(model)), Snapshot(model.policy)
    weight = model.policy.action_net.weight
    before = weight.detach().clone()
    with th.no_grad():
        weight += 1.0
    tries = []

    def jumps():
        tries.append((weight - before).mean().item())
        d = 0.1 if tries[-1] < 0.35 else 2.0
        return RolloutKL(d, d)

    scale, kl = shorten_step(snapshot, critics, jumps, 3.0, 1.0)
    assert tries[-1] > 0.35
    assert (weight - before).mean().item() == pytest.approx(scale) == pytest.approx(0.35, abs=0.01)
    assert kl.mean == 0.1


def test_the_second_search_begins_with_the_kl_of_the_whole_step():
    """Where the critic has to be scaled, too, and d is quadratic in the scale of all, one try is enough."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, **SMALL))
    critics, snapshot = critic_parameters(remember(model)), Snapshot(model.policy)
    actor, critic = model.policy.action_net.weight, model.policy.value_net.weight
    before = [weight.detach().clone() for weight in (actor, critic)]
    with th.no_grad():
        actor += 1.0
        critic += 1.0
    tries = []

    def depends_on_both():
        moved, critic_moved = ((now - then).mean().item() for now, then in zip((actor, critic), before, strict=True))
        tries.append(critic_moved)
        return RolloutKL(2 * moved**2 + 2 * critic_moved**2, 0.0)

    scale, kl = shorten_step(snapshot, critics, depends_on_both, 4.0, 1.0)
    assert kl.mean == pytest.approx(TARGET_FRACTION, rel=1e-4)
    assert scale == pytest.approx((TARGET_FRACTION / 4.0) ** 0.5, rel=1e-4)
    assert len([scale for scale in tries if scale < 0.999]) == 1


def test_the_ceiling_follows_a_schedule():
    model = CASES["box"].build(AdaptiveKLPPO, **{**TOO_FAR, "target_kl": lambda progress: 1e-3 * progress + 1e-6})
    for progress in (1.0, 0.5, 0.1):
        collect(model)
        model._current_progress_remaining = progress
        model.train()
        assert logged(model)["kl"] <= 1.5 * (1e-3 * progress + 1e-6) < logged(model)["kl_raw"]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(SET_UPS)),
    kl_divergence=st.sampled_from(["forward", "reverse", "k3", "pearson"]),
    learning_rate=st.sampled_from([1e-3, 1e-2, 0.1, 1.0]),
    target_kl=st.sampled_from([1e-4, 1e-2, 0.1]),
    kl_ceiling=st.sampled_from([1.0, 1.5, 4.0]),
    kl_rule=st.sampled_from(["adaptive", "predictive", "fixed"]),
    seed=st.integers(0, 100),
)
def test_the_ceiling_holds_or_the_update_is_undone(name, seed, kl_divergence, target_kl, kl_ceiling, **kwargs):
    algorithm, case = SET_UPS[name]
    kwargs |= {"kl_divergence": kl_divergence, "target_kl": target_kl, "kl_ceiling": kl_ceiling, "seed": seed}
    model = case.build(algorithm, **{**SMALL, "n_epochs": 2}, **kwargs)
    for _ in range(2):
        collect(model)
        old_policy, before = remember(model), parameters(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.train()
        assert th.isfinite(parameters(model)).all()
        assert old_policy.divergence_on_rollout().mean().item() <= kl_ceiling * target_kl * ROUNDING
        if model.step_scale == 0.0 and model._undone_in_a_row:
            assert th.equal(parameters(model), before)


@pytest.mark.parametrize("kl", [1.6, 3.0, 1e2, 1e8])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 6.0])
def test_the_search_ends_close_to_the_limit(kl, power):
    tries = []

    def divergence_at(scale):
        tries.append(scale)
        return kl * scale**power

    scale = longest_allowed(divergence_at, kl, 1.5)
    assert MIN_FRACTION * 1.5 <= kl * scale**power <= 1.5
    assert scale == tries[-1]
    assert len(tries) <= (1 if power == 2 else MAX_TRIES)
    if power == 2:
        assert kl * scale**power == pytest.approx(TARGET_FRACTION * 1.5)


def test_the_search_survives_what_cannot_be_measured():
    """NaN and infinity are too far; a function that jumps at 0 has no allowed scale."""
    assert 0 < longest_allowed(lambda scale: math.nan if scale > 0.01 else scale, math.inf, 1.0) <= 0.01
    assert 0 < longest_allowed(lambda scale: math.inf if scale > 0.5 else scale, 1e30, 1.0) <= 0.5
    assert longest_allowed(lambda scale: 2.0, 3.0, 1.0) == 0.0


def test_a_schedule_that_ends_at_zero():
    """The target is 0 there, and so is the step. The next call of learn() does not begin with a β that was compared with 0."""
    model = collect(CASES["discrete"].build(AdaptiveKLPPO, **{**TOO_FAR, "target_kl": lambda progress: 0.0}))
    model.train()
    assert logged(model)["kl"] <= 1.5e-12
    assert model.kl_coef == 1.0


@pytest.mark.parametrize("kl_divergence", ["k3", "pearson"])
def test_a_target_of_zero_where_rounding_exceeds_it(kl_divergence):
    """An estimate between a policy and itself is not 0 where log-probabilities are steep; the update is no failure."""
    case = Case("MlpPolicy", pendulum, {"policy_kwargs": {"log_std_init": -10.0}})
    model = case.build(AdaptiveKLPPO, **{**TOO_FAR, "target_kl": lambda progress: 0.0, "kl_divergence": kl_divergence})
    actor = collect(model).policy.action_net.weight.clone()
    model.train()
    assert logged(model)["kl"] > 1.5e-12
    assert logged(model)["undone_updates"] == 0
    assert th.equal(model.policy.action_net.weight, actor)


@pytest.mark.slow
def test_the_ceiling_holds_with_a_high_learning_rate():
    for env in ("CartPole-v1", "Acrobot-v1", "MountainCarContinuous-v0", "Pendulum-v1"):
        model = AdaptiveKLPPO("MlpPolicy", gym.make(env), learning_rate=0.1, kl_ceiling=1.5, n_steps=256, seed=0, device="cpu")
        model.learn(2048)
        assert logged(model)["kl_over_target"] <= 1.5 * ROUNDING
