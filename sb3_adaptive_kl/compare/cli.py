"""
Command line: `python -m sb3_adaptive_kl.compare`, or `sb3-adaptive-kl compare`.

Exit codes: 0 if all runs finished, 1 if some failed, 2 for invalid input (one line, nothing written), 130 after Ctrl-C.
"""

import argparse
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from sb3_adaptive_kl.compare import backends, plots, report, statistics
from sb3_adaptive_kl.compare.arms import PlanError
from sb3_adaptive_kl.compare.plan import FEW_SEEDS, Plan
from sb3_adaptive_kl.compare.run import carry_out
from sb3_adaptive_kl.compare.store import Store

PACKAGES = (
    "sb3-adaptive-kl", "stable-baselines3", "sb3-contrib", "rl_zoo3", "gymnasium", "torch", "numpy", "rliable",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


# Arguments that describe the plan; not allowed together with --plan
PLAN_ARGUMENTS = (
    "env",
    "algo",
    "seeds",
    "first_seed",
    "n_timesteps",
    "n_eval_episodes",
    "own_hyperparameters",
    "gym_packages",
)


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sb3-adaptive-kl compare",
        description="Compare algorithms on environments: train, measure, and write a report.",
        epilog="To resume an interrupted comparison, run the same command again.",
    )
    parser.add_argument("--env", nargs="+", metavar="ID", help="environments to compare on")
    parser.add_argument(
        "--algo",
        nargs="+",
        metavar="ARM",
        help="algorithms of RL Baselines3 Zoo, or 'ppo_kl:target_kl=0.1,kl_rule=fixed', or the same with a name for the "
        "report, 'fixed=ppo_kl:target_kl=0.1,kl_rule=fixed' (default: ppo_kl ppo)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help=f"number of seeds (default: {FEW_SEEDS})")
    parser.add_argument("--first-seed", type=int, metavar="N", help="where seeds are counted from (default: 0)")
    parser.add_argument(
        "-n",
        "--n-timesteps",
        type=int,
        metavar="N",
        help="time steps per run (default: the zoo's for PPO, 1,000,000 where it has none)",
    )
    parser.add_argument("--n-eval-episodes", type=int, metavar="N", help="episodes that score a final policy (default: 20)")
    parser.add_argument(
        "--own-hyperparameters",
        action="store_true",
        default=None,
        help="use the zoo's entry tuned for each algorithm, instead of PPO's entry with the algorithm's own trust region",
    )
    parser.add_argument("--gym-packages", nargs="+", metavar="PACKAGE", help="packages to import for their environments")
    parser.add_argument("--plan", type=Path, metavar="YML", help="file with the plan, instead of the arguments above")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder for the results")
    parser.add_argument("-j", "--jobs", type=int, metavar="N", help="number of runs at a time (default: 1)")
    parser.add_argument("--backend", choices=["loky", "ray"], default="loky", help="run on this machine or on a Ray cluster")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="existing cluster (default: start one here)")
    return parser


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
        Store.check(args.output, plan)
        plan.check()
        backend = _backend(args)
        store = Store.create(args.output, plan, _command(arguments))
        carry_out(plan, store, backend)
        return summarize(plan, store)
    except PlanError as error:
        print(f"sb3-adaptive-kl compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, run the same command again to resume", file=sys.stderr)
        return 130


def _plan(args: argparse.Namespace) -> Plan:
    given = {name: getattr(args, name) for name in PLAN_ARGUMENTS if getattr(args, name) is not None}
    if args.plan is None:
        defaults = {"env": [], "algo": ["ppo_kl", "ppo"], "seeds": FEW_SEEDS}
        renamed = {"env": "environments", "algo": "arms"}
        return Plan.create(**{renamed.get(name, name): value for name, value in {**defaults, **given}.items()})
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise PlanError(f"--plan cannot be combined with {names}: remove one or the other")
    return Plan.load(args.plan)


def _backend(args: argparse.Namespace) -> backends.Backend:
    if args.jobs is not None and args.jobs < 1:
        raise PlanError(f"jobs must be at least 1, not {args.jobs}")
    if args.ray_address is not None and (args.backend != "ray" or args.jobs is not None):
        raise PlanError("--ray-address requires --backend ray, and excludes --jobs: the cluster's CPUs decide")
    if args.backend == "ray":
        return backends.ray(args.jobs or 1, args.ray_address)
    return backends.loky(args.jobs or 1)


def summarize(plan: Plan, store: Store) -> int:
    """Write statistics, plots and report of the finished runs, and return the exit code."""
    statistics.write(plan, store)
    plots.write(plan, store)
    page = report.write(plan, store)
    warning = report.seeds_warning(plan.seeds)
    if warning is not None:
        print(f"Warning: {warning}", file=sys.stderr)
    failures = store.failures(plan)
    for run, line in failures.items():
        print(f"failed: {run}: {line}", file=sys.stderr)
    print(f"Report: {page}")
    return 1 if failures else 0


def _command(arguments: list[str]) -> dict[str, Any]:
    return {
        "command": ["sb3-adaptive-kl", "compare", *arguments],
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
    }
