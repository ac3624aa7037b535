"""The ceiling with unusual policies: what is scaled, and what is found to be the critic's."""

import math

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.step_back import critic_parameters
from tests.conftest import CASES, Case, collect, logged, parameters, pendulum, remember
from tests.test_step_back import TOO_FAR, shortened


class Normalized(BaseFeaturesExtractor):
    """Batch normalization, whose statistics move with every minibatch, and a buffer of which one entry moves."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=8)
        self.net = th.nn.Sequential(th.nn.Linear(observation_space.shape[0], 8), th.nn.BatchNorm1d(8))
        self.register_buffer("lowest", th.full((8,), -th.inf))
        self.lowest[0] = -100.0

    def forward(self, observations):
        if self.training:
            self.lowest[0] += 1.0
        return th.maximum(self.net(observations), self.lowest)


def test_statistics_of_a_batch_normalization_are_scaled_too():
    case = Case("MlpPolicy", pendulum, {"policy_kwargs": {"features_extractor_class": Normalized}})
    model, _, _ = shortened(case, target_kl=0.01)
    assert logged(model)["kl"] <= 0.015
    assert logged(model)["undone_updates"] == 0
    extractor = model.policy.features_extractor
    assert extractor.lowest[0] == pytest.approx(-100 + 8 * model.step_scale)  # 8 minibatches
    assert th.isinf(extractor.lowest[1:]).all()
    assert extractor.net[1].num_batches_tracked == 8  # a counter keeps its step


class Heads(th.nn.Module):
    """Two output layers, of which the second is for states that no rollout contains."""

    def __init__(self, n_inputs, n_outputs):
        super().__init__()
        self.usual, self.rare = th.nn.Linear(n_inputs, n_outputs), th.nn.Linear(n_inputs, n_outputs)

    def forward(self, x):
        return self.rare(x) if (x > 1e6).any() else self.usual(x)


def test_a_branch_that_no_probed_state_takes_counts_as_the_actors():
    model = CASES["box"].build(AdaptiveKLPPO, **TOO_FAR)
    model.policy.action_net = Heads(64, 1)
    critic = critic_parameters(remember(collect(model)))
    assert {id(parameter) for parameter in model.policy.value_net.parameters()} <= critic
    assert not critic & {id(parameter) for parameter in model.policy.action_net.parameters()}


class RunningMinimum(BaseFeaturesExtractor):
    """A buffer that begins as infinity, as torch's observers do."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=observation_space.shape[0])
        self.register_buffer("lowest", th.tensor(math.inf))

    def forward(self, observations):
        if self.training:
            self.lowest.copy_(th.minimum(self.lowest, observations.detach().min()))
        return observations


def test_a_buffer_that_was_infinite_stays_a_number():
    kwargs = {"policy_kwargs": {"features_extractor_class": RunningMinimum}}
    model = collect(Case("MlpPolicy", pendulum, kwargs).build(AdaptiveKLPPO, **TOO_FAR))
    model.train()
    assert model.step_scale < 1
    assert math.isfinite(model.policy.features_extractor.lowest)


def test_an_actor_that_is_frozen_but_for_its_statistics():
    case = Case("MlpPolicy", pendulum, {"policy_kwargs": {"features_extractor_class": Normalized}})
    model = case.build(AdaptiveKLPPO, **{**TOO_FAR, "target_kl": 1e-12})
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad = "value_net" in name
    collect(model).train()
    assert logged(model)["kl"] <= 1.5e-12
    assert logged(model)["undone_updates"] == 0


class Detour(th.nn.Module):
    """Depends on a number that is neither a parameter nor a buffer."""

    shift = 0.0

    def forward(self, x):
        return x + self.shift


def test_an_update_that_cannot_be_shortened_is_undone():
    model = CASES["box"].build(AdaptiveKLPPO, **TOO_FAR)
    detour = Detour()
    model.policy.mlp_extractor.policy_net.append(detour)
    model = collect(model)
    step = model.policy.optimizer.step

    def step_and_shift():
        step()
        detour.shift += 10.0

    model.policy.optimizer.step = step_and_shift
    before, seen = parameters(model), []
    model.kl_rule = lambda kl_coef, kl, target_kl: seen.append(kl) or 2.0
    with pytest.warns(UserWarning, match=r"above kl_ceiling at any step length and was undone.*neither a parameter"):
        model.train()
    assert th.equal(parameters(model), before)
    assert model.step_scale == 0.0
    assert seen == [math.inf]
    assert logged(model)["kl"] == 0.0


class ValueInActor(th.nn.Module):
    """The actor sees the critic's opinion, which it does not train."""

    def __init__(self, actor, critic):
        super().__init__()
        self.actor, self.critic = actor, [critic]  # in a list, so that it is no submodule

    def forward(self, x):
        return self.actor(x) + self.critic[0](x).detach()


def test_a_critic_that_the_actor_depends_on_is_scaled_as_well():
    case = Case("MlpPolicy", pendulum, {"policy_kwargs": {"ortho_init": False}})
    model = case.build(AdaptiveKLPPO, **{**TOO_FAR, "learning_rate": 0.1})
    extractor = model.policy.mlp_extractor
    extractor.policy_net = ValueInActor(extractor.policy_net, extractor.value_net)
    for _ in range(3):
        collect(model).train()
        assert logged(model)["kl"] <= 1.5e-3 < logged(model)["kl_raw"]
    assert logged(model)["undone_updates"] == 0


class BatchStatistics(BaseFeaturesExtractor):
    """Batch normalization without running statistics, which cannot evaluate a single observation."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=observation_space.shape[0])
        self.norm = th.nn.BatchNorm1d(observation_space.shape[0], track_running_stats=False)

    def forward(self, observations):
        return self.norm(observations)


def test_policies_that_need_several_transitions_at_a_time():
    extractor = {"policy_kwargs": {"features_extractor_class": BatchStatistics}}
    case = Case("MlpPolicy", lambda: make_vec_env("Pendulum-v1", n_envs=4), extractor)
    model = collect(case.build(AdaptiveKLPPO, **TOO_FAR))
    model.train()
    assert 0 < model.step_scale < 1


class Doubles(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=observation_space.shape[0])

    def forward(self, observations):
        return observations.double()


def mse_loss_mixes_precisions() -> bool:
    values = th.zeros(1, dtype=th.double, requires_grad=True)
    try:
        th.nn.functional.mse_loss(th.zeros(1), values).backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not mse_loss_mixes_precisions(), reason="the mse_loss of this torch, which SB3 also calls, rejects it")
@pytest.mark.parametrize("kl_divergence", ["forward", "k3"])
def test_policies_in_double_precision(kl_divergence):
    case = Case("MlpPolicy", pendulum, {"policy_kwargs": {"features_extractor_class": Doubles}})
    model = case.build(AdaptiveKLPPO, kl_divergence=kl_divergence, **TOO_FAR)
    model.policy.double()
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=0.03)
    collect(model).train()
    assert logged(model)["kl"] <= 1.5e-3 < logged(model)["kl_raw"]
    assert 0 < model.step_scale < 1
