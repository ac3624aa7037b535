"""When one rank fails, all end, and soon; nothing half-written is left."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch.distributed as dist
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.distributed import DistributedAdaptiveKLPPO
from tests.ranks import SMALL, TIMEOUT, Ranks

SHORT = timedelta(seconds=2)


@pytest.fixture
def mortal_ranks(tmp_path: Path) -> Iterator[Ranks]:
    processes = Ranks(tmp_path, 3)
    processes.run(started)
    yield processes
    processes.stop()


def started() -> None:
    """Import what learning needs."""
    DistributedAdaptiveKLPPO("MlpPolicy", "CartPole-v1", **SMALL)


class Failing(gym.Wrapper):
    """Calls a function in its 150th step on rank 1."""

    n_calls = 0

    def __init__(self, fail: Callable[[], None]) -> None:
        super().__init__(gym.make("CartPole-v1"))
        self.fail = fail

    def step(self, action: Any) -> Any:
        self.n_calls += 1
        if dist.get_rank() == 1 and self.n_calls == 150:
            self.fail()
        return super().step(action)


class FailingInUpdate(ActorCriticPolicy):
    """Calls a function on rank 1 in the third minibatch of the first update."""

    n_calls = 0

    def __init__(self, *args: Any, fail: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fail = fail

    def evaluate_actions(self, *args: Any) -> Any:
        self.n_calls += 1
        if dist.get_rank() == 1 and self.n_calls == 4:  # a sweep over the rollout comes first
            self.fail()
        return super().evaluate_actions(*args)


def raise_error() -> None:
    raise KeyError("no such joint")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(2 * SHORT.total_seconds())


def fail_in_rollout(fail: Callable[[], None], checkpoints: Path) -> None:
    model = DistributedAdaptiveKLPPO("MlpPolicy", Failing(fail), **SMALL)
    model.learn(10_000, callback=CheckpointCallback(64, str(checkpoints)))


def fail_in_update(fail: Callable[[], None], _: Path) -> None:
    DistributedAdaptiveKLPPO(FailingInUpdate, "CartPole-v1", policy_kwargs={"fail": fail}, **SMALL).learn(10_000)


@pytest.mark.parametrize("function", [fail_in_rollout, fail_in_update])
@pytest.mark.parametrize("fail", [raise_error, kill])
def test_a_rank_that_ends_ends_the_others_at_once(
    mortal_ranks: Ranks, function: Callable[..., None], fail: Callable[[], None], tmp_path: Path
) -> None:
    start = time.monotonic()
    first, second, third = mortal_ranks.run(function, fail, tmp_path / "checkpoints", ends=True)
    assert time.monotonic() - start < TIMEOUT.total_seconds() / 2
    assert type(second) is (KeyError if fail is raise_error else type(None))
    assert all(isinstance(error, RuntimeError) for error in (first, third))
    if function is fail_in_rollout:  # it can be continued from the last checkpoint
        # Rank 0 saves at the end of each rollout. It does not know yet, when it ends the third
        steps = sorted(int(path.name.split("_")[2]) for path in (tmp_path / "checkpoints").iterdir())
        assert steps in ([192, 384], [192, 384, 576])
        last = tmp_path / "checkpoints" / f"rl_model_{steps[-1]}_steps"
        model = AdaptiveKLPPO.load(last, env=gym.make("CartPole-v1"), device="cpu")
        assert model.learn(64, reset_num_timesteps=False).num_timesteps == steps[-1] + 64


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(mortal_ranks: Ranks) -> None:
    start = time.monotonic()
    first, _, third = mortal_ranks.run(fail_in_update, hang, None, timeout=SHORT, ends=True)
    assert time.monotonic() - start > SHORT.total_seconds()
    assert all(isinstance(error, RuntimeError) for error in (first, third))


def learn_unless_rank_1() -> None:
    if dist.get_rank() == 1:
        return hang()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_adaptive_kl.distributed.ranks.ARRIVAL_TIMEOUT", SHORT)
        DistributedAdaptiveKLPPO("MlpPolicy", "CartPole-v1", **SMALL).learn(128)


def test_a_rank_that_does_not_call_learn_is_named(mortal_ranks: Ranks) -> None:
    first, _, third = mortal_ranks.run(learn_unless_rank_1, ends=True)
    assert all(isinstance(error, RuntimeError) for error in (first, third))
    assert "Rank 1 failed to pass monitoredBarrier in 2000 ms" in str(first)


def save_and_be_killed(folder: Path) -> None:
    """Save twice; the second time, rank 0 is killed while it writes."""
    model = DistributedAdaptiveKLPPO("MlpPolicy", "CartPole-v1", **SMALL)
    model.save(folder / "model")
    model.num_timesteps = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zipfile.ZipFile.close", lambda *_: kill())
        model.save(folder / "model")


def test_a_rank_that_is_killed_while_it_saves_leaves_the_last_checkpoint(mortal_ranks: Ranks, tmp_path: Path) -> None:
    assert mortal_ranks.run(save_and_be_killed, tmp_path, ends=True)[0] is None
    assert AdaptiveKLPPO.load(tmp_path / "model", device="cpu").num_timesteps == 0
    assert sorted(path.name for path in tmp_path.glob("*model*")) == [".model.zip.unfinished", "model.zip"]
