"""
Train one policy with several processes, and continue from the newest checkpoint when one of them fails.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nproc-per-node 2 --max-restarts 3 examples/distributed.py --env LunarLander-v3 -n 1000000

An ordinary script for Stable-Baselines3, but for the process group, the name of the class, and ``record``, which lets torchrun
report the error of the rank that failed first. The variable is for restarts: without it, the new processes look for the
addresses of the old ones (https://github.com/pytorch/pytorch/issues/135712).
"""

import argparse
import re
from pathlib import Path

import torch.distributed as dist
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from torch.distributed.elastic.multiprocessing.errors import record

from sb3_adaptive_kl.distributed import DistributedAdaptiveKLPPO


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="LunarLander-v3", help="environment")
    parser.add_argument("--n-envs", type=int, default=4, help="environments of each process")
    parser.add_argument("-n", "--n-timesteps", type=int, default=1_000_000, help="time steps of all processes together")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/distributed"), help="folder of the checkpoints")
    args = parser.parse_args()

    dist.init_process_group("gloo")  # "cpu:gloo,cuda:nccl" for models on GPUs
    env = make_vec_env(args.env, args.n_envs)
    checkpoint = newest_checkpoint(args.output)
    if checkpoint is None:
        model = DistributedAdaptiveKLPPO("MlpPolicy", env, n_steps=256, seed=0, device="cpu", verbose=1)
    else:
        model = DistributedAdaptiveKLPPO.load(
            checkpoint, env, device="cpu"
        )  # on all ranks, from a folder that all of them see
    if model.num_timesteps < args.n_timesteps:
        model.learn(
            args.n_timesteps - model.num_timesteps,
            callback=CheckpointCallback(1024, str(args.output)),  # every 1024 steps of each environment, by rank 0
            reset_num_timesteps=checkpoint is None,
        )
    model.save(args.output / "final")
    dist.destroy_process_group()


def newest_checkpoint(folder: Path) -> Path | None:
    """
    Find the checkpoint with the most time steps.

    :param folder: where ``CheckpointCallback`` saves
    :return: its path, or ``None`` if there is none
    """
    steps = {path: re.fullmatch(r"rl_model_(\d+)_steps", path.stem) for path in folder.glob("*.zip")}
    return max((path for path in steps if steps[path]), key=lambda path: int(steps[path].group(1)), default=None)


if __name__ == "__main__":
    main()
