"""For tests of distributed training: ranks on the loopback address, which run functions of the tests, and one that trains."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_adaptive_kl import AdaptiveKLPPO, distributed

TIMEOUT = timedelta(seconds=60)
SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "device": "cpu"}


class Ranks:
    """
    Processes that run a function in one process group.

    :param folder: where the ranks find each other
    :param n: how many
    """

    def __init__(self, folder: Path, n: int = 2) -> None:
        # A fork of this process would inherit torch's threads, and new processes would take seconds to import it
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "pytest", "torch._dynamo"])  # the last for optimizers
        self._folder = folder
        self._n_groups = 0
        self._processes = []
        self._connections: list[Connection] = []
        for rank in range(n):
            connection, remote = context.Pipe()
            self._processes.append(context.Process(target=_serve, args=(remote, rank, n), daemon=True))
            self._connections.append(connection)
            self._processes[-1].start()
            remote.close()  # or the end of the process would not be noticed here

    def run(self, function: Callable[..., Any], *args: Any, timeout: timedelta = TIMEOUT, ends: bool = False) -> list[Any]:
        """
        Run a function of a module on all ranks, in a new group.

        :param function: called with ``args``
        :param timeout: the group's
        :param ends: whether the processes end afterwards, as those of a script would
        :return: what it returned on each rank, or the exception that it raised; None for a rank that was killed
        """
        self._n_groups += 1
        for connection in self._connections:
            connection.send((function, args, f"file://{self._folder / f'{self._n_groups}'}", timeout, ends))
        return [_received(connection) for connection in self._connections]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


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


def learned(
    algorithm: str = "DistributedAdaptiveKLPPO",
    callback: Any = None,
    normalize: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Train on this rank, and return the state of its model."""
    policy, env = ("MlpLstmPolicy" if "Recurrent" in algorithm else "MlpPolicy"), make_vec_env(make_env, 2)
    if normalize is not None:
        env = VecNormalize(env, **normalize)
    model = getattr(distributed, algorithm)(policy, env, **{**SMALL, "seed": 5, "verbose": 1, **arguments})
    model.learn(512, callback=callback)
    return outcome(model)


def outcome(model: AdaptiveKLPPO) -> dict[str, Any]:
    of_env = vars(model.get_vec_normalize_env() or model)
    return {
        "parameters": th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()]),
        "optimizer": model.policy.optimizer.state_dict()["state"][0]["exp_avg"],
        "kl_coef": model.kl_coef,
        "num_timesteps": model.num_timesteps,
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
        "undone": model._undone_updates,
        "observations": model.rollout_buffer.observations,
        "statistics": {name: vars(value) for name, value in of_env.items() if name in ("obs_rms", "ret_rms")},
        "seeds": [env.unwrapped.np_random_seed for env in model.get_env().unwrapped.envs],
        "logs": model.logger.output_formats != [],
    }


def make_env() -> gym.Env:
    return Masked(gym.make("CartPole-v1"))


class Masked(gym.Wrapper):
    """Forbids one of the two actions in every third step, for MaskablePPO."""

    n_calls = 0

    def action_masks(self) -> np.ndarray:
        self.n_calls += 1
        return np.array([True, self.n_calls % 3 != 0])


def check_same_model(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert th.equal(first["parameters"], second["parameters"])
    assert th.equal(first["optimizer"], second["optimizer"])
    for name in ("kl_coef", "num_timesteps", "episodes", "undone"):
        assert repr(first[name]) == repr(second[name]), name  # NaN is not equal to itself
