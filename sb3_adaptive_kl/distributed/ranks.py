"""
The ranks that train one policy, those of torch.distributed's default group, and what they tell each other.

All functions but the first are *collective*: they wait for all ranks, for as long as the group's timeout. Where a rank has
ended, they raise torch's ``RuntimeError``.
"""

from datetime import timedelta
from typing import Any

import torch as th
import torch.distributed as dist

# How long learn() waits for a rank that has not called it yet
ARRIVAL_TIMEOUT = timedelta(minutes=10)


def check_group(algorithm: str) -> None:
    """
    Check that there is a process group that can exchange numbers on the CPU.

    :param algorithm: name of the class that needs it
    :raises ValueError: if there is none
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{algorithm} needs a process group: call torch.distributed.init_process_group('gloo') first, in a script that "
            f"torchrun starts, or use {algorithm.removeprefix('Distributed')}"
        )
    if "cpu:" not in dist.get_backend_config():
        raise ValueError(
            f"the process group's backend is {dist.get_backend_config()}, which cannot exchange the numbers on the CPU that "
            "decisions depend on: call init_process_group('cpu:gloo,cuda:nccl')"
        )


def wait_for_all_ranks() -> None:
    """Wait until all ranks have arrived; if one does not, torch's error on rank 0 names it."""
    if dist.get_backend() == "gloo":  # no other backend can name it
        dist.monitored_barrier(timeout=ARRIVAL_TIMEOUT)


def gather(numbers: th.Tensor) -> th.Tensor:
    """
    Collect the numbers of all ranks.

    :param numbers: shape (n,), the same n and type on every rank
    :return: shape (number of ranks, n), in the order of the ranks
    """
    parts = [th.empty_like(numbers) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, numbers)
    return th.stack(parts)


def gather_objects(value: Any) -> list[Any]:
    """
    Collect one object of each rank.

    :param value: anything that can be pickled
    :return: one object per rank, in the order of the ranks
    """
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
