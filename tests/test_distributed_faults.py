"""When one rank fails, all end soon, with a message that names it and its reason."""

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch.distributed as dist
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.monitor import Monitor

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.distributed.failure import RankFailure
from tests.ranks import Ranks

SECONDS_TO_END = 20


@pytest.fixture
def three_ranks(tmp_path: Path) -> Iterator[Ranks]:
    processes = Ranks(tmp_path, 3)
    yield processes
    processes.stop()


class Failing(gym.Wrapper):
    """Calls a function in its 100th step on rank 1."""

    n_calls = 0

    def __init__(self, env: gym.Env, fail: Any) -> None:
        super().__init__(env)
        self.fail = fail

    def step(self, action: Any) -> Any:
        self.n_calls += 1
        if dist.get_rank() == 1 and self.n_calls == 100:
            self.fail()
        return super().step(action)


def raise_error() -> None:
    raise KeyError("no such joint")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(3600)


def learn(fail: Any, checkpoints: str | None = None) -> None:
    env = Monitor(Failing(gym.make("CartPole-v1"), fail))
    callback = None if checkpoints is None else CheckpointCallback(64, checkpoints)
    AdaptiveKLPPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=2, device="cpu").learn(10_000, callback=callback)


def test_an_exception_on_one_rank_ends_all_with_its_message(three_ranks: Ranks) -> None:
    three_ranks.run(dist.barrier)
    start = time.monotonic()
    first, second, third = three_ranks.run(learn, raise_error, ends=True)
    assert time.monotonic() - start < SECONDS_TO_END
    assert isinstance(second, KeyError)
    for error in (first, third):
        assert isinstance(error, RankFailure)
        assert "Rank 1 of 3 failed: KeyError: 'no such joint'" in str(error)


def test_a_killed_rank_is_named_by_all_others(three_ranks: Ranks, tmp_path: Path) -> None:
    three_ranks.run(dist.barrier)
    start = time.monotonic()
    first, second, third = three_ranks.run(learn, kill, str(tmp_path / "checkpoints"), ends=True)
    assert time.monotonic() - start < SECONDS_TO_END
    assert second is None
    for error in (first, third):
        assert isinstance(error, RankFailure)
        assert "Rank 1 of 3 has ended without a message" in str(error)
    # What is left can be continued from
    checkpoints = sorted(tmp_path.glob("checkpoints/*"))
    assert [path.name for path in checkpoints] == ["rl_model_192_steps.zip", "rl_model_384_steps.zip"]
    assert [AdaptiveKLPPO.load(path, device="cpu").num_timesteps for path in checkpoints] == [192, 384]


def learn_unless_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(10)
    else:
        AdaptiveKLPPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(128)


@pytest.mark.parametrize(("function", "arguments"), [(learn_unless_rank_1, ()), (learn, (hang,))])
def test_a_rank_that_does_not_arrive_is_named(three_ranks: Ranks, function: Any, arguments: tuple[Any, ...]) -> None:
    first, _, third = three_ranks.run(function, *arguments, timeout=timedelta(seconds=4), ends=True, awaited=(0, 2))
    for error in (first, third):
        assert isinstance(error, RankFailure)
        assert "Rank 1 of 3 has ended without a message (killed, perhaps for lack of memory), or did not arrive" in str(error)
