"""
Minibatches that know which transitions they hold: shuffled for training, in order for measuring.

SB3's minibatches do not say which transitions were drawn, but the old policy's parameters are stored once per rollout and
looked up by index. All buffers of SB3 and sb3-contrib draw through ``_get_samples(indices, …)``: recording its calls gives the
indices for any buffer, padded or masked, without changing the buffer or its random numbers.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_adaptive_kl.rollout.distributions import is_stock, replaced

# Draw at most this many bytes of the rollout at a time: images would otherwise be in memory twice
BLOCK_BYTES = 2**21
# Modules whose _get_samples indexes row by row and whose get() cuts one permutation: SB3's and contrib's maskable buffers
ROW_BY_ROW = ("stable_baselines3.common.buffers", "sb3_contrib.common.maskable.buffers")


class Draw(NamedTuple):
    """One call of ``buffer._get_samples(batch_inds, *args, **kwargs)`` and its result."""

    samples: Any
    batch_inds: np.ndarray
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def minibatches(buffer: RolloutBuffer, batch_size: int | None) -> Iterator[tuple[Any, th.Tensor]]:
    """
    Draw one epoch of ``buffer.get(batch_size)``, each minibatch with the indices of its transitions.

    :param buffer: a full rollout buffer of SB3 or sb3-contrib, or a user's that draws through ``_get_samples``
    :param batch_size: transitions per minibatch, None for all at once
    :return: pairs of the buffer's samples and their indices into the flattened rollout, shape (B,), on the buffer's device;
        padded samples hold more rows than there are indices, the valid ones in the order of the indices
    :raises ValueError: if the buffer does not draw through ``_get_samples``, or draws an empty minibatch
    """
    size = int(batch_size or buffer.buffer_size * buffer.n_envs)  # torch cannot split by NumPy's integers
    n_per_draw = 1
    # Indexing a rollout costs the same for 64 transitions and for 2048: draw several minibatches at once where the buffer cuts
    # one permutation, so that the block holds just the minibatches that the buffer would draw
    if all(is_stock(buffer, name, ROW_BY_ROW) for name in ("get", "_get_samples")):
        n_per_draw = max(1, transitions_per_block(buffer) // size)
    for samples, draw in _draws(buffer, n_per_draw * size):
        index = to_device(draw.batch_inds, buffer.device)
        if n_per_draw == 1:
            yield samples, index
        else:
            yield from zip(_split(samples, size), th.split(index, size), strict=True)


def to_device(array: Any, device: th.device) -> th.Tensor:
    """
    Copy an array to a device. A copy from pageable memory waits for all work that a GPU has been given; from pinned memory it
    is queued like everything else.

    :param array: NumPy's, or a tensor on the CPU; on the CPU, contiguous arrays share their memory
    :param device: where to
    :return: the tensor; a GPU may still be about to copy it
    """
    # as_tensor() would follow torch's default device
    tensor: th.Tensor = th.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array
    # torch keeps pinned memory until it has been copied
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def transitions_per_block(buffer: RolloutBuffer) -> int:
    """Count the transitions that fit into BLOCK_BYTES, at least 1."""
    fields = [*vars(buffer).values(), *(buffer.observations.values() if isinstance(buffer.observations, dict) else ())]
    n_bytes = sum(field.nbytes for field in fields if isinstance(field, np.ndarray))
    return max(1, BLOCK_BYTES * buffer.buffer_size * buffer.n_envs // n_bytes)


def in_order(buffer: RolloutBuffer, chunk_size: int) -> Iterator[tuple[Any, th.Tensor]]:
    """
    Draw every transition of the rollout once, in the order of the flattened rollout: one environment after the other.

    That of a policy with a memory is cut only where an episode or an environment ends: a sequence cut in two would restart
    from the old policy's hidden state, which hides a part of the divergence.

    :param buffer: as for ``minibatches``
    :param chunk_size: transitions at a time, at most, padding included; one whole sequence at least
    :return: as for ``minibatches``
    :raises ValueError: as for ``minibatches``
    """
    samples_at = _sampler(buffer)
    n_transitions = buffer.buffer_size * buffer.n_envs
    cuts = _cuts_between_sequences(buffer, chunk_size) if has_sequences(buffer) else range(0, n_transitions, chunk_size)
    for start, end in pairwise([*cuts, n_transitions]):
        yield samples_at(np.arange(start, end))


def has_sequences(buffer: RolloutBuffer) -> bool:
    """Whether the rollout is of a policy with a memory."""
    return hasattr(buffer, "hidden_states_pi")


def through_time(buffer: RolloutBuffer, chunk_size: int) -> Iterator[tuple[Any, th.Tensor]]:
    """
    Draw every transition of the rollout once, in the order of time: some steps of all environments, then their next steps.

    :param buffer: as for ``minibatches``
    :param chunk_size: transitions at a time, at most, but one step of each environment at least
    :return: as for ``minibatches``; within a chunk, one environment after the other
    :raises ValueError: as for ``minibatches``
    """
    samples_at = _sampler(buffer)
    first_steps = np.arange(0, buffer.buffer_size * buffer.n_envs, buffer.buffer_size)
    n_steps = max(chunk_size // buffer.n_envs, 1)
    for start, end in pairwise([*range(0, buffer.buffer_size, n_steps), buffer.buffer_size]):
        yield samples_at((first_steps[:, None] + np.arange(start, end)).flatten())


def _sampler(buffer: RolloutBuffer) -> Callable[[np.ndarray], tuple[Any, th.Tensor]]:
    """Flatten the rollout, and return the function that draws its transitions by their indices."""
    # The first minibatch of an epoch: drawing it flattens the rollout, and shows the arguments of _get_samples
    with closing(_draws(buffer, batch_size=1)) as epoch:
        _, draw = next(epoch)

    def samples_at(batch_inds: np.ndarray) -> tuple[Any, th.Tensor]:
        samples = buffer._get_samples(batch_inds, *draw.args, **draw.kwargs)
        return samples, to_device(batch_inds, buffer.device)

    return samples_at


def _cuts_between_sequences(buffer: RolloutBuffer, chunk_size: int) -> list[int]:
    """
    Choose where chunks begin. Sequences are padded to the longest of their chunk: one long episode among many short ones would
    otherwise take memory quadratic in the length of the rollout.
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


def _split(samples: Any, batch_size: int) -> Iterator[Any]:
    """Split the samples of a block into minibatches, which are views of it. Observations may be a dict of tensors."""

    def split(field: Any) -> Any:
        if not isinstance(field, dict):
            return field.split(batch_size)
        parts = zip(*(tensor.split(batch_size) for tensor in field.values()), strict=True)
        return [dict(zip(field, part, strict=True)) for part in parts]

    return map(type(samples)._make, zip(*map(split, samples), strict=True))


def _draws(buffer: RolloutBuffer, batch_size: int) -> Generator[tuple[Any, Draw], None, None]:
    """Iterate over ``buffer.get(batch_size)`` while recording its calls of ``_get_samples``."""
    pending: list[Draw] = []
    get_samples = buffer._get_samples

    def recording(batch_inds: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        samples = get_samples(batch_inds, *args, **kwargs)
        pending.append(Draw(samples, batch_inds, args, kwargs))
        return samples

    with replaced(buffer, _get_samples=recording):
        for samples in buffer.get(batch_size):
            # Match by identity, since get() may prefetch or drop draws. If it returns modified samples, there must be exactly
            # one pending draw
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


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the global generators of NumPy and of torch on the CPU on exit."""
    # Not a GPU's: only a policy that is random in eval mode, which is warned about, draws from it
    numpy_state = np.random.get_state()
    try:
        with th.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numpy_state)
