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

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.distributed.callbacks import callbacks_of_this_rank
from tests.ranks import Ranks, check_same_model, make_env, outcome


class ListOfUser(CallbackList):
    """Has a class of its own, and perhaps a behavior of its own."""


def test_callbacks_that_write_files_run_on_rank_0_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoints, mine = CheckpointCallback(10, str(tmp_path)), StopTrainingOnMaxEpisodes(5)
    nested = EveryNTimesteps(10, CheckpointCallback(1, str(tmp_path)))
    harmless = EveryNTimesteps(10, StopTrainingOnMaxEpisodes(5))
    of_zoo = [SaveVecNormalizeCallback(1, str(tmp_path)), RawStatisticsCallback()]
    in_list = ListOfUser([mine, EvalCallback(make_env())])
    callback = [checkpoints, in_list, nested, harmless, *of_zoo]
    first = callbacks_of_this_rank(callback, progress_bar=True).callbacks[1:]
    assert first[:-1] == callback
    assert isinstance(first[-1], ProgressBarCallback)
    monkeypatch.setattr("sb3_adaptive_kl.distributed.callbacks.rank", lambda: 1)
    reduced, *rest = callbacks_of_this_rank(callback, progress_bar=True).callbacks[1:]
    assert type(reduced) is ListOfUser
    assert reduced.callbacks == [mine]
    assert rest == [harmless]
    assert len(in_list.callbacks) == 2  # that of the user has not changed


class StopsOnOneRank(BaseCallback):
    """Stops rank 1 in the middle of its second rollout."""

    def _on_step(self) -> bool:
        return not (dist.get_rank() == 1 and self.n_calls == 80)


def stopped() -> dict[str, Any]:
    model = AdaptiveKLPPO("MlpPolicy", make_vec_env(make_env, 2), n_steps=64, batch_size=32, n_epochs=2, device="cpu")
    return outcome(model.learn(10_000, callback=StopsOnOneRank()))


def test_a_callback_that_stops_one_rank_stops_all(ranks: Ranks) -> None:
    first, second = ranks.run(stopped)
    check_same_model(first, second)
    assert first["num_timesteps"] == 2 * 2 * 2 * 64
