"""
Draw the figures of docs/results.md, docs/continuing.md and the README from the runs in docs/study: judged.svg,
learning_rate.svg and continued.svg, each also for dark pages.

    python docs/draw_results.py
"""

from importlib.resources import files
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from sb3_adaptive_kl.compare.intervals import interval, probability_of_improvement

DOCS = Path(__file__).parent
STYLES = {"": "light", "-dark": "dark"}  # suffix of the file's name → style of compare's pictures
# Arms as the plan names them, and as the page does
HELD, PPO, PAPER = "held_farther", "ppo", "paper"
NAMES = {PPO: "PPO", PAPER: "paper 0.01", HELD: "held 0.03 + clip"}
MEASURES = {"area": "while learning", "final_return": "final policy"}
# Families of the sensitivity study, each with its line style: readable without colors, too
FAMILIES = {"ppo": ("PPO", "C1", "s--"), "held": ("held", "C0", "o-"), "balanced": ("held, balanced rate", "C2", "D-")}
# Arms of the study with a reference policy, likewise
CONTINUED = {"ppo": ("PPO", "C1", "s--"), "held": ("held", "C0", "o-"), "reference": ("held, with the reference", "C2", "D-")}
WIND = ' {"enable_wind": true}'
CONTINUED_TASKS = ("LunarLander-v3", "Pendulum-v1", "Swimmer-v5", "Hopper-v5", f"LunarLander-v3{WIND}")


def probabilities(runs: pd.DataFrame) -> dict[str, list[float]]:
    """Return the probability, with its interval, that a run of the held arm is better than one of each other arm."""
    found = {}
    for column, measure in MEASURES.items():
        wide = runs.pivot(index=["arm", "seed"], columns="env", values=column)
        for other in (PPO, PAPER):
            better = interval(probability_of_improvement, wide.loc[HELD].to_numpy(), wide.loc[other].to_numpy())
            found[f"than {NAMES[other]},\n{measure}"] = better
    return found


def shares_near_target(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the share of updates within a factor of 1.5 of the target: a row for each environment, a column for each arm."""
    shares = runs[runs["arm"] != PPO].pivot_table(index="env", columns="arm", values="kl_in_band")
    return shares.loc[runs["env"].unique()]


def draw_judged(runs: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    better = probabilities(runs)
    for y, (estimate, low, high) in enumerate(better.values()):
        left.plot([low, high], [y, y], lw=3, color="C0", solid_capstyle="round")
        left.plot(estimate, y, "D", color=mpl.rcParams["text.color"], ms=5)
    left.axvline(0.5, color=mpl.rcParams["text.color"], lw=0.8, ls=":")
    left.set(title=f"a run of {NAMES[HELD]} is better …", xlabel="probability, and its 95 % interval", xlim=(0.25, 1))
    left.set_yticks(range(len(better)), list(better))
    left.set_ylim(len(better) - 0.5, -0.5)

    shares = shares_near_target(runs)
    for arm, color, marker in ((HELD, "C0", "o"), (PAPER, "C1", "s")):
        right.plot(shares[arm], range(len(shares)), marker, color=color, label=NAMES[arm])
    right.set(title="updates near their target", xlabel="within a factor of 1.5", xlim=(0, 1.03))
    right.set_yticks(range(len(shares)), list(shares.index))
    right.set_ylim(len(shares) - 0.5, -0.5)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.legend(loc="upper right", bbox_to_anchor=(1, -0.2), ncols=2, frameon=False)
    return figure


def draw_learning_rate(runs: pd.DataFrame) -> Figure:
    """Draw the return while learning over the learning rate: a panel for each environment, a line for each family."""
    runs = runs.assign(family=runs["arm"].str.split(":").str[0], rate=runs["arm"].str.split("=").str[-1].astype(float))
    environments = runs["env"].unique()
    figure = Figure(figsize=(2.6 * len(environments), 3.2), layout="constrained")
    for axes, env in zip(figure.subplots(1, len(environments)), environments, strict=True):
        of_env = runs[runs["env"] == env]
        for family, (name, color, style) in FAMILIES.items():
            areas = of_env[of_env["family"] == family].groupby("rate")["area"]
            axes.plot(areas.mean(), style, color=color, ms=5, label=name)
            axes.fill_between(areas.mean().index, areas.min(), areas.max(), color=color, alpha=0.2, lw=0)
        axes.set_xscale("log")
        axes.set_title(env, fontsize="medium")
    figure.supxlabel("learning rate", fontsize="medium")
    figure.supylabel("return while learning", fontsize="medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(FAMILIES), frameon=False)
    return figure


def share_kept(evaluations: pd.DataFrame) -> pd.Series:
    """Return what each evaluation has kept of the clone's return: 1 is the clone's, 0 that of random actions."""
    gained = evaluations[["return", "cloned_return"]].sub(evaluations["random_return"], axis=0)
    return gained["return"] / gained["cloned_return"]


def draw_continued(evaluations: pd.DataFrame) -> Figure:
    """Draw what is kept of the clone's return over time: a panel for each task, a line for each arm."""
    evaluations = evaluations.assign(kept=share_kept(evaluations), steps=evaluations["timesteps"] / 1000)
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(CONTINUED_TASKS)), CONTINUED_TASKS, strict=True):
        of_task = evaluations[evaluations["env"] == task]
        for arm, (name, color, style) in CONTINUED.items():
            kept = of_task[of_task["arm"] == arm].groupby("steps")["kept"]
            axes.plot(kept.mean(), style, color=color, ms=4, label=name)
            axes.fill_between(kept.mean().index, kept.min(), kept.max(), color=color, alpha=0.2, lw=0)
        axes.axhline(1, color=mpl.rcParams["text.color"], lw=0.8, ls=":")
        axes.set_title(task.replace(WIND, ", with wind"), fontsize="medium")
    figure.supxlabel("thousand time steps after the clone", fontsize="medium")
    figure.supylabel("share of the clone's return", fontsize="medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(CONTINUED), frameon=False)
    return figure


# Name of a figure → the runs that it shows, and how it is drawn
FIGURES = {
    "judged": ("judged.csv", draw_judged),
    "learning_rate": ("sensitivity.csv", draw_learning_rate),
    "continued": ("continued.csv", draw_continued),
}


def main() -> None:
    for name, (file, draw) in FIGURES.items():
        runs = pd.read_csv(DOCS / "study" / file)
        for suffix, style in STYLES.items():
            with mpl.rc_context(fname=str(files("sb3_adaptive_kl.compare") / "styles" / f"{style}.mplstyle")):
                draw(runs).savefig(DOCS / f"{name}{suffix}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
