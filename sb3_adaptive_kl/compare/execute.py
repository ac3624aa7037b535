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
import io
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from sb3_contrib.common.maskable.distributions import make_masked_proba_distribution
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_adaptive_kl.compare.arms import check_numbers, reported
from sb3_adaptive_kl.compare.plan import Plan, Run
from sb3_adaptive_kl.compare.ruler import Ruler
from sb3_adaptive_kl.zoo.masks import MASKS

N_EVALUATIONS = 10  # the zoo's evaluations during training, for its plots
MIN_EVAL_FREQ = 500  # time steps: a first rollout longer than the budget is collected in full, and not evaluated at every step
EVAL_SEED = 1_000_000  # added to the run's seed: evaluate on other seeds than those used for training


class Recorder(BaseCallback):
    """
    Record every training episode, and report the current time step. A return that is not finite fails this run, rather than
    the report of all runs.
    """

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self.episodes: list[tuple[int, float, int]] = []  # time step of the end, return, length
        self._report = report
        self._reported = -float("inf")

    def _on_step(self) -> bool:
        for info in self.locals.get("infos", ()):
            if "episode" in info:
                episode = info["episode"]
                self.episodes.append((self.num_timesteps, _finite_return(episode["r"]), int(episode["l"])))
        if time.monotonic() - self._reported > 0.5:
            self._reported = time.monotonic()
            self._report(self.num_timesteps)
        return True

    def _on_training_end(self) -> None:
        self._report(self.num_timesteps)  # the driver shows that the evaluation begins


def check(plan: Plan) -> None:
    """
    Build every arm on every environment, so that a mistake is found before the first run, and not hours later.

    :raises PlanError: if an environment cannot be made, or an algorithm rejects it or a hyperparameter
    """
    for run in plan.runs():
        if run.seed == plan.first_seed:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), reported(f"{run.arm!r} on {run.env}"):
                warnings.simplefilter("ignore")
                with contextlib.redirect_stdout(io.StringIO()):  # the zoo prints the hyperparameters, which the plan holds
                    build(run, Path(folder))[1].env.close()


def build(run: Run, folder: Path) -> tuple[ExperimentManager, Any]:
    """Return the zoo's manager of a run, which writes below the folder, and the untrained model."""
    check_numbers(run.algo, run.hyperparameters)
    config = folder / "hyperparameters.yml"
    config.write_text(yaml.safe_dump({run.env: run.hyperparameters}))
    manager = ExperimentManager(
        # The zoo's other scripts read these from the args.yml of an agent
        argparse.Namespace(**asdict(run), n_timesteps=run.budget, env_kwargs=None, device="cpu"),
        run.algo,
        run.env,
        str(folder),
        seed=run.seed,
        eval_freq=max(run.budget // N_EVALUATIONS, MIN_EVAL_FREQ),
        verbose=0,
        log_interval=-2,  # disables the zoo's logging
        device="cpu",
        config=str(config),
    )
    return manager, manager.setup_experiment()[0]  # type: ignore[index]  # None only when the zoo optimizes hyperparameters


def execute(run: Run, report: Callable[[int], None] = lambda timesteps: None) -> dict[str, bytes]:
    """
    Train and evaluate, in this process.

    :param run: the run to execute
    :param report: called with the current time step twice a second
    :return: content of the run's folder
    :raises Exception: if anything in the training or evaluation does
    """
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
    manager, model = build(run, folder)
    recorder, ruler = Recorder(report), Ruler()
    manager.callbacks.extend([recorder, ruler] if isinstance(model, OnPolicyAlgorithm) else [recorder])
    start = time.perf_counter()
    manager.learn(model)
    seconds = time.perf_counter() - start - ruler.seconds
    if model.num_timesteps < run.budget:  # on an interrupt the zoo stops the training and saves
        raise RuntimeError(f"training ended after {model.num_timesteps} of {run.budget} time steps")
    manager.save_trained_model(model)

    folder = Path(manager.save_path)
    pd.DataFrame(recorder.episodes, columns=["timesteps", "return", "length"]).to_csv(folder / "episodes.csv", index=False)
    pd.DataFrame(ruler.updates, columns=ruler.COLUMNS).to_csv(folder / "updates.csv", index=False)
    return manager, {
        **asdict(run),
        "timesteps": model.num_timesteps,
        "final_returns": _returns(run, manager, model),
        "random_returns": _returns(run, manager, None),
        "reward_threshold": gym.spec(run.env).reward_threshold,
        "seconds": seconds,
        "machine": platform.node(),
    }


def _returns(run: Run, manager: ExperimentManager, model: Any) -> list[float]:
    """
    Score a policy on ``n_eval_episodes`` episodes, which are the same for all arms.

    :param model: the model with the policy; None for uniformly random actions, the zero of the normalized score
    """
    env = manager.create_envs(1, eval_env=True, no_log=True)
    env.seed(EVAL_SEED + run.seed)
    if model is None:
        env.action_space.seed(EVAL_SEED + run.seed)  # the same zero for all arms
        th.manual_seed(EVAL_SEED + run.seed)
        model = SimpleNamespace(predict=lambda *_, **__: (random_action(env), None))
    else:
        sync_envs_normalization(model.get_env(), env)  # else the policy would see observations that it does not know
    returns, _ = evaluate_policy(
        model, env, n_eval_episodes=run.n_eval_episodes, deterministic=manager.deterministic_eval, return_episode_rewards=True
    )
    env.close()
    return list(map(_finite_return, returns))  # type: ignore[arg-type]  # a list with return_episode_rewards


def random_action(env: VecEnv) -> np.ndarray:
    """Draw an action of one environment uniformly, of those that are valid."""
    if not env.has_attr(MASKS):
        return np.array([env.action_space.sample()])
    masks = np.stack(env.env_method(MASKS))
    distribution = make_masked_proba_distribution(env.action_space).proba_distribution(th.zeros(masks.shape))
    distribution.apply_masking(masks)
    return distribution.sample().numpy()


def _finite_return(value: Any) -> float:
    """Convert a return, and refuse one that cannot be averaged or drawn."""
    if not np.isfinite(value):
        raise ValueError(f"an episode's return is {value}: only finite rewards can be compared")
    return float(value)
