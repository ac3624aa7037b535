"""
Plot return, KL and β of a training run of AdaptiveKLPPO from the TensorBoard log of SB3 (or of the zoo's `-tb`).

    python -m rl_zoo3.train --algo ppo_kl --env CartPole-v1 -f logs -tb logs/tensorboard
    python examples/training_curves.py logs/tensorboard/CartPole-v1/AdaptiveKLPPO_1 -o training.png

This needs the extra `zoo` for tensorboard and matplotlib; `make demo` installs it.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BLUE, VERMILION = "#0072B2", "#D55E00"  # Okabe and Ito's palette, safe for color-blind readers
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


def draw(log: dict[str, Curve]) -> Figure:
    figure = Figure(figsize=(8, 8), layout="constrained")
    returns, kl, kl_coef = figure.subplots(3, 1, sharex=True)
    returns.plot(*log["rollout/ep_rew_mean"], color=BLUE)
    returns.set(title="AdaptiveKLPPO", ylabel="mean episode return")

    timesteps, kls = log["train/kl"]
    kl.plot(timesteps, kls, color=BLUE, marker=".", ls="")
    # The target may be a schedule; an update that changed nothing does not tell it
    told = [(t, d / r) for t, d, r in zip(timesteps, kls, log["train/kl_over_target"][1], strict=True) if r > 0]
    at, target = [t for t, _ in told], [value for _, value in told]
    kl.plot(at, target, color=VERMILION, lw=1, label="target")
    low, high = [value / BAND for value in target], [value * BAND for value in target]
    kl.fill_between(at, low, high, color=VERMILION, alpha=0.25, lw=0, label=f"within a factor of {BAND:g}")
    kl.set(ylabel="KL after the update [nats]", yscale="log")
    kl.legend()

    kl_coef.step(*log["train/kl_coef"], color=BLUE, where="post")
    kl_coef.set(ylabel="KL coefficient β", xlabel="time steps")
    kl_coef.set_yscale("log", base=2)

    for axes in (returns, kl, kl_coef):
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of a run, which contains an events.out.tfevents file")
    parser.add_argument("-o", "--output", type=Path, default=Path("training.png"), help="picture to write, .png or .svg")
    arguments = parser.parse_args()
    log = read_log(arguments.folder, ["rollout/ep_rew_mean", "train/kl", "train/kl_over_target", "train/kl_coef"])
    draw(log).savefig(arguments.output, dpi=120)
    print(f"Saved the plot to {arguments.output}")


if __name__ == "__main__":
    main()
