"""
Test and time this package on a GPU, for as long as a rented machine lasts: the most important first.

    python -m benchmarks.cuda
    python -m benchmarks.cuda --seconds 540 --only tests mlp cnn
    python -m benchmarks.cuda --device cpu --rounds 1 --only waits

Each section is a process of its own: one that fails, hangs or has lost the GPU does not end the others. Algorithms that are
compared take turns; their rows are printed as soon as a section has timed them, with medians over the rounds after a warm-up.
The last section compares ranks on the CPU's cores.
"""

import argparse
import inspect
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.distributed import on_ranks, variants
from benchmarks.throughput import build, images, seconds, with_random_rollout
from sb3_adaptive_kl.fast.compilation import _guards_to_keep
from sb3_adaptive_kl.fast.compiled import clipped_gradients

GRAPHS = "CUDA graphs"
# What a GPU's queue runs empty for, by the names of the profiler; on the CPU, where numbers are read from tensors
WAITS = {
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    "cpu": ("aten::_local_scalar_dense",),
}


class Network(NamedTuple):
    """A policy, and the sizes of its update."""

    title: str
    policy: str
    make_env: Callable[[], Any]
    kwargs: dict[str, Any]

    def build(self, name: str, device: str) -> PPO:
        compiled = "compiled" if name == GRAPHS else name
        model = with_random_rollout(build(compiled, self.policy, self.make_env(), device, **self.kwargs))
        if name == GRAPHS:
            use_cuda_graphs(model)
        return model

    @property
    def n_minibatches(self) -> int:
        return self.kwargs["n_epochs"] * self.kwargs["n_steps"] // self.kwargs["batch_size"]


def cartpole() -> gym.Env:
    return gym.make("CartPole-v1")


def sizes(n_steps: int, batch_size: int, n_epochs: int = 10, **kwargs: Any) -> dict[str, Any]:
    return {"n_steps": n_steps, "batch_size": batch_size, "n_epochs": n_epochs, **kwargs}


NETWORKS = {
    "mlp": Network("64×64, minibatch 64 of 2048, 10 epochs", "MlpPolicy", cartpole, sizes(2048, 64)),
    "cnn": Network("NatureCNN 84×84×4, minibatch 256 of 1024, 4 epochs", "CnnPolicy", images, sizes(1024, 256, 4)),
    "large": Network("64×64, minibatch 4096 of 8192, 10 epochs", "MlpPolicy", cartpole, sizes(8192, 4096)),
    "wide": Network(
        "256×256, minibatch 64 of 2048, 10 epochs",
        "MlpPolicy",
        cartpole,
        sizes(2048, 64, policy_kwargs={"net_arch": [256, 256]}),
    ),
}


def use_cuda_graphs(model: Any) -> None:
    """Replay the compiled gradients of a model as a CUDA graph. The next replay overwrites what it returns."""
    options = {"triton.cudagraphs": True, "guard_filter_fn": _guards_to_keep, "fallback_random": True}
    compiled = th.compile(clipped_gradients, fullgraph=True, dynamic=False, options=options)

    def replay(*args: Any) -> Any:
        th.compiler.cudagraph_mark_step_begin()
        gradients, metrics, norm = compiled(*args)
        return gradients, metrics.clone(), norm.clone()

    model._compiler.compiled[clipped_gradients] = replay


def let_older_torch_compile() -> None:
    """The package wants torch 2.13, where each model has its own limit of recompilations. A benchmark does not reach it."""
    if "isolate_recompiles" in inspect.signature(th.compile).parameters:
        return
    original = th.compile

    def compile(function: Any, *, isolate_recompiles: bool = True, **kwargs: Any) -> Any:
        return original(function, **kwargs)

    th.compile = compile  # type: ignore[assignment]
    th._dynamo.config.recompile_limit = 64


def finishing(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Wait for the GPU, too."""

    def finish() -> None:
        run()
        if device == "cuda":
            th.cuda.synchronize()

    return finish


def show_error(title: str, error: BaseException) -> None:
    lines = [line for line in str(error).splitlines() if line.strip()]
    print(f"{title:24} failed: {type(error).__name__}: {' '.join(lines[:2])[:300]}", flush=True)


def surviving(names: tuple[str, ...], make: Callable[[str], tuple[Any, Callable[[], Any]]]) -> dict[str, Callable[[], Any]]:
    """Build models and run each once, with a row for each that fails."""
    runs = {}
    for name in names:
        start = time.perf_counter()
        try:
            model, run = make(name)
            run()
        except Exception as error:  # the others are still worth their rows
            show_error(name, error)
            continue
        if compiler := getattr(model, "_compiler", None):
            state = "NOT compiled" if compiler.failed else "compiled"
            print(f"{name:24} {state}, first run {time.perf_counter() - start:.1f} s", flush=True)
        runs[name] = run
    return runs


def train_times(network: Network, device: str, rounds: int) -> None:
    names = ("PPO", "AdaptiveKLPPO", "compiled", *([GRAPHS] if device == "cuda" else []))

    def make(name: str) -> tuple[Any, Callable[[], Any]]:
        model = network.build(name, device)
        return model, finishing(model.train, device)

    print(f"\ntrain(): {network.title}, on {device}")
    times = seconds(surviving(names, make), rounds)
    print(f"{'':24}{'ms per minibatch':>18}{'relative':>10}")
    for name, of_run in times.items():
        relative = f"{of_run / times['PPO']:10.2f}" if "PPO" in times else ""
        print(f"{name:24}{1e3 * of_run / network.n_minibatches:18.3f}{relative}", flush=True)


def learn_speeds(env_id: str, n_envs: int, device: str, rounds: int) -> None:
    def make(name: str) -> tuple[Any, Callable[[], Any]]:
        algorithm, _, where = name.partition(" on ")
        model = build(algorithm, "MlpPolicy", make_vec_env(env_id, n_envs, seed=0), where or device, n_steps=256)
        return model, finishing(lambda: model.learn(256 * n_envs), device)

    print(f"\nlearn(): {env_id}, {n_envs} environment(s), 256 steps each, minibatch 64, 10 epochs, on {device}")
    times = seconds(surviving(("PPO", "AdaptiveKLPPO", "compiled", "compiled on cpu"), make), rounds)
    print(f"{'':24}{'steps per second':>18}{'relative':>10}")
    for name, of_run in times.items():
        relative = f"{times['PPO'] / of_run:10.2f}" if "PPO" in times else ""
        print(f"{name:24}{256 * n_envs / of_run:18.0f}{relative}", flush=True)


def count_waits(device: str) -> None:
    """Print how often an update waits for the GPU, from updates of one and of two epochs with a few minibatches each."""
    n_minibatches = 4
    print(f"\nsynchronizations of train(), on {device}")
    print(f"{'':40}{'per minibatch':>15}{'per update':>12}")
    activities = [th.profiler.ProfilerActivity.CPU, *([th.profiler.ProfilerActivity.CUDA] if device == "cuda" else [])]
    for network in (NETWORKS["mlp"], NETWORKS["cnn"]):
        network.kwargs["n_steps"] = n_minibatches * network.kwargs["batch_size"]
        for name in ("PPO", "AdaptiveKLPPO", "compiled", "predictive"):
            title = f"{name}, {network.policy}"
            try:
                model = network.build(name, device)
                model.train()
                counts = []
                for n_epochs in (1, 2):
                    model.n_epochs = n_epochs
                    with th.profiler.profile(activities=activities) as profile:
                        model.train()
                    counts.append(sum(event.count for event in profile.key_averages() if event.key in WAITS[device]))
            except Exception as error:  # the others are still worth their rows
                show_error(title, error)
                continue
            each = (counts[1] - counts[0]) / n_minibatches
            print(f"{title:40}{each:15.2f}{counts[0] - each * n_minibatches:12.1f}", flush=True)


def rank_speeds(env_id: str) -> None:
    print(f"\nranks: learn() of {env_id}, 8 environments, 512 steps each, minibatch 256, {os.cpu_count()} cores")
    print(f"{'':32} steps per second   ratio")
    first = None
    for variant in variants((2, 4, 8)):
        try:
            speed = on_ranks(variant, env_id, False, 512)
        except (Exception, SystemExit) as error:  # as above
            show_error(variant.title, error)
            continue
        first = first or speed
        print(f"{variant.title:32} {speed:16.0f} {speed / first:7.2f}", flush=True)


def run_tests(device: str) -> None:
    # Another machine has other versions, and their warnings
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "default"]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_device.py", "-k", device]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=False)


# In the order of their importance, with the seconds that each may take
SECTIONS: dict[str, tuple[float, Callable[[str, int], None]]] = {
    "tests": (180, lambda device, rounds: run_tests(device)),
    "mlp": (120, lambda device, rounds: train_times(NETWORKS["mlp"], device, rounds)),
    "cnn": (120, lambda device, rounds: train_times(NETWORKS["cnn"], device, rounds)),
    "waits": (90, lambda device, rounds: count_waits(device)),
    "large": (90, lambda device, rounds: train_times(NETWORKS["large"], device, rounds)),
    "wide": (90, lambda device, rounds: train_times(NETWORKS["wide"], device, rounds)),
    "learn": (90, lambda device, rounds: learn_speeds("CartPole-v1", 8, device, rounds)),
    "mujoco": (90, lambda device, rounds: learn_speeds("HalfCheetah-v5", 1, device, rounds)),
    "ranks": (120, lambda device, rounds: rank_speeds("CartPole-v1")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=840, help="end after this long (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run (default: all)")
    parser.add_argument("--here", choices=SECTIONS, help=argparse.SUPPRESS)  # a section, in this process
    args = parser.parse_args()
    if args.here:
        th.set_num_threads(1)
        warnings.filterwarnings("ignore", message="You are trying to run")
        let_older_torch_compile()
        SECTIONS[args.here][1](args.device, args.rounds)
        return

    if args.device == "cuda" and not th.cuda.is_available():
        raise SystemExit("torch finds no GPU: --device cpu only shows that this script works")
    gpu = th.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    print(f"torch {th.__version__}, Python {sys.version.split()[0]}, {gpu}, {os.cpu_count()} cores", flush=True)
    end = time.monotonic() + args.seconds
    for name in args.only:
        limit = min(SECTIONS[name][0], end - time.monotonic())
        if limit < 10:
            print(f"\n{name}: no time left", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks.cuda", "--here", name]
        start = time.monotonic()
        try:
            subprocess.run([*command, "--device", args.device, "--rounds", str(args.rounds)], timeout=limit, check=True)
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {limit:.0f} s", flush=True)
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error}", flush=True)
        print(f"({name}: {time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
