"""Comparisons whose runs fail, stand still or are interrupted."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from sb3_adaptive_kl.compare import backends, cli, plots
from sb3_adaptive_kl.compare.plan import Plan, Run
from sb3_adaptive_kl.compare.store import Store
from tests.compare_results import COMMAND, COMPARE, ENVIRONMENT, PLAN, in_this_process


@pytest.fixture
def start():
    """Start a process in a session of its own, which does not survive the test."""
    children = []

    def start(*args, **kwargs):
        children.append(subprocess.Popen(*args, start_new_session=True, **kwargs))
        return children[-1]

    yield start
    for child in children:
        for process in processes_of(child.pid):
            os.kill(process, signal.SIGKILL)
        child.communicate()


def test_ctrl_c_stops_all_processes_and_leaves_no_unfinished_run(tmp_path, start):
    """Ctrl-C reaches every process of the terminal. Afterwards no process may remain, and no run may look finished."""
    (tmp_path / "plan.yml").write_text(yaml.safe_dump({**PLAN, "n_timesteps": 500_000}))
    arguments = [*COMPARE, "--plan", "plan.yml", "-o", "results"]
    (tmp_path / "tmp").mkdir()
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path / "tmp")}
    child = start(arguments, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    # A run trains: the zoo makes its training environment, and then its monitor file, after everything was imported. So does
    # the check of the plan before it, after which the plan is written
    until((tmp_path / "results" / "plan.yml").exists)
    until(lambda: list((tmp_path / "tmp").rglob("0.monitor.csv")))
    os.killpg(child.pid, signal.SIGINT)
    _, stderr = child.communicate(timeout=600)  # a busy machine may pause for long
    assert child.returncode == 130, stderr
    assert stderr.splitlines()[-1].startswith("interrupted; finished runs are kept")
    assert "Traceback" not in stderr
    assert not list(tmp_path.glob("results/runs/**/run.json"))
    until(lambda: not processes_of(child.pid))


def processes_of(session: int) -> list[int]:
    processes = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            processes.append(int(path.name))
    return processes


def until(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not fulfilled within {seconds} seconds"
        time.sleep(0.1)


def test_failing_arm_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """The network becomes NaN in the first update. The report contains the error, and the exit code is 1."""
    monkeypatch.setattr(backends, "loky", lambda jobs: in_this_process)
    monkeypatch.setattr(plots, "_render", lambda figure, format: b"")
    options = f"--env CartPole-v1 --algo ppo:ent_coef=.nan ppo --seeds 1 -n 300 --n-eval-episodes 1 -o {tmp_path}/results"
    assert cli.main(options.split()) == 1
    assert "failed: ppo:ent_coef=.nan CartPole-v1 seed 0: ValueError: Expected parameter" in capsys.readouterr().err
    statistics = json.loads((tmp_path / "results" / "statistics.json").read_text())
    assert list(statistics["environments"]["CartPole-v1"]["arms"]) == ["ppo"]
    for name in ("report.html", "report.md"):
        assert "ValueError: Expected parameter" in (tmp_path / "results" / name).read_text()
    assert "Traceback" in next((tmp_path / "results" / "failures").iterdir()).read_text()
    assert (tmp_path / "results" / "runs/ppo/ppo/CartPole-v1_1/run.json").exists()


@pytest.mark.parametrize(
    ("backend", "ending", "error"),
    [
        (in_this_process, "sys.exit('bye')", "SystemExit: bye\n"),
        (backends.loky(jobs=1), "os.kill(os.getpid(), signal.SIGKILL)", "TerminatedWorkerError: "),
    ],
    ids=["exit", "kill"],
)
def test_run_whose_process_ends_is_reported_as_failed(tmp_path, monkeypatch, backend, ending, error):
    """The driver must not wait for it forever."""
    (tmp_path / "ending.py").write_text(f"import os, signal, sys\n{ending}")
    monkeypatch.syspath_prepend(tmp_path)
    run = Run("CartPole-v1", "ppo", "ppo", 0, {"n_timesteps": 64}, 1, ("ending",), "runs/ppo")
    *_, (_, outcome) = backend([run])
    assert outcome.startswith(error)


def test_driver_shows_evaluations_and_says_once_that_a_run_stands_still(tmp_path, capsys, monkeypatch):
    """As in an environment that never ends an episode, where the first evaluation never ends either."""
    monkeypatch.setattr(cli, "PATIENCE", -1)
    shown = []

    class Bars(cli.Progress):
        def update(self, task_id, **kwargs):
            shown.append(kwargs["description"])
            super().update(task_id, **kwargs)

    def backend(runs):
        for run in runs:
            for timesteps in (0, 512, 1536, 1536, 1536):
                yield run, timesteps
            yield run, "RuntimeError: killed"

    monkeypatch.setattr(cli, "Progress", Bars)
    cli.carry_out(Store.create(tmp_path / "results", Plan.create({**PLAN, "arms": ["ppo"], "seeds": 1}), COMMAND), backend)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "If its environment never ends an episode" in line] == lines[1:2]
    assert lines[2] == "[1/1] ppo CartPole-v1 seed 0: failed: RuntimeError: killed"
    assert shown[::2] == ["ppo CartPole-v1 seed 0"] * 2 + ["ppo CartPole-v1 seed 0, evaluating"] * 4


def test_a_run_that_takes_no_first_step_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "PATIENCE", -1)

    def backend(runs):
        for run in runs:
            yield from ((run, 0), (run, 0), (run, "RuntimeError: killed"))

    cli.carry_out(Store.create(tmp_path / "results", Plan.create({**PLAN, "arms": ["ppo"], "seeds": 1}), COMMAND), backend)
    assert "ppo CartPole-v1 seed 0 has not taken a time step" in capsys.readouterr().err
