"""What `make demo` runs, with fewer steps: it trains, evaluates, and leaves a picture of the whole run."""

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore:rich is experimental")  # tqdm's, under SB3's progress bar
def test_cartpole_example(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[1] / "examples" / "cartpole.py"
    spec = importlib.util.spec_from_file_location("cartpole", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "FOLDER", tmp_path)
    monkeypatch.setattr(example, "TOTAL_TIMESTEPS", 3 * 2048)
    monkeypatch.setattr(example, "N_EVAL_EPISODES", 5)

    example.main()

    output = capsys.readouterr().out
    assert "Mean return over 5 episodes: " in output
    picture = tmp_path / "training.png"
    assert str(picture) in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    log = example.read_log()
    assert [step for step, _ in log["train/kl"]] == [2048, 4096, 6144]  # each update where it happened, the last one too
    assert [step for step, _ in log["rollout/ep_rew_mean"]] == [2048, 4096, 6144]
