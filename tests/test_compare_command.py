"""The command: from a plan to a report; killed and continued; wrong input; a cluster that loses a node."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sb3_adaptive_kl.compare import backends
from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.run import carry_out
from sb3_adaptive_kl.compare.store import Store

# The runs of one plan are shared by these tests
pytestmark = pytest.mark.xdist_group("compare")

PLAN = {"environments": ["CartPole-v1"], "arms": ["ppo_kl", "ppo"], "seeds": 2, "n_timesteps": 1500, "n_eval_episodes": 2}
COMPARE = [sys.executable, "-m", "sb3_adaptive_kl.compare"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}


def compare(folder: Path, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
    child = subprocess.run([*COMPARE, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert child.returncode == expect, child.stdout + child.stderr
    return child


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The results of a run that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "plan.yml").write_text(yaml.safe_dump(PLAN))
    return folder / "results", compare(folder, "--plan", "plan.yml", "-j", "2", "-o", "results")


def statistics_of(results: Path) -> str:
    return (results / "statistics.json").read_text()


def test_everything_is_written(unbroken):
    results, child = unbroken
    for name in ("plan.yml", "command.json", "runs.csv", "statistics.json", "timings.json", "report.md", "report.html"):
        assert (results / name).stat().st_size > 0, name
    for name in ("curves-CartPole-v1", "final_returns", "aggregates", "probability_of_improvement", "performance_profile"):
        for ending in (".png", ".svg", "-dark.png", "-dark.svg"):
            assert (results / "plots" / f"{name}{ending}").stat().st_size > 0, name + ending
    assert len((results / "runs.csv").read_text().splitlines()) == 1 + 4
    assert "Report: results/report.html" in child.stdout
    assert "Warning: 2 seeds" in child.stderr
    assert len(re.findall(r"^\[\d/4\] ppo(_kl)? CartPole-v1 seed \d: return", child.stderr, flags=re.MULTILINE)) == 4
    assert not list(results.glob(".unfinished*"))


def test_the_report_is_one_file_that_says_what_was_done(unbroken):
    results, _ = unbroken
    page, text = (results / "report.html").read_text(), (results / "report.md").read_text()
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:)""", page)
    assert "<script" not in page
    assert 'class="open"' in page  # a verdict that says nothing does not look like one
    assert 'class="shown"' not in page
    for content in (page, text):
        assert "2 seeds: with fewer than 5, the intervals say little" in content
        assert "no difference is shown (ppo_kl − ppo = " in content
        assert "sb3-adaptive-kl compare --plan plan.yml" in content
        assert "lin_0.2" in content  # where they differ
        assert "torch" in content
    for picture in re.findall(r"\]\((.*?)\)", text):
        assert (results / picture).is_file()


def test_the_folders_are_the_zoos(unbroken):
    """Its plots and its enjoy work on them."""
    results, _ = unbroken
    zoo = [sys.executable, "-m"]
    options = {"cwd": results, "env": {**ENVIRONMENT, "MPLBACKEND": "Agg"}, "capture_output": True, "text": True}
    logs = ["-f", "runs/ppo_kl", "runs/ppo"]
    child = subprocess.run(
        [*zoo, "rl_zoo3.plots.all_plots", "-a", "ppo_kl", "ppo", "-e", "CartPole-v1", *logs, "--no-display"], **options
    )
    assert "|CartPole-v1 |" in child.stdout, child.stderr
    enjoy = "rl_zoo3.enjoy --algo ppo_kl --env CartPole-v1 -f runs/ppo_kl --no-render -n 600 --exp-id 2"
    child = subprocess.run([*zoo, *enjoy.split()], **options)
    assert "Mean reward: " in child.stdout, child.stderr


def test_what_is_finished_is_not_repeated(unbroken):
    results, _ = unbroken
    before = {path: path.stat().st_mtime_ns for path in results.glob("runs/**/run.json")}
    statistics = statistics_of(results)
    child = compare(results.parent, "--plan", "plan.yml", "-j", "2", "-o", "results")
    assert {path: path.stat().st_mtime_ns for path in results.glob("runs/**/run.json")} == before
    assert "seed" not in child.stderr.replace("2 seeds", "")
    assert statistics_of(results) == statistics


def test_each_stage_runs_alone(unbroken):
    results, _ = unbroken
    statistics, page = statistics_of(results), (results / "report.html").read_text()
    for name in ("statistics.json", "report.html", "plots/final_returns.svg"):
        (results / name).unlink()
    for stage in ("run", "statistics", "plots", "report"):
        subprocess.run([sys.executable, "-m", f"sb3_adaptive_kl.compare.{stage}", str(results)], env=ENVIRONMENT, check=True)
    assert statistics_of(results) == statistics
    assert (results / "report.html").read_text() == page
    command = [sys.executable, "-m", "sb3_adaptive_kl.compare.report", str(results / "runs")]
    child = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert child.returncode == 2
    assert "holds no results" in child.stderr


def test_killed_at_any_moment_and_continued(unbroken, tmp_path):
    """SIGKILL while runs go on, and a run whose folder was left half written."""
    results, _ = unbroken
    (tmp_path / "plan.yml").write_text(yaml.safe_dump(PLAN))
    arguments = [*COMPARE, "--plan", "plan.yml", "-j", "2", "-o", "results"]
    child = subprocess.Popen(arguments, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    until(lambda: list(tmp_path.glob("results/runs/**/run.json")))
    time.sleep(4 * os.urandom(1)[0] / 256)
    child.send_signal(signal.SIGKILL)
    child.wait()
    finished = list(tmp_path.glob("results/runs/*/*/*/run.json"))
    if len(finished) > 1:
        finished[-1].unlink()  # as if the disk had been pulled out
    (tmp_path / "results" / ".unfinished-x").mkdir()

    child = compare(tmp_path, "--plan", "plan.yml", "-j", "2", "-o", "results")
    assert f"{max(1, len(finished) - 1)} of 4 runs are done already" in child.stderr
    assert statistics_of(tmp_path / "results") == statistics_of(results)
    assert not list((tmp_path / "results").glob(".unfinished*"))


def test_interrupted(unbroken, tmp_path):
    """Ctrl-C reaches every process of the terminal. No run may then pass for finished, and none goes on."""
    (tmp_path / "plan.yml").write_text(yaml.safe_dump({**PLAN, "n_timesteps": 500_000}))
    arguments = [*COMPARE, "--plan", "plan.yml", "-j", "2", "-o", "results"]
    child = subprocess.Popen(
        arguments, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until(lambda: len(processes_of(child.pid)) >= 3)
    time.sleep(8)  # into the training
    os.killpg(child.pid, signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130
    assert stderr.splitlines()[-1].startswith("interrupted; what is finished is kept")
    assert "Traceback" not in stderr
    assert not list(tmp_path.glob("results/runs/**/run.json"))
    until(lambda: not processes_of(child.pid))


def processes_of(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.name))
    return found


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_a_failing_arm_stops_no_other(tmp_path):
    """SAC cannot act in CartPole. What it said is in the report, and the exit code tells."""
    options = "--env CartPole-v1 --algo sac ppo --seeds 1 -n 300 --n-eval-episodes 1 -o results"
    child = compare(tmp_path, *options.split(), expect=1)
    assert "failed: sac CartPole-v1 seed 0: AssertionError: The algorithm only supports" in child.stderr
    statistics = json.loads(statistics_of(tmp_path / "results"))
    assert list(statistics["environments"]["CartPole-v1"]["arms"]) == ["ppo"]
    for name in ("report.html", "report.md"):
        assert "AssertionError: The algorithm only supports" in (tmp_path / "results" / name).read_text()
    assert "Traceback" in next((tmp_path / "results" / "failures").iterdir()).read_text()
    assert (tmp_path / "results" / "runs/ppo/ppo/CartPole-v1_1/run.json").exists()


def test_a_run_that_exits_is_a_failure(tmp_path):
    """Not a driver that waits for ever."""
    (tmp_path / "exiting.py").write_text(
        """
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv
class Exiting(CartPoleEnv):
    def step(self, action):
        raise SystemExit("bye")
gym.register("Exiting-v0", Exiting, max_episode_steps=10)
"""
    )
    options = "--env Exiting-v0 --algo ppo --seeds 1 -n 64 --gym-packages exiting -o results"
    assert "failed: SystemExit: bye" in compare(tmp_path, *options.split(), expect=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--env CartPole-v7", "did you mean 'CartPole-v1'"),
        ("--env CartPole-v1 --algo ppo_lk", "did you mean 'ppo_kl'"),
        ("--env CartPole-v1 --algo ppo_kl:clip_rnage=1", "did you mean 'clip_range'"),
        ("--env CartPole-v1 --seeds 0", "seeds must be"),
        ("--env CartPole-v1 --seeds many", "invalid int value"),
        ("--env CartPole-v1 --jobs 0", "jobs must be"),
        ("--plan nowhere.yml", "cannot be read"),
        ("--env CartPole-v1 -o occupied", "is not empty and holds no results"),
        ("--env CartPole-v1 -o occupied/file", "is a file"),
        ("--env CartPole-v1 -o occupied/file/below", "is a file"),
        ("--plan plan.yml --seeds 3", "without --seeds, please"),
        ("--env CartPole-v1 --ray-address there", "--ray-address goes with --backend ray"),
    ],
)
def test_bad_input(tmp_path, arguments, message, capsys, monkeypatch):
    """One line, exit code 2, nothing written."""
    from sb3_adaptive_kl.compare.cli import main

    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").touch()
    monkeypatch.chdir(tmp_path)
    try:
        code = main([*arguments.split(), *([] if "-o" in arguments.split() else ["-o", "results"])])
    except SystemExit as error:
        code = error.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.rglob("*")] == ["occupied", "file"]


def test_another_plan_is_refused_with_the_difference(unbroken, capsys):
    from sb3_adaptive_kl.compare.cli import main

    results, _ = unbroken
    options = "--env CartPole-v1 --algo ppo_kl ppo --seeds 2 -n 1600 --n-eval-episodes 2 -o"
    assert main([*options.split(), str(results)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "hyperparameters.CartPole-v1.ppo_kl.n_timesteps: 1500 → 1600" in line


@pytest.mark.filterwarnings("ignore")  # Ray's own, of which it has many
def test_a_cluster_of_two_nodes_that_loses_one(unbroken, tmp_path, monkeypatch):
    """What the lost node was running is run again on the other, and the statistics are those of loky."""
    from ray.cluster_utils import Cluster

    from sb3_adaptive_kl.compare import statistics

    results, _ = unbroken
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    try:
        plan = Plan.load(results / "plan.yml")
        store = Store.create(tmp_path / "results", plan, {})
        running: set[str] = set()

        def losing(runs):
            for event in backends.ray(jobs=1, address=cluster.address)(runs):
                if isinstance(event, backends.Progress) and len(running) < 2:
                    running.add(event.run.folder)
                    if len(running) == 2:  # one on each node
                        cluster.remove_node(other, allow_graceful=False)
                yield event

        carry_out(plan, store, losing)
        assert len(running) == 2
        assert store.failures(plan) == {}
        statistics.write(plan, store)
    finally:
        cluster.shutdown()
    assert statistics_of(tmp_path / "results") == statistics_of(results)
