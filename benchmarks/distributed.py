"""
Compare one process with several that train the same policy, on this machine.

    python -m benchmarks.distributed              # speed, and the time of the sum over the ranks
    python -m benchmarks.distributed --learning   # what they learn, as JSON: one process against two, 5 seeds

All have the same number of environments, of transitions per update and per minibatch together. The variants take turns, so
that all run under the same load; each number is the median over the rounds.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.distributed.ranks import connected_ranks, sum_over_ranks

# How many numbers a step sums over the ranks: MlpPolicy on HalfCheetah-v5, and CnnPolicy on Atari with six actions
LENGTHS = {"MlpPolicy": 11_106, "CnnPolicy": 1_687_739}


class Task(NamedTuple):
    """An environment, and the arguments of all ranks together."""

    env: str
    n_envs: int
    n_steps: int
    batch_size: int
    normalize: bool = False
    arguments: dict[str, Any] = {}  # noqa: RUF012  # it is not changed

    def model(self, n_ranks: int, seed: int = 0, **kwargs: Any) -> AdaptiveKLPPO:
        """Build the model of one rank."""
        env = make_vec_env(self.env, self.n_envs // n_ranks)
        sizes = {"n_steps": self.n_steps, "batch_size": self.batch_size // n_ranks}
        arguments = {**sizes, **self.arguments, **kwargs}
        return AdaptiveKLPPO("MlpPolicy", VecNormalize(env) if self.normalize else env, seed=seed, device="cpu", **arguments)


SPEED = {
    "HalfCheetah-v5": Task("HalfCheetah-v5", 8, 2048, 256, normalize=True),
    "CartPole-v1": Task("CartPole-v1", 8, 2048, 256),
}
# RL Baselines3 Zoo's hyperparameters for PPO, with a constant learning rate and without the clip range
LEARNING = {
    "CartPole-v1": Task(
        "CartPole-v1", 8, 32, 256, arguments={"gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "learning_rate": 0.001}
    ),
    "Pendulum-v1": Task(
        "Pendulum-v1", 4, 1024, 64, arguments={"gamma": 0.9, "learning_rate": 0.001, "use_sde": True, "sde_sample_freq": 4}
    ),
}


class Clock(BaseCallback):
    """Notes when each rollout begins."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def _on_rollout_start(self) -> None:
        self.times.append(time.perf_counter())

    def _on_step(self) -> bool:
        return True


def learn_speed(n_ranks: int, name: str, compile: bool) -> float:
    """Measure time steps per second in the third and fourth iteration: the first two compile."""
    task, clock = SPEED[name], Clock()
    per_iteration = task.n_envs * task.n_steps
    task.model(n_ranks, compile=compile).learn(5 * per_iteration, callback=clock)
    return 2 * per_iteration / (clock.times[4] - clock.times[2])


def sum_times(n_ranks: int, length: int) -> tuple[float, float]:
    """Measure the sum over the ranks of one minibatch, in microseconds: as a step takes it, and gloo's."""
    vector = th.ones(length)
    with connected_ranks():
        return _median_time(lambda: sum_over_ranks(vector)), _median_time(lambda: dist.all_reduce(vector.clone()))


def _median_time(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(220):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[20:])


def learned(n_ranks: int, name: str, seed: int) -> tuple[float, float]:
    """Train for 100,000 time steps: the mean return while learning, and that of the final policy over 20 episodes."""
    model = LEARNING[name].model(n_ranks, 1000 * seed, stats_window_size=1_000_000)
    model.learn(100_000)
    final, _ = evaluate_policy(model, make_vec_env(name, seed=10_000 + seed), n_eval_episodes=20)
    return float(np.mean([episode["r"] for episode in model.ep_info_buffer])), float(final)


def on_ranks(n_ranks: int, function: Callable[..., Any], *args: Any, connected: bool = True) -> Any:
    """Run a function in new processes, one per rank, in a process group or each by itself; return the result of rank 0."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_run, args=(results, folder, rank, n_ranks if connected else 1, function, (n_ranks, *args)))
            for rank in range(n_ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("A process has failed, for the reason above.")
    return results.get()


def _run(results: Any, folder: str, rank: int, n_ranks: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    th.set_num_threads(1)
    if n_ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    result = function(*args)
    if rank == 0:
        results.put(result)
    if n_ranks > 1:
        dist.destroy_process_group()


def print_speed(n_ranks: int, rounds: int) -> None:
    """
    Print time steps per second of one process and of several, and their ratio; and that of as many processes that train
    without exchange, which bounds the ratio.
    """
    print(f"{'learn(), time steps per second':32} 1 rank   {n_ranks} ranks   ratio   without exchange")
    for name in SPEED:
        for compile in (False, True):
            speeds = [
                (
                    on_ranks(1, learn_speed, name, compile),
                    on_ranks(n_ranks, learn_speed, name, compile),
                    on_ranks(n_ranks, learn_speed, name, compile, connected=False),
                )
                for _ in range(rounds)
            ]
            one, together, apart = map(statistics.median, zip(*speeds, strict=True))
            title = f"{name}, {'compiled' if compile else 'default'}"
            print(f"{title:32} {one:6.0f} {together:9.0f} {together / one:7.2f} {apart / one:18.2f}", flush=True)


def print_sums(n_ranks: int) -> None:
    """Print how long the ranks take to sum a vector, while they do nothing else."""
    for policy, length in LENGTHS.items():
        mine, gloo = on_ranks(n_ranks, sum_times, length)
        print(f"sum over {n_ranks} ranks, {policy}, {length:,} numbers: {mine:.0f} µs, by gloo {gloo:.0f} µs", flush=True)


def print_learning(n_ranks: int, seeds: int) -> None:
    """Print what one process and several learn, seed by seed."""
    for name in LEARNING:
        for seed in range(seeds):
            for n in (1, n_ranks):
                while_learning, final = on_ranks(n, learned, name, seed)
                result = {"env": name, "ranks": n, "seed": seed, "while_learning": while_learning, "final": final}
                print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="number of processes to compare with one (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the speed (default: 3)")
    parser.add_argument("--learning", action="store_true", help="compare what is learned instead")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of --learning (default: 5)")
    args = parser.parse_args()
    if args.learning:
        print_learning(args.ranks, args.seeds)
    else:
        print_speed(args.ranks, args.rounds)
        print_sums(args.ranks)


if __name__ == "__main__":
    main()
