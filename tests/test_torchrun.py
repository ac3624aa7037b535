"""torchrun: the zoo's own command, other programs that import the zoo, and a script that restarts after a rank was killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

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
    train = "-m rl_zoo3.train --algo ppo_kl --env CartPole-v1 -n 6144 --eval-freq 2048 --eval-episodes 2 -f logs -P"
    output = run(tmp_path, *train.split(), "--save-freq", "4096", "-params", "n_steps:256")
    assert "8,192/6,144" in output
    assert len(re.findall("Saving to logs/ppo_kl/CartPole-v1_1", output)) == 1
    (folder,) = (tmp_path / "logs" / "ppo_kl").iterdir()
    assert sorted(path.name for path in folder.glob("*.zip")) == [
        "CartPole-v1.zip",
        "best_model.zip",
        "rl_model_4096_steps.zip",
        "rl_model_8192_steps.zip",
    ]
    assert AdaptiveKLPPO.load(folder / "CartPole-v1.zip", device="cpu").num_timesteps == 8192
    arguments = yaml.unsafe_load((folder / "CartPole-v1" / "args.yml").read_text())
    assert arguments["seed"] == int(re.search(r"2 processes train one agent. Seed: (\d+)", output)[1])


def test_the_zoo_refuses_to_optimize_under_torchrun(tmp_path: Path) -> None:
    output = run(tmp_path, *["-m", "rl_zoo3.train", "--algo", "ppo_kl", "--env", "CartPole-v1", "-optimize"], succeeds=False)
    assert "-optimize cannot be run by torchrun" in output


TRAIN_IN_SCRIPT = """
import sys
from rl_zoo3.train import train
sys.argv += "--algo ppo_kl --env CartPole-v1 -n 256 --eval-freq -1 -params n_steps:32".split()
train()
"""


@pytest.mark.parametrize(
    "arguments",
    ["-m rl_zoo3.train --algo ppo --env CartPole-v1 -n 256 --eval-freq -1 -params n_steps:32 -uuid", "script.py -uuid"],
    ids=["another algorithm", "a script of the user's"],
)
def test_other_programs_train_one_agent_per_process(tmp_path: Path, arguments: str) -> None:
    (tmp_path / "script.py").write_text(TRAIN_IN_SCRIPT)
    run(tmp_path, *arguments.split())
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
    # Each rank says which process it is before it runs the example
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, runpy
with open("pid-of-rank-" + os.environ["RANK"], "w") as file:
    file.write(str(os.getpid()))
runpy.run_path({EXAMPLE!r}, run_name="__main__")
""")
    arguments = ["--max-restarts", "1", str(script), "--env", "CartPole-v1", "-n", "24576", "--n-envs", "2", "-o", "out"]
    with subprocess.Popen(
        [*TORCHRUN, *arguments], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as agent:
        try:
            while not (tmp_path / "out" / "rl_model_4096_steps.zip").exists():
                assert agent.poll() is None, agent.stdout.read()
                time.sleep(0.05)
            os.kill(int((tmp_path / "pid-of-rank-1").read_text()), signal.SIGKILL)
            output, _ = agent.communicate(timeout=300)
        finally:
            agent.terminate()  # if the test has failed: the agent ends its ranks
    assert agent.returncode == 0, output
    assert AdaptiveKLPPO.load(tmp_path / "out" / "final", device="cpu").num_timesteps == 24576
    # It did not begin again
    totals = [int(total) for total in re.findall(r"total_timesteps\s*\|\s*(\d+)", output)]
    assert totals.count(1024) == 1
    assert not list((tmp_path / "out").glob(".*"))
