"""
Command line: `python -m sb3_adaptive_kl.compare`, or `sb3-adaptive-kl compare`.

Exit codes: 0 if all runs finished, 1 if some failed, 2 for invalid input (nothing is written), 130 after Ctrl-C.
"""

import argparse
import json
import math
import platform
import sys
import time
from contextlib import closing
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sb3_adaptive_kl.compare import backends, report
from sb3_adaptive_kl.compare.arms import Loader, PlanError, reported
from sb3_adaptive_kl.compare.execute import check
from sb3_adaptive_kl.compare.plan import FEW_SEEDS, Plan
from sb3_adaptive_kl.compare.store import Store

# Those that can change a result
PACKAGES = ("sb3-adaptive-kl", "stable-baselines3", "sb3-contrib", "rl_zoo3", "gymnasium", "torch", "numpy", "scipy")
ARMS = "algorithms of the zoo, or 'ppo_kl:target_kl=0.1', or 'name=ppo_kl:target_kl=0.1' (default: ppo_kl ppo)"
PATIENCE = 300  # seconds without a time step: longer than the update of a large network
HINT = "If its environment never ends an episode, neither does the evaluation: register it with max_episode_steps."


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sb3-adaptive-kl compare",
        description="Compare algorithms on environments: train on the CPU, measure, and write a report.",
        epilog="To resume an interrupted comparison, run the same command again.",
        allow_abbrev=False,  # --seed 7 would mean --seeds 7
    )
    # An option that is not given is absent from the namespace
    plan = parser.add_argument_group("the plan", argument_default=argparse.SUPPRESS)
    either = plan.add_mutually_exclusive_group(required=True)
    either.add_argument("--plan", type=Path, default=None, metavar="YML", help="file with a plan; options replace its fields")
    either.add_argument("--env", dest="environments", nargs="+", metavar="ID", help="gymnasium ids of the environments")
    plan.add_argument("--algo", dest="arms", nargs="+", metavar="ARM", help=ARMS)
    plan.add_argument("--seeds", type=int, metavar="N", help=f"number of seeds (default: {FEW_SEEDS})")
    plan.add_argument("--first-seed", type=int, metavar="N", help="where seeds are counted from (default: 0)")
    plan.add_argument("-n", "--n-timesteps", type=float, metavar="N", help="time steps (default: PPO's in the zoo)")
    plan.add_argument("--n-eval-episodes", type=int, metavar="N", help="episodes that score a final policy (default: 20)")
    plan.add_argument("--params", nargs="+", help="hyperparameters of all arms, such as n_envs=8 normalize=true")
    plan.add_argument("--own-hyperparameters", action="store_true", help="give each algorithm the entry tuned for it")
    plan.add_argument("--sweep", type=sweep, metavar="NAME=VALUE,…", help="numbers that every arm gets for a hyperparameter")
    plan.add_argument("--protocol", choices=["ppo-paper"], help="also score as in a paper: that of PPO, section 6.1")
    plan.add_argument("--gym-packages", nargs="+", metavar="PACKAGE", help="packages to import for their environments")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder for the results")
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="number of runs at a time (default: 1)")
    parser.add_argument("--backend", choices=["loky", "ray"], default="loky", help="run on this machine or on a Ray cluster")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="existing cluster, whose CPUs replace --jobs")
    return parser


def sweep(text: str) -> dict[str, Any]:
    """Parse ``name=value,value``; the plan checks that the values are numbers."""
    name, equals, values = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value,value")
    with reported(text):
        return {name: yaml.load(f"[{values}]", Loader)}


def main(arguments: list[str] | None = None) -> int:
    """
    Run the command.

    :param arguments: command-line arguments, ``sys.argv`` if None
    :return: the exit code
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    try:
        plan = _plan(args)
        check(plan)
        backend = _backend(args)
        command = {
            "command": ["sb3-adaptive-kl", "compare", *arguments],
            "versions": {package: metadata.version(package) for package in PACKAGES},
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
        }
        store = Store.create(args.output, plan, command)
        carry_out(store, backend)
        return report.summarize(store)
    except PlanError as error:
        print(f"sb3-adaptive-kl compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, run the same command again to resume", file=sys.stderr)
        return 130


def _plan(args: argparse.Namespace) -> Plan:
    given = {name: value for name, value in vars(args).items() if name in Plan.model_fields}
    if args.plan is None:
        return Plan.create({"arms": ["ppo_kl", "ppo"], "seeds": FEW_SEEDS, **given})
    return Plan.load(args.plan, given)


def _backend(args: argparse.Namespace) -> backends.Backend:
    if args.jobs < 1:
        raise PlanError(f"jobs must be at least 1, not {args.jobs}")
    if args.ray_address is not None and args.backend != "ray":
        raise PlanError("--ray-address requires --backend ray")
    return backends.ray(args.jobs, args.ray_address) if args.backend == "ray" else backends.loky(args.jobs)


def carry_out(store: Store, backend: backends.Backend) -> None:
    """
    Execute the unfinished runs, with progress bars on a terminal and a line for each run that ends.

    A failure is recorded and does not stop the other runs.
    """
    plan, runs = store.plan, list(store.plan.runs())
    todo = [run for run in runs if not store.finished(run)]
    n_finished = len(runs) - len(todo)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # On stderr, so that stdout has the result alone; and names of arms may look like rich's markup: [0.1, 3]
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    sizes = ((len(plan.names), "arm"), (len(plan.environments), "environment"), (plan.seeds, "seed"))
    budgets = " or ".join(f"{budget:,}" for budget in sorted({run.budget for run in runs}))
    size = " × ".join(report.count(*each) for each in sizes)
    console.print(f"{size} × {budgets} time steps = {len(runs)} runs, {n_finished} finished")
    start, total = time.monotonic(), sum(run.budget for run in todo)
    progress: dict[str, tuple[int, float]] = {}  # folder of a run → its time step, and when it took that
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars, closing(backend(todo)) as events:
        overall = bars.add_task(f"{n_finished}/{len(runs)} runs", total=total)
        tasks = {run.folder: bars.add_task("", total=run.budget, visible=False) for run in todo}
        for run, event in events:
            # A rollout ends beyond the budget
            timesteps = min(event, run.budget) if isinstance(event, int) else run.budget
            before, since = progress.get(run.folder, (-1, 0.0))
            if timesteps != before:
                progress[run.folder] = timesteps, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                hint = HINT if timesteps else "Does its environment's reset() come to an end?"
                console.print(f"{run} has not taken a time step for {PATIENCE // 60} minutes. {hint}")
                progress[run.folder] = timesteps, math.inf  # say it once
            completed = sum(timesteps for timesteps, _ in progress.values())
            doing = f"{run}, evaluating" if timesteps == run.budget else str(run)
            bars.update(tasks[run.folder], completed=timesteps, visible=isinstance(event, int), description=doing)
            if not isinstance(event, int):
                store.keep(run, event)
                n_finished += 1
                # Not rich's estimate, which follows the last seconds, in which some runs may only evaluate
                left = timedelta(seconds=round((time.monotonic() - start) * (total / completed - 1)))
                ending = f", {left} left" if n_finished < len(runs) else ""
                console.print(f"[{n_finished}/{len(runs)}] {run}: {_in_short(event)}{ending}")
            bars.update(overall, completed=completed, description=f"{n_finished}/{len(runs)} runs")


def _in_short(outcome: backends.Outcome) -> str:
    if isinstance(outcome, str):
        return f"failed: {outcome.splitlines()[0]}"
    result = json.loads(outcome["run.json"])
    speed = result["timesteps"] / result["seconds"]
    return f"return {fmean(result['final_returns']):.1f}, {result['seconds']:.0f} s, {speed:,.0f} steps/s"
