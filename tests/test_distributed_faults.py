"""When one rank fails, all end soon, with a message that names it and its reason."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch.distributed as dist
from sb3_adaptive_kl.distributed.failure import GRACE_SECONDS
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.distributed import RankFailure
from tests.ranks import Ranks

SECONDS_ALIVE = 4
TIMEOUT = timedelta(seconds=2)


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    processes = Ranks(tmp_path_factory.mktemp("ranks"), 3)
    yield processes
    processes.stop()


@pytest.fixture
def mortal_ranks(tmp_path: Path) -> Iterator[Ranks]:
    processes = Ranks(tmp_path, 3)
    processes.run(dist.barrier)  # they have started
    yield processes
    processes.stop()


class Failing(gym.Wrapper):
    """Calls a function in its 100th step on one rank."""

    n_calls = 0

    def __init__(self, env: gym.Env, rank: int, fail: Callable[[], None]) -> None:
        super().__init__(env)
        self.rank, self.fail = rank, fail

    def step(self, action: Any) -> Any:
        self.n_calls += 1
        if dist.get_rank() == self.rank and self.n_calls == 100:
            self.fail()
        return super().step(action)


def raise_error() -> None:
    raise KeyError("no such joint")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(TIMEOUT.total_seconds() + GRACE_SECONDS + 3)  # until the others have given up


def sleep_briefly() -> None:
    time.sleep(1)


def learn(rank: int, fail: Callable[[], None], checkpoints: str | None = None) -> None:
    env = Monitor(Failing(gym.make("CartPole-v1"), rank, fail))
    callback = None if checkpoints is None else CheckpointCallback(64, checkpoints)
    AdaptiveKLPPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=2, device="cpu").learn(10_000, callback=callback)


def end_of(function: Callable[..., None], *args: Any) -> tuple[str, str, float]:
    """Tell how a function failed and when, after the process has lived on for some time."""
    try:
        function(*args)
    except Exception as error:
        end = time.monotonic()
        time.sleep(SECONDS_ALIVE)
        return type(error).__name__, str(error), end
    raise AssertionError("it did not fail")


def raise_in_setup() -> None:
    """Fail on rank 0 while the ranks connect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_adaptive_kl.distributed.ranks.make_folder", lambda _: raise_error())
        learn(0, raise_error)


def raise_after_nested() -> None:
    """Train another model in a callback, before rank 1 fails."""
    model = AdaptiveKLPPO("MlpPolicy", Failing(gym.make("CartPole-v1"), 1, raise_error), n_steps=64, device="cpu")
    other = AdaptiveKLPPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu")
    model.learn(10_000, callback=lambda *_: model.num_timesteps != 30 or bool(other.learn(192)))


def raise_undecodable() -> None:
    raise ValueError("no such joint: " + os.fsdecode(b"\xe9"))


@pytest.mark.parametrize(
    ("failing", "function", "args"),
    [
        (0, learn, (0, raise_error)),
        (1, learn, (1, raise_error)),
        (1, learn, (1, raise_undecodable)),
        (0, raise_in_setup, ()),
        (1, raise_after_nested, ()),
    ],
    ids=["rank 0", "rank 1", "undecodable", "in setup", "after nested"],
)
def test_an_exception_ends_all_at_once_though_its_process_lives_on(
    three_ranks: Ranks, failing: int, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    ends = three_ranks.run(end_of, function, *args)
    times = [end for _, _, end in ends]
    assert max(times) - min(times) < SECONDS_ALIVE - 1
    for rank, (error, message, _) in enumerate(ends):
        assert "no such joint" in message
        if rank == failing:
            assert error in ("KeyError", "ValueError")
        else:
            assert error == "RankFailure"
            assert f"Rank {failing} of 3 failed: {ends[failing][0]}: " in message


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


def learn_with_failing_policy(fail: Callable[[], None]) -> None:
    kwargs = {"policy_kwargs": {"fail": fail}, "n_steps": 64, "batch_size": 16, "device": "cpu"}
    AdaptiveKLPPO(FailingInUpdate, "CartPole-v1", **kwargs).learn(192)


@pytest.mark.parametrize(
    ("fail", "message"), [(raise_error, "Rank 1 of 3 failed: KeyError: 'no such joint'"), (hang, "Rank 1 of 3 has ended")]
)
def test_a_failure_within_an_update_ends_all(three_ranks: Ranks, fail: Callable[[], None], message: str) -> None:
    first, _, third = three_ranks.run(end_of, learn_with_failing_policy, fail, timeout=TIMEOUT)
    for error, told, _ in (first, third):
        assert error == "RankFailure"
        assert message in told
    assert abs(first[-1] - third[-1]) < SECONDS_ALIVE - 1


def learn_after_failure() -> int:
    """Train again, in the same process group."""
    try:
        learn(1, raise_error)
    except (KeyError, RankFailure):
        model = AdaptiveKLPPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2, device="cpu").learn(192)
    return model.num_timesteps


def test_a_caught_failure_does_not_disturb_the_next_learn(three_ranks: Ranks) -> None:
    assert three_ranks.run(learn_after_failure) == [192, 192, 192]


def fail_and_exit() -> None:
    """Fail on rank 0, whose process is gone as soon as ``learn()`` has raised, while the others are in their rollouts."""
    try:
        learn(dist.get_rank(), raise_error if dist.get_rank() == 0 else sleep_briefly)
    except KeyError:
        os._exit(1)


def test_the_reason_of_rank_0_is_read_before_its_store_is_gone(mortal_ranks: Ranks) -> None:
    first, *others = mortal_ranks.run(fail_and_exit, ends=True, rank_0_holds_store=True)
    assert first is None
    for error in others:
        assert isinstance(error, RankFailure)
        assert "Rank 0 of 3 failed: KeyError: 'no such joint'" in str(error)


def learn_while_another_is_slow(checkpoints: str, grace: float) -> None:
    """Rank 1 is killed while rank 2 is in the middle of a long rollout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_adaptive_kl.distributed.failure.GRACE_SECONDS", grace)
        learn(dist.get_rank(), {0: sleep_briefly, 1: kill, 2: hang}[dist.get_rank()], checkpoints)


def test_a_killed_rank_is_named_by_all_others(mortal_ranks: Ranks, tmp_path: Path) -> None:
    first, second, third = mortal_ranks.run(learn_while_another_is_slow, str(tmp_path / "checkpoints"), 0.5, ends=True)
    assert second is None
    for error in (first, third):
        assert isinstance(error, RankFailure)
        assert "Rank 1 of 3 has ended without a message" in str(error)
    # What is left can be continued from
    checkpoints = sorted(tmp_path.glob("checkpoints/*"))
    assert [path.name for path in checkpoints] == ["rl_model_192_steps.zip", "rl_model_384_steps.zip"]
    assert [AdaptiveKLPPO.load(path, device="cpu").num_timesteps for path in checkpoints] == [192, 384]


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("fail", [kill, stop])
def test_a_rank_0_that_was_lost_takes_its_store_with_it(mortal_ranks: Ranks, fail: Callable[[], None]) -> None:
    # A stopped process would not send its result. The others end after the timeout, and twice the grace period for the store
    threading.Timer(TIMEOUT.total_seconds() + 2 * GRACE_SECONDS + 6, mortal_ranks.processes[0].kill).start()
    first, *others = mortal_ranks.run(learn, 0, fail, ends=True, rank_0_holds_store=True, timeout=TIMEOUT)
    assert first is None
    for error in others:
        assert isinstance(error, RankFailure)
        assert "The rank that holds the group's store (rank 0, unless torchrun holds it) has ended" in str(error)


def exit_in_setup() -> None:
    """End rank 1 while the ranks connect."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr("sb3_adaptive_kl.distributed.ranks.SharedMemory.connect", lambda _: os._exit(1))
        learn(1, raise_error)


def test_a_rank_that_ends_in_setup_is_named(mortal_ranks: Ranks) -> None:
    first, second, third = mortal_ranks.run(exit_in_setup, ends=True)
    assert second is None
    for error in (first, third):
        assert isinstance(error, RankFailure)
        assert "Rank 1 of 3 has ended without a message" in str(error)


def learn_unless_rank_1() -> None:
    if dist.get_rank() == 1:
        hang()
    else:
        AdaptiveKLPPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(128)


@pytest.mark.parametrize(("function", "arguments"), [(learn_unless_rank_1, ()), (learn, (1, hang))])
def test_a_rank_that_does_not_arrive_is_named(three_ranks: Ranks, function: Any, arguments: tuple[Any, ...]) -> None:
    first, _, third = three_ranks.run(function, *arguments, timeout=TIMEOUT)
    for error in (first, third):
        assert isinstance(error, RankFailure)
        assert "Rank 1 of 3 has ended without a message (killed, perhaps for lack of memory), or did not arrive" in str(error)
