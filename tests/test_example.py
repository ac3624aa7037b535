"""examples/training_curves.py: the picture of a tensorboard log, with each update where it happened."""

import runpy
import sys
from pathlib import Path

import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_adaptive_kl import AdaptiveKLPPO

SCRIPT = Path(__file__).parents[1] / "examples" / "training_curves.py"


@pytest.mark.filterwarnings("ignore")  # tensorboard's and protobuf's own
def test_training_curves(tmp_path, monkeypatch, capsys):
    model = AdaptiveKLPPO("MlpPolicy", make_vec_env("CartPole-v1", seed=0), n_steps=256, tensorboard_log=str(tmp_path), seed=0)
    updated, train = [], model.train
    monkeypatch.setattr(model, "train", lambda: (updated.append(model.num_timesteps), train()))
    model.learn(1024)

    read_log = runpy.run_path(str(SCRIPT))["read_log"]
    log = read_log(tmp_path / "AdaptiveKLPPO_1", ["rollout/ep_rew_mean", "train/kl", "train/kl_coef"])
    assert log["train/kl"][0] == log["train/kl_coef"][0] == updated[:-1]  # SB3 does not write the last update
    assert log["train/kl_coef"][1][0] == 1.0
    assert log["rollout/ep_rew_mean"][0] == updated

    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "AdaptiveKLPPO_1"), "-o", str(tmp_path / "picture.png")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no log of rollout/ep_rew_mean"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
