"""
The last stage: write `report.html`, a single file to share, and `report.md` with the same content.

    python -m sb3_adaptive_kl.compare.report FOLDER
"""

import base64
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sb3_adaptive_kl.compare import plots
from sb3_adaptive_kl.compare.arms import Arm
from sb3_adaptive_kl.compare.intervals import SAMPLES
from sb3_adaptive_kl.compare.plan import FEW_SEEDS, Plan
from sb3_adaptive_kl.compare.statistics import STATISTICS_FILE, TIMINGS_FILE
from sb3_adaptive_kl.compare.store import COMMAND_FILE, Store, on_folder

REPORT_FILE = "report.html"

# Entry of a pair → its name in the report, and what a seed needs to be compared
MEASURES = {"final": ("final policy", "a finished run"), "area": ("while learning", "a finished training episode")}

# Captions, also used as alternative text
CAPTIONS = {
    "final_returns": "Return of the final policy: a dot per seed, and the mean with its 95 % interval.",
    "aggregates": "Normalized scores over all environments, with 95 % intervals.",
    "probability_of_improvement": "Probability that a run of the first arm beats a run of the second; ½ is a tie.",
    "performance_profile": "Share of runs above each normalized score. Higher is better.",
}
CURVES_CAPTION = (
    "Learning curves: mean over seeds with its 95 % interval; the threshold is dotted. Below, on the same time axis: exact KL "
    "of the updates that changed the policy, and β, each as median and middle 80 % over seeds; the target is dashed."
)


def write(plan: Plan, store: Store) -> Path:
    """
    Write both reports.

    :return: path of the HTML page
    """
    content = gather(plan, store)
    for template, autoescape in ((REPORT_FILE, True), ("report.md", False)):
        environment = Environment(
            loader=PackageLoader("sb3_adaptive_kl.compare"),
            autoescape=autoescape,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(number=number, interval=interval, percent=percent, count=count, reached=reached)
        store.write(template, environment.get_template(template).render(content))
    return store.folder / REPORT_FILE


def gather(plan: Plan, store: Store) -> dict[str, Any]:
    """Collect the variables of the templates."""
    statistics = store.read_json(STATISTICS_FILE)
    runs, arms = list(plan.runs()), [Arm.parse(arm) for arm in plan.arms]
    return {
        "plan": plan,
        "statistics": statistics,
        "timings": store.read_json(TIMINGS_FILE),
        "command": store.read_json(COMMAND_FILE),
        "command_line": shlex.join(store.read_json(COMMAND_FILE)["command"]),
        "n_runs": len(runs),
        "n_finished": sum(store.finished(run) for run in runs),
        "failures": store.failures(plan),
        "seeds_warning": seeds_warning(plan.seeds),
        "bootstrap_samples": SAMPLES,
        "verdicts": [verdict(env, pair) for env, stats in statistics["environments"].items() for pair in stats["pairs"]],
        "differing": {env: differing(plan.effective(env)) for env in plan.environments},
        "shared": {env: shared(plan.effective(env)) for env in plan.environments},
        "curves": {env: plots.curves_name(env) for env in statistics["environments"]},
        "curves_caption": CURVES_CAPTION,
        "improvements": improvements(statistics["across"]),
        "captions": {name: CAPTIONS[name] for name in plots.picture_names(statistics) if name in CAPTIONS},
        "image": lambda name, suffix="": _data_uri(store.folder / plots.FOLDER / f"{name}{suffix}.svg"),
        "folder": plots.FOLDER,
        "definitions": {
            arm.name: text.removeprefix(f"{arm.name}=") for arm, text in zip(arms, plan.arms, strict=True) if arm.name != text
        },
        "on_policy": {arm.name: arm.on_policy for arm in arms},
        "zoo_logs": {arm.name: f"runs/{arm.folder}" for arm in arms},
    }


def improvements(across: dict[str, Any] | None) -> dict[str, list[Any]]:
    """Pair of arms → probabilities that a run of the first beats a run of the second, while learning and in the end."""
    table: dict[str, list[Any]] = {}
    measures = ("probability_of_improvement_while_learning", "probability_of_improvement")
    for column, measure in enumerate(measures):
        for pair in across[measure] if across is not None else ():
            table.setdefault(" > ".join(pair["arms"]), [None] * len(measures))[column] = pair["probability"]
    return table


def seeds_warning(seeds: int) -> str | None:
    """Warn about the width of the intervals; None if there are enough seeds."""
    if seeds == 1:
        return "1 seed: a single run does not have intervals and cannot show a difference."
    return f"{count(seeds, 'seed')}: with fewer than {FEW_SEEDS}, the intervals say little." if seeds < FEW_SEEDS else None


def verdict(env: str, pair: dict[str, Any]) -> dict[str, Any]:
    """State the differences between two arms, and which of them are shown."""
    a, b = pair["arms"]
    sentences = [f"{name}: {_sentence(a, b, pair[measure], needed)}" for measure, (name, needed) in MEASURES.items()]
    shown = any(pair[measure] is not None and pair[measure]["winner"] for measure in MEASURES)
    return {"env": env, "arms": f"{a} and {b}", "sentences": sentences, "shown": shown}


def _sentence(a: str, b: str, difference: dict[str, Any] | None, needed: str) -> str:
    if difference is None:
        return f"not compared: no seed has {needed} in both arms."
    low, high = difference["student"]
    student = "" if low is None else f", Student's t [{number(low)}, {number(high)}]"
    numbers = f"{a} − {b} = {interval(difference['mean'])}{student}, {count(difference['seeds'], 'seed')}"
    winner = difference["winner"]
    if winner is None:
        return f"no difference is shown ({numbers})."
    return f"{winner} is better than {b if winner == a else a} ({numbers})."


def differing(arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Hyperparameter → arm → value, for hyperparameters that differ between arms."""
    keys = dict.fromkeys(key for arm in arms.values() for key in arm)
    table = {key: {arm: given.get(key, "–") for arm, given in arms.items()} for key in keys}
    return {key: values for key, values in table.items() if len({repr(value) for value in values.values()}) > 1}


def shared(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Hyperparameter → value, for hyperparameters that are the same in all arms."""
    return {key: value for key, value in next(iter(arms.values())).items() if key not in differing(arms)}


def number(value: float | None) -> str:
    """Format for reading, with about three significant digits."""
    if value is None:
        return "–"
    if value == 0 or 0.1 <= abs(value) < 1000:
        text = f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 or value == 0 else 3}f}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def interval(values: list[float] | None) -> str:
    """Format an estimate with its limits, if there are enough runs for limits."""
    if values is None or values[1] is None:
        return number(None if values is None else values[0])
    return f"{number(values[0])} [{number(values[1])}, {number(values[2])}]"


def count(n: int, noun: str) -> str:
    """Format a number with its noun in singular or plural."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def reached(arm: dict[str, Any], threshold: float | None) -> str:
    """Format how many seeds of an arm reached the threshold."""
    return "–" if threshold is None else f"{arm['reached']} of {arm['seeds']}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _data_uri(path: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


if __name__ == "__main__":
    on_folder(write)
