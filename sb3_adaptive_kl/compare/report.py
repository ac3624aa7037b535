"""
The last stage: `report.html`, one file to share, and `report.md`, with the same content.

    python -m sb3_adaptive_kl.compare.report FOLDER
"""

import base64
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sb3_adaptive_kl.compare import plots
from sb3_adaptive_kl.compare.arms import Arm
from sb3_adaptive_kl.compare.plan import FEW_SEEDS, Plan
from sb3_adaptive_kl.compare.statistics import BOOTSTRAP_SAMPLES, STATISTICS_FILE, TIMINGS_FILE
from sb3_adaptive_kl.compare.store import COMMAND_FILE, Store, on_folder

REPORT_FILE = "report.html"

MEASURES = {"final": "final policy", "area": "while learning"}

# What a picture shows, for those who cannot see it and for the line below it
CAPTIONS = {
    "final_returns": "Return of the final policy: each seed a dot, the mean with its 95 % interval.",
    "aggregates": "Normalised scores over all environments, with 95 % intervals.",
    "probability_of_improvement": "Probability that a run of the first arm is better than one of the second; ½ is level.",
    "performance_profile": "Share of runs above each normalised score. Higher is better.",
}
CURVES_CAPTION = (
    "Learning curves: mean over seeds with its 95 % interval; dotted, the threshold. Below, on the same time axis, the exact "
    "KL of each update and β: median and middle 80 % over seeds; dashed, the target."
)


def write(plan: Plan, store: Store) -> Path:
    """
    :return: the page
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
        environment.filters.update(number=number, interval=interval, percent=percent, count=count)
        store.write(template, environment.get_template(template).render(content))
    return store.folder / REPORT_FILE


def gather(plan: Plan, store: Store) -> dict[str, Any]:
    """Everything that the templates show."""
    statistics = store.read_json(STATISTICS_FILE)
    runs = list(plan.runs())
    return {
        "plan": plan,
        "statistics": statistics,
        "timings": store.read_json(TIMINGS_FILE),
        "command": store.read_json(COMMAND_FILE),
        "command_line": shlex.join(store.read_json(COMMAND_FILE)["command"]),
        "n_runs": len(runs),
        "n_finished": sum(store.finished(run) for run in runs),
        "failures": store.failures(plan),
        "few_seeds": FEW_SEEDS if plan.seeds < FEW_SEEDS else None,
        "bootstrap_samples": BOOTSTRAP_SAMPLES,
        "verdicts": [verdict(env, pair) for env, found in statistics["environments"].items() for pair in found["pairs"]],
        "differing": {env: differing(plan.effective(env)) for env in plan.environments},
        "shared": {env: shared(plan.effective(env)) for env in plan.environments},
        "curves": {env: plots.curves_name(env) for env in statistics["environments"]},
        "curves_caption": CURVES_CAPTION,
        "captions": {name: CAPTIONS[name] for name in plots.picture_names(statistics) if name in CAPTIONS},
        "image": lambda name, suffix="": _data_uri(store.folder / plots.FOLDER / f"{name}{suffix}.svg"),
        "folder": plots.FOLDER,
        "zoo_logs": {arm: f"runs/{Arm.parse(arm).folder}" for arm in plan.arms},
    }


def verdict(env: str, pair: dict[str, Any]) -> dict[str, Any]:
    """What may be said of two arms, and no more."""
    a, b = pair["arms"]
    sentences = [f"{what}: {_sentence(a, b, pair[measure])}" for measure, what in MEASURES.items()]
    shown = any(pair[measure] is not None and pair[measure]["winner"] for measure in MEASURES)
    return {"env": env, "arms": f"{a} and {b}", "sentences": sentences, "shown": shown}


def _sentence(a: str, b: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return "no seed was finished by both."
    low, high = found["student"]
    student = "" if low is None else f", Student's t [{number(low)}, {number(high)}]"
    difference = f"{a} − {b} = {interval(found['mean'])}{student}, {count(found['seeds'], 'seed')}"
    if found["winner"] is None:
        return f"no difference is shown ({difference})."
    return f"{found['winner']} is better than {b if found['winner'] == a else a} ({difference})."


def differing(arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Hyperparameter → arm → value, of those that are not the same for all."""
    keys = dict.fromkeys(key for arm in arms.values() for key in arm)
    table = {key: {arm: given.get(key, "–") for arm, given in arms.items()} for key in keys}
    return {key: values for key, values in table.items() if len({repr(value) for value in values.values()}) > 1}


def shared(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The hyperparameters that are the same for all arms."""
    return {key: value for key, value in next(iter(arms.values())).items() if key not in differing(arms)}


def number(value: float | None) -> str:
    """As many digits as one reads."""
    if value is None:
        return "–"
    if value == 0 or 0.1 <= abs(value) < 1000:
        text = f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 or value == 0 else 3}f}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def interval(values: list[float] | None) -> str:
    """An estimate with its limits, if there are runs enough for any."""
    if values is None or values[1] is None:
        return number(None if values is None else values[0])
    return f"{number(values[0])} [{number(values[1])}, {number(values[2])}]"


def count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _data_uri(path: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


if __name__ == "__main__":
    on_folder(write)
