"""
Plot return, KL and β of a training run of AdaptiveKLPPO from the TensorBoard log of SB3 (or of the zoo's `-tb`).

    python -m rl_zoo3.train --algo ppo_kl --env Pendulum-v1 -f logs -tb logs/tensorboard
    python examples/training_curves.py logs/tensorboard/Pendulum-v1/AdaptiveKLPPO_1 -o training.png

This needs the extra `zoo` for tensorboard and matplotlib; `make demo` installs it.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BAND = 1.5  # the paper moves β outside of [target / 1.5, 1.5 · target]
Curve = tuple[list[int], list[float]]


def read_log(folder: Path, keys: list[str]) -> dict[str, Curve]:
    """Read the time steps and values of each key. SB3 logs an update at the time step of the following rollout."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder: the log of a run is in TENSORBOARD_LOG/ENV/AdaptiveKLPPO_1, or _2, …")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    try:
        scalars = {key: events.Scalars(key) for key in keys}
    except KeyError as error:
        raise SystemExit(
            f"{folder} has no log of {error.args[0].split()[1]}: pass the folder of a single run of AdaptiveKLPPO"
        ) from None
    return {key: ([event.step for event in found], [event.value for event in found]) for key, found in scalars.items()}


def draw(log: dict[str, Curve], title: str) -> Figure:
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    returns, kl, kl_coef = figure.subplots(3, 1, sharex=True)
    returns.plot(*log["rollout/ep_rew_mean"], color="C0")
    returns.set_ylabel("mean episode return")

    timesteps, kls = log["train/kl"]
    over_target = log["train/kl_over_target"][1]
    inside = sum(1 / BAND <= ratio <= BAND for ratio in over_target)
    returns.set_title(f"{title}: {inside} of {len(kls)} updates within a factor of {BAND:g} of the target KL")
    kl.plot(timesteps, kls, color="C0", marker=".", ls="")
    # The target may be a schedule; an update that changed nothing does not tell it
    told = [(t, d / r) for t, d, r in zip(timesteps, kls, over_target, strict=True) if r > 0]
    at, target = [t for t, _ in told], [value for _, value in told]
    kl.plot(at, target, color="C1", lw=1, label="target")
    low, high = [value / BAND for value in target], [value * BAND for value in target]
    kl.fill_between(at, low, high, color="C1", alpha=0.25, lw=0, label=f"within a factor\nof {BAND:g}")
    kl.set(ylabel="KL after the update [nats]", yscale="log")
    for axis_formatter in (kl.yaxis.set_major_formatter, kl.yaxis.set_minor_formatter):
        axis_formatter(FuncFormatter(few_decimals))
    kl.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)

    kl_coef.step(*log["train/kl_coef"], color="C0", where="post")
    kl_coef.set(ylabel="KL coefficient β", xlabel="time steps")
    kl_coef.set_yscale("log", base=2)
    kl_coef.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    for axes in (returns, kl, kl_coef):
        axes.grid(alpha=0.3)
    return figure


def few_decimals(value: float, _: int) -> str:
    """Write 0.02 instead of 2×10⁻², and only where a label fits: at 1, 2, 3 and 5 times a power of ten."""
    return f"{value:g}" if f"{value:e}"[0] in "1235" else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of a run, which contains an events.out.tfevents file")
    parser.add_argument("-o", "--output", type=Path, default=Path("training.png"), help="picture to write, .png or .svg")
    parser.add_argument("--title", help="environment to name (default: the folder above, which is it in the zoo's logs)")
    arguments = parser.parse_args()
    log = read_log(arguments.folder, ["rollout/ep_rew_mean", "train/kl", "train/kl_over_target", "train/kl_coef"])
    draw(log, arguments.title or arguments.folder.resolve().parent.name).savefig(arguments.output, dpi=120)
    print(f"Saved the plot to {arguments.output}")


if __name__ == "__main__":
    main()
