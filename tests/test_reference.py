"""The KL to a reference policy: what is measured, what it does to the loss, and how its coefficient moves."""

import numpy as np
import pytest
import torch as th
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution, kl_divergence
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor

from sb3_adaptive_kl import (
    HELD,
    AdaptiveKLPPO,
    MaskableAdaptiveKLPPO,
    MaskableRecurrentAdaptiveKLPPO,
    RecurrentAdaptiveKLPPO,
    ReferencePolicy,
)
from sb3_adaptive_kl.arguments import settings_at
from sb3_adaptive_kl.maskable_recurrent.policies import MaskableRecurrentActorCriticPolicy
from sb3_adaptive_kl.reference import adapted_kl_coef, reference_kl_coef
from sb3_adaptive_kl.rollout.minibatches import has_sequences, minibatches
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.rollout.reference import Reference
from sb3_adaptive_kl.step import minibatch_loss
from tests import test_maskable, test_maskable_recurrent, test_recurrent
from tests.conftest import CASES, FAMILIES, collect, logged, parameters, pendulum

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


def other(case, algorithm=PPO, scale=0.1):
    """A policy for the same environment that acts differently."""
    policy = case.build(algorithm, n_steps=64, batch_size=64).policy
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * th.randn(parameter.shape, generator=th.Generator().manual_seed(1)))
    return policy


def on_rollout(model, reference):
    return OldPolicy(model.policy, model.rollout_buffer, model.kl_divergence, reference)


def summed(divergence):
    return divergence if divergence.dim() == 1 else divergence.sum(dim=1)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("case", [*FAMILIES, "cnn", "dict"])
def test_measured_kl_is_the_divergence_of_the_distributions(case, direction):
    """Compare with SB3's ``kl_divergence``, after the update, on the whole rollout."""
    theirs = other(CASES[case])
    reference = ReferencePolicy(theirs, kl_coef=0.0, direction=direction)
    model = CASES[case].build(AdaptiveKLPPO, reference_policy=reference, **SMALL).learn(64)
    observations = model.rollout_buffer.observations
    observations = obs_as_tensor(observations, "cpu")
    theirs.set_training_mode(False)
    model.policy.set_training_mode(False)
    with th.no_grad():
        pair = [policy.get_distribution(observations) for policy in (model.policy, theirs)]
        expected = summed(kl_divergence(*(pair if direction == "reverse" else reversed(pair)))).mean().item()
    assert expected > 0.01
    assert logged(model)["reference_kl"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("case", ["box", "discrete", "gsde"])
def test_reference_that_is_only_measured_changes_nothing(case, tmp_path):
    """Neither a parameter, nor β, nor a random number; read from a file or given as an object."""
    kwargs = {**SMALL, **HELD}
    alone = CASES[case].build(AdaptiveKLPPO, **kwargs).learn(3 * 64)
    CASES[case].build(PPO, n_steps=64, batch_size=64, seed=1).save(tmp_path / "reference")
    for policy in (str(tmp_path / "reference"), other(CASES[case])):
        model = CASES[case].build(AdaptiveKLPPO, reference_policy=ReferencePolicy(policy, kl_coef=0.0), **kwargs)
        model.learn(3 * 64)
        assert th.equal(parameters(model), parameters(alone))
        assert model.kl_coef == alone.kl_coef
        assert logged(model)["reference_kl"] > 0
        assert logged(model)["reference_kl_coef"] == 0


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("kl_divergence_name", ["forward", "k3"])
def test_loss_gains_the_coefficient_times_the_kl(direction, kl_divergence_name):
    """Its gradient, against that of SB3's ``kl_divergence``."""
    theirs = other(CASES["box"])
    model = collect(CASES["box"].build(AdaptiveKLPPO, kl_divergence=kl_divergence_name, **SMALL))
    old_policy = on_rollout(model, Reference(ReferencePolicy(theirs, direction=direction), model.policy))
    rollout_data, index = next(minibatches(model.rollout_buffer, 32))
    settings = settings_at(model, 1.0)
    weights = [p for name, p in model.policy.named_parameters() if "value" not in name and "vf" not in name.split(".")[0]]

    def gradient(coefficient):
        loss, _ = minibatch_loss(
            model.policy,
            old_policy,
            rollout_data,
            index,
            settings._replace(reference_kl_coef=coefficient),
        )
        gradients = th.autograd.grad(loss, weights, allow_unused=True)
        return loss.item(), th.cat([g.flatten() for g in gradients if g is not None])

    pair = [policy.get_distribution(rollout_data.observations) for policy in (model.policy, theirs)]
    kl = summed(kl_divergence(*(pair if direction == "reverse" else reversed(pair)))).mean()
    expected = th.cat([g.flatten() for g in th.autograd.grad(kl, weights, allow_unused=True) if g is not None])
    (loss, with_it), (loss_without, without) = gradient(3.0), gradient(None)
    assert loss - loss_without == pytest.approx(3 * kl.item(), rel=1e-3)
    difference = (with_it - without)[: len(expected)] if len(with_it) > len(expected) else with_it - without
    difference = difference[difference != 0]
    expected = 3 * expected[expected != 0]
    assert th.allclose(difference, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_distance_before_the_update_is_remembered(direction):
    """The policy moves, its distance from the reference before it moved does not: measured in a sweep of its own, at first."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, kl_divergence="k3", **SMALL))
    old_policy = on_rollout(model, Reference(ReferencePolicy(other(CASES["box"]), direction=direction), model.policy))
    before = old_policy.kl()
    assert before.reference_before == pytest.approx(before.reference, rel=1e-6)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.1)
    after = old_policy.kl()
    assert after.reference != pytest.approx(before.reference, rel=0.01)
    assert after.reference_before == before.reference_before


def test_reference_is_frozen_and_apart():
    """It has no gradients, is in eval mode and not changed, nor is the user's object, which may be trained further."""
    theirs = other(CASES["cnn"])
    theirs.set_training_mode(True)
    before = [parameter.clone() for parameter in theirs.parameters()]
    model = CASES["cnn"].build(AdaptiveKLPPO, reference_policy=theirs, **SMALL)
    with th.no_grad():
        next(theirs.parameters()).add_(1.0)
    model.learn(2 * 64)
    frozen = model._reference.policy
    assert all(map(th.equal, frozen.parameters(), before))
    assert not frozen.training
    assert theirs.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen.parameters())
    assert frozen.optimizer is None
    assert theirs.optimizer is not None
    assert model.reference_policy.policy is frozen  # what save() writes


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


@pytest.mark.parametrize("algorithm", [MaskablePPO, PPO], ids=["masked", "unmasked"])
@pytest.mark.parametrize("case", test_maskable.CASES)
def test_reference_is_masked_as_the_rollout(case, algorithm):
    """Compare with probabilities that are normalized over the valid choices by hand; PPO's policies know no masks."""
    theirs = other(test_maskable.CASES[case], algorithm)
    model = collect(test_maskable.CASES[case].build(MaskableAdaptiveKLPPO, **SMALL))
    old_policy = on_rollout(model, Reference(ReferencePolicy(theirs), model.policy))
    with th.no_grad():
        held = theirs.get_distribution(obs_as_tensor(model.rollout_buffer.observations, "cpu"))
    if case == "multibinary" and algorithm is PPO:
        probs = th.stack([1 - held.distribution.probs, held.distribution.probs], dim=2)
    else:
        parts = getattr(held, "distributions", None) or getattr(held, "distribution", None)
        probs = [part.probs for part in (parts if isinstance(parts, list) else [parts])]
        probs = th.stack(probs, dim=1) if case == "multibinary" else probs
    masks = th.as_tensor(model.rollout_buffer.action_masks).bool()
    sizes = {"multidiscrete": [3, 4], "multibinary": [2] * 4}.get(case, [6])
    groups = probs.unbind(dim=1) if case == "multibinary" else probs
    expected = []
    for group, mask in zip(groups, masks.split(sizes, dim=1), strict=True):
        valid = th.where(mask, group, 0.0)
        expected.append(valid / valid.sum(dim=1, keepdim=True))
    assert th.allclose(old_policy.reference.log_probs.exp(), th.cat(expected, dim=1), atol=1e-5)
    assert (~masks).any()


@pytest.mark.parametrize("algorithm", [MaskableAdaptiveKLPPO, AdaptiveKLPPO], ids=["masked", "unmasked"])
def test_switches_of_masked_and_unmasked_policies_are_compared_with_their_own(algorithm):
    """MultiBinary: sb3-contrib's masked policies lay their outcomes out in another order than SB3's."""
    case = test_maskable.CASES["multibinary"]
    masked, unmasked = (case.build(algorithm, n_steps=64, batch_size=64).policy for algorithm in (MaskablePPO, PPO))
    bias = th.tensor([2.0, -1.0, 0.5, -3.0])  # log odds
    with th.no_grad():
        for policy in (masked, unmasked):
            policy.action_net.weight.zero_()
        unmasked.action_net.bias.copy_(bias)
        masked.action_net.bias.copy_(th.stack([th.zeros(4), bias], dim=1).flatten())
    model = collect(case.build(algorithm, **SMALL))
    first, second = (on_rollout(model, Reference(ReferencePolicy(policy), model.policy)) for policy in (masked, unmasked))
    assert th.allclose(first.reference.log_probs, second.reference.log_probs, atol=1e-5)
    assert first.reference.log_probs.shape == first.distribution.log_probs.shape


def test_a_masked_policy_that_trains_without_masks_is_at_no_distance_from_itself():
    case = CASES["multibinary"]._replace(policy=MaskableRecurrentActorCriticPolicy)
    model = collect(case.build(RecurrentAdaptiveKLPPO, **SMALL))
    with th.no_grad():
        model.policy.action_net.bias.copy_(th.linspace(-2, 2, 6))
    old_policy = on_rollout(model, Reference(ReferencePolicy(model.policy), model.policy))
    assert old_policy.reference.kl(old_policy.distribution).abs().max() < 1e-5


@pytest.mark.parametrize("lstm_in_training", [True, False], ids=["lstm", "feed-forward"])
def test_memory_of_the_reference_is_its_own(lstm_in_training):
    """Step by step, over two rollouts and several episodes, from states that the reference itself has computed."""
    case = test_recurrent.CASES["two-environments"]
    theirs = other(case, RecurrentPPO, scale=0.5)
    if lstm_in_training:
        model = case.build(RecurrentAdaptiveKLPPO, **SMALL)
    else:
        model = CASES["discrete"]._replace(make_env=case.make_env).build(AdaptiveKLPPO, **SMALL)
    reference = Reference(ReferencePolicy(theirs), model.policy)
    states = (th.zeros(1, 2, 16), th.zeros(1, 2, 16))
    n_starts = 0
    for _ in range(2):
        collect(model) if model.num_timesteps == 0 else continue_collecting(model)
        distributions = reference.on_rollout(model.rollout_buffer, chunk_size=10)
        observations = th.as_tensor(model.rollout_buffer.observations).reshape(2, 64, 4)
        starts = th.as_tensor(model.rollout_buffer.episode_starts)
        starts = starts.reshape(2, 64) if lstm_in_training else starts.T
        n_starts += int(starts.sum())
        for t in range(64):
            with th.no_grad():
                step, states = theirs.get_distribution(observations[:, t], states, starts[:, t])
            assert th.allclose(distributions.log_probs.reshape(2, 64, 2)[:, t], step.distribution.logits, atol=1e-4)
    assert n_starts > 4
    assert has_sequences(model.rollout_buffer) == lstm_in_training


def continue_collecting(model):
    """One more rollout, where the last one ended."""
    model.train = lambda: None
    model.learn(model.n_steps * model.n_envs, reset_num_timesteps=False)
    del model.train


@pytest.mark.parametrize(
    ("algorithm", "case"),
    [
        *[(RecurrentAdaptiveKLPPO, test_recurrent.CASES[case]) for case in ("box", "dict", "gsde", "shared-lstm")],
        *[(MaskableRecurrentAdaptiveKLPPO, test_maskable_recurrent.CASES[case]) for case in ("multibinary", "dict")],
    ],
    ids=["box", "dict", "gsde", "shared-lstm", "masked-multibinary", "masked-dict"],
)
def test_memory_that_began_with_the_policys_agrees_with_it(algorithm, case):
    """The policy itself as the reference: no distance before the first step."""
    model = collect(case.build(algorithm, **SMALL))
    old_policy = on_rollout(model, Reference(ReferencePolicy(model.policy), model.policy))
    assert old_policy.kl().reference < 1e-6


@pytest.mark.parametrize("reference_is_squashed", [False, True])
def test_gaussian_that_sb3_squashes_is_another_family(reference_is_squashed):
    """Its torch distribution is a Normal, too, but the KL between the two is not that of the Normals."""

    class Squashed(ActorCriticPolicy):
        def _build(self, lr_schedule):
            super()._build(lr_schedule)
            self.action_dist = SquashedDiagGaussianDistribution(1)

    plain, squashed = (PPO(policy, "Pendulum-v1", device="cpu").policy for policy in ("MlpPolicy", Squashed))
    of_training, reference = ("MlpPolicy", squashed) if reference_is_squashed else (Squashed, plain)
    sizes = {"n_steps": 64, "batch_size": 32, "device": "cpu"}
    model = AdaptiveKLPPO(of_training, "Pendulum-v1", **sizes, reference_policy=reference)
    with pytest.raises(ValueError, match=r"TanhTransform.* there is no KL divergence between them"):
        model.learn(64)
    AdaptiveKLPPO(Squashed, "Pendulum-v1", **sizes, reference_policy=squashed).learn(64)
