"""`torchrun --nproc-per-node N -m rl_zoo3.train --algo ppo_kl`: N processes train one agent, in the log folder of rank 0."""

import atexit
import os
import sys
import tempfile
from importlib import import_module
from typing import Any

import torch as th
import torch.distributed as dist

from sb3_adaptive_kl import distributed
from sb3_adaptive_kl.distributed.ranks import gather_objects
from sb3_adaptive_kl.zoo.masks import asking_for_masks


def join_ranks(manager: Any) -> None:
    """
    Let one of our algorithms train with the other ranks, if torchrun has started several of the zoo's ``train``.

    All ranks get the seed of rank 0, frequencies count the time steps of all ranks, and ranks other than 0 neither evaluate
    nor print, and log to a temporary folder.

    :param manager: the zoo's ``ExperimentManager``, initialized, for one of our algorithms
    :raises SystemExit: if hyperparameters are to be optimized, which would need one process group per trial
    """
    # A script of the user's may start one run per process
    if getattr(sys.modules["__main__"].__spec__, "name", None) != "rl_zoo3.train":
        return
    if not (dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1):
        return
    algorithms = import_module("rl_zoo3.utils").ALGOS
    distributed_algorithm = getattr(distributed, f"Distributed{algorithms[manager.algo].__name__}", None)
    if distributed_algorithm is None:  # the user has registered another one under this name
        return
    if manager.optimize_hyperparameters:
        sys.exit(
            "-optimize cannot be run by torchrun: start it several times with the same --storage and --study-name instead"
        )
    if th.cuda.is_available():
        th.cuda.set_device(int(os.environ["LOCAL_RANK"]) % th.cuda.device_count())
    # NCCL refuses to let two ranks share a GPU
    has_own_gpu = th.cuda.is_available() and int(os.environ["LOCAL_WORLD_SIZE"]) <= th.cuda.device_count()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_own_gpu else "gloo")
    atexit.register(dist.destroy_process_group)
    algorithms[manager.algo] = asking_for_masks(distributed_algorithm)
    manager.seed = manager.args.seed = gather_objects(manager.seed)[0]
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes train one agent. Seed: {manager.seed}")
        for name in ("eval_freq", "save_freq"):  # the zoo counts the steps of one process
            steps = getattr(manager, name)
            setattr(manager, name, max(steps // dist.get_world_size(), 1) if steps > 0 else steps)
    else:
        folder = tempfile.TemporaryDirectory(prefix=f"rank-{dist.get_rank()}-")
        atexit.register(folder.cleanup)
        manager.save_path, manager.params_path = folder.name, f"{folder.name}/{manager.env_name}"
        manager.eval_freq, manager.save_freq, manager.verbose, manager.show_progress = -1, -1, 0, False
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # it is needed until the process ends
