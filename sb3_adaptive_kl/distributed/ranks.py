"""
The ranks that train one policy, those of torch.distributed's default group, and what they tell each other.

All functions but the first three are *collective*: they wait for all ranks, for as long as the group's timeout. Where one has
ended, they raise torch's ``RuntimeError``.
"""

from datetime import timedelta
from typing import TypeVar

import torch as th
import torch.distributed as dist

T = TypeVar("T")
# How long learn() waits for a rank that has not called it yet
ARRIVAL_TIMEOUT = timedelta(minutes=10)


def check_group(algorithm: str) -> None:
    """
    Raise ValueError unless there is a process group that can exchange numbers on the CPU.

    :param algorithm: name of the class that needs it
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


def rank() -> int:
    """Return the number of this process, from 0 to ``world_size() - 1``."""
    return dist.get_rank()


def world_size() -> int:
    """Count the processes that train together."""
    return dist.get_world_size()


def wait_for_all_ranks() -> None:
    """Wait until all ranks have arrived; if one does not, torch's error names it."""
    if dist.get_backend() == "gloo":  # no other backend can name it
        dist.monitored_barrier(timeout=ARRIVAL_TIMEOUT)


def sum_over_ranks(tensor: th.Tensor) -> th.Tensor:
    """
    Add up a tensor over all ranks.

    :param tensor: of the same shape and type on every rank
    :return: the sum, which is the same to the last bit on every rank
    """
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def gather(numbers: th.Tensor) -> th.Tensor:
    """
    Collect the numbers of all ranks.

    :param numbers: shape (n,), the same n and type on every rank
    :return: shape (number of ranks, n), in the order of the ranks
    """
    parts = [th.empty_like(numbers) for _ in range(world_size())]
    dist.all_gather(parts, numbers)
    return th.stack(parts)


def gather_objects(value: T) -> list[T]:
    """
    Collect one object of each rank.

    :param value: anything that can be pickled
    :return: one object per rank, in the order of the ranks
    """
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(tensor: th.Tensor) -> None:
    """
    Overwrite a tensor with the one of rank 0.

    :param tensor: of the same shape and type on every rank
    """
    received = tensor.detach().clone(memory_format=th.contiguous_format)
    dist.broadcast(received, src=0)
    with th.no_grad():
        tensor.copy_(received)
