"""
Compare what one machine can do for one policy: one process, ``SubprocVecEnv``, more torch threads, and ranks.

    python -m benchmarks.distributed
    python -m benchmarks.distributed --compile

Prints time steps per second of ``learn()``, of all ranks together. "The same work" are the same environments, transitions per
update and per minibatch in all. With "the same work each", every rank has as many of them as the one process. The variants
take turns, each in new processes, so that all run under the same load; each number is the median over the rounds.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch as th
import torch.distributed as dist
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.distributed import DistributedAdaptiveKLPPO

N_ENVS, N_STEPS, BATCH_SIZE = 8, 2048, 256
TASKS = ("HalfCheetah-v5", "CartPole-v1")


class Variant(NamedTuple):
    """How the work is done."""

    title: str
    n_ranks: int = 1
    share: int = 1  # each rank has the environments and minibatches of one process, divided by this
    n_threads: int = 1
    vec_env: type[DummyVecEnv] | type[SubprocVecEnv] = DummyVecEnv


ONE_PROCESS = (
    Variant("1 process"),
    Variant("1 process, SubprocVecEnv", vec_env=SubprocVecEnv),
    Variant("1 process, 2 torch threads", n_threads=2),
)


def variants(numbers_of_ranks: Sequence[int]) -> list[Variant]:
    ranks = [
        variant
        for n in numbers_of_ranks
        for variant in (
            Variant(f"{n} ranks, the same work", n_ranks=n, share=n),
            Variant(f"{n} ranks, the same work each", n_ranks=n),
        )
    ]
    return [*ONE_PROCESS, *ranks]


class Clock(BaseCallback):
    """Notes when each rollout begins, and at which time step."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[float, int]] = []

    def _on_rollout_start(self) -> None:
        self.times.append((time.perf_counter(), self.model.num_timesteps))

    def _on_step(self) -> bool:
        return True


def speed(env_id: str, variant: Variant, compile: bool, n_steps: int) -> float:
    """Measure time steps per second in the third and fourth iteration: the first two compile, and fill caches."""
    env: Any = make_vec_env(env_id, N_ENVS // variant.share, vec_env_cls=variant.vec_env)
    if env_id == "HalfCheetah-v5":
        env = VecNormalize(env)
    algorithm = AdaptiveKLPPO if variant.n_ranks == 1 else DistributedAdaptiveKLPPO
    sizes = {"n_steps": n_steps, "batch_size": BATCH_SIZE // variant.share}
    model, clock = algorithm("MlpPolicy", env, seed=0, device="cpu", compile=compile, **sizes), Clock()
    model.learn(5 * n_steps * env.num_envs * variant.n_ranks, callback=clock)
    env.close()
    (start, first), (end, last) = clock.times[2], clock.times[4]
    return (last - first) / (end - start)


def on_ranks(variant: Variant, *args: Any) -> float:
    """Measure a variant in new processes, one per rank."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_run, args=(results, folder, rank, variant, args)) for rank in range(variant.n_ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("A process has failed, for the reason above.")
    return results.get()


def _run(results: Any, folder: str, rank: int, variant: Variant, args: tuple[str, bool, int]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    th.set_num_threads(variant.n_threads)
    if variant.n_ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=variant.n_ranks)
    env_id, *others = args
    result = speed(env_id, variant, *others)
    if rank == 0:
        results.put(result)
    if variant.n_ranks > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--n-steps", type=int, default=N_STEPS, help=f"rollout of each environment (default: {N_STEPS})")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2], help=f"numbers of ranks, divisors of {N_ENVS} (default: 2)"
    )
    parser.add_argument("--compile", action="store_true", help="with compile=True")
    args = parser.parse_args()
    for env_id in TASKS:
        print(f"\n{env_id + (', compiled' if args.compile else ''):32} steps per second   ratio")
        chosen = variants(args.ranks)
        rounds = [[on_ranks(variant, env_id, args.compile, args.n_steps) for variant in chosen] for _ in range(args.rounds)]
        speeds = [statistics.median(of_variant) for of_variant in zip(*rounds, strict=True)]
        for variant, of_variant in zip(chosen, speeds, strict=True):
            print(f"{variant.title:32} {of_variant:16.0f} {of_variant / speeds[0]:7.2f}", flush=True)


if __name__ == "__main__":
    main()
