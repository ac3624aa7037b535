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

from sb3_adaptive_kl.compare import backends, report
from sb3_adaptive_kl.compare.arms import PlanError
from sb3_adaptive_kl.compare.plan import FEW_SEEDS, Plan
from sb3_adaptive_kl.compare.run import carry_out
from sb3_adaptive_kl.compare.store import Store

PACKAGES = ("sb3-adaptive-kl", "stable-baselines3", "sb3-contrib", "rl_zoo3", "gymnasium", "torch", "numpy", "scipy")


FLAGS = {"environments": ["--env"], "arms": ["--algo"], "n_timesteps": ["-n", "--n-timesteps"]}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sb3-adaptive-kl compare",
        description="Compare algorithms on environments: train on the CPU, measure, and write a report.",
        epilog="To resume an interrupted comparison, run the same command again.",
    )
    # A field of the plan that is not given is absent from the namespace
    group = parser.add_argument_group("the plan", argument_default=argparse.SUPPRESS)
    for name, field in Plan.model_fields.items():
        flags = FLAGS.get(name, [f"--{name.replace('_', '-')}"])
        kinds = {list[str]: {"nargs": "+"}, bool: {"action": "store_true"}}
        if name != "hyperparameters":
            group.add_argument(*flags, dest=name, help=field.description, **kinds.get(field.annotation, {"type": int}))
    parser.add_argument("--plan", type=Path, metavar="YML", help="file with the plan, instead of the options above")
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
        plan.check()
        backend = _backend(args)
        store = Store.create(args.output, plan, _command(arguments))
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
        return Plan.create({"environments": [], "arms": ["ppo_kl", "ppo"], "seeds": FEW_SEEDS, **given})
    if given:
        raise PlanError(f"--plan cannot be combined with {', '.join(given)}: remove one or the other")
    return Plan.load(args.plan)


def _backend(args: argparse.Namespace) -> backends.Backend:
    if args.jobs is not None and args.jobs < 1:
        raise PlanError(f"jobs must be at least 1, not {args.jobs}")
    if args.ray_address is not None and (args.backend != "ray" or args.jobs is not None):
        raise PlanError("--ray-address requires --backend ray, and excludes --jobs: the cluster's CPUs decide")
    jobs = args.jobs or 1
    return backends.ray(jobs, args.ray_address) if args.backend == "ray" else backends.loky(jobs)


def _command(arguments: list[str]) -> dict[str, Any]:
    return {
        "command": ["sb3-adaptive-kl", "compare", *arguments],
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
    }
