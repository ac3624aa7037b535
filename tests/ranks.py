"""Processes for tests of distributed training: ranks on the loopback address, which run functions of the tests."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch as th
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)


class Ranks:
    """
    Processes that run a function in one process group.

    :param folder: where the ranks find each other
    :param n: how many
    """

    def __init__(self, folder: Path, n: int = 2) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
        self._folder = folder
        self._n_groups = 0
        self.processes = []
        self._connections: list[Connection] = []
        for rank in range(n):
            mine, its = context.Pipe()
            self.processes.append(context.Process(target=_serve, args=(its, rank, n), daemon=True))
            self._connections.append(mine)
        for process in self.processes:
            process.start()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: timedelta = TIMEOUT,
        ends: bool = False,
        rank_0_holds_store: bool = False,
    ) -> list[Any]:
        """
        Run a function of a module on all ranks, in a new group.

        :param function: called with ``args``
        :param timeout: the group's
        :param ends: whether the processes end afterwards, as those of a script would
        :param rank_0_holds_store: whether the group's store goes with rank 0; otherwise it is a file
        :return: what it returned on each rank, or the exception that it raised; None for a rank that was killed
        """
        self._n_groups += 1
        store = f"tcp://127.0.0.1:{_free_port()}" if rank_0_holds_store else f"file://{self._folder / f'{self._n_groups}'}"
        for connection in self._connections:
            connection.send((function, args, store, timeout, ends))
        return [_received(connection) for connection in self._connections]

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _received(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:
        return None


def _serve(connection: Connection, rank: int, n: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    th.set_num_threads(1)
    while True:
        function, args, store, timeout, ends = connection.recv()
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=n, timeout=timeout)
        try:
            result = function(*args)
        except Exception as error:
            traceback.print_exc()
            result = type(error)(*map(str, error.args))
        connection.send(result)
        if ends:
            return
        dist.destroy_process_group()
