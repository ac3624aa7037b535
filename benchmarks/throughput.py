"""
Compare the speed and memory of AdaptiveKLPPO with SB3's PPO, with sbx's PPO if it is installed, and with an LSTM.

    python -m benchmarks.throughput

This prints the comparison in docs/performance.md, from one process with one torch thread. The algorithms take turns, so that
all run under the same load. The times are medians over the rounds after a warm-up round; "relative" compares them with SB3's
PPO, or sb3-contrib's RecurrentPPO, in the same rounds. Benchmarks of `train()` use random rollouts, since their contents do
not change the time of an update; those with an LSTM, where it depends on the lengths of episodes, use one of a random policy.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.logger import configure

from sb3_adaptive_kl import AdaptiveKLPPO, RecurrentAdaptiveKLPPO
from sb3_adaptive_kl.fast.compiled import clipped_gradients
from sb3_adaptive_kl.rollout.old_policy import OldPolicy

RMSPROP = {"policy_kwargs": {"optimizer_class": th.optim.RMSprop}}
# With a ceiling that no update here exceeds, and with one that all do, since β cannot hold so small a target
PREDICTIVE = {"kl_rule": "predictive", "kl_ceiling": 1e6}
SHORTENED = {"kl_rule": "predictive", "kl_ceiling": 1.5, "target_kl": 1e-5, "kl_coef_bounds": (0.5, 1.0)}
VARIANTS: dict[str, tuple[type[PPO], dict[str, Any]]] = {
    "PPO": (PPO, {}),
    "AdaptiveKLPPO": (AdaptiveKLPPO, {}),
    "compiled": (AdaptiveKLPPO, {"compile": True}),
    "compiled, RMSprop": (AdaptiveKLPPO, {"compile": True, **RMSPROP}),
    "compiled, early stop": (AdaptiveKLPPO, {"compile": True, "kl_stop_factor": 1e9}),
    "predictive": (AdaptiveKLPPO, PREDICTIVE),
    "compiled, predictive": (AdaptiveKLPPO, {"compile": True, **PREDICTIVE}),
    "shortened": (AdaptiveKLPPO, SHORTENED),
}
RECURRENT: dict[str, tuple[type[RecurrentPPO], dict[str, Any]]] = {
    "RecurrentPPO": (RecurrentPPO, {}),
    "RecurrentAdaptiveKLPPO": (RecurrentAdaptiveKLPPO, {}),
    "compiled": (RecurrentAdaptiveKLPPO, {"compile": True}),
}


def images() -> gym.Env:
    return FakeImageEnv(screen_height=84, screen_width=84, n_channels=4, channel_first=True, discrete=True, action_dim=6)


def with_random_rollout(model: PPO) -> PPO:
    """Fill the rollout buffer with random numbers and uniformly distributed actions."""
    buffer, rng = model.rollout_buffer, np.random.default_rng(0)
    shape = buffer.rewards.shape
    if buffer.observations.dtype == np.uint8:
        buffer.observations[:] = rng.integers(256, size=buffer.observations.shape, dtype=np.uint8)
    else:
        buffer.observations[:] = rng.normal(size=buffer.observations.shape)
    buffer.actions[:] = rng.integers(model.action_space.n, size=buffer.actions.shape)
    buffer.log_probs[:] = -np.log(model.action_space.n)
    buffer.advantages[:] = rng.normal(size=shape)
    buffer.returns[:] = rng.normal(size=shape)
    buffer.full = True
    model.set_logger(configure(None, []))
    return model


def build(name: str, policy: str, env: Any, device: str = "cpu", **kwargs: Any) -> PPO:
    algorithm, options = VARIANTS[name]
    return algorithm(policy, env, seed=0, device=device, **kwargs, **options)


def seconds(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each run in seconds; the runs take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(of_run[1:]) for name, of_run in times.items()}


def update(name: str, model: PPO) -> None:
    model.train()
    assert name != "shortened" or 0 < model.step_scale < 1, "an update was not shortened, and its time means something else"


def sbx_model(**kwargs: Any) -> Any:
    from sbx import PPO as SbxPPO

    return SbxPPO("MlpPolicy", seed=0, **kwargs)


def train_times(rounds: int) -> None:
    kwargs = {"n_steps": 2048, "batch_size": 64, "n_epochs": 10}
    models = {name: with_random_rollout(build(name, "MlpPolicy", gym.make("CartPole-v1"), **kwargs)) for name in VARIANTS}
    runs: dict[str, Callable[[], Any]] = {name: partial(update, name, model) for name, model in models.items()}
    if find_spec("sbx"):
        runs["sbx PPO"] = sbx_model(env=gym.make("CartPole-v1"), **kwargs).learn(2048).train
    print("\ntrain(): CartPole-v1, 2048 steps, minibatch 64, 10 epochs, 64×64")
    print(f"{'':24}{'ms per minibatch':>18}{'relative':>10}")
    times = seconds(runs, rounds)
    for name, of_run in times.items():
        print(f"{name:24}{1e3 * of_run / 320:18.3f}{of_run / times['PPO']:10.2f}", flush=True)


def learn_speeds(n_envs: int, rounds: int) -> None:
    def env() -> Any:
        return make_vec_env("CartPole-v1", n_envs, seed=0)

    models = {name: build(name, "MlpPolicy", env()) for name in ("PPO", "AdaptiveKLPPO", "compiled")}
    if find_spec("sbx"):
        models["sbx PPO"] = sbx_model(env=env())
    n_steps = 2048 * n_envs
    print(f"\nlearn(): CartPole-v1, {n_envs} environment(s), 2048 steps each, minibatch 64, 10 epochs")
    print(f"{'':24}{'steps per second':>18}{'relative':>10}")
    times = seconds({name: lambda model=model: model.learn(n_steps) for name, model in models.items()}, rounds)
    for name, of_run in times.items():
        print(f"{name:24}{n_steps / of_run:18.0f}{times['PPO'] / of_run:10.2f}", flush=True)


def recurrent_speeds(rounds: int) -> None:
    models = {}
    for name, (algorithm, options) in RECURRENT.items():
        env = make_vec_env("CartPole-v1", 8, seed=0)
        models[name] = model = algorithm("MlpLstmPolicy", env, n_steps=128, seed=0, device="cpu", **options)
        model.train = lambda: None  # only collect, under the same policy each
        model.learn(8 * 128)
        del model.train
    print("\nMlpLstmPolicy: CartPole-v1, 8 environments, 128 steps each, minibatch 128, 10 epochs")
    print(f"{'':24}{'train(), ms per minibatch':>26}{'relative':>10}{'learn(), steps per second':>28}{'relative':>10}")
    updates = seconds({name: model.train for name, model in models.items()}, rounds)
    runs = seconds({name: lambda model=model: model.learn(8 * 128) for name, model in models.items()}, rounds)
    for name in models:
        update, run = updates[name], runs[name]
        train = f"{1e3 * update / 80:26.2f}{update / updates['RecurrentPPO']:10.2f}"
        print(f"{name:24}{train}{8 * 128 / run:28.0f}{runs['RecurrentPPO'] / run:10.2f}", flush=True)


def update_times(title: str, policy: str, env: Callable[[], Any], names: tuple[str, ...], rounds: int, **kwargs: Any) -> None:
    """Print the time of an update in µs per transition and epoch."""
    models = {name: with_random_rollout(build(name, policy, env(), **kwargs)) for name in names}
    times = seconds({name: partial(update, name, model) for name, model in models.items()}, rounds)
    n_drawn = kwargs["n_steps"] * kwargs["n_epochs"]
    cells = [f"{name} {1e6 * of_run / n_drawn:8.1f} ({of_run / times['PPO']:.2f})" for name, of_run in times.items()]
    print(f"{title:50}" + "   ".join(cells), flush=True)


def peak_memory(name: str, policy: str, n_steps: int) -> float:
    """Peak memory in MiB of a new process that trains once on a random rollout."""
    command = [sys.executable, "-m", "benchmarks.throughput", "--peak-memory-of", name, policy, str(n_steps)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak_memory(name: str, policy: str, n_steps: int) -> None:
    env = images() if policy == "CnnPolicy" else gym.make("CartPole-v1")
    with_random_rollout(build(name, policy, env, n_steps=n_steps, n_epochs=1)).train()
    # Not getrusage: a process inherits its maximum from the parent process
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


def print_profile(env_id: str, n_envs: int) -> None:
    """
    Print the time of each part of a compiled iteration, as a median over nine iterations, beside the time of what it cannot do
    without: the simulation alone, and the matrix products alone.
    """
    n_transitions = 2048 * n_envs
    model = build("compiled", "MlpPolicy", make_vec_env(env_id, n_envs, seed=0)).learn(2 * n_transitions)
    parts: list[dict[str, float]] = []

    def timed(title: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timer(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                parts[-1][title] = parts[-1].get(title, 0.0) + time.perf_counter() - start

        return timer

    for title, owner, name in (
        ("collecting: policy", type(model.policy), "__call__"),
        ("collecting: environment", model.env, "step"),
        ("collecting: buffer", model.rollout_buffer, "add"),
        ("collecting: returns and advantages", model.rollout_buffer, "compute_returns_and_advantage"),
        ("updating: old policy and KL", OldPolicy, "__init__"),
        ("updating: old policy and KL", OldPolicy, "kl"),
        ("updating", model, "train"),
        ("all", model, "learn"),
    ):
        setattr(owner, name, timed(title, getattr(owner, name)))
    compiled = model._compiler.compiled
    if clipped_gradients in compiled:
        compiled[clipped_gradients] = timed("updating: gradients", compiled[clipped_gradients])
    for _ in range(10):
        parts.append({})
        model.learn(n_transitions)
    ms = {title: 1e3 * statistics.median(part[title] for part in parts[1:]) for title in parts[-1]}
    everything, updating = ms.pop("all"), ms.pop("updating")
    ms["updating: other"] = updating - sum(ms[title] for title in ms if title.startswith("updating"))
    ms["collecting: other"] = everything - updating - sum(ms[title] for title in ms if title.startswith("collecting"))
    limits = {
        "collecting: environment": n_transitions * simulation_alone(env_id),
        "collecting: policy": 2048 * products_alone(model.policy, n_envs),
        "updating: gradients": model._steps_per_update * products_alone(model.policy, model.batch_size, backward=True),
    }
    print(f"{f'{env_id}, {n_envs} environment(s)':40}{'ms':>8}{'share':>8}{'limit':>8}")
    print(f"{'compiled iteration':40}{everything:8.1f}")
    for title in sorted(ms):
        limit = f"{1e3 * limits[title]:8.1f}" if title in limits else ""
        print(f"{title:40}{ms[title]:8.1f}{ms[title] / everything:8.0%}{limit}")


def simulation_alone(env_id: str) -> float:
    """Seconds of one time step of an environment without wrappers, including its share of a reset."""
    env = gym.make(env_id).unwrapped
    env.action_space.seed(0)
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(2048)]

    def steps() -> None:
        for action in actions:
            if env.step(action)[2]:
                env.reset()

    return seconds({"steps": steps}, 5)["steps"] / len(actions)


def products_alone(policy: Any, batch_size: int, backward: bool = False) -> float:
    """Seconds of the matrix products of a policy's forward pass, and of its backward pass, into memory that is there."""
    products = []
    for layer in (module for module in policy.modules() if isinstance(module, th.nn.Linear)):
        weight = layer.weight.detach()
        inputs, outputs = th.randn(batch_size, layer.in_features), th.randn(batch_size, layer.out_features)
        products.append((inputs, weight.t(), th.empty_like(outputs)))
        if backward:
            products.append((outputs.t(), inputs, th.empty_like(weight)))
            if layer.in_features != policy.features_dim:  # observations have no gradient
                products.append((outputs, weight, th.empty_like(inputs)))

    def multiply() -> None:
        for _ in range(100):
            for left, right, result in products:
                th.mm(left, right, out=result)

    return seconds({"products": multiply}, 5)["products"] / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of the short benchmarks (default: %(default)s)")
    parser.add_argument(
        "--profile", nargs=2, metavar=("ENV", "N_ENVS"), help="only print the time of each part of a compiled iteration"
    )
    parser.add_argument("--recurrent", action="store_true", help="only compare the algorithms with an LSTM")
    parser.add_argument("--peak-memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    th.set_num_threads(1)
    if args.peak_memory_of:
        name, policy, n_steps = args.peak_memory_of
        print_peak_memory(name, policy, int(n_steps))
        return

    if args.profile:
        if not args.profile[1].isdecimal() or args.profile[0] not in gym.registry:
            parser.error(f"--profile {' '.join(args.profile)}: the id of an environment and a number of them are needed")
        print_profile(args.profile[0], int(args.profile[1]))
        return

    print(f"torch {th.__version__}, Python {platform.python_version()}, {platform.machine()}, 1 thread")
    if args.recurrent:
        recurrent_speeds(args.rounds)
        return

    train_times(args.rounds)
    learn_speeds(1, args.rounds)
    learn_speeds(8, max(2, args.rounds // 2))
    recurrent_speeds(max(2, args.rounds // 2))

    print("\ntrain(), µs per transition and epoch (relative)")
    ours = ("PPO", "AdaptiveKLPPO")
    for batch_size, n_epochs in ((64, 10), (256, 10), (256, 4)):  # the last as for Atari games
        title = f"CnnPolicy 84×84×4, minibatch {batch_size}, {n_epochs} epochs"
        kwargs = {"n_steps": 512, "batch_size": batch_size, "n_epochs": n_epochs}
        update_times(title, "CnnPolicy", images, (*ours, "shortened"), 2, **kwargs)
    everything = (*ours, "compiled")
    for batch_size in (64, 512, 4096):
        title = f"minibatch {batch_size} of 8192 transitions, 10 epochs"
        kwargs = {"n_steps": 8192, "batch_size": batch_size, "n_epochs": 10}
        update_times(title, "MlpPolicy", lambda: gym.make("CartPole-v1"), everything, 2, **kwargs)
    # A single epoch is long enough here; the work done once per update then weighs ten times as much
    for n_steps in (2048, 20480, 204800):
        kwargs = {"n_steps": n_steps, "batch_size": 64, "n_epochs": 1}
        title = f"minibatch 64 of {n_steps} transitions, 1 epoch"
        update_times(title, "MlpPolicy", lambda: gym.make("CartPole-v1"), everything, 2, **kwargs)

    print("\npeak memory of one update, MiB (relative)")
    for policy, n_steps in (("MlpPolicy", 204800), ("CnnPolicy", 4096)):
        peaks = {name: peak_memory(name, policy, n_steps) for name in ours}
        cells = [f"{name} {peak:.0f} ({peak / peaks['PPO']:.2f})" for name, peak in peaks.items()]
        print(f"{policy + f', {n_steps} transitions':50}" + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
