"""Minibatches of all ranks together: as many on every rank, and advantages normalized over all of them."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch as th

from sb3_adaptive_kl.distributed.ranks import sum_over_ranks, world_size
from sb3_adaptive_kl.rollout.hosts import Host

# Minibatches drawn ahead, whose moments are reduced in one collective
N_AHEAD = 8


def minibatches_of_all_ranks(
    minibatches: Iterator[tuple[Any, th.Tensor]], host: Host, normalize_advantage: bool
) -> Iterator[tuple[Any, th.Tensor]]:
    """
    Iterate over an epoch in step with the other ranks. *Collective*, once per ``N_AHEAD`` minibatches.

    :param minibatches: this rank's
    :param host: knows what is padding
    :param normalize_advantage: whether to normalize the advantages by the mean and the standard deviation that they have on
        all ranks together
    :return: the same minibatches
    :raises ValueError: on all ranks, if one of them draws more minibatches than another
    """
    while True:
        ahead = list(islice(minibatches, N_AHEAD))
        moments = th.zeros(N_AHEAD, 4, dtype=th.float64)
        if ahead:
            valid = [_valid_advantages(rollout_data, host) for rollout_data, _ in ahead]
            moments[: len(ahead), 0] = 1
            moments[: len(ahead), 1] = th.tensor([len(advantages) for advantages in valid])
            moments[: len(ahead), 2] = th.stack([advantages.sum() for advantages in valid]).cpu()
            moments[: len(ahead), 3] = th.stack([advantages.square().sum() for advantages in valid]).cpu()
        n_ranks, n, total, total_of_squares = sum_over_ranks(moments).unbind(dim=1)
        if not n_ranks.any():
            return
        if not n_ranks[: len(ahead)].eq(world_size()).all() or n_ranks[len(ahead) :].any():
            raise ValueError(
                "the ranks draw different numbers of minibatches from their rollouts: all must have the same n_steps, n_envs, "
                "batch_size and rollout_buffer_class"
            )
        mean = total / n
        std = ((total_of_squares - n * mean.square()) / (n - 1)).clamp(min=0).sqrt()
        for i, (rollout_data, index) in enumerate(ahead):
            if normalize_advantage:
                advantages = rollout_data.advantages
                normalized = (advantages - mean[i].to(advantages)) / (std[i].to(advantages) + 1e-8)
                rollout_data = rollout_data._replace(advantages=normalized)
            yield rollout_data, index


def _valid_advantages(rollout_data: Any, host: Host) -> th.Tensor:
    valid = host.valid(rollout_data)
    advantages: th.Tensor = rollout_data.advantages if valid is None else rollout_data.advantages[valid]
    return advantages.double()
