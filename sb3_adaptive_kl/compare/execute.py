"""
Execute one training run with the zoo's ExperimentManager, into an ordinary zoo log folder, measured by the ruler.

The result depends on the run alone and is the content of its folder; `backends.py` decides where it is executed.
Besides the zoo's files, the folder holds

    output.txt      printed output, including warnings
    episodes.csv    every training episode: time step of its end, return, length
    updates.csv     every update of an on-policy algorithm: see `Ruler`
    run.json        settings, returns of the final policy, training time; written last
"""

import argparse
import contextlib
import csv
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_adaptive_kl.compare.arms import defaults
from sb3_adaptive_kl.compare.plan import Files, Run
from sb3_adaptive_kl.compare.ruler import Ruler, measurable

N_EVALUATIONS = 10  # the zoo's evaluations during training, for its plots
EVAL_SEED = 1_000_000  # added to the run's seed: evaluate on other seeds than those used for training


class Recorder(BaseCallback):
    """Record every training episode, and report the current time step."""

    COLUMNS = ("timesteps", "return", "length")

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self.episodes: list[tuple[int, float, int]] = []
        self._report = report
        self._reported = -float("inf")

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.episodes.append((self.num_timesteps, float(info["episode"]["r"]), int(info["episode"]["l"])))
        if time.monotonic() - self._reported > 0.5:
            self._reported = time.monotonic()
            self._report(self.num_timesteps)
        return True


def execute(run: Run, report: Callable[[int], None] = lambda timesteps: None) -> Files:
    """
    Train and evaluate, in this process.

    :param run: the run to execute
    :param report: called with the current time step twice a second
    :return: content of the run's folder
    :raises Exception: if anything in the training or evaluation does
    """
    th.set_num_threads(1)  # every run has its own process
    for package in ("rl_zoo3.import_envs", *run.gym_packages):
        import_module(package)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "output.txt"), "w") as output:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):  # with warnings
            manager, result = _train(run, Path(folder), report)
        output.flush()
        path = Path(manager.save_path)
        os.replace(output.name, path / "output.txt")
        (path / "run.json").write_text(json.dumps(result, indent=1))
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def _train(run: Run, folder: Path, report: Callable[[int], None]) -> tuple[ExperimentManager, dict[str, Any]]:
    config = folder / "hyperparameters.yml"
    config.write_text(yaml.safe_dump({run.env: run.hyperparameters}))
    n_timesteps = int(run.hyperparameters["n_timesteps"])
    # The zoo's other scripts read these from the args.yml of an agent
    args = argparse.Namespace(
        algo=run.algo, env=run.env, seed=run.seed, n_timesteps=n_timesteps, env_kwargs=None, device="cpu"
    )
    manager = ExperimentManager(
        args,
        run.algo,
        run.env,
        str(folder),
        seed=run.seed,
        eval_freq=max(n_timesteps // N_EVALUATIONS, _n_steps_of_a_rollout(run) // N_EVALUATIONS, 1),
        verbose=0,
        log_interval=-2,  # disables the zoo's logging
        device="cpu",
        config=str(config),
    )
    experiment = manager.setup_experiment()
    assert experiment is not None  # it is None only when the zoo optimizes hyperparameters
    model, _ = experiment
    recorder, ruler = Recorder(report), Ruler()
    manager.callbacks.extend([recorder, ruler] if measurable(model) else [recorder])
    start = time.perf_counter()
    manager.learn(model)
    seconds = time.perf_counter() - start - ruler.seconds
    if model.num_timesteps < n_timesteps:  # on an interrupt the zoo stops the training and saves
        raise RuntimeError(f"training ended after {model.num_timesteps} of {n_timesteps} time steps")
    manager.save_trained_model(model)

    _write_csv(Path(manager.save_path, "episodes.csv"), recorder.COLUMNS, recorder.episodes)
    if measurable(model):
        _write_csv(Path(manager.save_path, "updates.csv"), ruler.COLUMNS, ruler.updates)
    return manager, {
        "env": run.env,
        "arm": run.arm,
        "algo": run.algo,
        "seed": run.seed,
        "hyperparameters": run.hyperparameters,
        "timesteps": model.num_timesteps,
        "final_returns": _final_returns(run, manager, model),
        "random_returns": _random_returns(run, manager),
        "reward_threshold": gym.spec(run.env).reward_threshold,
        "kl_tolerance": getattr(model, "kl_tolerance", None),
        "seconds": seconds,
        "machine": platform.node(),
    }


def _n_steps_of_a_rollout(run: Run) -> int:
    """Number of time steps that an on-policy algorithm takes at least, even if the budget is smaller."""
    hyperparameters = {"n_envs": 1, **defaults(run.algo), **run.hyperparameters}
    return int(hyperparameters.get("n_steps", 0)) * int(hyperparameters["n_envs"])


def _final_returns(run: Run, manager: ExperimentManager, model: Any) -> list[float]:
    """Score the trained policy: returns of ``n_eval_episodes`` episodes."""
    env = _evaluation_env(run, manager)
    sync_envs_normalization(model.get_env(), env)
    returns, _ = evaluate_policy(
        model, env, n_eval_episodes=run.n_eval_episodes, deterministic=manager.deterministic_eval, return_episode_rewards=True
    )
    env.close()
    return [float(value) for value in returns]  # type: ignore[union-attr]


def _random_returns(run: Run, manager: ExperimentManager) -> list[float]:
    """Score uniformly random actions, the zero of the normalized score. All arms get the same episodes."""
    env = _evaluation_env(run, manager)
    env.action_space.seed(EVAL_SEED + run.seed)
    env.reset()
    returns: list[float] = []
    while len(returns) < run.n_eval_episodes:
        _, _, _, infos = env.step(np.array([env.action_space.sample()]))
        returns.extend(float(info["episode"]["r"]) for info in infos if "episode" in info)
    env.close()
    return returns


def _evaluation_env(run: Run, manager: ExperimentManager) -> VecEnv:
    env = manager.create_envs(1, eval_env=True, no_log=True)
    env.seed(EVAL_SEED + run.seed)
    return env


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[Any]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
