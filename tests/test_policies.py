"""Whatever SB3's PPO takes: policies, feature extractors, wrappers, buffers; and a clear error where it cannot be used."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.rollout.minibatches import minibatches
from tests.conftest import CASES, collect, logged, minibatch_loss, parameters, remember

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


@pytest.mark.parametrize("case", CASES)
def test_every_case_learns_in_several_rollouts(case):
    model = CASES[case].build(AdaptiveKLPPO, **SMALL)
    start = parameters(model)
    model.learn(3 * 64)
    assert not th.equal(parameters(model), start)
    assert 0 < logged(model)["kl"] < 1
    assert logged(model)["undone_updates"] == 0


def test_several_normalized_environments_with_an_odd_last_minibatch():
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=3, seed=0))
    with pytest.warns(UserWarning, match="truncated mini-batch"):
        model = AdaptiveKLPPO("MlpPolicy", env, n_steps=43, batch_size=32, n_epochs=2, seed=0, device="cpu")
    model.learn(2 * 129)  # 129 = 4 · 32 + 1: the last minibatch has one transition
    assert np.isfinite(logged(model)["kl"])


def test_callbacks_and_evaluation(tmp_path):
    model = CASES["discrete"].build(AdaptiveKLPPO, **SMALL)
    callback = EvalCallback(make_vec_env(CASES["discrete"].make_env), eval_freq=64, n_eval_episodes=1, verbose=0)
    model.learn(128, callback=callback)
    assert callback.n_calls == 128
    assert callback.last_mean_reward > 0


class NoisyExtractor(BaseFeaturesExtractor):
    """Batch normalization and dropout: the policy in training mode is not the policy that acted."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=16)
        n_inputs = observation_space.shape[0]
        self.net = th.nn.Sequential(th.nn.Linear(n_inputs, 16), th.nn.BatchNorm1d(16), th.nn.Dropout(0.2), th.nn.ReLU())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)


def test_batch_norm_and_dropout():
    policy_kwargs = {"features_extractor_class": NoisyExtractor}
    model = CASES["box"].build(AdaptiveKLPPO, policy_kwargs=policy_kwargs, **SMALL).learn(3 * 64)
    assert np.isfinite(logged(model)["kl"])
    before = [buffer.clone() for buffer in model.policy.buffers()]
    old_policy = remember(model)
    assert (old_policy.divergence_on_rollout() == 0).all()  # sweeps are in eval mode
    assert all(th.equal(*pair) for pair in zip(before, model.policy.buffers(), strict=True))  # and leave statistics alone


def test_other_optimizers():
    policy_kwargs = {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}
    model = CASES["box"].build(AdaptiveKLPPO, policy_kwargs=policy_kwargs, **SMALL).learn(2 * 64)
    assert isinstance(model.policy.optimizer, th.optim.SGD)
    assert logged(model)["kl"] > 0


class RecordingBuffer(RolloutBuffer):
    """A user's buffer, with arguments of its own."""

    def __init__(self, *args, scale: float = 1.0, **kwargs) -> None:
        self.scale = scale
        self.sampled: list[int] = []
        super().__init__(*args, **kwargs)

    def _get_samples(self, batch_inds, env=None):
        self.sampled.append(len(batch_inds))
        return super()._get_samples(batch_inds, env)


def test_user_supplied_rollout_buffer():
    model = CASES["box"].build(
        AdaptiveKLPPO, rollout_buffer_class=RecordingBuffer, rollout_buffer_kwargs={"scale": 2.0}, **SMALL
    )
    model.learn(64)
    assert model.rollout_buffer.sampled.count(32) == 2 * 2  # two epochs
    assert model.rollout_buffer.scale == 2.0
    assert "_get_samples" not in vars(model.rollout_buffer)


class DropLastBuffer(RolloutBuffer):
    """Leaves out what does not fill a minibatch."""

    def get(self, batch_size=None):
        yield from list(super().get(batch_size))[: self.buffer_size * self.n_envs // batch_size]


class ReplacingBuffer(RolloutBuffer):
    """Draws with replacement."""

    def get(self, batch_size=None):
        next(super().get(1))  # flattens
        for _ in range(4):
            yield self._get_samples(np.random.randint(self.buffer_size * self.n_envs, size=batch_size))


class PrefetchingBuffer(RolloutBuffer):
    """Draws the next minibatch before it hands out this one."""

    def get(self, batch_size=None):
        epoch = super().get(batch_size)
        ahead = next(epoch)
        for samples in epoch:
            yield ahead
            ahead = samples
        yield ahead


@pytest.mark.parametrize("buffer", [DropLastBuffer, ReplacingBuffer, PrefetchingBuffer])
def test_unusual_rollout_buffers(buffer):
    """Every transition is compared with itself: at unchanged parameters the KL of each minibatch is 0."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, rollout_buffer_class=buffer, n_steps=60, batch_size=20))
    with th.no_grad():
        model.policy.action_net.weight *= 100  # so that states differ
    old_policy = remember(model)
    assert (old_policy.divergence_on_rollout() == 0).all()
    for _ in range(2):
        for rollout_data, index in minibatches(model.rollout_buffer, 20):
            _, metrics = minibatch_loss(model, old_policy, rollout_data, index)
            assert metrics.kl < 1e-9
    model.train()
    assert logged(model)["undone_updates"] == 0


class OpaqueBuffer(RolloutBuffer):
    """Draws its minibatches by itself."""

    def get(self, batch_size=None):
        yield RolloutBuffer._get_samples(self, np.arange(4))


class EmptyBuffer(RolloutBuffer):
    def get(self, batch_size=None):
        yield from super().get(batch_size)
        yield self._get_samples(np.array([], dtype=int))


@pytest.mark.parametrize("kl_divergence", ["forward", "k3"])
@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (OpaqueBuffer, r"rollout_buffer_class=OpaqueBuffer does not draw .* override _get_samples"),
        (EmptyBuffer, r"rollout_buffer_class=EmptyBuffer drew an empty minibatch"),
    ],
)
def test_unusable_rollout_buffers_are_named(buffer, message, kl_divergence):
    model = CASES["discrete"].build(AdaptiveKLPPO, rollout_buffer_class=buffer, kl_divergence=kl_divergence, **SMALL)
    with pytest.raises(ValueError, match=message):
        model.learn(64)


class SecretivePolicy(ActorCriticPolicy):
    """Evaluates actions with a distribution of its own, and leaves another one behind."""

    def evaluate_actions(self, obs, actions):
        features = self.extract_features(obs)
        latent_pi, latent_vf = self.mlp_extractor(features)
        own = CategoricalDistribution(int(self.action_space.n)).proba_distribution(
            3 * self.action_net(latent_pi) + latent_pi[:, :2]
        )
        return self.value_net(latent_vf), own.log_prob(actions), own.entropy()


class MoreSecretivePolicy(SecretivePolicy):
    """Does not use ``action_dist`` when it acts, either."""

    def forward(self, obs, deterministic=False):
        actions = th.zeros(len(obs), dtype=th.long)
        values, log_prob, _ = self.evaluate_actions(obs, actions)
        return actions, values, log_prob


class PolicyWithoutDistribution(MoreSecretivePolicy):
    @property
    def action_dist(self):
        raise AttributeError("no action_dist")

    @action_dist.setter
    def action_dist(self, value):
        self.__dict__["hidden_dist"] = value

    def _build(self, lr_schedule):
        self.mlp_extractor = MlpExtractor(self.features_dim, self.net_arch, self.activation_fn)
        self.action_net = th.nn.Linear(self.mlp_extractor.latent_dim_pi, int(self.action_space.n))
        self.value_net = th.nn.Linear(self.mlp_extractor.latent_dim_vf, 1)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1))


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("policy", [SecretivePolicy, MoreSecretivePolicy, PolicyWithoutDistribution])
@pytest.mark.parametrize("kl_divergence", ["forward", "reverse"])
def test_policy_that_hides_its_distribution_is_named(kl_divergence, policy, n_envs):
    env = make_vec_env("CartPole-v1", n_envs=n_envs)
    model = AdaptiveKLPPO(policy, env, kl_divergence=kl_divergence, seed=0, **SMALL)
    with pytest.raises(ValueError, match=rf"policy={policy.__name__}:.*_get_action_dist_from_latent.*kl_divergence='k3'"):
        model.learn(64 * n_envs)


def test_policy_that_hides_its_distribution_can_use_an_estimator():
    model = AdaptiveKLPPO(SecretivePolicy, gym.make("CartPole-v1"), kl_divergence="k3", seed=0, **SMALL)
    model.learn(64)
    assert logged(model)["kl"] > 0
