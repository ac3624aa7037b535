"""
Train AdaptiveKLPPO on CartPole-v1, evaluate it over 100 episodes, and draw what happened.

    python examples/cartpole.py

Needs the extras `progress` and `plots`; `make demo` installs them.
"""

import csv
from pathlib import Path

import torch as th
from matplotlib.figure import Figure
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure

from sb3_adaptive_kl import AdaptiveKLPPO

ENV = "CartPole-v1"
TOTAL_TIMESTEPS = 100_000
N_EVAL_EPISODES = 100
FOLDER = Path("runs/cartpole")
BLUE, VERMILION = "#0072B2", "#D55E00"  # Okabe and Ito's palette: told apart by colour-blind readers


def train() -> AdaptiveKLPPO:
    model = AdaptiveKLPPO("MlpPolicy", make_vec_env(ENV, n_envs=8, seed=0), n_steps=256, seed=0, device="cpu")
    model.set_logger(configure(str(FOLDER), ["csv"]))
    model.learn(TOTAL_TIMESTEPS, progress_bar=True)
    model.logger.dump(model.num_timesteps)  # the last update, which SB3 would write after the next rollout
    model.logger.close()
    model.save(FOLDER / "model")
    return model


def read_log() -> dict[str, list[tuple[int, float]]]:
    """Every logged quantity as pairs of time step and value."""
    with (FOLDER / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    timesteps = [int(row["time/total_timesteps"] or 0) for row in rows]
    log: dict[str, list[tuple[int, float]]] = {key: [] for key in rows[0]}
    for i, row in enumerate(rows):
        for key, value in row.items():
            if value:
                # SB3 writes what an update did with the rollout that follows it
                log[key].append((timesteps[i - 1 if key.startswith("train/") else i], float(value)))
    return log


def draw(log: dict[str, list[tuple[int, float]]], target_kl: float, tolerance: float) -> Path:
    figure = Figure(figsize=(8, 8), layout="constrained")
    returns, kl, kl_coef = figure.subplots(3, 1, sharex=True)
    returns.plot(*zip(*log["rollout/ep_rew_mean"], strict=True), color=BLUE)
    returns.set(title=f"AdaptiveKLPPO on {ENV}", ylabel="mean episode return", ylim=(0, 520))

    kl.plot(*zip(*log["train/kl"], strict=True), color=BLUE, marker=".")
    kl.axhspan(target_kl / tolerance, target_kl * tolerance, color=VERMILION, alpha=0.25, lw=0, label="β stays")
    kl.axhline(target_kl, color=VERMILION, lw=1, label=f"target_kl = {target_kl}")
    kl.set(ylabel="KL after the update [nats]", yscale="log")
    kl.legend()

    kl_coef.step(*zip(*log["train/kl_coef"], strict=True), color=BLUE, where="post")
    kl_coef.set(ylabel="KL coefficient β", xlabel="time steps")
    kl_coef.set_yscale("log", base=2)

    for axes in (returns, kl, kl_coef):
        axes.grid(alpha=0.3)
    path = FOLDER / "training.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    th.set_num_threads(1)
    model = train()
    mean, std = evaluate_policy(model, make_vec_env(ENV, n_envs=8, seed=1000), n_eval_episodes=N_EVAL_EPISODES)
    picture = draw(read_log(), target_kl=model.target_kl, tolerance=model.kl_tolerance)
    print(f"Mean return over {N_EVAL_EPISODES} episodes: {mean:.1f} ± {std:.1f}")
    print(f"Picture of return, KL and β:   {picture}")


if __name__ == "__main__":
    main()
