"""For tests of comparisons: a small plan and how it is run, and statistics of runs that the fixture `make` writes to disk."""

import json
import os
import signal
import sys
from dataclasses import asdict
from types import SimpleNamespace

from sb3_adaptive_kl.compare import backends, statistics
from sb3_adaptive_kl.compare.ruler import Ruler

PLAN = {"environments": ["CartPole-v1"], "arms": ["ppo_kl", "ppo"], "seeds": 2, "n_timesteps": 1500, "n_eval_episodes": 2}
# What command.json holds
COMMAND = {"command": ["sb3-adaptive-kl", "compare"], "versions": {}, "python": "3", "machine": "here"}
COMPARE = [sys.executable, "-m", "sb3_adaptive_kl.compare"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}


def computed(results, **plan):
    """The statistics of runs, for what they read of a plan."""
    return statistics.compute(SimpleNamespace(**{"seeds": 5, "protocol": None, "families": {}, **plan}), results)[0]


def compute(make, arms, environments=("E",), **kwargs):
    """Compute the statistics of arms given as lists of final returns, one per seed, the same on each environment."""
    results = [
        make(final=(final,), arm=arm, seed=seed, env=env, **kwargs)
        for env in environments
        for arm, finals in arms.items()
        for seed, final in enumerate(finals)
    ]
    return computed(results)


def in_this_process(runs):
    """Backend that saves the time in which each process would import everything."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    for run in runs:
        outcome = backends.attempt(run, lambda timesteps: None)
        signal.signal(signal.SIGINT, on_interrupt)
        yield run, outcome


def finished(run, updates=((256, 0.02),), episodes=((100, 20.0),), final=20.0, threshold=475.0):
    """Files of a finished run: updates as (time step, KL), none if not measured; episodes as (time step, return)."""
    penalty = "1.0,0.01" if run.algo == "ppo_kl" else ","
    summary = {
        **asdict(run),
        "timesteps": 256,
        "final_returns": [final] * run.n_eval_episodes,
        "random_returns": [10.0],
        "reward_threshold": threshold,
        "seconds": 1.0,
        "machine": "here",
    }
    files = {"run.json": json.dumps(summary), "episodes.csv": "timesteps,return,length\n"}
    files["episodes.csv"] += "".join(f"{timestep},{value},1\n" for timestep, value in episodes)
    rows = "".join(f"{timestep},{kl},{kl},{penalty},,3e-4\n" for timestep, kl in updates)
    files["updates.csv"] = ",".join(Ruler.COLUMNS) + "\n" + rows
    return {name: content.encode() for name, content in files.items()}
