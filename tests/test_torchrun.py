"""torchrun: the zoo's own command, other programs that import the zoo, and a script that restarts after a rank was killed."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import yaml
from rl_zoo3.exp_manager import ExperimentManager

from sb3_adaptive_kl import AdaptiveKLPPO

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = str(REPOSITORY / "examples" / "distributed.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
# The last is for restarts: see examples/distributed.py
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def run(folder: Path, *arguments: str, succeeds: bool = True) -> str:
    command = [*TORCHRUN, *arguments]
    child = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert (child.returncode == 0) == succeeds, child.stdout + child.stderr
    return child.stdout + child.stderr


def test_the_zoo_trains_one_agent_in_one_folder(tmp_path: Path) -> None:
    train = "-m rl_zoo3.train --algo ppo_kl --env CartPole-v1 -n 1536 --eval-freq 512 --eval-episodes 2 -f logs -P"
    output = run(tmp_path, *train.split(), "--save-freq", "1024", "-params", "n_steps:64")
    assert "2,048/1,536" in output
    assert len(re.findall("Saving to logs/ppo_kl/CartPole-v1_1", output)) == 1
    (folder,) = (tmp_path / "logs" / "ppo_kl").iterdir()
    assert sorted(path.name for path in folder.glob("*.zip")) == [
        "CartPole-v1.zip",
        "best_model.zip",
        "rl_model_1024_steps.zip",
        "rl_model_2048_steps.zip",
    ]
    assert AdaptiveKLPPO.load(folder / "CartPole-v1.zip", device="cpu").num_timesteps == 2048
    arguments = yaml.unsafe_load((folder / "CartPole-v1" / "args.yml").read_text())
    assert arguments["seed"] == int(re.search(r"2 processes train one agent. Seed: (\d+)", output)[1])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that torchrun has started with ``-m rl_zoo3.train``."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="rl_zoo3.train"))


@pytest.mark.usefixtures("started")
def test_the_zoo_refuses_to_optimize_under_torchrun() -> None:
    with pytest.raises(SystemExit, match="-optimize cannot be run by torchrun"):
        ExperimentManager(Namespace(), "ppo_kl", "CartPole-v1", "logs", optimize_hyperparameters=True)


@pytest.mark.usefixtures("started")
def test_another_algorithm_trains_one_agent_per_process() -> None:
    ExperimentManager(Namespace(), "ppo", "CartPole-v1", "logs")
    assert not dist.is_initialized()


def test_a_script_of_the_users_trains_one_agent_per_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("""
import sys
from rl_zoo3.train import train
sys.argv += "--algo ppo_kl --env CartPole-v1 -n 256 --eval-freq -1 -params n_steps:32".split()
train()
""")
    run(tmp_path, "script.py", "-uuid")
    assert len(list(tmp_path.glob("logs/*/*/CartPole-v1.zip"))) == 2


def test_torchrun_reports_the_rank_that_failed_and_its_error(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, runpy
import gymnasium as gym
class Failing(gym.Wrapper):
    def step(self, action):
        if os.environ["RANK"] == "1":
            raise KeyError("no such joint")
        return super().step(action)
gym.register("Failing-v0", lambda: Failing(gym.make("CartPole-v1")))
runpy.run_path({EXAMPLE!r}, run_name="__main__")
""")
    output = run(tmp_path, str(script), "--env", "Failing-v0", succeeds=False)
    summary = output[output.index("Root Cause (first observed failure)") :]
    assert re.search(r"rank *: 1 \(local_rank: 1\)", summary)
    assert "KeyError: 'no such joint'" in summary


def test_a_killed_rank_is_restarted_from_the_newest_checkpoint(tmp_path: Path) -> None:
    # The first process of rank 1 does not survive the first checkpoint
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, runpy, signal
from pathlib import Path
import gymnasium as gym
class Killing(gym.Wrapper):
    def step(self, action):
        first = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and Path("out", "rl_model_4096_steps.zip").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)
gym.register("Killing-v0", lambda: Killing(gym.make("CartPole-v1")))
runpy.run_path({EXAMPLE!r}, run_name="__main__")
""")
    options = ["--env", "Killing-v0", "-n", "8192", "--n-envs", "2", "-o", "out"]
    output = run(tmp_path, "--max-restarts", "1", str(script), *options)
    assert AdaptiveKLPPO.load(tmp_path / "out" / "final", device="cpu").num_timesteps == 8192
    # It was killed, and did not begin again
    totals = [int(total) for total in re.findall(r"total_timesteps\s*\|\s*(\d+)", output)]
    assert totals.count(1024) == 1
    assert totals.count(5120) >= 1
    assert "exitcode: -9" in output
    assert not list((tmp_path / "out").glob(".*"))
