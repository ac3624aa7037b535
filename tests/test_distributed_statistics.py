"""Running statistics, of VecNormalize and of the policy, and the measured KL are those of all ranks."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_adaptive_kl.distributed import DistributedAdaptiveKLPPO
from sb3_adaptive_kl.distributed.synchronization import average_buffers, pool_kl, pooled
from sb3_adaptive_kl.rollout.old_policy import RolloutKL
from tests.ranks import SMALL, Ranks, check_same_model, learned, make_env, outcome


def pooled_kl() -> RolloutKL:
    """Each rank has measured as many transitions."""
    rank = dist.get_rank()
    return pool_kl(RolloutKL(mean=[1.0, 4.0][rank], max=[9.0, 5.0][rank], reference=6.0 * rank, reference_before=3.0 * rank))


def test_every_transition_counts_alike_in_the_kl(ranks: Ranks) -> None:
    assert ranks.run(pooled_kl) == [pytest.approx((2.5, 9.0, 3.0, 1.5))] * 2


def test_statistics_of_vec_normalize_are_pooled(ranks: Ranks) -> None:
    first, second = (one["statistics"] for one in ranks.run(learned, "DistributedAdaptiveKLPPO", None, {}))
    np.testing.assert_equal(first, second)
    assert first["obs_rms"]["count"] == pytest.approx(512 + 2, abs=1e-3)  # and what reset() returned on rank 0
    assert first["ret_rms"]["count"] == pytest.approx(512, abs=1e-3)


def test_statistics_that_are_not_updated_stay(ranks: Ranks) -> None:
    for one in ranks.run(learned, "DistributedAdaptiveKLPPO", None, {"training": False}):
        assert [statistics["count"] for statistics in one["statistics"].values()] == [1e-4, 1e-4]  # as VecNormalize begins


def test_statistics_of_rewards_alone_are_pooled(ranks: Ranks) -> None:
    first, second = (one["statistics"] for one in ranks.run(learned, "DistributedAdaptiveKLPPO", None, {"norm_obs": False}))
    np.testing.assert_equal(first, second)
    assert first.keys() == {"ret_rms"}
    assert first["ret_rms"]["count"] == pytest.approx(512, abs=1e-3)


class WithTwoKeys(gym.ObservationWrapper):
    """Gives the observation in two parts, of different scales."""

    def __init__(self) -> None:
        super().__init__(make_env())
        box = gym.spaces.Box(-np.inf, np.inf, (2,))
        self.observation_space = gym.spaces.Dict({"cart": box, "pole": box})

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return {"cart": observation[:2], "pole": 100 * observation[2:]}


def learned_from_dict() -> dict[str, dict[str, Any]]:
    env = VecNormalize(make_vec_env(WithTwoKeys, 2), norm_obs_keys=["pole"])
    model = DistributedAdaptiveKLPPO("MultiInputPolicy", env, **SMALL).learn(256)
    return {key: vars(statistics) for key, statistics in model.get_vec_normalize_env().obs_rms.items()}


def test_statistics_of_dict_observations_are_pooled(ranks: Ranks) -> None:
    first, second = ranks.run(learned_from_dict)
    np.testing.assert_equal(first, second)
    assert first.keys() == {"pole"}
    assert first["pole"]["count"] == pytest.approx(256 + 2, abs=1e-3)


def test_pooled_statistics_are_those_of_all_the_data() -> None:
    data = np.random.default_rng(0).normal(1e4, 3.0, size=(4, 100, 2))
    before, alone = RunningMeanStd(shape=(2,)), RunningMeanStd(shape=(2,))
    before.update(data[0])
    after = [before.copy() for _ in range(3)]
    for one, its_data in zip(after, data[1:], strict=True):
        one.update(its_data)
    alone.update(data.reshape(-1, 2))
    result = pooled(before, after)
    assert result.count == pytest.approx(alone.count)
    np.testing.assert_allclose(result.mean, alone.mean, rtol=1e-12)
    np.testing.assert_allclose(result.var, alone.var, rtol=1e-6)


class Normalized(FlattenExtractor):
    """A feature extractor with a batch normalization, whose running statistics are buffers."""

    def __init__(self, observation_space: gym.spaces.Space) -> None:
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(super().forward(observations))


def learned_with_batch_norm() -> tuple[dict[str, Any], th.Tensor]:
    policy_kwargs = {"features_extractor_class": Normalized}
    model = DistributedAdaptiveKLPPO("MlpPolicy", make_env(), policy_kwargs=policy_kwargs, kl_ceiling=1.0, **SMALL)
    model.learn(512)
    return outcome(model), model.policy.features_extractor.norm.running_mean


def test_running_statistics_of_the_policy_are_the_same_on_all_ranks(ranks: Ranks) -> None:
    (first, mean), (second, their_mean) = ranks.run(learned_with_batch_norm)
    check_same_model(first, second)
    assert th.equal(mean, their_mean)
    assert (mean != 0).all()


def test_average_of_equal_buffers_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = th.nn.BatchNorm1d(1000)
    policy.running_mean.copy_(th.rand(1000))
    policy.running_mean[:2] = th.tensor([math.inf, -math.inf])  # a running minimum that has seen nothing, a mask
    expected = policy.running_mean.clone()
    monkeypatch.setattr("sb3_adaptive_kl.distributed.synchronization.gather", lambda buffer: buffer.expand(3, -1))
    average_buffers(policy)
    assert th.equal(policy.running_mean, expected)


def test_unequal_buffers_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = th.nn.BatchNorm1d(10)
    policy.running_mean.copy_(th.rand(10))
    expected = 2 * policy.running_mean
    factors = th.tensor([[1.0], [2.0], [3.0]])  # of three ranks
    monkeypatch.setattr("sb3_adaptive_kl.distributed.synchronization.gather", lambda buffer: factors * buffer)
    average_buffers(policy)
    th.testing.assert_close(policy.running_mean, expected)
