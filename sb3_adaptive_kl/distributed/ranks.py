"""
The processes that train one policy: the ranks of torch.distributed's default process group.

Without a group there is one rank, and every function returns what it is given. The functions marked *collective* wait for all
ranks, so that all of them must call it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import reduce
from typing import TYPE_CHECKING, TypeVar

import torch as th
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
# Gloo's all_reduce takes several rounds of messages. Up to so many numbers per rank, sending them to all others is faster
# (docs/distributed.md)
MAX_EXCHANGED = 2**18

_group: "ProcessGroup | None" = None  # that of connected_ranks(); None stands for the default group


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


@contextmanager
def connected_ranks() -> Iterator[None]:
    """
    Connect the ranks by a group of our own, in which the collectives within take place, and disconnect this rank at the end:
    ranks that still wait for it notice at once. (Destroying the default group would not be ours to do.) *Collective.*

    :raises LostRanks: if another rank has ended, or does not arrive in time
    """
    global _group
    everything = dist.get_backend_config()
    with _completing():
        dist.barrier()  # fails if a rank has ended, where new_group() would wait for it
        # NCCL only sees GPUs; the numbers on which decisions depend are on the CPU
        backend = None if "cpu:" in everything else f"cpu:gloo,{everything}"
        group = _group = dist.new_group(backend=backend, timeout=_default_timeout())
    try:
        yield
    finally:
        _group = None
        dist.destroy_process_group(group)


def is_disconnected(other: int) -> bool:
    """
    Tell whether the connection to another rank is closed: its process has ended, or it has left ``connected_ranks``. After a
    timeout, gloo closes all connections of a rank.

    :param other: the rank to ask about
    """
    try:
        dist.irecv(th.empty(1), other, group=_group)  # for a message that never comes
    except RuntimeError:
        return True
    return False


def sum_over_ranks(tensor: th.Tensor) -> th.Tensor:
    """
    Add up a tensor over all ranks. *Collective.*

    :param tensor: of the same shape and type on every rank
    :return: the sum, which is the same to the last bit on every rank, on the tensor's device
    """
    if not is_parallel():
        return tensor
    mine = tensor.clone()
    with _completing():
        if mine.device.type == "cpu" and (world_size() - 1) * mine.numel() <= MAX_EXCHANGED:
            return _exchanged_sum(mine)
        dist.all_reduce(mine, group=_group)
    return mine


def gather(numbers: th.Tensor) -> th.Tensor:
    """
    Collect the numbers of all ranks. *Collective.*

    :param numbers: shape (n,), the same n and type on every rank
    :return: shape (number of ranks, n), in the order of the ranks, on the device of ``numbers``
    """
    if not is_parallel():
        return numbers[None]
    parts = [th.empty_like(numbers) for _ in range(world_size())]
    with _completing():
        dist.all_gather(parts, numbers, group=_group)
    return th.stack(parts)


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
        dist.all_gather_object(values, value, group=_group)
    return values


def broadcast(tensor: th.Tensor) -> None:
    """
    Overwrite a tensor with the one of rank 0. *Collective.*

    :param tensor: of the same shape and type on every rank
    """
    if not is_parallel():
        return
    received = tensor.detach().clone(memory_format=th.contiguous_format)
    with _completing():
        dist.broadcast(received, src=0, group=_group)
    with th.no_grad():
        tensor.copy_(received)


def _exchanged_sum(mine: th.Tensor) -> th.Tensor:
    """Send a vector to every other rank, and add up all vectors in the order of the ranks: the same on each of them."""
    vectors = [mine if other == rank() else th.empty_like(mine) for other in range(world_size())]
    others = [other for other in range(world_size()) if other != rank()]
    works = [dist.irecv(vectors[other], other, group=_group) for other in others]
    works += [dist.isend(mine, other, group=_group) for other in others]
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


def _default_timeout() -> timedelta:
    """Read the default group's timeout: new_group() would take torch's default."""
    world = dist.group.WORLD
    assert world is not None
    timeout: timedelta = world._get_backend(world._device_types[0]).options._timeout
    return timeout
