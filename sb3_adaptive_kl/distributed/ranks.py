"""
The processes that train one policy: the ranks of torch.distributed's default process group.

Without a group there is one rank, and nothing is exchanged. The functions marked *collective* wait for all ranks, so that all
of them must call it.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch as th
import torch.distributed as dist

from sb3_adaptive_kl.distributed.errors import LostRanks
from sb3_adaptive_kl.distributed.shared_memory import SLOT, SharedMemory, make_folder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Connection(NamedTuple):
    """How collectives reach the other ranks: a process group, ``None`` for the default one, and memory for short sums."""

    group: "ProcessGroup | None" = None
    shared_memory: SharedMemory | None = None


_connection = Connection()


def is_parallel() -> bool:
    """Tell whether several processes train together."""
    return world_size() > 1


def world_size() -> int:
    """Count the processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0 to ``world_size() - 1``."""
    return dist.get_rank() if is_parallel() else 0


@contextmanager
def connected_ranks() -> Iterator[None]:
    """
    Create a process group for the collectives inside the ``with`` block, and destroy it on exit, so that ranks that wait for
    this one fail at once. (The default group is not ours to destroy.) *Collective.*

    :raises LostRanks: if another rank has ended, or does not arrive in time
    """
    global _connection
    outer = _connection  # where a callback trains another model
    backends, timeout = dist.get_backend_config(), _default_timeout()
    with _raising_lost_ranks():
        dist.barrier()  # fails if a rank has ended, where new_group() would wait for it
        # NCCL only sees GPUs; the numbers on which decisions depend are on the CPU
        group = dist.new_group(backend=None if "cpu:" in backends else f"cpu:gloo,{backends}", timeout=timeout)
    shared_memory = None
    try:
        _connection = Connection(group)
        shared_memory = _share_memory(timeout)
        _connection = Connection(group, shared_memory)
        yield
    finally:
        _connection = outer
        if shared_memory is not None:
            shared_memory.close()
        dist.destroy_process_group(group)
        del group  # an exception's traceback would keep it, and its connections, alive


def _share_memory(timeout: timedelta) -> SharedMemory | None:
    """Connect the ranks by shared memory, if that succeeds on all of them. *Collective.*"""
    mine = None
    if rank() == 0:
        with suppress(OSError):  # without it, sums take longer
            mine = make_folder(world_size())
    try:
        folder = gather_objects(mine)[0]
        if folder is None:
            return None
        memory = SharedMemory(folder, rank(), world_size(), timeout.total_seconds())
        if all(_succeeds_on_all_ranks(step) for step in (memory.map, memory.listen, memory.connect, memory.accept)):
            return memory
        memory.close()
        return None
    finally:
        if mine is not None:
            shutil.rmtree(mine)


def _succeeds_on_all_ranks(step: Callable[[], None]) -> bool:
    try:
        step()
    except OSError:
        return all(gather_objects(False))
    return all(gather_objects(True))


def is_disconnected(other: int) -> bool:
    """
    Tell whether the connection to another rank is closed: its process has ended, or it has left ``connected_ranks``. After a
    timeout, gloo closes all connections of a rank.

    :param other: the rank to ask about
    """
    try:
        dist.irecv(th.empty(1), other, group=_connection.group)  # for a message that never comes
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
    with _raising_lost_ranks():
        shared_memory = _connection.shared_memory
        if shared_memory is not None and tensor.device.type == "cpu" and tensor.nbytes <= SLOT:
            return shared_memory.sum(tensor)
        total = tensor.clone()
        dist.all_reduce(total, group=_connection.group)
    return total


def gather(numbers: th.Tensor) -> th.Tensor:
    """
    Collect the numbers of all ranks. *Collective.*

    :param numbers: shape (n,), the same n and type on every rank
    :return: shape (number of ranks, n), in the order of the ranks, on the device of ``numbers``
    """
    if not is_parallel():
        return numbers[None]
    parts = [th.empty_like(numbers) for _ in range(world_size())]
    with _raising_lost_ranks():
        dist.all_gather(parts, numbers, group=_connection.group)
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
    with _raising_lost_ranks():
        dist.all_gather_object(values, value, group=_connection.group)
    return values


def broadcast(tensor: th.Tensor) -> None:
    """
    Overwrite a tensor with the one of rank 0. *Collective.*

    :param tensor: of the same shape and type on every rank
    """
    if not is_parallel():
        return
    received = tensor.detach().clone(memory_format=th.contiguous_format)
    with _raising_lost_ranks():
        dist.broadcast(received, src=0, group=_connection.group)
    with th.no_grad():
        tensor.copy_(received)


@contextmanager
def _raising_lost_ranks() -> Iterator[None]:
    """Turn the errors of a collective that cannot be completed into ``LostRanks``."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # gloo has no type of its own for it; OSError is that of shared memory
        raise LostRanks(str(error)) from error


def _default_timeout() -> timedelta:
    """Read the default group's timeout: new_group() would take torch's default."""
    world = dist.group.WORLD
    assert world is not None
    timeout: timedelta = world._get_backend(world._device_types[0]).options._timeout
    return timeout
