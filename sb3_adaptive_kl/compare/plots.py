"""
The fourth stage: pictures of the statistics and of the runs, as png and svg, for light and dark pages.

    python -m sb3_adaptive_kl.compare.plots FOLDER

For each environment one picture with the learning curves and, below them on the same time axis, KL and β; then final returns
seed by seed, and across environments the aggregates, the probability of improvement and the performance profile.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.results import Results, read
from sb3_adaptive_kl.compare.statistics import STATISTICS_FILE
from sb3_adaptive_kl.compare.store import Store, on_folder

FOLDER = "plots"
WIDTH = 6.4  # inches: one column of a page, and legible on a phone
N_BINS = 80  # of the traces of single updates
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Theme:
    """
    Colours of a page.

    :param suffix: of the files
    :param ink: of text and axes
    :param paper: of the background
    :param arms: of the arms, told apart by colour-blind readers (Okabe and Ito 2008), lightened for dark paper
    """

    suffix: str
    ink: str
    paper: str
    arms: tuple[str, ...]


LIGHT = Theme("", "#222222", "#ffffff", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"))
DARK = Theme("-dark", "#dddddd", "#16181d", ("#56B4E9", "#F08A4B", "#35C79C", "#E3A6C6", "#F0C04A", "#8FB8FF", "#ffffff"))


def write(plan: Plan, store: Store) -> None:
    """Draw every picture that there are numbers for, in both themes."""
    statistics, results = store.read_json(STATISTICS_FILE), read(plan, store)
    for theme in (LIGHT, DARK):
        colours = {arm: theme.arms[i % len(theme.arms)] for i, arm in enumerate(plan.arms)}
        styles = {arm: STYLES[i // len(theme.arms) % len(STYLES)] for i, arm in enumerate(plan.arms)}
        pen = Pen(theme, colours, styles)
        for name, draw in pictures(statistics, results).items():
            with mpl.rc_context(_settings(theme)):
                figure = draw(pen)
                for format in ("svg", "png"):
                    store.write(f"{FOLDER}/{name}{theme.suffix}.{format}", _render(figure, format))


@dataclass(frozen=True)
class Pen:
    """How the arms are drawn."""

    theme: Theme
    colours: dict[str, str]
    styles: dict[str, str]

    def line(self, arm: str) -> dict[str, Any]:
        return {"color": self.colours[arm], "linestyle": self.styles[arm]}


def picture_names(statistics: dict[str, Any]) -> list[str]:
    """Without suffix and extension, in the order of the report."""
    return list(pictures(statistics, {env: {} for env in statistics["environments"]}))


def pictures(statistics: dict[str, Any], results: Results) -> dict[str, Callable[[Pen], Figure]]:
    environments = statistics["environments"]
    drawn: dict[str, Callable[[Pen], Figure]] = {}
    for env, environment in environments.items():
        drawn[curves_name(env)] = partial(_curves, env=env, environment=environment, results=results[env])
    if environments:
        drawn["final_returns"] = lambda pen: _final_returns(pen, environments, results)
    across = statistics["across"]
    if across is not None:
        drawn["aggregates"] = lambda pen: _aggregates(pen, across)
        if across["probability_of_improvement"]:
            drawn["probability_of_improvement"] = lambda pen: _improvement(pen, across)
        drawn["performance_profile"] = lambda pen: _profile(pen, across)
    return drawn


def curves_name(env: str) -> str:
    return f"curves-{env.replace('/', '-')}"


# ---------------------------------------------------------------- one environment


def _curves(pen: Pen, env: str, environment: dict[str, Any], results: Any) -> Figure:
    updates = {
        arm: pd.concat([run.updates for run in runs.values()])
        for arm, runs in results.items()
        if any(run.updates is not None and len(run.updates) for run in runs.values())
    }
    penalised = {arm: frame for arm, frame in updates.items() if frame["kl_coef"].notna().all()}
    n_panels = 1 + bool(updates) + bool(penalised)
    figure = Figure(figsize=(WIDTH, 1.2 + 2.2 * n_panels), layout="constrained")
    panels = list(figure.subplots(n_panels, 1, sharex=True, squeeze=False)[:, 0])

    returns = panels[0]
    returns.set(title=env, ylabel="mean return")
    for arm, statistics in environment["arms"].items():
        if statistics["curve"] is not None:
            _band(pen, returns, arm, statistics["curve"]["timesteps"], *statistics["curve"]["mean"])
    if environment["threshold"] is not None:
        returns.axhline(environment["threshold"], color=pen.theme.ink, lw=0.8, ls=":")
    figure.legend(*returns.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize="small", frameon=False)

    if updates:
        _traces(pen, panels[1], updates, "kl")
        panels[1].set(ylabel="KL per update [nats]", yscale="log")
        for arm, frame in penalised.items():
            panels[1].axhline(frame["target_kl"].iloc[0], color=pen.colours[arm], lw=0.8, ls="--")
    if penalised:
        _traces(pen, panels[2], penalised, "kl_coef")
        panels[2].set_ylabel("coefficient β")
        panels[2].set_yscale("log", base=2)
    panels[-1].set_xlabel("time steps")
    return figure


def _traces(pen: Pen, axes: Axes, updates: dict[str, pd.DataFrame], column: str) -> None:
    """Median and middle 80 % of all seeds' updates, in bins of the time axis."""
    for arm, frame in updates.items():
        positive = frame[frame[column] > 0]  # an update without any effect has no place on a logarithmic axis
        n_bins = min(N_BINS, positive["timesteps"].nunique())
        bins = positive.groupby(pd.cut(positive["timesteps"], n_bins), observed=True)
        middle, low, high = (bins[column].quantile(q).to_numpy() for q in (0.5, 0.1, 0.9))
        _band(pen, axes, arm, bins["timesteps"].mean().to_numpy(), middle, low, high)


def _band(pen: Pen, axes: Axes, arm: str, x: Any, middle: Any, low: Any, high: Any) -> None:
    axes.plot(x, middle, label=arm, marker="." if len(x) == 1 else "", **pen.line(arm))
    if low[0] is not None:  # a single run has no interval
        axes.fill_between(x, low, high, color=pen.colours[arm], alpha=0.2, lw=0)


def _final_returns(pen: Pen, environments: dict[str, Any], results: Results) -> Figure:
    """Every seed as a dot, the mean with its interval as a line."""
    n_rows = sum(len(environment["arms"]) for environment in environments.values())
    figure = Figure(figsize=(WIDTH, 0.8 * len(environments) + 0.45 * n_rows + 0.3), layout="constrained")
    ratios = [len(environment["arms"]) + 0.5 for environment in environments.values()]
    panels = figure.subplots(len(environments), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (env, environment) in zip(panels, environments.items(), strict=True):
        for row, (arm, statistics) in enumerate(environment["arms"].items()):
            mean, low, high = statistics["final"]["mean"]
            finals = [run.final for run in results[env][arm].values()]
            axes.plot(finals, [row + 0.22] * len(finals), "o", ms=4, alpha=0.6, mew=0, color=pen.colours[arm])
            if low is not None:
                axes.plot([low, high], [row, row], lw=3, color=pen.colours[arm], solid_capstyle="round")
            axes.plot(mean, row, "D", color=pen.theme.ink, ms=5)
        axes.set_title(env, fontsize="medium")
        _rows(axes, list(environment["arms"]))
    panels[-1].set_xlabel("return of the final policy")
    return figure


# ---------------------------------------------------------------- across environments


def _aggregates(pen: Pen, across: dict[str, Any]) -> Figure:
    names = {"iqm": "IQM", "median": "median", "mean": "mean", "optimality_gap": "optimality gap (less is better)"}
    figure = Figure(figsize=(WIDTH, 2 * (0.9 + 0.35 * len(across["arms"]))), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True).flat
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for row, (arm, aggregates) in enumerate(across["arms"].items()):
            _interval(axes, row, aggregates[name], pen.colours[arm], pen.theme.ink)
        axes.set_title(title, fontsize="medium")
        _rows(axes, list(across["arms"]))
    figure.supxlabel("normalised score: 0 a random policy, 1 the best arm", fontsize="medium")
    return figure


def _improvement(pen: Pen, across: dict[str, Any]) -> Figure:
    pairs = across["probability_of_improvement"]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.45 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.5, color=pen.theme.ink, lw=0.8, ls=":")
    for row, pair in enumerate(pairs):
        _interval(axes, row, pair["probability"], pen.colours[pair["arms"][0]], pen.theme.ink)
    _rows(axes, [" > ".join(pair["arms"]) for pair in pairs])
    axes.set(xlim=(-0.02, 1.02), xlabel="probability that a run of the first is better")
    return figure


def _profile(pen: Pen, across: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    at = across["profile"]["at"]
    for arm, (share, low, high) in across["profile"]["arms"].items():
        _band(pen, axes, arm, at, share, low, high)
    axes.set(xlabel="normalised score τ", ylabel="share of runs above τ", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small", frameon=False)
    return figure


def _interval(axes: Axes, row: int, interval: Any, colour: str, ink: str) -> None:
    estimate, low, high = interval
    if low is not None:
        axes.plot([low, high], [row, row], lw=5, color=colour, alpha=0.7, solid_capstyle="butt")
    axes.plot(estimate, row, "|", color=ink, ms=12, mew=2)


def _rows(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks(np.arange(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


# ---------------------------------------------------------------- files


def _settings(theme: Theme) -> Any:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), theme.ink)
    return {
        **ink,
        "axes.facecolor": theme.paper,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "sb3_adaptive_kl",  # the same picture is the same file
    }


def _render(figure: Figure, format: str) -> bytes:
    output = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else None
    figure.savefig(output, format=format, dpi=150, metadata=metadata)
    return output.getvalue()


if __name__ == "__main__":
    on_folder(write)
