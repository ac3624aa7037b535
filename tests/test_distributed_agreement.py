"""Ranks that would make different updates say so, and an update that is unsound on one rank is undone on all."""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_adaptive_kl import PenaltyRule
from sb3_adaptive_kl.distributed import DistributedAdaptiveKLPPO, RanksDisagree
from sb3_adaptive_kl.distributed.synchronization import comparable
from tests.ranks import SMALL, Ranks, check_same_model, learned, make_env, outcome


class Subclass(DistributedAdaptiveKLPPO):
    """As users write them: the constructor's arguments are hidden in **kwargs, and there is one that may differ."""

    def __init__(self, *args: Any, folder: str, **kwargs: Any) -> None:
        self.folder = folder
        super().__init__(*args, **kwargs)


def learned_with(of_ranks: dict[str, list[Any]]) -> None:
    """Train with arguments that depend on the rank."""
    mine = {name: values[dist.get_rank()] for name, values in of_ranks.items()}
    env = make_vec_env("CartPole-v1", mine.pop("n_envs", 1))
    normalize = mine.pop("normalize", None)
    env = env if normalize is None else VecNormalize(env, **normalize)
    n = mine.pop("total_timesteps", 128)
    Subclass("MlpPolicy", env, folder=f"rank-{dist.get_rank()}", **{**SMALL, **mine}).learn(n)


@pytest.mark.parametrize(
    ("of_ranks", "message"),
    [
        ({"seed": [0, 1]}, "seed is 0 on rank 0, but 1 on rank 1"),
        ({"n_epochs": [2, 3]}, "n_epochs is 2 on rank 0, but 3 on rank 1"),
        ({"n_envs": [1, 2]}, "n_envs is 1 on rank 0, but 2 on rank 1"),
        ({"kl_coef_bounds": [None, (1e-3, 10)]}, "kl_coef_bounds is None on rank 0, but (0.001, 10) on rank 1"),
        ({"normalize": [{}, None]}, "VecNormalize is {'clip_obs': 10.0, "),
        ({"total_timesteps": [128, 256]}, "total_timesteps is 128 on rank 0, but 256 on rank 1"),
        ({"policy_kwargs": [{}, {"net_arch": [8]}]}, "the shapes of the policy's parameters is ((64, 4), "),
        (
            {"policy_kwargs": [{"activation_fn": th.nn.Tanh}, {"activation_fn": th.nn.ReLU}]},
            "policy_kwargs is {'activation_fn': <class 'torch.nn.modules.activation.Tanh'>} on rank 0, but ",
        ),
        (
            {"kl_rule": ["adaptive", {"name": "adaptive", "decrease": 0.9}]},
            "kl_rule is 'adaptive' on rank 0, but {'decrease': 0.9",
        ),
        (
            {"kl_rule": [{"name": "adaptive", "high": high} for high in (1.5, 2.0)]},
            "kl_rule is {'high': 1.5, 'name': 'adaptive'}",
        ),
        ({"normalize": [{"norm_reward": True}, {"norm_reward": False}]}, "'norm_reward': True} on rank 0, but {"),
        ({"normalize": [{"clip_obs": 5.0}, {"clip_obs": 10.0}]}, "VecNormalize is {'clip_obs': 5.0, "),
    ],
    ids=str,
)
def test_ranks_must_be_given_the_same(ranks: Ranks, of_ranks: dict[str, list[Any]], message: str) -> None:
    for error in ranks.run(learned_with, of_ranks):
        assert isinstance(error, RanksDisagree)
        assert message in str(error)


def test_spaces_are_compared_by_all_that_they_are() -> None:
    """Policies for them have the same shapes."""
    for one, other in (
        (spaces.MultiDiscrete([2, 3]), spaces.MultiDiscrete([3, 2])),
        (spaces.Discrete(2), spaces.Discrete(2, start=1)),
        (spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (3,))),
    ):
        assert repr(comparable(one)) != repr(comparable(other))
        assert repr(comparable({"space": one})) == repr(comparable({"space": copy.deepcopy(one)}))


@dataclass(frozen=True)
class RuleOfUser(PenaltyRule):
    """Holds a function, whose representation has an address."""

    change: Callable[[float], float]

    def __call__(self, kl_coef: float, kl: float, target_kl: float) -> float:
        return self.change(kl_coef)


def trained_with_a_rule() -> dict[str, Any]:
    return learned(kl_rule=RuleOfUser(lambda kl_coef: 2 * kl_coef), policy_kwargs={"net_arch": {"pi": [8], "vf": [8]}})


def test_functions_are_the_same_on_all_ranks(ranks: Ranks) -> None:
    first, second = ranks.run(trained_with_a_rule)
    check_same_model(first, second)
    assert first["kl_coef"] > 1


def test_arguments_that_change_nothing_may_differ(ranks: Ranks) -> None:
    assert ranks.run(learned_with, {"verbose": [1, 0], "tensorboard_log": [None, "unused"]}) == [None, None]


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
        (ChangesOneRank("target_kl", 0.5), "target_kl is 0.02 on rank 0, but 0.5 on rank 1"),
        # As this NumPy prints it: 0.5 before 2.0
        (ChangesOneRank("gamma", np.float64(0.5)), f"gamma is 0.99 on rank 0, but {np.float64(0.5)!r} on rank 1"),
        (MovesOneRank(), "the checksum of the parameters is "),
        (FreezesOneRank(), "the choice of trainable parameters is (True, True"),
    ],
)
def test_ranks_that_disagree_all_say_where(ranks: Ranks, callback: BaseCallback, message: str) -> None:
    for error in ranks.run(learned, "DistributedAdaptiveKLPPO", callback):
        assert isinstance(error, RanksDisagree)
        assert message in str(error)


class OneRewardIsNaN(gym.Wrapper):
    """Gives one NaN as a reward, on rank 1 only."""

    n_calls = 0

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        self.n_calls += 1
        return observation, math.nan if dist.get_rank() == 1 and self.n_calls == 20 else reward, *rest


def learned_undoing_the_first_update(policy: Any, env: gym.Env, **arguments: Any) -> dict[str, Any]:
    model = DistributedAdaptiveKLPPO(policy, env, **SMALL, **arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The update at 128 timesteps produced a non-finite")
        model.learn(256)
    return outcome(model)


def learned_from_nan() -> dict[str, Any]:
    return learned_undoing_the_first_update("MlpPolicy", OneRewardIsNaN(make_env()))


def test_nan_on_one_rank_undoes_the_update_on_all(ranks: Ranks) -> None:
    first, second = ranks.run(learned_from_nan)
    check_same_model(first, second)
    assert first["undone"] == 1
    assert first["parameters"].isfinite().all()


class FailsOnOneRank(ActorCriticPolicy):
    """Cannot be evaluated on rank 1, in the second minibatch of the first update, as if its distributions were invalid."""

    n_steps = n_failures = 0

    def evaluate_actions(self, *args: Any) -> Any:
        self.n_steps += th.is_grad_enabled()
        # In the second step, and in the sweep that then asks about the policy
        if dist.get_rank() == 1 and self.n_steps == 2 and self.n_failures < 2:
            self.n_failures += 1
            raise ValueError("invalid distribution")
        return super().evaluate_actions(*args)


def learned_with_failing_policy() -> dict[str, Any]:
    return learned_undoing_the_first_update(FailsOnOneRank, make_env())


def test_a_policy_that_diverged_on_one_rank_undoes_the_update_on_all(ranks: Ranks) -> None:
    first, second = ranks.run(learned_with_failing_policy)
    check_same_model(first, second)
    assert first["undone"] == 1
    assert first["parameters"].isfinite().all()


def error_of_a_hinge(by_callback: bool) -> str:
    model = DistributedAdaptiveKLPPO("MlpPolicy", make_env(), kl_cutoff_coef=0.0 if by_callback else 1000.0, **SMALL)

    def callback(*_: Any) -> bool:
        model.kl_cutoff_coef = 1000.0
        return True

    with pytest.raises(ValueError) as error:  # noqa: PT011  # matched in the main process
        model.learn(64, callback)
    return str(error.value)


@pytest.mark.parametrize("by_callback", [False, True])
def test_hinge_is_refused(ranks: Ranks, by_callback: bool) -> None:
    for message in ranks.run(error_of_a_hinge, by_callback):
        assert message == "kl_cutoff_coef=1000.0 needs one process: pass 0, and a kl_ceiling"
