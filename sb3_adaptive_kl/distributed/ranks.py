"""
The processes that train one policy: the ranks of torch.distributed's default process group.

Without a group there is one rank, and every function returns what it is given. The functions marked *collective* wait for all
ranks, so that all of them must call it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import TypeVar

import torch as th
import torch.distributed as dist

T = TypeVar("T")
# Gloo's all_reduce takes several rounds of messages. Up to so many numbers per rank, sending them to all others is faster
# (docs/distributed.md)
MAX_EXCHANGED = 2**18


class LostRanks(RuntimeError):
    """A collective could not be completed: another rank has ended, or did not arrive in time."""


def is_parallel() -> bool:
    """Tell whether several processes train together."""
    return world_size() > 1


def world_size() -> int:
    """Count the processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number this process among those that train together: 0 to ``world_size() - 1``."""
    return dist.get_rank() if is_parallel() else 0


def sum_over_ranks(tensor: th.Tensor) -> th.Tensor:
    """
    Add up a tensor over all ranks. *Collective.*

    :param tensor: of the same shape and type on every rank
    :return: the sum, which is the same to the last bit on every rank, on the tensor's device
    """
    if not is_parallel():
        return tensor
    mine = tensor.to(_device_for(tensor), copy=True)
    with _completing():
        if mine.device.type == "cpu" and (world_size() - 1) * mine.numel() <= MAX_EXCHANGED:
            return _exchanged_sum(mine)
        dist.all_reduce(mine)
    return mine.to(tensor.device)


def gather(numbers: th.Tensor) -> th.Tensor:
    """
    Collect the numbers of all ranks. *Collective.*

    :param numbers: shape (n,), the same n and type on every rank
    :return: shape (number of ranks, n), in the order of the ranks, on the device of ``numbers``
    """
    if not is_parallel():
        return numbers[None]
    numbers_there = numbers.to(_device_for(numbers))
    parts = [th.empty_like(numbers_there) for _ in range(world_size())]
    with _completing():
        dist.all_gather(parts, numbers_there)
    return th.stack(parts).to(numbers.device)


def gather_objects(value: T) -> list[T]:
    """
    Collect one object of each rank. *Collective.*

    :param value: anything that can be pickled
    :return: one object per rank, in the order of the ranks
    """
    if not is_parallel():
        return [value]
    values: list[T] = [value] * world_size()
    with _completing():
        dist.all_gather_object(values, value)
    return values


def broadcast(tensor: th.Tensor) -> None:
    """
    Overwrite a tensor with the one of rank 0. *Collective.*

    :param tensor: of the same shape and type on every rank
    """
    if not is_parallel():
        return
    there = tensor.detach().to(_device_for(tensor), copy=True)
    with _completing():
        dist.broadcast(there, src=0)
    with th.no_grad():
        tensor.copy_(there)


def _exchanged_sum(mine: th.Tensor) -> th.Tensor:
    """Send a vector to every other rank, and add up all vectors in the order of the ranks: the same on each of them."""
    vectors = [mine if other == rank() else th.empty_like(mine) for other in range(world_size())]
    others = [other for other in range(world_size()) if other != rank()]
    works = [dist.irecv(vectors[other], other) for other in others] + [dist.isend(mine, other) for other in others]
    for work in works:
        assert work is not None  # None is for processes outside of the group
        work.wait()
    return reduce(th.add, vectors)


@contextmanager
def _completing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the only type that gloo has for it
        raise LostRanks(str(error)) from error


def _device_for(tensor: th.Tensor) -> th.device:
    """Where one of the group's backends can reach a tensor: NCCL only sees GPUs, and may be the only one."""
    reaches_cpu = "cpu:" in dist.get_backend_config()
    return tensor.device if reaches_cpu or tensor.is_cuda else th.device("cuda", th.cuda.current_device())
