"""
``train()`` of AdaptiveKLPPO against SB3's PPO, on rollouts of the same size, in one process with one torch thread.

    python -m benchmarks.throughput

The two alternate, so that both see the same load of the machine; medians over the rounds.
"""

import argparse
import statistics
import time

import gymnasium as gym
import torch as th
from stable_baselines3 import PPO

from sb3_adaptive_kl import AdaptiveKLPPO

N_STEPS, BATCH_SIZE, N_EPOCHS = 2048, 64, 10


def train_seconds(model: PPO) -> float:
    start = time.perf_counter()
    model.train()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1", help="Gymnasium id (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed train() calls per algorithm (default: %(default)s)")
    args = parser.parse_args()

    th.set_num_threads(1)
    kwargs = {"n_steps": N_STEPS, "batch_size": BATCH_SIZE, "n_epochs": N_EPOCHS, "seed": 0, "device": "cpu"}
    # One iteration leaves a full rollout behind, on which train() can be called again and again
    models = {
        algorithm.__name__: algorithm("MlpPolicy", gym.make(args.env), **kwargs).learn(N_STEPS)
        for algorithm in (PPO, AdaptiveKLPPO)
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.rounds + 1):
        for name, model in models.items():
            seconds[name].append(train_seconds(model))

    n_minibatches = N_EPOCHS * N_STEPS // BATCH_SIZE
    reference = statistics.median(seconds["PPO"][1:])
    print(f"{args.env}, {N_STEPS} steps, minibatch {BATCH_SIZE}, {N_EPOCHS} epochs, torch {th.__version__}, 1 thread")
    print(f"{'':16}{'ms per train()':>16}{'ms per minibatch':>18}{'relative':>10}")
    for name, times in seconds.items():
        median = statistics.median(times[1:])  # the first warms up
        print(f"{name:16}{1e3 * median:16.1f}{1e3 * median / n_minibatches:18.3f}{median / reference:10.2f}")


if __name__ == "__main__":
    main()
