"""The results folder: whose runs it holds, what it remembers of earlier commands, and what a killed one left behind."""

import json
import runpy
import sys

import pytest

from sb3_adaptive_kl.compare import backends, report
from sb3_adaptive_kl.compare.arms import PlanError
from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.store import Store
from tests.compare_results import COMMAND, finished

ENV = "CartPole-v1"


@pytest.fixture
def finished_store(tmp_path):
    """A results folder with a finished run."""
    plan = Plan.create({"environments": [ENV], "arms": ["ppo"], "seeds": 1, "n_timesteps": 256, "n_eval_episodes": 1})
    store = Store.create(tmp_path / "results", plan, COMMAND)
    for run in plan.runs():
        store.keep(run, finished(run))
    return store


@pytest.mark.parametrize(("key", "old", "new"), [("n_epochs", 20, 10), ("n_eval_episodes", 1, 2)])
def test_runs_of_a_plan_that_was_edited_in_its_folder_are_refused(finished_store, key, old, new):
    """The edited file is the folder's plan: nothing but the runs themselves tells that they are of another one."""
    file = finished_store.folder / "plan.yml"
    file.write_text(file.read_text().replace(f"{key}: {old}", f"{key}: {new}"))
    with pytest.raises(PlanError, match=rf"plan.yml was edited after .* choose another folder: {key}: {old} → {new}$"):
        Store.create(finished_store.folder, Plan.load(file), COMMAND)


def test_report_names_the_versions_of_earlier_commands(finished_store):
    """They are kept once each, however often the comparison is resumed."""
    folder, plan = finished_store.folder, finished_store.plan
    for version in ("2", "2", "1", "2", "1"):
        store = Store.create(folder, plan, {**COMMAND, "versions": {"torch": version}})
    report.summarize(store)
    for file in ("report.md", "report.html"):
        text = (folder / file).read_text()
        for earlier in (", torch 2", ""):
            assert f"some of the runs may be from: here; Python 3{earlier}\n" in text.replace("</p>", "\n")
        assert text.count("may be from") == 2
    (folder / "command.json").write_text(json.dumps(COMMAND))  # as older versions wrote it, also those in docs/study
    report.summarize(store)
    assert "may be from" not in (folder / "report.md").read_text()


def test_files_that_a_killed_driver_left_are_removed(finished_store):
    """A file, or the folder of a run."""
    (finished_store.folder / ".unfinished-report.html").touch()
    (finished_store.folder / ".unfinished-run").mkdir()
    Store.create(finished_store.folder, finished_store.plan, COMMAND)
    assert not list(finished_store.folder.glob(".unfinished*"))


@pytest.mark.parametrize(("folder", "message"), [("missing", "missing is not a results folder"), ("", "not a results folder")])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_mistyped_folder_is_told_in_one_line(folder, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / folder)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("sb3_adaptive_kl.compare.report", run_name="__main__")
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("text", "line"), [("no such map", "KeyError: 'no such map'"), (None, "KeyError")])
def test_first_line_of_a_failure_names_the_error_and_not_its_note(text, line):
    error = KeyError() if text is None else KeyError(text)
    error.__notes__ = ["raised while resetting"]  # as by add_note(), from Python 3.11 on
    assert backends._described(error).splitlines()[0] == line
