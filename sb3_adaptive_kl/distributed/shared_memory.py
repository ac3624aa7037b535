"""
Sums over processes on one machine, through memory that all of them see.

Gloo's messages pass through threads of its own. Where the cores are busy, these wait for the end of a time slice, which
takes about 3 ms in newer Linux kernels, in every tenth sum or more (docs/distributed.md). Here, only the thread that needs the
sum takes part: it writes its vector, sends one byte to each other process, and waits for one byte of each of them.
"""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch as th

# Bytes of the longest vector. Two vectors per process: the next sum must not overwrite what another process still adds up
SLOT = 2**20
IN_MEMORY = Path("/dev/shm")
SECONDS_AWAKE = 1e-4


def make_folder(n_processes: int) -> Path:
    """
    Make the folder in which the processes find each other, with the memory that they share.

    :param n_processes: how many
    :return: a folder for this user only, to be deleted when all have been connected
    :raises OSError: if there is no room for it in memory, or no such folder: only Linux has it
    """
    folder = Path(tempfile.mkdtemp(prefix="sb3_adaptive_kl-", dir=IN_MEMORY))
    try:
        with (folder / "memory").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 2 * n_processes * SLOT)  # without room, writing to it would kill the process
    except OSError:
        shutil.rmtree(folder)
        raise
    return folder


class SharedMemory:
    """
    Connects the processes that see a folder.

    :param folder: of ``make_folder``, the same for all processes
    :param rank: number of this process
    :param n_processes: how many there are
    :param timeout: how long to wait for the others, in seconds
    :param barrier: waits for all processes
    :raises OSError: if the connection fails
    """

    def __init__(self, folder: Path, rank: int, n_processes: int, timeout: float, barrier: Callable[[], object]) -> None:
        self.rank = rank
        self.timeout = timeout
        self.n_sums = 0
        size = 2 * n_processes * SLOT
        memory = th.from_file(str(folder / "memory"), shared=True, size=size, dtype=th.uint8)
        self.slots = memory.view(2, n_processes, SLOT)
        self.others: list[socket.socket] = []
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / str(rank)))
            listener.listen(n_processes)
            barrier()
            for lower in range(rank):
                self.others.append(socket.socket(socket.AF_UNIX))
                self.others[-1].connect(str(folder / str(lower)))
            for _ in range(rank + 1, n_processes):
                self.others.append(listener.accept()[0])
            barrier()
        for other in self.others:
            other.setblocking(False)

    def sum(self, tensor: th.Tensor) -> th.Tensor:
        """
        Add up a tensor over all processes.

        :param tensor: of the same shape and type in every process, on the CPU, at most ``SLOT`` bytes
        :return: the sum, which is the same to the last bit in every process
        :raises OSError: if another process has ended, or does not arrive in time
        """
        slots = self.slots[self.n_sums % 2, :, : tensor.nbytes].view(tensor.dtype)
        self.n_sums += 1
        slots[self.rank] = tensor.flatten()
        for other in self.others:
            other.sendall(b"+")
        for other in self.others:
            self._wait_for(other)
        return slots.sum(dim=0).view(tensor.shape)

    def close(self) -> None:
        """Disconnect: processes that wait for this one raise ``OSError``."""
        for other in self.others:
            other.close()

    def _wait_for(self, other: socket.socket) -> None:
        """Wait for a byte: actively at first, since it takes longer to wake up than most waits last."""
        received = None
        awake = time.perf_counter() + SECONDS_AWAKE
        while received is None and time.perf_counter() < awake:
            received = _received_so_far(other)
        if received is None:
            other.settimeout(self.timeout)
            received = other.recv(1)
            other.setblocking(False)
        if not received:
            raise ConnectionError("another process has closed its connection")


def _received_so_far(other: socket.socket) -> bytes | None:
    try:
        return other.recv(1)
    except BlockingIOError:
        return None
