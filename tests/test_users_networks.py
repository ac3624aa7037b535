"""Networks, hooks and distributions that users write: the update is PPO's, or a sentence says why it cannot be."""

import math

import gymnasium as gym
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution, SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import polyak_update
from torch.utils.checkpoint import checkpoint

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.rollout.distributions import action_distribution
from tests.conftest import CASES, NEEDS_COMPILER, collect, logged, remember

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}
EAGER_AND_COMPILED = [pytest.param({}, id="eager"), pytest.param({"compile": True}, id="compiled", marks=NEEDS_COMPILER)]


class Extractor(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box, features_dim: int = 8) -> None:
        super().__init__(observation_space, features_dim)
        self.layer = th.nn.Linear(observation_space.shape[0], features_dim)

    def forward(self, observations):
        return self.layer(observations)


class Checkpointed(Extractor):
    """Reentrant checkpoints are differentiated by backward() alone."""

    def forward(self, observations):
        return checkpoint(self.layer, observations.clone().requires_grad_(), use_reentrant=True)


class Fourier(BaseFeaturesExtractor):
    """Complex weights."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 6)
        self.weight = th.nn.Parameter(th.randn(3, observation_space.shape[0], dtype=th.complex64))

    def forward(self, observations):
        product = observations.to(th.complex64) @ self.weight.T
        return th.cat([product.real, product.imag], dim=1)


@pytest.mark.parametrize("extractor", [Checkpointed, Fourier])
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("compiled", EAGER_AND_COMPILED)
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_first_update_of_unusual_networks_is_ppos(extractor, compiled):
    """With a single step, the penalty has no gradient yet."""
    kwargs = {"n_steps": 64, "batch_size": 64, "n_epochs": 1, "policy_kwargs": {"features_extractor_class": extractor}}
    theirs = CASES["box"].build(PPO, **kwargs).learn(64).policy
    ours = CASES["box"].build(AdaptiveKLPPO, **kwargs, **compiled).learn(64).policy
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert th.allclose(parameter, other, atol=1e-6), name


class Scripted(Extractor):
    """A module that torch.jit has compiled does not take hooks."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.layer = th.jit.script(self.layer)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_modules_train():
    model = CASES["box"].build(AdaptiveKLPPO, policy_kwargs={"features_extractor_class": Scripted}, **SMALL)
    before = model.policy.features_extractor.layer.weight.detach().clone()
    assert not th.equal(model.learn(64).policy.features_extractor.layer.weight, before)


def test_complex_weights_step_back():
    """By the same factor as the others: without a ceiling, the same update takes the whole step."""
    full_batch = {"n_steps": 64, "batch_size": 64, "n_epochs": 4}
    kwargs = {"learning_rate": 0.05, "target_kl": 1e-3, "policy_kwargs": {"features_extractor_class": Fourier}, **full_batch}
    shortened, whole = (
        collect(CASES["box"].build(AdaptiveKLPPO, kl_ceiling=kl_ceiling, **kwargs)) for kl_ceiling in (1.5, None)
    )
    old = shortened.policy.features_extractor.weight.detach().clone()
    shortened.train()
    whole.train()
    scaled, new = (model.policy.features_extractor.weight for model in (shortened, whole))
    assert 0 < shortened.step_scale < 1
    assert th.allclose(scaled, old + shortened.step_scale * (new - old), atol=1e-4)


@pytest.mark.parametrize("listen", ["register_hook", "register_post_accumulate_grad_hook"])
@NEEDS_COMPILER
@pytest.mark.usefixtures("compiler")
def test_gradient_hooks_are_called_when_compiled(listen):
    """One warning names the parameter; then the plain step calls them as often as PPO does."""

    def freeze(value):
        calls.append(value)
        if listen == "register_hook":
            return th.zeros_like(value)
        value.grad = th.zeros_like(value)
        return None

    calls: list[th.Tensor] = []
    model = CASES["box"].build(AdaptiveKLPPO, compile=True, **SMALL)
    weight = model.policy.mlp_extractor.policy_net[0].weight
    getattr(weight, listen)(freeze)
    before = weight.detach().clone()
    with pytest.warns(UserWarning, match=r"compile=True: .* hooks on a parameter's gradient") as caught:
        model.learn(2 * 64)
    assert len(caught) == 1
    assert len(calls) == 2 * 2 * 2
    assert th.equal(weight, before)


class WithSecondAction(DiagGaussianDistribution):
    """A hybrid action: the Gaussian decides more than itself, by a categorical that is kept elsewhere."""

    def proba_distribution(self, mean_actions, log_std):
        self.choice = th.distributions.Categorical(logits=mean_actions[:, :1] * th.arange(3))
        return super().proba_distribution(mean_actions, log_std)

    def log_prob(self, actions):
        chosen = (10 * actions[:, 0].abs()).long().clamp(max=2)
        return super().log_prob(actions) + self.choice.log_prob(chosen)


class Sharper(th.distributions.Normal):
    def log_prob(self, value):
        return 3 * super().log_prob(value)


class OwnFamily(DiagGaussianDistribution):
    def proba_distribution(self, mean_actions, log_std):
        self.distribution = Sharper(mean_actions, th.ones_like(mean_actions) * log_std.exp())
        return self


class Renamed(SquashedDiagGaussianDistribution):
    """Adds nothing that the divergence depends on."""

    def log_prob(self, actions, gaussian_actions=None):
        return super().log_prob(actions, gaussian_actions)


class Rewritten(DiagGaussianDistribution):
    """The textbook formula: other rounding, the same distribution."""

    def log_prob(self, actions):
        mean, std = self.distribution.mean, self.distribution.stddev
        return (-0.5 * ((actions - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).sum(dim=1)


@pytest.mark.parametrize("family", [WithSecondAction, OwnFamily])
def test_a_distribution_with_a_part_elsewhere_is_named(family):
    model = CASES["box"].build(AdaptiveKLPPO, **SMALL)
    model.policy.action_dist = family(model.action_space.shape[0])
    with pytest.raises(ValueError, match=rf"no closed-form KL .* {family.__name__} .* pass kl_divergence='k3'"):
        model.learn(64)


@pytest.mark.parametrize("family", [Renamed, Rewritten])
def test_a_subclass_that_adds_nothing_is_trained(family):
    kwargs = {"n_steps": 1024, "batch_size": 1024, "n_epochs": 2, "policy_kwargs": {"log_std_init": -2.0}}
    model = CASES["box"].build(AdaptiveKLPPO, **kwargs)
    model.policy.action_dist = family(model.action_space.shape[0])
    model.learn(1024)
    assert logged(model)["kl"] > 0


class Agents(Distribution):
    """Three agents, each with a choice of its own, in one distribution of torch with the batch shape (B, 3)."""

    def proba_distribution_net(self, latent_dim):
        return th.nn.Linear(latent_dim, 3 * 4)

    def proba_distribution(self, logits):
        self.distribution = th.distributions.Categorical(logits=logits.view(-1, 3, 4))
        return self

    def log_prob(self, actions):
        return self.distribution.log_prob(actions).sum(dim=1)

    def entropy(self):
        return self.distribution.entropy().sum(dim=1)

    def sample(self):
        return self.distribution.sample()

    def mode(self):
        return self.distribution.probs.argmax(dim=-1)

    def actions_from_params(self, logits, deterministic=False):
        return self.proba_distribution(logits).get_actions(deterministic)

    def log_prob_from_params(self, logits):
        actions = self.actions_from_params(logits)
        return actions, self.log_prob(actions)


class ListOfAgents(Agents):
    """The same with a distribution of torch for each."""

    def proba_distribution(self, logits):
        self.distribution = [th.distributions.Categorical(logits=part) for part in logits.view(-1, 3, 4).unbind(dim=1)]
        return self

    def log_prob(self, actions):
        return sum(agent.log_prob(action) for agent, action in zip(self.distribution, actions.unbind(dim=1), strict=True))

    def entropy(self):
        return sum(agent.entropy() for agent in self.distribution)

    def sample(self):
        return th.stack([agent.sample() for agent in self.distribution], dim=1)


class AgentsPolicy(ActorCriticPolicy):
    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.action_dist = Agents()
        self.action_net = self.action_dist.proba_distribution_net(self.mlp_extractor.latent_dim_pi)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1))

    def _get_action_dist_from_latent(self, latent_pi):
        return self.action_dist.proba_distribution(self.action_net(latent_pi))


class ThreeChoices(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.MultiDiscrete([4, 4, 4])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(action[0] == 1), self.np_random.random() < 0.1, False, {}


def test_several_agents_in_a_list_of_distributions():
    model = AdaptiveKLPPO(AgentsPolicy, ThreeChoices(), seed=0, device="cpu", **SMALL)
    model.policy.action_dist = ListOfAgents()
    assert logged(model.learn(64))["kl"] > 0


def test_several_agents_in_one_distribution():
    """Their divergences add up."""
    model = AdaptiveKLPPO(AgentsPolicy, ThreeChoices(), seed=0, device="cpu", **SMALL).learn(64)
    assert logged(model)["kl"] > 0
    collect(model)
    old_policy = remember(model)
    old = model.policy.get_distribution(th.as_tensor(model.rollout_buffer.observations).float()).distribution
    model.train()
    new = model.policy.get_distribution(th.as_tensor(model.rollout_buffer.observations).float())
    expected = th.distributions.kl_divergence(old, new.distribution).sum(dim=1)
    assert th.allclose(old_policy.divergence_on_rollout(), expected, rtol=1e-3, atol=1e-6)
    assert action_distribution(new).log_probs.shape == (64, 12)


class MovingAverage(Extractor):
    """Frozen, but written to by every step of the optimizer."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.average = th.nn.Linear(observation_space.shape[0], 8).requires_grad_(False)

    def forward(self, observations):
        return super().forward(observations) + self.average(observations)


def test_a_moving_average_is_undone_with_the_update():
    model = CASES["box"].build(AdaptiveKLPPO, policy_kwargs={"features_extractor_class": MovingAverage}, **SMALL)
    extractor = model.policy.features_extractor
    # It writes to .data, which torch does not count as a change
    model.policy.optimizer.register_step_post_hook(
        lambda *_: polyak_update(extractor.layer.parameters(), extractor.average.parameters(), 0.5)
    )
    model.learn(2 * 64)
    collect(model)
    model.rollout_buffer.advantages[:] = th.nan
    before = extractor.average.weight.clone()
    with pytest.warns(UserWarning, match="undone"):
        model.train()
    assert th.equal(extractor.average.weight, before)


@NEEDS_COMPILER
@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_callback_can_trace_the_policy_of_a_compiled_rollout():
    class Trace(BaseCallback):
        def _on_step(self):
            if self.n_calls == 3:
                self.traced = th.jit.trace(self.model.policy, th.ones(1, 3), check_trace=False)
                with th.no_grad():
                    self.values = [policy(2 * th.ones(1, 3))[1] for policy in (self.traced, self.model.policy)]
            return True

    callback = Trace()
    CASES["box"].build(AdaptiveKLPPO, compile=True, **SMALL).learn(64, callback)
    traced, expected = callback.values
    assert traced != 0
    assert th.allclose(traced, expected, atol=1e-5)
