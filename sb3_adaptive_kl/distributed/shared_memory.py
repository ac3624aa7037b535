"""
Sums over processes on one machine, through memory that all of them see.

Gloo's messages pass through threads of its own. Where the cores are busy, these wait for the end of a time slice, which
takes about 3 ms in newer Linux kernels (docs/distributed.md). Here, only the thread that needs the sum takes part: it writes
its vector, sends one byte to each other process, and waits for one byte of each of them.
"""

import os
import shutil
import socket
import tempfile
import time
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
    Connects the processes that see a folder. The steps of connecting, ``map``, ``listen``, ``connect`` and ``accept``, do not
    wait for other processes; each of them needs that all have finished the one before.

    :param folder: of ``make_folder``, the same for all processes
    :param rank: number of this process
    :param n_processes: how many there are
    :param timeout: how long to wait for the others in a sum, in seconds
    """

    def __init__(self, folder: Path, rank: int, n_processes: int, timeout: float) -> None:
        self.folder = folder
        self.rank = rank
        self.n_processes = n_processes
        self.timeout = timeout
        self.n_sums = 0
        self.listener = socket.socket(socket.AF_UNIX)
        self.others: list[socket.socket] = []

    def map(self) -> None:
        """
        Map the shared memory.

        :raises OSError: if this process does not see it
        """
        size = 2 * self.n_processes * SLOT
        if not (self.folder / "memory").exists():
            raise FileNotFoundError(f"{self.folder} is on another machine, or in another container")
        try:
            memory = th.from_file(str(self.folder / "memory"), shared=True, size=size, dtype=th.uint8)
        except RuntimeError as error:  # torch's only type
            raise OSError(str(error)) from error
        self.slots = memory.view(2, self.n_processes, SLOT)

    def listen(self) -> None:
        """
        Let the processes of higher ranks connect.

        :raises OSError: if the system refuses it
        """
        self.listener.bind(str(self.folder / str(self.rank)))
        self.listener.listen(self.n_processes)
        self.listener.setblocking(False)

    def connect(self) -> None:
        """
        Connect to the processes of lower ranks, whether or not they have accepted.

        :raises OSError: if the system refuses it
        """
        for lower in range(self.rank):
            other = socket.socket(socket.AF_UNIX)
            self.others.append(other)
            other.connect(str(self.folder / str(lower)))

    def accept(self) -> None:
        """
        Accept the connections of higher ranks, which are there already.

        :raises OSError: if the system refuses it
        """
        for _ in range(self.rank + 1, self.n_processes):
            self.others.append(self.listener.accept()[0])
        self.listener.close()
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
        for each in (self.listener, *self.others):
            each.close()

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
