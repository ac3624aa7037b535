"""Callbacks that write files run on rank 0 only, the others on all ranks; each can stop all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rl_zoo3.callbacks import RawStatisticsCallback, SaveVecNormalizeCallback
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env

from sb3_adaptive_kl.distributed import DistributedAdaptiveKLPPO
from sb3_adaptive_kl.distributed.callbacks import callbacks_of_this_rank
from tests.ranks import SMALL, Ranks, check_same_model, make_env, outcome


class ListOfUser(CallbackList):
    """Has a class of its own, and perhaps a behavior of its own."""


def test_callbacks_that_write_files_run_on_rank_0_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoints, evaluation = CheckpointCallback(10, str(tmp_path)), EvalCallback(make_env())
    mine, also_mine = StopTrainingOnMaxEpisodes(5), EveryNTimesteps(10, StopTrainingOnMaxEpisodes(5))
    nested, of_user = EveryNTimesteps(10, CheckpointCallback(1, str(tmp_path))), ListOfUser([mine, evaluation])
    of_zoo = [SaveVecNormalizeCallback(1, str(tmp_path)), RawStatisticsCallback()]
    callback = [checkpoints, CallbackList([mine, evaluation]), nested, of_user, also_mine, *of_zoo]
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    first = callbacks_of_this_rank(callback, progress_bar=True).callbacks[1:]
    assert first[:-1] == [checkpoints, mine, evaluation, nested, of_user, also_mine, *of_zoo]
    assert isinstance(first[-1], ProgressBarCallback)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert callbacks_of_this_rank(callback, progress_bar=True).callbacks[1:] == [mine, also_mine]


class ListsNothing(BaseCallback):
    """A user's attribute with the same name as SB3's."""

    callbacks = callback = None

    def _on_step(self) -> bool:
        return True


def test_attributes_of_the_users_are_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    one = ListsNothing()
    assert callbacks_of_this_rank(one, progress_bar=False).callbacks[1:] == [one]


class StopsOnOneRank(BaseCallback):
    """Stops rank 1 in the middle of its second rollout."""

    def _on_step(self) -> bool:
        return not (dist.get_rank() == 1 and self.n_calls == 80)


def stopped() -> dict[str, Any]:
    model = DistributedAdaptiveKLPPO("MlpPolicy", make_vec_env(make_env, 2), **SMALL)
    return outcome(model.learn(10_000, callback=StopsOnOneRank()))


def test_a_callback_that_stops_one_rank_stops_all(ranks: Ranks) -> None:
    first, second = ranks.run(stopped)
    check_same_model(first, second)
    assert first["num_timesteps"] == 2 * 2 * 2 * 64
