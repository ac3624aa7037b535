"""The command: complete runs, resumption, invalid input, and a Ray cluster that loses a node."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sb3_adaptive_kl.compare import backends, cli, plots, report, statistics
from sb3_adaptive_kl.compare.arms import PlanError
from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.store import Store
from tests.compare_results import COMMAND, COMPARE, ENVIRONMENT, PLAN, in_this_process

# These tests share the runs of one plan
pytestmark = pytest.mark.xdist_group("compare")


def stamps(folder: Path) -> dict[str, int]:
    """When each run was finished, by its folder."""
    return {str(path.parent.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("runs/**/run.json")}


def statistics_of(results: Path) -> str:
    return (results / "statistics.json").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Results of all runs, executed one after the other in this process, without a report."""
    store = Store.create(tmp_path_factory.mktemp("undisturbed") / "results", Plan.create(PLAN), COMMAND)
    cli.carry_out(store, in_this_process)
    return store


@pytest.fixture(scope="module")
def resumed(undisturbed, tmp_path_factory):
    """
    Folder of a comparison that the command completed, when each run was finished before, and the finished process.

    The driver had been killed after two of four runs, and one of the other folders was damaged.
    """
    folder = tmp_path_factory.mktemp("compare")
    (folder / "plan.yml").write_text(yaml.safe_dump(PLAN))
    results = shutil.copytree(undisturbed.folder, folder / "results")
    missing = [results / run.folder for run in undisturbed.plan.runs() if run.seed == 1]
    for path in missing:
        shutil.rmtree(path)
    missing[0].mkdir()
    (missing[0] / "episodes.csv").write_text("incomplete")
    (results / ".unfinished-x").mkdir()
    before = stamps(results)
    arguments = [*COMPARE, "--plan", "plan.yml", "-j", "2", "-o", "results"]
    child = subprocess.run(arguments, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    return results, before, child


@pytest.fixture(scope="module")
def completed(resumed):
    """Results folder of a comparison, and the finished process."""
    results, _, child = resumed
    return results, child


def test_command_writes_all_files(completed):
    results, child = completed
    for name in ("plan.yml", "command.json", "runs.csv", "statistics.json", "report.md", "report.html"):
        assert (results / name).stat().st_size > 0, name
    for name in ("curves-CartPole-v1", "final_returns"):
        for ending in (".png", ".svg", "-dark.png", "-dark.svg"):
            assert (results / "plots" / f"{name}{ending}").stat().st_size > 0, name + ending
    assert len((results / "runs.csv").read_text().splitlines()) == 1 + 4
    assert "Report: results/report.html" in child.stdout
    assert "Warning: 2 seeds" in child.stderr
    first, *lines = child.stderr.splitlines()
    assert first == "2 arms × 1 environment × 2 seeds × 1,500 time steps = 4 runs, 2 finished"
    assert len([line for line in lines if re.match(r"\[[34]/4\] ppo(_kl)? CartPole-v1 seed 1: return", line)]) == 2
    assert len([line for line in lines if re.search(r", \d+:\d\d:\d\d left$", line)]) == 1  # but for the last run
    assert "- **CartPole-v1**: ppo_kl and ppo\n  - final policy: " in child.stdout
    assert not list(results.glob(".unfinished*"))


def test_html_report_is_self_contained_and_both_reports_are_complete(completed):
    results, _ = completed
    page, text = (results / "report.html").read_text(), (results / "report.md").read_text()
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:)""", page)
    assert "<script" not in page
    assert "figure { margin: 0; max-width: 720px; }" in page  # a curve over the whole screen says no more
    assert 'class="open"' in page  # a verdict without a winner is not highlighted
    assert 'class="shown"' not in page
    for content in (page, text):
        assert "2 seeds: with fewer than 5, intervals say little" in content
        assert "one thread on the CPU" in content
        assert "no difference is shown (ppo_kl − ppo = " in content
        assert "sb3-adaptive-kl compare --plan plan.yml" in content
        assert "lin_0.2" in content  # the hyperparameter that differs
        assert "torch" in content
    for picture in re.findall(r"\]\((.*?)\)", text):
        assert (results / picture).is_file()


def test_tables_have_the_labels_that_replace_their_header_on_a_phone(completed):
    results, _ = completed
    tables = re.findall(r"<table>(.*?)</table>", (results / "report.html").read_text(), flags=re.DOTALL)
    headed = [table for table in tables if "<th>" in table]
    assert len(headed) >= 4  # among them returns, KL, what differed and timings
    for table in headed:
        header = re.findall("<th>(.*?)</th>", table)
        rows = re.findall(r"<tr>(<td.*?)</tr>", table)
        assert rows
        for row in rows:
            assert re.findall('data-label="(.*?)"', row) == header[1:]
    assert re.search(r'<td>CartPole-v1</td>.*>ppo_kl<.*"seconds">[\d.]+<.*"steps/s">[\d.,]+<', headed[-1])


def test_zoo_scripts_work_on_the_run_folders(completed, zoo, monkeypatch):
    """Check with plots.all_plots and enjoy."""
    monkeypatch.chdir(completed[0])
    assert "|CartPole-v1 |" in zoo("plots.all_plots -a ppo_kl ppo -e CartPole-v1 -f runs/ppo_kl runs/ppo --no-display")
    enjoy = "enjoy --algo ppo_kl --env CartPole-v1 -f runs/ppo_kl --no-render -n 600 --exp-id 2"
    assert "Mean reward: " in zoo(enjoy)


def test_resumption_gives_the_same_statistics_and_repeats_no_finished_run(undisturbed, resumed):
    results, before, _ = resumed
    computed, _ = statistics.compute(undisturbed.plan, undisturbed.results())
    assert json.loads(statistics_of(results)) == computed
    after = stamps(results)
    assert len(after) == 4
    assert len(before) == 2
    assert {folder: after[folder] for folder in before} == before
    assert not list(results.glob(".unfinished*"))
    cli.carry_out(Store.open(results), backends.loky(jobs=2))
    assert stamps(results) == after


def test_run_is_kept_as_soon_as_it_has_finished(undisturbed, tmp_path):
    """A driver that is killed loses nothing but the runs that are going."""
    store = Store.create(tmp_path / "results", undisturbed.plan, COMMAND)

    def backend(runs):
        for run in runs:
            files = (undisturbed.folder / run.folder).rglob("*")
            yield run, {path.name: path.read_bytes() for path in files if path.is_file()}
            assert store.finished(run)

    cli.carry_out(store, backend)
    assert len(store.results()) == 4


def test_report_can_be_repeated_from_the_finished_runs_alone(completed, tmp_path, capsys, monkeypatch):
    """For example while other runs are going on: here one of four is missing."""
    results, _ = completed
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    for name in ("statistics.json", "report.html", "plots/final_returns.svg"):
        (copy / name).unlink()
    # As `python -m sb3_adaptive_kl.compare.report`
    monkeypatch.setattr(sys, "argv", ["report", str(copy)])
    monkeypatch.delitem(sys.modules, report.__name__)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(report.__name__, run_name="__main__")
    assert statistics_of(copy) == statistics_of(results)
    assert (copy / "report.html").read_text() == (results / "report.html").read_text()
    next(copy.glob("runs/ppo/*/*/run.json")).unlink()
    monkeypatch.setattr(plots, "_render", lambda figure, format: b"")
    assert report.summarize(Store.open(copy)) == 0
    assert "3 of 4 runs finished" in (copy / "report.md").read_text()
    with pytest.raises(PlanError, match="is not a results folder"):
        Store.open(results / "runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--env CartPole-v7", "provides versioned environments: [ `v0`, `v1` ]"),
        ("--env CartPole-v1 --algo ppo_lk", "did you mean 'ppo_kl'"),
        ("--env CartPole-v1 --algo ppo_kl:clip_rnage=1", "did you mean 'clip_range'"),
        ("--env CartPole-v1 --seeds 0", "seeds=0: Input should be greater than 0"),
        ("--env CartPole-v1 --seeds many", "--seeds: invalid int value"),
        ("--env CartPole-v1 --seed 7", "unrecognized arguments: --seed 7"),
        ("--env CartPole-v1 -n 1e4 --jobs 0", "jobs must be"),  # the budget is accepted
        ("--env CartPole-v1 -n 1.5", "n_timesteps=1.5: Input should be a valid integer"),
        ("--env CartPole-v1 --params n_evns=8", "did you mean 'n_envs'"),
        ("--env CartPole-v1 --algo ppo_kl:n_epochs=three", "n_epochs='three' must be an integer"),
        ("--plan plan.yml --env CartPole-v1", "argument --env: not allowed with argument --plan"),
        ("--seeds 2", "one of the arguments --plan --env is required"),
        ("--env CartPole-v1 --jobs 0", "jobs must be"),
        ("--plan nowhere.yml", "cannot be read"),
        ("--env CartPole-v1 -o occupied", "is neither empty nor a results folder"),
        ("--env CartPole-v1 -o occupied/file", "cannot write to occupied/file: FileExistsError"),
        ("--env CartPole-v1 -o occupied/file/below", "cannot write to occupied/file/below: NotADirectoryError"),
        ("--env CartPole-v1 --ray-address there", "--ray-address requires --backend ray"),
        ("--env CartPole-v1 --sweep gamma=0.9", "sweep.gamma=[0.9]: List should have at least 2 items"),
        ("--env CartPole-v1 --sweep gamma", "argument --sweep: 'gamma' is not of the form name=value,value"),
        ("--env CartPole-v1 --sweep gamma=[0.9,1", "argument --sweep: invalid sweep value: 'gamma=[0.9,1'"),
        ("--env CartPole-v1 --protocol ppo", "argument --protocol: invalid choice: 'ppo'"),
    ],
)
def test_invalid_input_is_reported_in_the_last_line_and_writes_nothing(tmp_path, arguments, message, capsys, monkeypatch):
    """The exit code is 2. The usage stands above an error of argparse."""
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").touch()
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main([*arguments.split(), *([] if "-o" in arguments.split() else ["-o", "results"])])
    except SystemExit as error:
        code = error.code
    assert code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert message in line
    assert not usage or usage[0].startswith("usage: ")
    assert [path.name for path in tmp_path.rglob("*")] == ["occupied", "file"]


def test_folder_of_another_plan_is_rejected_with_the_difference(completed, capsys):
    results, _ = completed
    options = "--env CartPole-v1 --algo ppo_kl ppo --seeds 2 -n 1600 --n-eval-episodes 2 -o"
    assert cli.main([*options.split(), str(results)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "hyperparameters.CartPole-v1.ppo_kl.n_timesteps: 1500 → 1600" in line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray emits many warnings of its own
def test_runs_of_a_lost_ray_node_are_repeated_on_another(completed, tmp_path, monkeypatch):
    """The statistics equal those of the loky backend."""
    from ray.cluster_utils import Cluster

    results, _ = completed
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    try:
        plan = Plan.load(results / "plan.yml")
        store = Store.create(tmp_path / "results", plan, COMMAND)
        running: set[str] = set()

        def lose_a_node(runs):
            for run, event in backends.ray(jobs=1, address=cluster.address)(runs):
                if isinstance(event, int) and event > 0 and len(running) < 2:
                    running.add(run.folder)
                    if len(running) == 2:  # one on each node
                        cluster.remove_node(other, allow_graceful=False)
                yield run, event

        cli.carry_out(store, lose_a_node)
        assert len(running) == 2
        assert store.failures() == {}
        computed, _ = statistics.compute(plan, store.results())
    finally:
        cluster.shutdown()
    assert computed == json.loads(statistics_of(results))
