"""
Write everything that follows from the finished runs; last `report.html`, a single file to share, and `report.md` with the same
content.

    python -m sb3_adaptive_kl.compare.report FOLDER
"""

import argparse
import json
import math
import shlex
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from sb3_adaptive_kl.compare import plots, statistics
from sb3_adaptive_kl.compare.arms import PlanError, effective
from sb3_adaptive_kl.compare.plan import FEW_SEEDS
from sb3_adaptive_kl.compare.store import COMMAND_FILE, Store


def summarize(store: Store) -> int:
    """Write statistics, plots and report of the finished runs, and return the exit code."""
    plan, results, failures = store.plan, store.results(), store.failures()
    computed, runs = statistics.compute(plan, results)
    # The numbers first: the report can be written again from them
    store.write("statistics.json", json.dumps(computed, indent=1, allow_nan=False))
    store.write("runs.csv", runs.to_csv(index=False))
    # StrictUndefined: a statistic that was renamed must not become an empty cell
    environment = Environment(
        loader=PackageLoader("sb3_adaptive_kl.compare"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({f.__name__: f for f in (number, interval, percent, count, differing)})
    runs = runs.fillna({"seconds_to_threshold": math.inf})  # never
    timed = {"seconds": "mean", "steps_per_second": "mean", "seconds_to_threshold": "median"}
    command = json.loads((store.folder / COMMAND_FILE).read_text())
    warning = f"{count(plan.seeds, 'seed')}: with fewer than {FEW_SEEDS}, intervals say little, and no arm is called better"
    content = {
        "plan": plan,
        "statistics": computed,
        "given_names": list(plan.families or plan.names),
        "timings": runs.groupby(["env", "arm"], sort=False).agg(timed) if len(runs) else runs,
        "command": {"earlier": [], **command},  # folders of older versions have none
        "command_line": shlex.join(command["command"]),
        "n_runs": len(list(plan.runs())),
        "n_finished": len(runs),
        "failures": failures,
        "seeds_warning": warning if plan.seeds < FEW_SEEDS else None,
        "hyperparameters": {env: effective(plan.parsed_arms, plan.hyperparameters[env]) for env in plan.environments},
        "plots": plots,
        "pictures": plots.write(store, computed, results),
        # Inlined, so that report.html can be shared as one file
        "svg": lambda name, suffix="": b64encode((store.folder / plots.FOLDER / f"{name}{suffix}.svg").read_bytes()).decode(),
    }
    texts = {name: environment.get_template(name).render(content) for name in ("report.md", "report.html")}
    for name, text in texts.items():
        store.write(name, text)
    print(texts["report.md"].partition("## In short\n")[2].partition("\n## ")[0].strip())
    # Last, where they are seen
    if plan.seeds < FEW_SEEDS:
        print(f"Warning: {warning}", file=sys.stderr)
    for run, line in failures.items():
        print(f"failed: {run}: {line}", file=sys.stderr)
    print(f"Report: {store.folder / 'report.html'}")
    return 1 if failures else 0


def differing(arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Hyperparameter → arm → value, for hyperparameters that differ between arms."""
    keys = dict.fromkeys(key for arm in arms.values() for key in arm)
    table = {key: {arm: given.get(key, "–") for arm, given in arms.items()} for key in keys}
    return {key: values for key, values in table.items() if len({repr(value) for value in values.values()}) > 1}


def number(value: float | None) -> str:
    """Format for reading, with three significant digits, or all digits of an integer part."""
    if value is None or not math.isfinite(value):
        return "–"
    # #: without it, 20.0 would lose the zero that says how precise it is
    text = f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")


def interval(values: list[float] | None) -> str:
    """Format an estimate with its limits, if there are enough runs for limits."""
    if values is None or values[1] is None:
        return number(values and values[0])
    return f"{number(values[0])} [{number(values[1])}, {number(values[2])}]"


def count(n: int, noun: str) -> str:
    """Format a number with its noun in singular or plural."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


if __name__ == "__main__":
    description = "Report what has finished so far."
    parser = argparse.ArgumentParser(prog="python -m sb3_adaptive_kl.compare.report", description=description)
    parser.add_argument("folder", type=Path, help="the results folder")
    try:
        sys.exit(summarize(Store.open(parser.parse_args().folder)))
    except PlanError as error:
        parser.error(str(error))
