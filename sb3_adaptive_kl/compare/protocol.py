"""
Scores of Schulman et al. 2017 (https://arxiv.org/abs/1707.06347, section 6.1).

The score of a run is the mean return of its last 100 training episodes. For each environment, it is shifted and scaled so that
a random policy gets 0 and the best result is 1. The score of an arm is the mean over its runs on all environments.

The paper does not say whether the best result is that of a single run or of a setting, its mean over seeds: both are computed.
"""

from typing import Any

import pandas as pd

from sb3_adaptive_kl.compare.intervals import interval, matrices, mean

LAST_EPISODES = 100


def ppo_paper(runs: pd.DataFrame) -> dict[str, Any]:
    """
    Score every arm by both readings, with an interval, which the paper does not have.

    :param runs: a row for each run, with its ``random_return`` and the mean of its last episodes as ``last_return``
    :return: the environments, without those where no arm beats a random policy, the returns that are 0 and 1 there, and the
        scores. An arm counts with the seeds it finished on all of them.
    """
    scale = runs.groupby("env", sort=False).agg(random=("random_return", "mean"), best_run=("last_return", "max"))
    scale["best_setting"] = runs.groupby(["env", "arm"])["last_return"].mean().groupby("env").max()
    # A scale of zero or less would turn the order of the arms around
    scale = scale[scale["best_setting"] > scale["random"]]
    counted = runs[runs["env"].isin(scale.index)].join(scale, on="env")
    arms: dict[str, Any] = {}
    for reading in ("best_run", "best_setting"):
        score = (counted["last_return"] - counted["random"]) / (counted[reading] - counted["random"])
        for arm, matrix in matrices(counted.assign(score=score), "score").items():
            arms.setdefault(arm, {"runs": matrix.size})[reading] = interval(mean, matrix)
    return {"name": "ppo-paper", "episodes": LAST_EPISODES, "environments": scale.to_dict("index"), "arms": arms}
