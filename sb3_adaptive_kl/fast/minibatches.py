"""Several minibatches per draw: indexing a rollout costs the same for 64 transitions and for 2048."""

from collections.abc import Iterator
from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_adaptive_kl.fast.sb3_policies import is_stock
from sb3_adaptive_kl.rollout.minibatches import minibatches, transitions_per_block

# Modules whose _get_samples indexes row by row and whose get() cuts one permutation: SB3's and contrib's maskable buffers
ROW_BY_ROW = ("stable_baselines3.common.buffers", "sb3_contrib.common.maskable.buffers")


def minibatches_in_blocks(buffer: RolloutBuffer, batch_size: int | None) -> Iterator[tuple[Any, th.Tensor]]:
    """
    Draw the same epoch as ``minibatches``, in fewer draws.

    :param buffer: a full rollout buffer
    :param batch_size: transitions per minibatch, None for all at once
    :return: as for ``minibatches``; the samples are views of a larger draw
    """
    if batch_size is None or not all(is_stock(buffer, name, ROW_BY_ROW) for name in ("get", "_get_samples")):
        yield from minibatches(buffer, batch_size)
        return
    n_minibatches = max(1, transitions_per_block(buffer) // batch_size)
    for samples, index in minibatches(buffer, n_minibatches * batch_size):
        yield from zip(_split(samples, batch_size), th.split(index, batch_size), strict=True)


def _split(samples: Any, batch_size: int) -> Iterator[Any]:
    """Split the samples of a block into minibatches, which are views of it. Observations may be a dict of tensors."""

    def split(field: Any) -> Any:
        if not isinstance(field, dict):
            return field.split(batch_size)
        parts = zip(*(tensor.split(batch_size) for tensor in field.values()), strict=True)
        return [dict(zip(field, part, strict=True)) for part in parts]

    return map(type(samples)._make, zip(*map(split, samples), strict=True))
