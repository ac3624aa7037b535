"""Which callbacks run on which rank, and the count of time steps that they see."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy

from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EventCallback,
    ProgressBarCallback,
)
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_adaptive_kl.distributed.ranks import rank, world_size

# They write files or draw, and what they evaluate is the same on all ranks
ONLY_ON_RANK_0 = (CheckpointCallback, EvalCallback, ProgressBarCallback)
# By name, since the zoo is optional
OF_ZOO_ONLY_ON_RANK_0 = ("rl_zoo3.callbacks.SaveVecNormalizeCallback", "rl_zoo3.callbacks.RawStatisticsCallback")


class CountAllRanks(BaseCallback):
    """
    Adds the time steps of the other ranks to ``num_timesteps``, before the callbacks after it see it, and to progress bars.

    :param progress_bars: those of this rank
    """

    def __init__(self, progress_bars: Sequence[ProgressBarCallback]) -> None:
        super().__init__()
        self.progress_bars = progress_bars

    def _on_step(self) -> bool:
        of_others = (world_size() - 1) * self.training_env.num_envs
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
    mine = [] if callback is None else _of_this_rank(callback)
    if progress_bar and rank() == 0:
        mine.append(ProgressBarCallback())
    return CallbackList([CountAllRanks([one for one in _nested(mine) if isinstance(one, ProgressBarCallback)]), *mine])


def _of_this_rank(callback: list[BaseCallback] | Callable[..., bool] | BaseCallback) -> list[BaseCallback]:
    """Return a callback, or those in a list, without those that run on rank 0 only if this is another rank."""
    if isinstance(callback, list):
        return [mine for one in callback for mine in _of_this_rank(one)]
    if isinstance(callback, CallbackList) and rank() > 0:  # copied, because the list is the user's
        of_this_rank = copy(callback)
        of_this_rank.callbacks = _of_this_rank(callback.callbacks)
        return [of_this_rank]
    if not isinstance(callback, BaseCallback):
        return [ConvertCallback(callback)]
    return [] if rank() > 0 and any(map(_is_only_on_rank_0, _nested([callback]))) else [callback]


def _nested(callbacks: Sequence[BaseCallback]) -> Iterator[BaseCallback]:
    """Iterate over callbacks and those that they call in turn."""
    for callback in callbacks:
        yield callback
        if isinstance(callback, CallbackList):
            yield from _nested(callback.callbacks)
        elif isinstance(callback, EventCallback) and callback.callback is not None:
            yield from _nested([callback.callback])


def _is_only_on_rank_0(callback: BaseCallback) -> bool:
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(callback).__mro__)
    return isinstance(callback, ONLY_ON_RANK_0) or any(name in OF_ZOO_ONLY_ON_RANK_0 for name in names)
