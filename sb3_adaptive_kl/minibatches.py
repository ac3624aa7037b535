"""
Rollout buffer → minibatches that know which transitions they hold: shuffled for training, in order for measuring.

The minibatches of SB3's rollout buffers do not say which transitions were drawn, but the old policy's parameters are stored
once per rollout and have to be looked up by index. All buffers of SB3 and sb3-contrib draw through ``_get_samples(indices,
…)``: listening there gives the indices of any buffer, padded or masked, without a change to the buffer or to its random
numbers. Where they draw row by row, several minibatches are drawn at once, since a draw costs the same for 64 and for 2048.
"""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

# Bytes of the rollout that are drawn at a time, where several minibatches can be: all of it but for images
BLOCK_BYTES = 2**21
# Where _get_samples indexes row by row, and get() cuts one permutation: SB3's buffers and contrib's maskable ones
ROW_BY_ROW = ("stable_baselines3.common.buffers", "sb3_contrib.common.maskable.buffers")


class Draw(NamedTuple):
    """One call of ``buffer._get_samples(batch_inds, *args, **kwargs)`` and what it gave."""

    samples: Any
    batch_inds: np.ndarray
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def minibatches(buffer: RolloutBuffer, batch_size: int | None) -> Generator[tuple[Any, th.Tensor], None, None]:
    """
    One epoch of ``buffer.get(batch_size)``, each minibatch with the indices of its transitions.

    :param buffer: a full rollout buffer of SB3 or sb3-contrib, or a user's that draws through ``_get_samples``
    :param batch_size: transitions per minibatch, None for all at once
    :return: pairs of the buffer's samples and their indices into the flattened rollout, shape (B,), on the buffer's device;
        padded samples hold more rows than there are indices, the valid ones in the order of the indices
    :raises ValueError: if the buffer does not draw through ``_get_samples``, or draws an empty minibatch
    """
    at_a_time = _minibatches_at_a_time(buffer, batch_size)
    for samples, draw in _draws(buffer, batch_size and at_a_time * batch_size):
        index = th.as_tensor(draw.batch_inds, device=buffer.device)
        if batch_size is None or at_a_time == 1:
            yield samples, index
        else:
            yield from zip(_split(samples, batch_size), th.split(index, batch_size), strict=True)


def _minibatches_at_a_time(buffer: RolloutBuffer, batch_size: int | None) -> int:
    """How many minibatches make a block: as many as BLOCK_BYTES hold, or one if the buffer is no plain one."""
    if batch_size is None or not {buffer.get.__module__, buffer._get_samples.__module__} <= set(ROW_BY_ROW):
        return 1
    return max(1, transitions_per_block(buffer) // batch_size)


def transitions_per_block(buffer: RolloutBuffer) -> int:
    """How many transitions BLOCK_BYTES hold."""
    fields = [*vars(buffer).values(), *(buffer.observations.values() if isinstance(buffer.observations, dict) else ())]
    n_bytes = sum(field.nbytes for field in fields if isinstance(field, np.ndarray))
    return max(1, BLOCK_BYTES * buffer.buffer_size * buffer.n_envs // n_bytes)


def _split(samples: Any, batch_size: int) -> Iterator[Any]:
    """The samples of a block as minibatches: views of it. Observations may be a dict of tensors."""

    def split(field: Any) -> Any:
        if not isinstance(field, dict):
            return field.split(batch_size)
        parts = zip(*(tensor.split(batch_size) for tensor in field.values()), strict=True)
        return [dict(zip(field, part, strict=True)) for part in parts]

    return map(type(samples)._make, zip(*map(split, samples), strict=True))


def in_order(buffer: RolloutBuffer, chunk_size: int, whole_sequences: bool = False) -> Iterator[tuple[Any, th.Tensor]]:
    """
    Every transition of the rollout once, in the order of the flattened rollout: one environment after the other.

    :param buffer: as for ``minibatches``
    :param chunk_size: transitions at a time, at most, padding included
    :param whole_sequences: whether to cut only where an episode or an environment ends; a chunk then holds at least one
        whole sequence, even if that is longer
    :return: as for ``minibatches``
    :raises ValueError: as for ``minibatches``
    """
    # The first minibatch of an epoch: drawing it flattens the rollout, and shows what _get_samples is called with
    with closing(_draws(buffer, batch_size=1)) as epoch:
        _, draw = next(epoch)
    n_transitions = buffer.buffer_size * buffer.n_envs
    cuts = _cuts_between_sequences(buffer, chunk_size) if whole_sequences else range(0, n_transitions, chunk_size)
    for start, end in pairwise([*cuts, n_transitions]):
        batch_inds = np.arange(start, end)
        samples = buffer._get_samples(batch_inds, *draw.args, **draw.kwargs)
        yield samples, th.as_tensor(batch_inds, device=buffer.device)


def _cuts_between_sequences(buffer: RolloutBuffer, chunk_size: int) -> list[int]:
    """
    Where chunks begin. Their sequences are padded to the longest: one long episode among many short ones would otherwise
    take memory quadratic in the length of the rollout.
    """
    begins = buffer.episode_starts.flatten() > 0
    begins[:: buffer.buffer_size] = True  # the first step of each environment
    sequences = np.flatnonzero(begins)
    cuts, n_sequences, longest = [0], 0, 0
    for start, length in zip(sequences, np.diff([*sequences, len(begins)]), strict=True):
        longest = max(longest, length)
        if n_sequences > 0 and (n_sequences + 1) * longest > chunk_size:
            cuts.append(int(start))
            n_sequences, longest = 0, length
        n_sequences += 1
    return cuts


def _draws(buffer: RolloutBuffer, batch_size: int | None) -> Generator[tuple[Any, Draw], None, None]:
    pending: list[Draw] = []
    get_samples = buffer._get_samples

    def listening(batch_inds: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        samples = get_samples(batch_inds, *args, **kwargs)
        pending.append(Draw(samples, batch_inds, args, kwargs))
        return samples

    buffer._get_samples = listening  # type: ignore[method-assign]
    try:
        for samples in buffer.get(batch_size):
            # By identity, since a buffer may draw ahead or drop what it has drawn; else the only one there is
            position = next((i for i, draw in enumerate(pending) if draw.samples is samples), 0)
            if not pending or (pending[position].samples is not samples and len(pending) > 1):
                raise ValueError(
                    f"rollout_buffer_class={type(buffer).__name__} does not draw its minibatches through "
                    "_get_samples(batch_inds, ...), so their transitions are unknown: subclass RolloutBuffer and "
                    "override _get_samples instead of get"
                )
            draw = pending[position]
            del pending[: position + 1]
            if len(draw.batch_inds) == 0:
                raise ValueError(
                    f"rollout_buffer_class={type(buffer).__name__} drew an empty minibatch, whose mean loss is NaN: "
                    "check its get() and batch_size"
                )
            yield samples, draw
    finally:
        del buffer._get_samples


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Draw from the global generators of NumPy and of torch on the CPU inside, and leave both as they were found."""
    numpy_state = np.random.get_state()
    try:
        with th.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numpy_state)
