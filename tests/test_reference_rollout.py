"""The reference policy over a rollout: the masks are the rollout's, the memory is its own."""

import pytest
import torch as th
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.utils import obs_as_tensor

from sb3_adaptive_kl import (
    AdaptiveKLPPO,
    MaskableAdaptiveKLPPO,
    MaskableRecurrentAdaptiveKLPPO,
    RecurrentAdaptiveKLPPO,
    ReferencePolicy,
)
from sb3_adaptive_kl.maskable_recurrent.policies import MaskableRecurrentActorCriticPolicy
from sb3_adaptive_kl.rollout.minibatches import has_sequences
from sb3_adaptive_kl.rollout.reference import Reference
from tests import test_maskable, test_maskable_recurrent, test_recurrent
from tests.conftest import CASES, collect
from tests.test_reference import SMALL, on_rollout, other


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
