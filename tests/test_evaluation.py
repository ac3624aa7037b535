"""The actor is evaluated alone where SB3's or sb3-contrib's code tells which part of a network it is."""

from contextlib import closing
from dataclasses import fields

import pytest
import torch as th
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor

from sb3_adaptive_kl import AdaptiveKLPPO, MaskableAdaptiveKLPPO, RecurrentAdaptiveKLPPO
from sb3_adaptive_kl.rollout.evaluation import evaluate_actor
from sb3_adaptive_kl.rollout.old_policy import can_leave_the_critic_out, sweep
from tests.conftest import CASES, FAMILIES, collect, logged, remember
from tests.test_maskable import CASES as MASKED
from tests.test_recurrent import CASES as RECURRENT

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


def tensors(distribution):
    """All tensors of an action distribution, however deep."""
    parts = [getattr(distribution, field.name) for field in fields(distribution)]
    return [tensor for part in parts for tensor in ([part] if isinstance(part, th.Tensor) else tensors(part))]


STOCK = {
    **{name: (AdaptiveKLPPO, CASES[name]) for name in (*FAMILIES, "separate-extractors")},
    **{f"masked {name}": (MaskableAdaptiveKLPPO, case) for name, case in MASKED.items()},
}


@pytest.mark.parametrize("name", STOCK)
def test_actor_alone_has_the_distribution_of_the_whole(name):
    algorithm, case = STOCK[name]
    model = collect(case.build(algorithm, **SMALL))
    assert can_leave_the_critic_out(model.policy, model.rollout_buffer)
    with closing(sweep(model.policy, model.rollout_buffer, True, chunk_size=64)) as evaluations:
        for rollout_data, _, whole in evaluations:
            alone = evaluate_actor(model.policy, rollout_data)
            for mine, its in zip(tensors(alone.distribution), tensors(whole.distribution), strict=True):
                assert th.equal(mine, its)


@pytest.mark.parametrize(("policy", "n_of_sweeps"), [("MlpPolicy", 0), ("own", 2)])
def test_critic_is_left_out_of_both_sweeps(policy, n_of_sweeps):
    """It runs for the minibatches, and for a few transitions that tell how the policy may be swept."""
    case = CASES["box"]._replace(policy=OwnFeatures if policy == "own" else policy)
    model = collect(case.build(AdaptiveKLPPO, n_steps=1024, batch_size=256, n_epochs=1))
    rows = []
    model.policy.value_net.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    model.train()
    assert rows.count(256) == 4
    assert rows.count(512) == 2 * n_of_sweeps
    assert set(rows) <= {64, 256, 512}


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
        (AdaptiveKLPPO, CASES["cnn"], None),  # the critic is next to nothing
        (RecurrentAdaptiveKLPPO, RECURRENT["discrete"], None),
    ],
)
def test_other_code_is_evaluated_as_a_whole(algorithm, case, policy):
    model = collect(case._replace(policy=policy or case.policy).build(algorithm, **SMALL))
    assert not can_leave_the_critic_out(model.policy, model.rollout_buffer)


class Shifted(FlattenExtractor):
    def forward(self, observations):
        return super().forward(observations) + 1


def replace_the_extractor(policy):
    """``get_distribution`` goes on with the one that the policy was built with."""
    policy.features_extractor = Shifted(policy.observation_space)


def hook_both_networks(policy):
    """``get_distribution`` calls one of them."""
    policy.mlp_extractor.register_forward_hook(lambda module, args, latents: (latents[0] + 1, latents[1]))


@pytest.mark.parametrize("change", [replace_the_extractor, hook_both_networks])
def test_what_lies_on_one_of_the_two_ways_counts(change):
    """The KL at rest would not be 0."""
    model = CASES["box"].build(AdaptiveKLPPO, **SMALL)
    change(model.policy)
    collect(model)
    assert not can_leave_the_critic_out(model.policy, model.rollout_buffer)
    assert remember(model).kl().mean == 0


class Elsewhere(DiagGaussianDistribution):
    """Leaves other parameters behind than it returns."""

    def proba_distribution(self, mean_actions, log_std):
        super().proba_distribution(mean_actions, log_std)
        return DiagGaussianDistribution(self.action_dim).proba_distribution(mean_actions + 1, log_std)


def test_parameters_that_are_kept_elsewhere_are_told():
    model = CASES["box"].build(AdaptiveKLPPO, **SMALL)
    model.policy.action_dist = Elsewhere(1)
    with pytest.raises(ValueError, match="does not leave the distribution it evaluated"):
        model.learn(64)


def test_kl_of_an_update_is_that_of_the_whole():
    stock, whole = (CASES["box"]._replace(policy=policy) for policy in ("MlpPolicy", OwnFeatures))
    kls = [logged(case.build(AdaptiveKLPPO, **SMALL).learn(3 * 64))["kl"] for case in (stock, whole)]
    assert kls[0] == kls[1] > 0
