"""
Draw the statistics and runs as png and svg, for light and dark pages.

Every environment gets one figure with learning curves, KL and β on the same time axis. Further figures show the final return
of every seed and, across environments, the aggregates, the probability of improvement and the performance profile.

An arm has the color of its number in the plan: ``C0`` is the first color of the style.
"""

import io
import textwrap
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.sensitivity import Families
from sb3_adaptive_kl.compare.store import Result, Store, updates_of

FOLDER = "plots"
STYLES = {"": "light", "-dark": "dark"}  # suffix of the file names → style
WIDTH = 6.4  # inches: one column of a page, legible on a phone
N_BINS = 80  # bins of the time axis in plots of updates
LEGEND_WIDTH, ROW_WIDTH = 80, 28  # characters of a line of the legend, and beside a row
LINE_HEIGHT = 0.17  # inches
AGGREGATES = {"iqm": "IQM", "median": "median", "mean": "mean", "optimality_gap": "optimality gap (less is better)"}
IMPROVEMENTS = {"probability_of_improvement_while_learning": "while learning", "probability_of_improvement": "final policy"}

Row = tuple[str, int, list[Any], list[float]]  # label, number of the arm, interval, single values


def write(store: Store, statistics: dict[str, Any], results: Sequence[Result]) -> list[str]:
    """
    Draw every figure that the statistics allow, in both styles.

    :return: file names without suffix and extension
    """
    for suffix, style in STYLES.items():
        with mpl.rc_context(fname=str(files("sb3_adaptive_kl.compare") / "styles" / f"{style}.mplstyle")):
            # In both styles: a figure takes its colors from the one in which it is drawn
            figures = dict(pictures(store.plan, statistics, results))
            for name, figure in figures.items():
                for format in ("svg", "png"):
                    store.write(f"{FOLDER}/{name}{suffix}.{format}", _render(figure, format))
    return list(figures)


def pictures(plan: Plan, statistics: dict[str, Any], results: Sequence[Result]) -> Iterator[tuple[str, Figure]]:
    """Yield the file name and the figure of each picture."""
    number = {arm: i for i, arm in enumerate(plan.names)}
    finals: dict[str, list[Row]] = {}
    for env, environment in statistics["environments"].items():
        of_arm = {arm: [r for r in results if (r.run.env, r.run.arm) == (env, arm)] for arm in environment["arms"]}
        yield file_name("curves", env), _curves(env, environment, number, of_arm)
        if any(entry["curve"] for entry in environment["arms"].values()):
            yield file_name("clock", env), _clock(env, environment, number, of_arm)
        means = {arm: entry["final"]["mean"] for arm, entry in environment["arms"].items()}
        finals[env] = [(arm, number[arm], mean, [r.final for r in of_arm[arm]]) for arm, mean in means.items()]
    if finals:
        yield "final_returns", _rows(finals, "return of the final policy")
    if across := statistics["across"]:
        scores: dict[str, list[Row]] = {
            title: [(arm, number[arm], entry[key], []) for arm, entry in across["arms"].items()]
            for key, title in AGGREGATES.items()
        }
        yield "aggregates", _rows(scores, "normalized score: 0 a random policy, 1 the best arm")
        improvements: dict[str, list[Row]] = {
            title: [(" > ".join(pair["arms"]), number[pair["arms"][0]], pair["probability"], []) for pair in across[key]]
            for key, title in IMPROVEMENTS.items()
            if across[key]
        }
        if improvements:
            yield "probability_of_improvement", _rows(improvements, "probability to be better", middle=0.5)
        yield "performance_profile", _profile(across["profile"], number)
    for hyperparameter, values in plan.sweep.items():
        for env, environment in statistics["environments"].items():
            yield file_name("sweep", env), _sweep(env, hyperparameter, sorted(values), plan.families, environment["arms"])


def file_name(kind: str, env: str) -> str:
    """
    Name the file of an environment's figure, without suffix and extension.

    :param kind: ``curves``, ``clock`` (learning curves over wall-clock time) or ``sweep``
    :param env: gymnasium id
    """
    return f"{kind}-{env.replace('/', '-')}"


# ---------------------------------------------------------------- figures


def _curves(env: str, environment: dict[str, Any], number: dict[str, int], results: dict[str, list[Result]]) -> Figure:
    """Plot learning curves, KL and β of all arms on one time axis."""
    updates = {number[arm]: frame for arm, of_arm in results.items() if (frame := updates_of(of_arm)) is not None}
    penalized = {i: frame for i, frame in updates.items() if frame["kl_coef"].notna().all()}
    n_panels = 1 + bool(updates) + bool(penalized)
    figure = _figure_with_legend(2.2 * n_panels + 0.7, {arm: number[arm] for arm in results})
    panels = figure.subplots(n_panels, 1, sharex=True, squeeze=False)[:, 0]
    panels[-1].set_xlabel("time steps")
    _learning(panels[0], env, environment, number, dict.fromkeys(results, 1.0))
    if updates:
        panels[1].set(ylabel="KL per update [nats]", yscale="log")
        _traces(panels[1], updates, "kl", "no update changed the policy")
        for i, frame in penalized.items():
            target = frame.groupby("timesteps")["target_kl"].first()
            target = target[target > target.max() / 100]  # without a schedule's end at zero, which stretches the axis
            panels[1].plot([0, *target.index], [target.iloc[0], *target], color=f"C{i}", lw=0.8, ls="--")
    if penalized:
        panels[2].set_ylabel("coefficient β")
        panels[2].set_yscale("log", base=2)
        _traces(panels[2], penalized, "kl_coef", "β is 0")
    return figure


def _clock(env: str, environment: dict[str, Any], number: dict[str, int], results: dict[str, list[Result]]) -> Figure:
    """Plot the learning curves over the mean time of the runs, as if every time step took the same time."""
    figure = _figure_with_legend(2.9, {arm: number[arm] for arm in results})
    axes = figure.subplots()
    axes.set_xlabel("seconds")
    per_step = {arm: np.mean([r.summary["seconds"] / r.summary["timesteps"] for r in runs]) for arm, runs in results.items()}
    _learning(axes, env, environment, number, per_step)
    return figure


def _learning(axes: Axes, env: str, environment: dict[str, Any], number: dict[str, int], per_step: dict[str, float]) -> None:
    """Plot the learning curves and the threshold over time, of which a time step of an arm takes ``per_step``."""
    axes.set(title=env, ylabel="mean return")
    for arm, entry in environment["arms"].items():
        if entry["curve"] is not None:
            _band(axes, number[arm], per_step[arm] * np.array(entry["curve"]["timesteps"]), *entry["curve"]["mean"])
    if not axes.lines:
        _note(axes, "no learning curve: not every run recorded a training episode")
    if environment["threshold"] is not None:
        axes.axhline(environment["threshold"], color=mpl.rcParams["text.color"], lw=0.8, ls=":")


def _traces(axes: Axes, updates: dict[int, pd.DataFrame], column: str, nothing: str) -> None:
    """Plot the median and the middle 80 % of all seeds' updates, in bins of the time axis; or say why there is nothing."""
    for i, frame in updates.items():
        shown = frame[(frame[column] > 0) & np.isfinite(frame[column])]  # what a logarithmic axis shows
        if len(shown):
            bins = shown.groupby(pd.cut(shown["timesteps"], min(N_BINS, shown["timesteps"].nunique())), observed=True)
            # Quantiles: KL spreads over powers of ten, where a mean shows the largest update only
            low, middle, high = bins[column].quantile([0.1, 0.5, 0.9]).unstack().to_numpy().T
            _band(axes, i, bins["timesteps"].mean().to_numpy(), middle, low, high)
    if not axes.lines:
        _note(axes, nothing)


def _sweep(env: str, hyperparameter: str, values: list[float], families: Families, arms: dict[str, Any]) -> Figure:
    figure = _figure_with_legend(5.2, {family: i for i, family in enumerate(families)})
    panels = figure.subplots(2, 1, sharex=True)
    if values[0] > 0 and values[-1] >= 10 * values[0]:
        panels[1].set_xscale("log")
    panels[1].set_xticks(values, [f"{value:g}" for value in values])
    panels[1].minorticks_off()
    for i, of_family in enumerate(families.values()):
        finished = [(value, arms[arm]) for value, arm in sorted(of_family.items()) if arm in arms]
        for axes, returns in (
            (panels[0], {value: entry["final"]["mean"] for value, entry in finished}),
            (panels[1], {value: entry["area"] for value, entry in finished if entry["area"] is not None}),
        ):
            if returns:
                middle, low, high = np.array(list(returns.values()), dtype=float).T  # NaN: a single run has no interval
                _band(axes, i, list(returns), middle, low, high)
                axes.plot(list(returns), middle, "o", ms=4, color=f"C{i}")
    panels[0].set(title=env, ylabel="return of the final policy")
    panels[1].set(xlabel=hyperparameter, ylabel="mean return while learning")
    return figure


def _profile(profile: dict[str, Any], number: dict[str, int]) -> Figure:
    figure = _figure_with_legend(2.8, {arm: number[arm] for arm in profile["arms"]})
    axes = figure.subplots()
    for arm, shares in profile["arms"].items():
        _band(axes, number[arm], profile["at"], *shares)
    axes.set(xlabel="normalized score τ", ylabel="share of runs above τ", ylim=(-0.03, 1.03))
    return figure


def _rows(panels: dict[str, list[Row]], xlabel: str, middle: float | None = None) -> Figure:
    """Plot a row for each interval: its estimate as a diamond, its limits as a line, single values as dots."""
    labels = [row[0] for rows in panels.values() for row in rows]
    row_height = 0.3 + LINE_HEIGHT * max(_n_lines(label, ROW_WIDTH) for label in labels)
    height = 0.4 + 0.8 * len(panels) + row_height * len(labels)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=[len(rows) + 0.5 for rows in panels.values()])
    for axes, (title, rows) in zip(grid.flat, panels.items(), strict=True):
        axes.set_title(title, fontsize="medium")
        for y, (_, i, (estimate, low, high), values) in enumerate(rows):
            axes.plot(values, [y + 0.22] * len(values), "o", ms=4, alpha=0.6, mew=0, color=f"C{i}")
            axes.plot([low, high], [y, y], lw=3, color=f"C{i}", solid_capstyle="round")  # nothing, if they are None
            axes.plot(estimate, y, "D", color=mpl.rcParams["text.color"], ms=5)
        if middle is not None:
            axes.axvline(middle, color=mpl.rcParams["text.color"], lw=0.8, ls=":")
            axes.set_xlim(middle - 0.52, middle + 0.52)
        axes.set_yticks(np.arange(len(rows)), [_wrapped(row[0], ROW_WIDTH) for row in rows], fontsize="small")
        axes.set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel(xlabel, fontsize="medium")
    return figure


# ---------------------------------------------------------------- parts of figures


def _band(axes: Axes, arm: int, x: Any, middle: Any, low: Any, high: Any) -> None:
    axes.plot(x, middle, marker="." if len(x) == 1 else "", **_line(arm))
    if low is not None and len(x) > 1:  # no interval from a single run, no area around a single point
        axes.fill_between(x, low, high, color=f"C{arm}", alpha=0.2, lw=0)


def _line(arm: int) -> dict[str, Any]:
    """Color and line style: the next line style where the colors are used up."""
    cycle = list(mpl.rcParams["axes.prop_cycle"])
    return cycle[arm % len(cycle)]  # type: ignore[no-any-return]


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.6, text, transform=axes.transAxes, ha="center", va="center")


def _figure_with_legend(height: float, arms: dict[str, int]) -> Figure:
    """Name every arm above the panels, including arms that are missing from some of them."""
    height += LINE_HEIGHT * sum(_n_lines(arm, LEGEND_WIDTH) for arm in arms)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    handles = [Line2D([], [], label=_wrapped(arm, LEGEND_WIDTH), **_line(i)) for arm, i in arms.items()]
    figure.legend(handles=handles, loc="outside upper center", fontsize="small", frameon=False)
    return figure


def _wrapped(label: str, width: int) -> str:
    """Break the long name of an arm after commas, and a pair of names where it has a space."""
    return textwrap.fill(label.replace(",", ", "), width).replace(", ", ",")


def _n_lines(label: str, width: int) -> int:
    return _wrapped(label, width).count("\n") + 1


def _render(figure: Figure, format: str) -> bytes:
    output = io.BytesIO()
    figure.savefig(output, format=format, dpi=150, metadata={"Date": None} if format == "svg" else None)
    return output.getvalue()
