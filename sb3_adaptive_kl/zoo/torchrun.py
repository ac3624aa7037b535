"""`torchrun --nproc-per-node N -m rl_zoo3.train --algo ppo_kl`: N processes train one agent, in the log folder of rank 0."""

import argparse
import atexit
import os
import re
import shutil
import sys
import tempfile

import numpy as np
import torch as th
import torch.distributed as dist

from sb3_adaptive_kl.distributed.ranks import gather_objects, rank, world_size

# Flags of train.py that only rank 0 may have
FLAGS_OF_RANK_0 = ("-P", "--progress", "--track")


def join_group(algorithms: tuple[str, ...]) -> None:
    """
    Join the process group if torchrun has started this process to train one of our algorithms with others.

    The zoo reads its arguments afterwards: all ranks get the same seed, frequencies count the time steps of all ranks, and
    ranks other than 0 neither evaluate nor print, and log to a temporary folder.

    :param algorithms: names of ours in the zoo
    :raises SystemExit: if hyperparameters are to be optimized, which would need one process group per trial
    """
    if not (dist.is_available() and dist.is_torchelastic_launched() and train_is_running()) or dist.is_initialized():
        return
    args, _ = _parser().parse_known_args(sys.argv[1:])
    if args.algo not in algorithms or int(os.environ["WORLD_SIZE"]) == 1:
        return
    if args.optimize_hyperparameters:
        sys.exit(
            "-optimize cannot be run by torchrun: start it several times with the same --storage and --study-name instead"
        )
    if th.cuda.is_available():
        th.cuda.set_device(int(os.environ["LOCAL_RANK"]) % th.cuda.device_count())
    # NCCL refuses to let two ranks share a GPU
    has_own_gpu = th.cuda.is_available() and int(os.environ["LOCAL_WORLD_SIZE"]) <= th.cuda.device_count()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_own_gpu else "gloo")
    atexit.register(dist.destroy_process_group)
    if args.seed < 0:
        sys.argv += ["--seed", str(gather_objects(int(np.random.randint(2**31)))[0])]
    if rank() == 0:
        # The zoo counts the steps of one process
        for flag, steps in (("--eval-freq", args.eval_freq), ("--save-freq", args.save_freq)):
            if steps > 0:
                sys.argv += [flag, str(max(steps // world_size(), 1))]
    else:
        folder = tempfile.mkdtemp(prefix=f"rank-{rank()}-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in FLAGS_OF_RANK_0]
        sys.argv += ["--log-folder", folder, "--eval-freq", "-1", "--save-freq", "-1", "--verbose", "0"]
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # it is needed until the process ends


def train_is_running() -> bool:
    """Check whether this process was started to run the zoo's ``train``."""
    return re.search(r"(^| )-m ?(rl_zoo3\.train|sb3_adaptive_kl\.zoo train)( |$)", " ".join(sys.orig_argv)) is not None


def _parser() -> argparse.ArgumentParser:
    """Return a parser of these arguments, with the defaults of the zoo's ``train``."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo", default="ppo")
    parser.add_argument("--seed", type=int, default=-1)
    parser.add_argument("--eval-freq", type=int, default=25_000)
    parser.add_argument("--save-freq", type=int, default=-1)
    parser.add_argument("-optimize", "--optimize-hyperparameters", action="store_true")
    return parser
