"""Ranks that would make different updates say so, and an update that is unsound on one rank is undone on all."""

import math
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from sb3_adaptive_kl.execution import Execution
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.distributed import RanksDisagree
from tests.ranks import Ranks, check_same_model, learned, make_env, outcome


def learned_with_one_normalized() -> None:
    env = make_vec_env("CartPole-v1", 1)
    model = AdaptiveKLPPO("MlpPolicy", VecNormalize(env) if dist.get_rank() == 0 else env, n_steps=64, device="cpu")
    model.learn(128)


def test_ranks_must_agree_on_normalization(ranks: Ranks) -> None:
    for error in ranks.run(learned_with_one_normalized):
        assert isinstance(error, RanksDisagree)
        assert "the use of VecNormalize is True on rank 0, but False on rank 1" in str(error)


class ChangesOneRank(BaseCallback):
    """Sets an attribute of the model on rank 1 only."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        self.name, self.value = name, value

    def _on_rollout_end(self) -> None:
        if dist.get_rank() == 1:
            setattr(self.model, self.name, self.value)

    def _on_step(self) -> bool:
        return True


class MovesOneRank(BaseCallback):
    """Changes the last bits of a parameter on rank 1 only."""

    def _on_rollout_start(self) -> None:
        if dist.get_rank() == 1:
            with th.no_grad():
                next(self.model.policy.parameters()).mul_(1 + 1e-6)

    def _on_step(self) -> bool:
        return True


class MovesOneRankAtTheEnd(MovesOneRank):
    """The same, after the last update."""

    def _on_rollout_start(self) -> None:
        pass

    def _on_training_end(self) -> None:
        super()._on_rollout_start()


class FreezesOneRank(BaseCallback):
    """Freezes a layer on rank 1 only."""

    def _on_rollout_end(self) -> None:
        self.model.policy.value_net.requires_grad_(dist.get_rank() == 0)

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (ChangesOneRank("n_epochs", 3), "n_epochs is 2 on rank 0, but 3 on rank 1"),
        (ChangesOneRank("target_kl", 0.5), "target_kl is 0.01 on rank 0, but 0.5 on rank 1"),
        # As this NumPy prints it: 0.5 before 2.0
        (ChangesOneRank("gamma", np.float64(0.5)), f"gamma is 0.99 on rank 0, but {np.float64(0.5)!r} on rank 1"),
        (MovesOneRank(), "the checksum of the parameters is "),
        (MovesOneRankAtTheEnd(), "the checksum of the parameters is "),
        (FreezesOneRank(), "the choice of trainable parameters is [True, True"),
    ],
)
def test_ranks_that_disagree_all_say_where(ranks: Ranks, callback: BaseCallback, message: str) -> None:
    for error in ranks.run(learned, "AdaptiveKLPPO", callback):
        assert isinstance(error, RanksDisagree)
        assert message in str(error)


class Subclass(AdaptiveKLPPO):
    """As users write them: the constructor's arguments are hidden in **kwargs, and there is one that may differ."""

    def __init__(self, *args: Any, folder: str, **kwargs: Any) -> None:
        self.folder = folder
        super().__init__(*args, **kwargs)


def learned_with_different_epochs(difference: int) -> None:
    n_epochs = 2 + difference * dist.get_rank()
    model = Subclass("MlpPolicy", "CartPole-v1", folder=f"rank-{dist.get_rank()}", n_steps=64, n_epochs=n_epochs, device="cpu")
    model.learn(128)


def test_arguments_of_a_subclass_are_compared(ranks: Ranks) -> None:
    assert ranks.run(learned_with_different_epochs, 0) == [None, None]
    for error in ranks.run(learned_with_different_epochs, 1):
        assert isinstance(error, RanksDisagree)
        assert "n_epochs is 2 on rank 0, but 3 on rank 1" in str(error)


def learned_for_different_times() -> None:
    AdaptiveKLPPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(128 + 128 * dist.get_rank())


def test_ranks_must_train_for_the_same_time(ranks: Ranks) -> None:
    for error in ranks.run(learned_for_different_times):
        assert isinstance(error, RanksDisagree)
        assert "total_timesteps is 128 on rank 0, but 256 on rank 1" in str(error)


class OneRewardIsNaN(gym.Wrapper):
    """Gives one NaN as a reward, on rank 1 only."""

    n_calls = 0

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        self.n_calls += 1
        return observation, math.nan if dist.get_rank() == 1 and self.n_calls == 20 else reward, *rest


def learned_from_nan(without_fast: bool) -> dict[str, Any]:
    model = AdaptiveKLPPO("MlpPolicy", OneRewardIsNaN(make_env()), n_steps=64, batch_size=32, n_epochs=2, device="cpu")
    if without_fast:
        model._execution = Execution()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The update at 128 timesteps produced a non-finite")
        model.learn(256)
    return outcome(model)


@pytest.mark.parametrize("without_fast", [False, True])
def test_nan_on_one_rank_undoes_the_update_on_all(ranks: Ranks, without_fast: bool) -> None:
    first, second = ranks.run(learned_from_nan, without_fast)
    check_same_model(first, second)
    assert first["undone"] == 1
    assert first["parameters"].isfinite().all()


class FailsOnOneRank(ActorCriticPolicy):
    """Cannot be evaluated on rank 1, in the second minibatch of the first update, as if its distributions were invalid."""

    n_calls = 0

    def evaluate_actions(self, *args: Any) -> Any:
        self.n_calls += 1
        # In a step, and in the sweep that then asks about the policy
        if dist.get_rank() == 1 and self.n_calls in (3, 4):
            raise ValueError("invalid distribution")
        return super().evaluate_actions(*args)


def learned_with_failing_policy() -> dict[str, Any]:
    model = AdaptiveKLPPO(FailsOnOneRank, make_env(), n_steps=64, batch_size=32, n_epochs=2, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The update at 128 timesteps produced a non-finite")
        model.learn(256)
    return outcome(model)


def test_a_policy_that_diverged_on_one_rank_undoes_the_update_on_all(ranks: Ranks) -> None:
    first, second = ranks.run(learned_with_failing_policy)
    check_same_model(first, second)
    assert first["undone"] == 1
