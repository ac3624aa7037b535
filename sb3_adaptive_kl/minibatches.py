"""
Rollout buffer → shuffled minibatches that know which transitions they hold.

The minibatches of SB3's rollout buffers do not say which transitions were drawn, but the old policy's parameters are stored
once per rollout and have to be looked up by index. All buffers of SB3 and sb3-contrib draw through ``_get_samples(indices,
…)``: listening there gives the indices of any buffer, padded or masked, without a change to the buffer or to its random
numbers.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer


def minibatches(buffer: RolloutBuffer, batch_size: int | None) -> Generator[tuple[Any, th.Tensor], None, None]:
    """
    One epoch of ``buffer.get(batch_size)``, each minibatch with the indices of its transitions.

    :param buffer: a full rollout buffer of SB3 or sb3-contrib, or a user's that draws through ``_get_samples``
    :param batch_size: transitions per minibatch, None for all at once
    :return: pairs of the buffer's samples and their indices into the flattened rollout, shape (B,), on the buffer's device;
        padded samples hold more rows than there are indices, the valid ones in the order of the indices
    :raises ValueError: if the buffer does not draw through ``_get_samples``, or draws an empty minibatch
    """
    drawn: list[np.ndarray] = []
    get_samples = buffer._get_samples

    def listening(batch_inds: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        drawn.append(batch_inds)
        return get_samples(batch_inds, *args, **kwargs)

    buffer._get_samples = listening  # type: ignore[method-assign]
    try:
        for samples in buffer.get(batch_size):
            if not drawn:
                raise ValueError(
                    f"rollout_buffer_class={type(buffer).__name__} does not draw its minibatches through "
                    "_get_samples(batch_inds, ...), so their transitions are unknown: subclass RolloutBuffer and "
                    "override _get_samples instead of get"
                )
            batch_inds = drawn.pop()
            if len(batch_inds) == 0:
                raise ValueError(
                    f"rollout_buffer_class={type(buffer).__name__} drew an empty minibatch, whose mean loss is NaN: "
                    "check its get() and batch_size"
                )
            yield samples, th.as_tensor(batch_inds, device=buffer.device)
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
