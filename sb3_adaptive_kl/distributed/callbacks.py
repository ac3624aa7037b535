"""Which callbacks run on which rank, and the count of time steps that they see."""

from collections.abc import Iterator, Sequence

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
    all_of_them = [*_flat(callback), *([ProgressBarCallback()] if progress_bar and rank() == 0 else [])]
    mine = [one for one in all_of_them if rank() == 0 or not _is_only_on_rank_0(one)]
    return CallbackList([CountAllRanks([one for one in mine if isinstance(one, ProgressBarCallback)]), *mine])


def _is_only_on_rank_0(callback: BaseCallback) -> bool:
    """Whether a callback, or the one that it calls on its event, belongs on rank 0."""
    if isinstance(callback, EventCallback) and callback.callback is not None and _is_only_on_rank_0(callback.callback):
        return True
    return isinstance(callback, ONLY_ON_RANK_0)


def _flat(callback: MaybeCallback) -> Iterator[BaseCallback]:
    if callback is None:
        return
    if isinstance(callback, list) or type(callback) is CallbackList:
        for one in callback if isinstance(callback, list) else callback.callbacks:
            yield from _flat(one)
    else:
        yield callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)
