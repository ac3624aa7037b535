"""
The fourth stage: plot statistics and runs as png and svg, for light and dark pages.

    python -m sb3_adaptive_kl.compare.plots FOLDER

Every environment gets one figure with learning curves, KL and β on the same time axis. Further figures show the final return
of every seed and, across environments, the aggregates, the probability of improvement and the performance profile.
"""

import io
import textwrap
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.results import Results, read, updates_of
from sb3_adaptive_kl.compare.statistics import STATISTICS_FILE
from sb3_adaptive_kl.compare.store import Store, on_folder

FOLDER = "plots"
WIDTH = 6.4  # inches: one column of a page, legible on a phone
N_BINS = 80  # bins of the time axis in plots of updates
LINE_STYLES = ("-", "--", ":", "-.")
LEGEND_WIDTH = 80  # characters of a line of the legend
ROW_WIDTH = 28  # characters of a line beside a row
LINE_HEIGHT = 0.17  # inches


@dataclass(frozen=True)
class Theme:
    """
    Colors of a page.

    :param suffix: suffix of the file names
    :param foreground: color of text and axes
    :param background: color of the page
    :param arms: colors of the arms, distinguishable for color-blind readers (Okabe and Ito 2008), lighter on a dark page
    """

    suffix: str
    foreground: str
    background: str
    arms: tuple[str, ...]


LIGHT = Theme("", "#222222", "#ffffff", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"))
DARK = Theme("-dark", "#dddddd", "#16181d", ("#56B4E9", "#F08A4B", "#35C79C", "#E3A6C6", "#F0C04A", "#8FB8FF", "#ffffff"))


def write(plan: Plan, store: Store) -> None:
    """Draw every figure that the statistics allow, in both themes."""
    statistics, results = store.read_json(STATISTICS_FILE), read(plan, store)
    for theme in (LIGHT, DARK):
        colors = {arm: theme.arms[i % len(theme.arms)] for i, arm in enumerate(plan.names)}
        line_styles = {arm: LINE_STYLES[i // len(theme.arms) % len(LINE_STYLES)] for i, arm in enumerate(plan.names)}
        style = Style(theme, colors, line_styles)
        for name, draw in pictures(statistics, results).items():
            with mpl.rc_context(_settings(theme)):
                figure = draw(style)
                for format in ("svg", "png"):
                    store.write(f"{FOLDER}/{name}{theme.suffix}.{format}", _render(figure, format))


@dataclass(frozen=True)
class Style:
    """Theme of a figure, and color and line style of every arm."""

    theme: Theme
    colors: dict[str, str]
    line_styles: dict[str, str]

    def line(self, arm: str) -> dict[str, Any]:
        return {"color": self.colors[arm], "linestyle": self.line_styles[arm]}


def picture_names(statistics: dict[str, Any]) -> list[str]:
    """File names of all figures without suffix and extension, in the order of the report."""
    return list(pictures(statistics, {env: {} for env in statistics["environments"]}))


def pictures(statistics: dict[str, Any], results: Results) -> dict[str, Callable[[Style], Figure]]:
    """File name → function that draws the figure."""
    environments = statistics["environments"]
    figures: dict[str, Callable[[Style], Figure]] = {}
    for env, environment in environments.items():
        figures[curves_name(env)] = partial(_curves, env=env, environment=environment, results=results[env])
    if environments:
        figures["final_returns"] = lambda style: _final_returns(style, environments, results)
    across = statistics["across"]
    if across is not None:
        figures["aggregates"] = lambda style: _aggregates(style, across)
        if across["probability_of_improvement"]:
            figures["probability_of_improvement"] = lambda style: _improvement(style, across)
        figures["performance_profile"] = lambda style: _profile(style, across)
    return figures


def curves_name(env: str) -> str:
    """File name of an environment's figure, without suffix and extension."""
    return f"curves-{env.replace('/', '-')}"


# ---------------------------------------------------------------- one environment


def _curves(style: Style, env: str, environment: dict[str, Any], results: Any) -> Figure:
    """Plot learning curves, KL and β of all arms on one time axis."""
    updates = {arm: frame for arm, runs in results.items() if (frame := updates_of(runs.values())) is not None}
    penalized = {arm: frame for arm, frame in updates.items() if frame["kl_coef"].notna().all()}
    n_panels = 1 + bool(updates) + bool(penalized)
    figure = Figure(figsize=(WIDTH, 0.7 + _legend_height(environment["arms"]) + 2.2 * n_panels), layout="constrained")
    panels = list(figure.subplots(n_panels, 1, sharex=True, squeeze=False)[:, 0])

    returns = panels[0]
    returns.set(title=env, ylabel="mean return")
    for arm, statistics in environment["arms"].items():
        if statistics["curve"] is not None:
            _band(style, returns, arm, statistics["curve"]["timesteps"], *statistics["curve"]["mean"])
    if not returns.lines:
        _note(returns, "no learning curve: not every run finished a training episode")
    if environment["threshold"] is not None:
        returns.axhline(environment["threshold"], color=style.theme.foreground, lw=0.8, ls=":")
    _legend(style, figure, list(environment["arms"]))

    if updates:
        panels[1].set(ylabel="KL per update [nats]", yscale="log")
        if _traces(style, panels[1], updates, "kl"):
            _targets(style, panels[1], penalized)
        else:  # without targets: matplotlib cannot scale a logarithmic axis to a horizontal line alone
            _note(panels[1], "no update changed the policy")
    if penalized:
        panels[2].set_ylabel("coefficient β")
        panels[2].set_yscale("log", base=2)
        if not _traces(style, panels[2], penalized, "kl_coef"):
            _note(panels[2], "β is 0")
    panels[-1].set_xlabel("time steps")
    return figure


def _traces(style: Style, axes: Axes, updates: dict[str, pd.DataFrame], column: str) -> bool:
    """
    Plot the median and the middle 80 % of all seeds' updates, in bins of the time axis.

    :return: whether there was anything to plot; a logarithmic axis shows neither zero nor infinity
    """
    drawable = {arm: frame[(frame[column] > 0) & np.isfinite(frame[column])] for arm, frame in updates.items()}
    shown = {arm: frame for arm, frame in drawable.items() if len(frame)}
    for arm, frame in shown.items():
        n_bins = min(N_BINS, frame["timesteps"].nunique())
        bins = frame.groupby(pd.cut(frame["timesteps"], n_bins), observed=True)
        middle, low, high = (bins[column].quantile(q).to_numpy() for q in (0.5, 0.1, 0.9))
        _band(style, axes, arm, bins["timesteps"].mean().to_numpy(), middle, low, high)
    return bool(shown)


def _targets(style: Style, axes: Axes, updates: dict[str, pd.DataFrame]) -> None:
    """Plot the target over time, without stretching the axis to a schedule's end at zero."""
    low, high = axes.get_ylim()
    for arm, frame in updates.items():
        target = frame.groupby("timesteps")["target_kl"].first()
        if target.nunique() == 1:
            axes.axhline(target.iloc[0], color=style.colors[arm], lw=0.8, ls="--")
        else:
            axes.plot(target.index, target, color=style.colors[arm], lw=0.8, ls="--")
        low, high = min(low, target.median() / 2), max(high, target.max() * 2)
    axes.set_ylim(low, high)


def _band(style: Style, axes: Axes, arm: str, x: Any, middle: Any, low: Any, high: Any) -> None:
    axes.plot(x, middle, marker="." if len(x) == 1 else "", **style.line(arm))
    if low[0] is not None and len(x) > 1:  # no interval from a single run, no area around a single point
        axes.fill_between(x, low, high, color=style.colors[arm], alpha=0.2, lw=0)


def _legend(style: Style, figure: Figure, arms: list[str]) -> None:
    """Name every arm above the panels, including arms that are missing from some of them."""
    handles = [Line2D([], [], label=_wrapped(arm, LEGEND_WIDTH), **style.line(arm)) for arm in arms]
    ncols = _legend_columns(arms)
    figure.legend(handles=handles, loc="outside upper center", ncols=ncols, fontsize="small", frameon=False)


def _legend_columns(arms: Iterable[str]) -> int:
    return 2 if all(len(arm) <= LEGEND_WIDTH // 2 - 5 for arm in arms) else 1


def _legend_height(arms: Collection[str]) -> float:
    """Height of the legend in inches."""
    return LINE_HEIGHT * sum(_n_lines(arm, LEGEND_WIDTH) for arm in arms) / _legend_columns(arms)


def _wrapped(label: str, width: int) -> str:
    """Break the long name of an arm after commas, and a pair of names where it has a space."""
    return textwrap.fill(label.replace(",", ", "), width).replace(", ", ",")


def _n_lines(label: str, width: int) -> int:
    return _wrapped(label, width).count("\n") + 1


def _row_height(labels: Iterable[str]) -> float:
    """Height in inches of each row beside which a label stands."""
    return 0.3 + LINE_HEIGHT * max(_n_lines(label, ROW_WIDTH) for label in labels)


def _note(axes: Axes, text: str) -> None:
    """Say why a panel is empty."""
    axes.text(0.5, 0.6, text, transform=axes.transAxes, ha="center", va="center")


def _final_returns(style: Style, environments: dict[str, Any], results: Results) -> Figure:
    """Plot every seed as a dot and the mean with its interval as a line."""
    rows = [arm for environment in environments.values() for arm in environment["arms"]]
    height = 0.8 * len(environments) + _row_height(rows) * len(rows) + 0.3
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ratios = [len(environment["arms"]) + 0.5 for environment in environments.values()]
    panels = figure.subplots(len(environments), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (env, environment) in zip(panels, environments.items(), strict=True):
        for row, (arm, statistics) in enumerate(environment["arms"].items()):
            mean, low, high = statistics["final"]["mean"]
            finals = [run.final for run in results[env][arm].values()]
            axes.plot(finals, [row + 0.22] * len(finals), "o", ms=4, alpha=0.6, mew=0, color=style.colors[arm])
            if low is not None:
                axes.plot([low, high], [row, row], lw=3, color=style.colors[arm], solid_capstyle="round")
            axes.plot(mean, row, "D", color=style.theme.foreground, ms=5)
        axes.set_title(env, fontsize="medium")
        _rows(axes, list(environment["arms"]))
    panels[-1].set_xlabel("return of the final policy")
    return figure


# ---------------------------------------------------------------- across environments


def _aggregates(style: Style, across: dict[str, Any]) -> Figure:
    names = {"iqm": "IQM", "median": "median", "mean": "mean", "optimality_gap": "optimality gap (less is better)"}
    height = 2 * (0.9 + (_row_height(across["arms"]) - 0.1) * len(across["arms"]))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True).flat
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for row, (arm, aggregates) in enumerate(across["arms"].items()):
            _interval(axes, row, aggregates[name], style.colors[arm], style.theme.foreground)
        axes.set_title(title, fontsize="medium")
        _rows(axes, list(across["arms"]))
    figure.supxlabel("normalized score: 0 a random policy, 1 the best arm", fontsize="medium")
    return figure


def _improvement(style: Style, across: dict[str, Any]) -> Figure:
    measures = {"probability_of_improvement_while_learning": "while learning", "probability_of_improvement": "final policy"}
    drawn = {title: across[name] for name, title in measures.items() if across[name]}
    rows = [_pair(pair) for pairs in drawn.values() for pair in pairs]
    height = 0.6 + 0.5 * len(drawn) + _row_height(rows) * len(rows)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False, sharex=True, height_ratios=[len(pairs) for pairs in drawn.values()])
    for axes, (title, pairs) in zip(panels[:, 0], drawn.items(), strict=True):
        axes.axvline(0.5, color=style.theme.foreground, lw=0.8, ls=":")
        for row, pair in enumerate(pairs):
            _interval(axes, row, pair["probability"], style.colors[pair["arms"][0]], style.theme.foreground)
        axes.set_title(title, fontsize="medium")
        _rows(axes, [_pair(pair) for pair in pairs])
    panels[-1, 0].set(xlim=(-0.02, 1.02), xlabel="probability that a run of the first is better")
    return figure


def _pair(pair: dict[str, Any]) -> str:
    return " > ".join(pair["arms"])


def _profile(style: Style, across: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 2.8 + _legend_height(across["profile"]["arms"])), layout="constrained")
    axes = figure.subplots()
    at = across["profile"]["at"]
    for arm, (share, low, high) in across["profile"]["arms"].items():
        _band(style, axes, arm, at, share, low, high)
    axes.set(xlabel="normalized score τ", ylabel="share of runs above τ", ylim=(-0.03, 1.03))
    _legend(style, figure, list(across["profile"]["arms"]))
    return figure


def _interval(axes: Axes, row: int, interval: Any, color: str, foreground: str) -> None:
    estimate, low, high = interval
    if low is not None:
        axes.plot([low, high], [row, row], lw=5, color=color, alpha=0.7, solid_capstyle="butt")
    axes.plot(estimate, row, "|", color=foreground, ms=12, mew=2)


def _rows(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks(np.arange(len(labels)), [_wrapped(label, ROW_WIDTH) for label in labels], fontsize="small")
    axes.set_ylim(len(labels) - 0.5, -0.5)


# ---------------------------------------------------------------- files


def _settings(theme: Theme) -> Any:
    colored = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(colored, theme.foreground),
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "sb3_adaptive_kl",  # makes the files reproducible
    }


def _render(figure: Figure, format: str) -> bytes:
    output = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else None
    figure.savefig(output, format=format, dpi=150, metadata=metadata)
    return output.getvalue()


if __name__ == "__main__":
    on_folder(write)
