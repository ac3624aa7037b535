"""Which callbacks run on which rank, and the count of time steps that they see."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.type_aliases import MaybeCallback

# SB3's and the zoo's that write files or draw; what they evaluate is the same on all ranks. By name, since the zoo is optional
ONLY_ON_RANK_0 = frozenset(
    ("CheckpointCallback", "EvalCallback", "ProgressBarCallback", "SaveVecNormalizeCallback", "RawStatisticsCallback")
)


class CountAllRanks(BaseCallback):
    """
    Adds the time steps of the other ranks to ``num_timesteps``, before the callbacks after it see it, and to progress bars.

    :param progress_bars: those of this rank
    """

    def __init__(self, progress_bars: Sequence[ProgressBarCallback]) -> None:
        super().__init__()
        self.progress_bars = progress_bars

    def _on_step(self) -> bool:
        of_others = (dist.get_world_size() - 1) * self.training_env.num_envs
        self.model.num_timesteps += of_others
        self.num_timesteps = self.model.num_timesteps
        for bar in self.progress_bars:
            bar.pbar.update(of_others)
        return True


def callbacks_of_this_rank(callback: MaybeCallback, progress_bar: bool) -> CallbackList:
    """
    Select the callbacks that run on this rank: all on rank 0, on the others all but those that write files or draw.

    :param callback: as the user gave it to ``learn()``
    :param progress_bar: whether the user asked for a progress bar
    :return: a list that begins with ``CountAllRanks``
    """
    # SB3 would add the bar itself, out of reach of CountAllRanks
    callbacks = [*_flat(callback), *([ProgressBarCallback()] if progress_bar else [])]
    mine = [one for one in callbacks if dist.get_rank() == 0 or not _is_only_on_rank_0(one)]
    return CallbackList([CountAllRanks([one for one in mine if isinstance(one, ProgressBarCallback)]), *mine])


def _flat(callback: Any) -> Iterator[BaseCallback]:
    """Iterate over the callbacks in lists. A list of a class of the user's stays: it may do more than call them."""
    if type(callback) in (list, CallbackList):
        for one in callback if isinstance(callback, list) else callback.callbacks:
            yield from _flat(one)
    elif callback is not None:
        yield callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)


def _is_only_on_rank_0(callback: BaseCallback) -> bool:
    """Check a callback, and those that it calls in turn."""
    called = callback.callbacks if isinstance(callback, CallbackList) else [getattr(callback, "callback", None)]
    is_named = not ONLY_ON_RANK_0.isdisjoint(base.__name__ for base in type(callback).__mro__)
    return is_named or any(_is_only_on_rank_0(one) for one in called if isinstance(one, BaseCallback))
