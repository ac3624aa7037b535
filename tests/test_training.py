"""The update as a whole: what is measured, when, on what; what each option does to it; what is logged."""

import math
import warnings

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl import step as step_module
from sb3_adaptive_kl.arguments import settings_at
from sb3_adaptive_kl.control import PATIENCE_AT_BOUND
from sb3_adaptive_kl.objective import MinibatchMetrics
from sb3_adaptive_kl.rollout.minibatches import minibatches
from tests.conftest import CASES, FAMILIES, NEEDS_COMPILER, collect, logged, minibatch_loss, parameters, remember

SMALL = {"n_steps": 128, "batch_size": 32, "n_epochs": 4}


def torch_kl(model, distribution, reduce=th.mean):
    """KL(old ‖ new) over the whole rollout by torch's own formulas, given the old policy's torch distributions."""
    observations = th.as_tensor(model.rollout_buffer.observations)
    with th.no_grad():
        new = model.policy.get_distribution(observations).distribution
    if isinstance(new, list):
        kl = sum(th.distributions.kl_divergence(p, q) for p, q in zip(distribution, new, strict=True))
    else:
        kl = th.distributions.kl_divergence(distribution, new)
    return reduce(kl.sum(dim=1) if kl.ndim > 1 else kl).item()


@pytest.mark.parametrize("case", FAMILIES)
def test_measured_after_the_update_on_the_whole_rollout(case):
    model = collect(FAMILIES[case].build(AdaptiveKLPPO, **SMALL))
    buffer = model.rollout_buffer
    observations = th.as_tensor(buffer.swap_and_flatten(buffer.observations))
    with th.no_grad():
        before = model.policy.get_distribution(observations).distribution
    model.train()
    assert logged(model)["kl"] == pytest.approx(torch_kl(model, before), rel=1e-3, abs=1e-7)
    assert logged(model)["kl"] > 1e-5
    assert logged(model)["kl_max"] == pytest.approx(torch_kl(model, before, reduce=th.max), rel=1e-3, abs=1e-7)
    assert logged(model)["kl_over_target"] == pytest.approx(logged(model)["kl"] / 0.02)


def test_rule_is_applied_once_with_what_was_measured():
    calls = []

    def rule(kl_coef, kl, target_kl):
        calls.append((kl_coef, kl, target_kl))
        return 3.0

    model = CASES["box"].build(AdaptiveKLPPO, kl_rule=rule, target_kl=0.02, **SMALL).learn(128)
    assert calls == [(1.0, logged(model)["kl"], 0.02)]
    assert logged(model)["kl_coef"] == 1.0  # the β that was used
    assert model.kl_coef == 3.0  # the one to be used next
    model.learn(128)
    assert logged(model)["kl_coef"] == 3.0


@pytest.mark.parametrize(("clip_range", "learning_rate", "n_warnings"), [(None, 1e-9, 1), (0.2, 1e-9, 1), (1e-9, 1e-6, 0)])
def test_lower_bound_is_normal_where_a_clip_range_acts(clip_range, learning_rate, n_warnings):
    """The clip ends updates below the target, where β has nothing to restrain."""
    kwargs = {"clip_range": clip_range, "learning_rate": learning_rate, "init_kl_coef": 1 / 32, **SMALL}
    model = CASES["box"].build(AdaptiveKLPPO, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(PATIENCE_AT_BOUND * SMALL["n_steps"])
    assert ["lower bound" in str(warning.message) for warning in caught] == [True] * n_warnings
    assert (logged(model).get("clip_fraction", 0.0) > 0) == (n_warnings == 0)


def test_rule_result_is_kept_within_bounds():
    for result, expected in ((0.0, 0.5), (-1.0, 0.5), (math.inf, 4.0), (1, 1.0)):
        model = CASES["box"].build(AdaptiveKLPPO, kl_rule=lambda *_, result=result: result, kl_coef_bounds=(0.5, 4), **SMALL)
        model.learn(128)
        assert model.kl_coef == expected
        assert isinstance(model.kl_coef, float)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "k3", "pearson"])
@pytest.mark.parametrize("case", FAMILIES)
def test_kl_falls_as_beta_rises(case, divergence):
    measured = []
    for kl_coef in (0.1, 30.0):
        model = FAMILIES[case].build(
            AdaptiveKLPPO, kl_rule="fixed", init_kl_coef=kl_coef, kl_divergence=divergence, learning_rate=0.003, **SMALL
        )
        measured.append(logged(model.learn(128))["kl"])
    assert measured[0] > 2 * measured[1]


@pytest.mark.parametrize("option", [{"kl_cutoff_coef": 1000.0}, {"clip_range": 0.05}, {"kl_stop_factor": 2.0}])
def test_options_restrain_a_step_that_is_too_long(option):
    """At β = 0.05 the learning rate is far too high; each option alone brings the KL near 2 · target_kl or below."""
    kwargs = {"n_steps": 128, "batch_size": 32, "n_epochs": 10, "learning_rate": 3e-3, "init_kl_coef": 0.05, "target_kl": 0.01}
    free, restrained = (
        logged(CASES["discrete"].build(AdaptiveKLPPO, **kwargs, **options).learn(128))["kl"] for options in ({}, option)
    )
    assert free > 0.5
    assert restrained < 0.03


def test_stop_factor_is_relative_to_the_target():
    """The same run stops later at twice the factor, and at the same place at twice the factor and half the target."""
    kwargs = {"n_steps": 128, "batch_size": 32, "n_epochs": 10, "learning_rate": 0.001, "init_kl_coef": 0.05}

    def n_updates(target_kl, factor):
        options = {"target_kl": target_kl, "kl_stop_factor": factor}
        return CASES["discrete"].build(AdaptiveKLPPO, **kwargs, **options).learn(128)._n_updates

    assert n_updates(0.01, 0.5) < n_updates(0.01, 2.0) == n_updates(0.005, 4.0) < 10


def test_clip_ranges_follow_their_schedules():
    schedule = LinearSchedule(0.4, 0.0, 1.0)
    model = CASES["box"].build(AdaptiveKLPPO, clip_range=schedule, clip_range_vf=schedule, **SMALL).learn(2 * 128)
    assert logged(model)["clip_range"] == logged(model)["clip_range_vf"] == 0.0
    settings = settings_at(model, progress_remaining=0.5)
    assert (settings.clip_range, settings.clip_range_vf) == pytest.approx((0.2, 0.2))


def test_hinge_begins_at_twice_the_target():
    """Of a policy that was moved by a known KL, the loss grows by c · (KL − 2 · target)², and not below."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, n_steps=128, batch_size=128, vf_coef=0.0, target_kl=0.005))
    old_policy = remember(model)
    with th.no_grad():
        model.policy.log_std += 0.2
    kl = old_policy.divergence_on_rollout().mean().item()
    rollout_data, index = next(minibatches(model.rollout_buffer, batch_size=128))

    def loss(coef, target):
        model.kl_cutoff_coef, model.target_kl = coef, target
        return minibatch_loss(model, old_policy, rollout_data, index)[0].item()

    assert loss(1000.0, target=0.005) - loss(0.0, target=0.005) == pytest.approx(1000 * (kl - 2 * 0.005) ** 2, rel=1e-3)
    assert loss(1000.0, target=kl / 1.9) == loss(0.0, target=kl / 1.9)


def test_early_stop_skips_epochs_but_not_the_rule(capsys):
    calls = []
    model = CASES["box"].build(
        AdaptiveKLPPO,
        learning_rate=0.01,
        kl_stop_factor=1.0,
        verbose=1,
        kl_rule=lambda kl_coef, kl, target_kl: calls.append(kl) or kl_coef,
        **SMALL,
    )
    model.learn(128)
    assert "Early stopping" in capsys.readouterr().out
    assert model._n_updates < SMALL["n_epochs"]
    assert calls == [logged(model)["kl"]]
    assert calls[0] > 0.01


def test_beta_enters_the_loss():
    """Between β = 1 and β = 2 the first full-batch loss differs by the KL of a policy that was moved beforehand."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, n_steps=128, batch_size=128, vf_coef=0.0))
    old_policy = remember(model)
    with th.no_grad():
        model.policy.log_std += 0.1
    rollout_data, index = next(minibatches(model.rollout_buffer, batch_size=128))
    losses = [minibatch_loss(model, old_policy, rollout_data, index, kl_coef=kl_coef)[0] for kl_coef in (1.0, 2.0)]
    kl = old_policy.divergence_on_rollout().mean()
    assert kl > 0.005
    assert (losses[1] - losses[0]).item() == pytest.approx(kl.item(), rel=1e-3)


@pytest.mark.parametrize("case", ["box", "gsde", "discrete", "cnn"])
def test_random_numbers_are_drawn_in_ppos_order(case):
    """After the same number of epochs NumPy's and torch's generators stand where PPO's would."""
    states = []
    for algorithm in (PPO, AdaptiveKLPPO):
        model = collect(CASES[case].build(algorithm, **SMALL))
        np.random.seed(1)
        th.manual_seed(1)
        model.train()
        states.append((np.random.random(), th.rand(1).item()))
    assert states[0] == states[1]


def test_progress_never_goes_below_zero():
    """300 steps in rollouts of 128 end at step 384: a linear learning rate would end up negative."""
    seen = []

    def schedule(progress_remaining):
        seen.append(progress_remaining)
        return 3e-4 * progress_remaining

    CASES["box"].build(AdaptiveKLPPO, learning_rate=schedule, **SMALL).learn(300)
    assert min(seen) == 0.0


def test_target_schedule_is_followed():
    targets = []
    model = CASES["box"].build(
        AdaptiveKLPPO,
        target_kl=LinearSchedule(0.04, 0.0, 1.0),
        kl_rule=lambda kl_coef, kl, target_kl: targets.append(target_kl) or kl_coef,
        **SMALL,
    )
    model.learn(4 * 128)
    assert targets == pytest.approx([0.03, 0.02, 0.01])  # then the target is 0, and the rule is not asked


SHARED_KEYS = {
    "policy_gradient_loss", "value_loss", "entropy_loss", "loss", "approx_kl", "explained_variance", "std", "n_updates",
    "learning_rate",
}  # fmt: skip
OWN_KEYS = {"kl", "kl_coef", "kl_over_target", "kl_loss", "kl_max", "grad_norm", "undone_updates"}


def test_log_keys():
    ppo = CASES["box"].build(PPO, **SMALL).learn(128)
    ours = CASES["box"].build(AdaptiveKLPPO, **SMALL).learn(128)
    assert logged(ours).keys() == SHARED_KEYS | OWN_KEYS
    assert logged(ppo).keys() == SHARED_KEYS | {"clip_fraction", "clip_range"}
    clipped = CASES["box"].build(AdaptiveKLPPO, clip_range=0.2, clip_range_vf=0.2, **SMALL).learn(128)
    assert logged(clipped).keys() == SHARED_KEYS | OWN_KEYS | {"clip_fraction", "clip_range", "clip_range_vf"}
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in logged(clipped).values())


def test_logged_values_mean_what_ppos_mean():
    """With a negligible β and PPO's clipping both take the same steps, and must report the same."""
    kwargs = {"clip_range_vf": 0.2, "learning_rate": 3e-3, **SMALL}
    theirs = logged(CASES["box"].build(PPO, **kwargs).learn(128))
    assert theirs["clip_fraction"] > 0
    negligible = {"init_kl_coef": 1e-8, "kl_coef_bounds": (1e-9, 1)}
    ours = CASES["box"].build(AdaptiveKLPPO, clip_range=0.2, **negligible, **kwargs).learn(128)
    for key in theirs.keys() & logged(ours).keys():
        assert logged(ours)[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("clip_range", [0.1, 1e6])
def test_a_penalty_that_cannot_matter_leaves_ppos_update(clip_range):
    """So the arms of benchmarks/table1*.yml with other clip ranges, or none, can be of this class, which is faster."""
    kwargs = {"n_steps": 128, "batch_size": 32, "n_epochs": 5, "clip_range": clip_range, "learning_rate": 3e-3}
    ppo = CASES["box"].build(PPO, **kwargs).learn(2 * 128)
    assert (logged(ppo)["clip_fraction"] > 0) == (clip_range < 1)
    ours = CASES["box"].build(AdaptiveKLPPO, kl_rule="fixed", init_kl_coef=1e-9, kl_coef_bounds=(1e-9, 1), **kwargs)
    assert (parameters(ours.learn(2 * 128)) - parameters(ppo)).abs().max() < 1e-6


def test_means_over_minibatches(monkeypatch):
    """All minibatches count alike, but for SB3's two habits: approx_kl is of the last epoch, loss of the last minibatch."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, n_steps=128, batch_size=32, n_epochs=2, init_kl_coef=3.0))
    norms, seen = [], []
    compute_gradients = step_module.compute_gradients

    def recorded(*args):
        metrics, norm = compute_gradients(*args)
        norms.append(norm)
        seen.append(MinibatchMetrics(*metrics))
        return metrics, norm

    monkeypatch.setattr(step_module, "compute_gradients", recorded)
    model.train()
    assert len(norms) == len(seen) == 8
    assert logged(model)["grad_norm"] == pytest.approx(np.mean(norms))
    assert logged(model)["kl_loss"] == pytest.approx(3.0 * np.mean([minibatch.kl for minibatch in seen]))
    assert logged(model)["approx_kl"] == pytest.approx(np.mean([minibatch.approx_kl for minibatch in seen[4:]]))
    assert logged(model)["loss"] == seen[-1].loss.item()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["ent_coef", "vf_coef"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_COMPILER)])
def test_coefficients_can_be_schedules(name, compiled):
    """In the second of two updates the progress is 0, and the schedule at its end: as if that had been set by hand."""
    kwargs = {"compile": compiled, "n_steps": 64, "batch_size": 64, "n_epochs": 2}
    by_hand = CASES["box"].build(AdaptiveKLPPO, **{name: 0.6}, **kwargs)
    by_hand.learn(2 * 64, callback=SetBeforeTheSecondUpdate(name, 0.3))
    scheduled = CASES["box"].build(AdaptiveKLPPO, **{name: LinearSchedule(0.9, 0.3, 1.0)}, **kwargs).learn(2 * 64)
    assert th.allclose(parameters(scheduled), parameters(by_hand), atol=1e-6)
    assert logged(scheduled)[name] == pytest.approx(0.3)
    assert name not in logged(by_hand)


class SetBeforeTheSecondUpdate(BaseCallback):
    def __init__(self, name, value):
        super().__init__()
        self.name, self.value = name, value

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        if self.num_timesteps > 64:
            setattr(self.model, self.name, self.value)
