"""The actor is evaluated alone where SB3's or sb3-contrib's code tells which part of a network it is."""

from dataclasses import fields

import pytest
import torch as th
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor

from sb3_adaptive_kl import AdaptiveKLPPO, MaskableAdaptiveKLPPO, RecurrentAdaptiveKLPPO
from sb3_adaptive_kl.rollout.evaluation import evaluate, evaluate_actor
from sb3_adaptive_kl.rollout.old_policy import sweep
from tests.conftest import CASES, collect, logged
from tests.test_maskable import CASES as MASKED
from tests.test_recurrent import CASES as RECURRENT

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


def tensors(distribution):
    """All tensors of an action distribution, however deep."""
    parts = [getattr(distribution, field.name) for field in fields(distribution)]
    return [tensor for part in parts for tensor in ([part] if isinstance(part, th.Tensor) else tensors(part))]


def evaluations(model):
    """Evaluate the start of a rollout as a whole, and by the actor; and count how often the critic ran for the latter."""
    calls = []
    with th.no_grad():
        rollout_data, _, _ = next(sweep(model.policy, model.rollout_buffer, True))
        model.policy.set_training_mode(False)
        whole = evaluate(model.policy, rollout_data, True)
        handle = model.policy.value_net.register_forward_hook(lambda *_: calls.append(1))
        actor = evaluate_actor(model.policy, rollout_data)
        handle.remove()
    return whole, actor, len(calls)


@pytest.mark.parametrize(
    ("algorithm", "case"),
    [
        *((AdaptiveKLPPO, case) for case in CASES.values()),
        *((MaskableAdaptiveKLPPO, case) for case in MASKED.values()),
    ],
    ids=[*CASES, *MASKED],
)
def test_actor_alone_has_the_distribution_of_the_whole(algorithm, case):
    whole, actor, n_calls = evaluations(collect(case.build(algorithm, **SMALL)))
    assert n_calls == 0
    assert actor.log_prob is None
    for mine, its in zip(tensors(actor.distribution), tensors(whole.distribution), strict=True):
        assert th.equal(mine, its)


class OwnExtractor(MlpExtractor):
    """Evaluated together, its actor is another one."""

    def forward(self, features):
        return self.forward_actor(features) + 1, self.forward_critic(features)


class OwnNetwork(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = OwnExtractor(self.features_dim, self.net_arch, self.activation_fn, self.device)


class OwnFeatures(ActorCriticPolicy):
    def extract_features(self, obs, features_extractor=None):
        return super().extract_features(obs, features_extractor)


class OwnMasks(MaskableActorCriticPolicy):
    def get_distribution(self, obs, action_masks=None):
        return super().get_distribution(obs, None)


@pytest.mark.parametrize(
    ("algorithm", "case", "policy"),
    [
        (AdaptiveKLPPO, CASES["discrete"], OwnNetwork),
        (AdaptiveKLPPO, CASES["discrete"], OwnFeatures),
        (MaskableAdaptiveKLPPO, MASKED["discrete"], OwnMasks),
        (RecurrentAdaptiveKLPPO, RECURRENT["discrete"], None),
    ],
)
def test_other_code_is_run_as_a_whole(algorithm, case, policy):
    model = collect(case._replace(policy=policy or case.policy).build(algorithm, **SMALL))
    whole, actor, n_calls = evaluations(model)
    assert n_calls == 1
    for mine, its in zip(actor, whole, strict=True):
        assert mine is its is None or not isinstance(mine, th.Tensor) or th.equal(mine, its)


def test_kl_of_an_update_is_that_of_the_whole():
    stock, whole = (CASES["box"]._replace(policy=policy) for policy in ("MlpPolicy", OwnFeatures))
    kls = [logged(case.build(AdaptiveKLPPO, **SMALL).learn(3 * 64))["kl"] for case in (stock, whole)]
    assert kls[0] == kls[1] > 0
