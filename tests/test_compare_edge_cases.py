"""Reports of comparisons with little data: one update, seed, arm or episode, failed runs. A warning fails these tests."""

import io
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from sb3_adaptive_kl.compare import backends, intervals, plots, report
from sb3_adaptive_kl.compare.execute import Recorder, execute
from sb3_adaptive_kl.compare.plan import Plan, Run
from sb3_adaptive_kl.compare.store import Store
from tests.compare_results import COMMAND, PLAN, finished

ENV = "CartPole-v1"
FAILURE = "ValueError: Invalid learning rate: -1\n\nTraceback\nValueError: Invalid learning rate: -1"


@dataclass
class Summary:
    """Exit code, report and figure of a summarized comparison."""

    exit_code: int
    report: str
    stderr: str
    runs_csv: str
    curves: Figure | None
    figures: list[Figure]

    @property
    def notes(self):
        return [text.get_text() for axes in self.curves.axes for text in axes.texts]

    @property
    def legend(self):
        return [text.get_text() for text in self.curves.legends[0].get_texts()]


@pytest.fixture
def summarize(tmp_path, capsys, monkeypatch):
    """Function that stores an outcome for every run and writes statistics, plots and reports."""
    render, figures = plots._render, []

    def collect(figure, format):
        figures.append(figure)
        is_light = mpl.rcParams["figure.facecolor"] == "#ffffff"
        return render(figure, format) if format == "svg" and is_light else b""  # layout warns in both styles alike

    monkeypatch.setattr(plots, "_render", collect)
    monkeypatch.setattr(intervals, "SAMPLES", 200)

    def summarize(outcome, arms=("ppo_kl", "ppo"), seeds=1, environments=(ENV,), **fields):
        lists = {"environments": list(environments), "arms": list(arms)}
        plan = Plan.create({**lists, "seeds": seeds, "n_timesteps": 256, "n_eval_episodes": 1, **fields})
        store = Store.create(tmp_path / f"results-{len(environments)}", plan, COMMAND)
        for run in plan.runs():
            store.keep(run, outcome(run))
        exit_code = report.summarize(store)
        text, runs_csv = ((store.folder / name).read_text() for name in ("report.md", "runs.csv"))
        assert (store.folder / "report.html").is_file()
        return Summary(exit_code, text, capsys.readouterr().err, runs_csv, figures[0] if figures else None, figures)

    return summarize


def test_one_update_that_changes_the_policy_is_drawn(summarize):
    summary = summarize(finished)
    assert summary.exit_code == 0
    assert "| ppo_kl | 1 | 0.0200 | 0.0200 | 0.0200 | 0.00 | 0 % | 100 % | 2.00 | – | – |" in summary.report
    assert [line.get_marker() for line in summary.curves.axes[1].lines[:2]] == [".", "."]
    assert summary.notes == []


def test_one_update_that_changes_nothing_is_reported(summarize):
    """A linear schedule that ends at zero makes the only update one with learning rate 0."""
    summary = summarize(lambda run: finished(run, updates=[(256, 0.0)]))
    assert summary.exit_code == 0
    assert "| ppo_kl | 1 | 0.00 | 0.00 | 0.00 | – | 0 % | 0 % | 0.00 | – | – |" in summary.report
    assert summary.notes == ["no update changed the policy"]


def test_constant_coefficient_is_drawn(summarize):
    """As of kl_rule="fixed", or of a rule that never has a reason to move."""
    summary = summarize(lambda run: finished(run, updates=[(128, 0.0), (256, 0.0)]))
    assert summary.exit_code == 0
    assert summary.notes == ["no update changed the policy"]
    assert list(summary.curves.axes[2].lines[0].get_ydata()) == [1.0, 1.0]


def test_arm_whose_updates_change_nothing_stays_in_the_legend(summarize):
    summary = summarize(lambda run: finished(run, updates=[(256, 0.02 if run.arm == "ppo" else 0.0)]))
    assert summary.legend == ["ppo_kl", "ppo"]
    assert summary.notes == []


def test_coefficient_of_zero_is_drawn_as_empty_panel(summarize):
    """A logarithmic axis cannot show β = 0."""

    def outcome(run):
        files = finished(run)
        return {**files, "updates.csv": files["updates.csv"].replace(b",1.0,0.01", b",0.0,0.01")}

    assert summarize(outcome, arms=["ppo_kl"]).notes == ["β is 0"]


def test_infinite_kl_is_left_out(summarize):
    """JSON does not have infinity."""
    summary = summarize(lambda run: finished(run, updates=[(128, 0.02), (192, 0.02), (256, float("inf"))]))
    assert summary.exit_code == 0
    assert "| ppo_kl | 3 | 0.0200 | – | – | – | 0 % | 100 % | – | – | – |" in summary.report
    assert "inf" not in summary.runs_csv
    assert summary.notes == []


def test_runs_without_update_rows_are_reported(summarize):
    summary = summarize(lambda run: finished(run, updates=()))
    assert summary.exit_code == 0
    assert "| ppo | not measured: no update, or not an on-policy algorithm |" in summary.report
    assert len(summary.curves.axes) == 1


def test_run_without_update_rows_does_not_disturb_other_seeds(summarize):
    summary = summarize(lambda run: finished(run, updates=[(256, 0.02)] if run.seed else ()), seeds=2)
    assert "| ppo_kl | 1 | 0.0200 |" in summary.report
    assert summary.notes == []


def test_off_policy_arm_is_reported_as_not_measured(summarize):
    def files(run):
        measured = finished(run)
        return {name: content for name, content in measured.items() if (run.algo, name) != ("dqn", "updates.csv")}

    summary = summarize(files, arms=["ppo", "dqn"])  # older versions wrote no updates.csv for it
    assert "| dqn | not measured: no update, or not an on-policy algorithm |" in summary.report
    assert summary.legend == ["ppo", "dqn"]


def test_runs_without_a_finished_training_episode_are_reported(summarize):
    summary = summarize(lambda run: finished(run, episodes=()), seeds=2)
    assert summary.exit_code == 0
    assert "while learning: not compared: no seed has a recorded training episode in both arms." in summary.report
    assert summary.notes == ["no learning curve: not every run recorded a training episode"]
    assert summary.legend == ["ppo_kl", "ppo"]


def test_one_seed_does_not_have_intervals(summarize):
    summary = summarize(lambda run: finished(run, final=30.0 if run.arm == "ppo" else 20.0))
    assert "final policy: no difference is shown (ppo_kl − ppo = −10.0, 1 seed)." in summary.report
    for text in (summary.report, summary.stderr):
        assert "1 seed: with fewer than 5, intervals say little, and no arm is called better" in text


def test_report_says_what_the_number_of_seeds_can_show(summarize):
    summary = summarize(lambda run: finished(run, final=20.0 + run.seed % 2 * (run.arm == "ppo")), seeds=5)
    assert "(ppo_kl − ppo = −0.400 [−0.800, 0.00], Student's t [−1.08, 0.280], p = 0.356, 5 seeds)." in summary.report
    assert "With 5 seeds, a single comparison shows a difference of 1.68 standard deviations" in summary.report
    assert "with a probability of 80 %, and the first of 2 comparisons one of 2.05." in summary.report
    summary = summarize(finished, seeds=5, environments=(ENV, "Acrobot-v1"))
    assert "with a probability of 80 %, and the first of 4 comparisons one of 2.48." in summary.report
    summary = summarize(finished, seeds=4, environments=(ENV, "Acrobot-v1", "Pendulum-v1"))
    assert "With fewer than five seeds, no arm is called better." in summary.report


def test_one_episode_is_counted_in_the_singular(summarize):
    assert "scored over\n1 episode, " in summarize(finished).report


def test_arms_are_named_as_they_are_in_html(summarize, tmp_path):
    summarize(finished, arms=["a<b=ppo", "ppo_kl"])
    assert "a&lt;b − ppo_kl = " in next(tmp_path.glob("*/report.html")).read_text()


def test_one_arm_has_nothing_to_compare(summarize):
    summary = summarize(finished, arms=["ppo_kl"], seeds=2)
    assert summary.exit_code == 0
    assert "Fewer than two arms have finished runs, so there is nothing to compare." in summary.report
    assert "There is only one arm." in summary.report
    assert "paired by seed" not in summary.report


def test_threshold_that_does_not_exist_is_not_counted(summarize):
    """Without gymnasium's threshold and an arm that beats random there is nothing to reach."""
    summary = summarize(lambda run: finished(run, final=5.0, threshold=None))
    assert "| ppo | 1 | 5.00 | 5.00 | 5.00 | 20.0 | – | – |" in summary.report
    assert "- **CartPole-v1**: no arm is shown to beat a random policy, which gets 10.0" in summary.report


def test_wall_clock_time_is_reported_and_drawn(summarize):
    """Each run takes 1 second for 256 steps. One of three seeds never reaches the threshold."""

    def outcome(run):
        return finished(
            run, episodes=[(128 if run.seed else 32, 100.0 if run.seed < 2 or run.arm == "ppo" else 0.0)], threshold=90.0
        )

    summary = summarize(outcome, seeds=3)
    assert "| CartPole-v1 | ppo_kl | 1.00 | 256 | 0.500 |" in summary.report
    assert "(plots/clock-CartPole-v1.png)" in summary.report
    (axes,) = summary.figures[2].axes  # every figure is rendered as svg and as png
    assert axes.lines[0].get_xdata()[-1] == pytest.approx(1.0)
    summary = summarize(lambda run: finished(run, episodes=()), environments=(ENV, "Acrobot-v1"))
    assert "| CartPole-v1 | ppo_kl | 1.00 | 256 | – |" in summary.report
    assert "clock-" not in summary.report


def test_across_environments_is_reported_for_several_of_them(summarize, tmp_path):
    summary = summarize(finished, seeds=2)
    assert "## Across environments" not in summary.report
    assert "no arm is shown to beat" not in summary.report
    summary = summarize(finished, seeds=2, environments=(ENV, "Acrobot-v1"))
    assert "## Across environments" in summary.report
    for name in ("aggregates", "probability_of_improvement", "performance_profile"):
        assert f"(plots/{name}.png)" in summary.report
        for ending in (".png", ".svg", "-dark.png", "-dark.svg"):
            assert (tmp_path / "results-2" / "plots" / f"{name}{ending}").is_file(), name + ending


def test_scores_of_the_papers_protocol_are_reported(summarize):
    summary = summarize(lambda run: finished(run, episodes=[(100, 20.0 + run.seed)]), seeds=2, protocol="ppo-paper")
    assert "| ppo | 2 | 0.955 [0.909, 1.00] | 1.00 [0.952, 1.05] |" in summary.report
    assert "Environments: CartPole-v1." in summary.report
    summary = summarize(finished, environments=(ENV, "Acrobot-v1"))
    assert "Scores as in the paper" not in summary.report


def test_sweep_is_reported_and_drawn(summarize):
    """One arm, and at one of its values no finished run: nothing is compared."""

    def outcome(run):
        rate = run.hyperparameters["learning_rate"]
        return FAILURE if rate == 1e-2 else finished(run, final=11.0 + 1e4 * rate + run.seed / 10)

    summary = summarize(outcome, arms=["ppo"], seeds=2, sweep={"learning_rate": [1e-2, 1e-3, 1e-4]})
    assert summary.report.startswith("# ppo\n")
    assert "- each with learning_rate = 0.01, 0.001, 0.0001" in summary.report
    assert "Fewer than two arms have finished runs with the same value" in summary.report
    assert "## Sensitivity to learning_rate" in summary.report
    assert "| ppo | 0.001 | 1.00 [0.995, 1.00] | – | 0.001 |" in summary.report
    assert "(plots/sweep-CartPole-v1.png)" in summary.report
    final, learning = summary.figures[-1].axes
    assert final.get_xscale() == "log"
    assert list(final.lines[0].get_xdata()) == [1e-4, 1e-3]
    assert list(final.lines[0].get_ydata()) == pytest.approx([12.05, 21.05])
    assert list(learning.lines[0].get_ydata()) == [20.0, 20.0]


def test_sweep_without_intervals_or_training_episodes_is_drawn(summarize):
    summary = summarize(lambda run: finished(run, final=5.0, episodes=()), sweep={"n_epochs": [0, 1]})
    assert "Not computed: no arm is shown to beat a random policy." in summary.report
    final, learning = summary.figures[-1].axes
    assert final.get_xscale() == "linear"  # 0 is not on a logarithmic axis
    assert len(final.lines) == 4
    assert not learning.lines


def test_values_in_the_zoos_notation_are_explained(summarize):
    report = summarize(finished).report
    assert "| target_kl | clip_lin_0.245 | None |" in report
    assert "lin_0.2 decays linearly from 0.2 to 0" in report
    assert "clip_lin_0.2 the same for a clip range that decays" in report


def test_arm_whose_runs_all_failed_is_left_out(summarize):
    summary = summarize(lambda run: FAILURE if run.arm == "ppo" else finished(run), seeds=2)
    assert summary.exit_code == 1
    assert "- **failed: ppo CartPole-v1 seed 1**: `ValueError: Invalid learning rate: -1`" in summary.report
    assert "Fewer than two arms have finished runs" in summary.report
    assert summary.legend == ["ppo_kl"]
    assert "Traceback" not in summary.stderr


def test_arms_that_finished_different_seeds_are_not_compared(summarize):
    summary = summarize(lambda run: FAILURE if (run.arm == "ppo") == (run.seed == 0) else finished(run), seeds=2)
    assert summary.exit_code == 1
    assert "final policy: not compared: no seed has a finished run in both arms." in summary.report


def test_report_of_failed_runs_only(summarize):
    summary = summarize(lambda run: FAILURE, seeds=2)
    assert summary.exit_code == 1
    assert "No run has finished." in summary.report
    assert "## Final returns" not in summary.report
    assert "steps/s" not in summary.report
    assert summary.curves is None
    assert "failed: ppo_kl CartPole-v1 seed 0: ValueError: Invalid learning rate: -1" in summary.stderr
    assert "Traceback" not in summary.stderr


def test_long_names_are_wrapped_and_short_ones_are_explained(summarize):
    """A legend or a label that leaves no room for the panels makes matplotlib warn, which fails this test."""
    long = (
        "ppo_kl:target_kl=clip,kl_rule=predictive,kl_ceiling=1.5,clip_range=outliers,kl_coef_bounds=[0.3,32],kl_stop_factor=4"
    )
    summary = summarize(
        lambda run: finished(run), arms=(long, "held=ppo_kl:kl_ceiling=1.5", "ppo"), seeds=2, environments=(ENV, "Acrobot-v1")
    )
    assert [name.replace("\n", "") for name in summary.legend] == [long, "held", "ppo"]
    assert max(len(line) for name in summary.legend for line in name.split("\n")) <= plots.LEGEND_WIDTH
    assert "- `held=ppo_kl:kl_ceiling=1.5`" in summary.report
    assert "| held > ppo | final policy | 0.500" in summary.report


def test_budget_below_one_rollout_is_not_evaluated_at_every_step():
    hyperparameters = {"policy": "MlpPolicy", "n_steps": 1200, "batch_size": 100, "n_epochs": 1, "n_timesteps": 20}
    run = Run("CartPole-v1", "ppo_kl", "ppo_kl", 0, hyperparameters, 1, (), "runs/ppo_kl")
    reported = []
    files = execute(run, reported.append)
    assert reported[-1] == 1200  # the driver says that it is evaluating
    evaluations = np.load(io.BytesIO(files["evaluations.npz"]))
    assert evaluations["timesteps"].tolist() == [500, 1000]


def test_episodes_have_raw_returns_where_rewards_are_normalized():
    """CartPole pays 1 a step, so a raw return is the length of its episode."""
    hyperparameters = {"policy": "MlpPolicy", "n_steps": 256, "n_epochs": 1, "n_timesteps": 256, "normalize": True}
    files = execute(Run("CartPole-v1", "ppo", "ppo", 0, hyperparameters, 1, (), "runs/ppo"))
    _, *episodes = files["episodes.csv"].decode().split()
    assert len(episodes) > 2
    for episode in episodes:
        _, value, length = map(float, episode.split(","))
        assert value == length


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_run_with_an_infinite_return_fails_at_once(value):
    """A report cannot hold it."""
    recorder = Recorder(lambda timesteps: None)
    recorder.locals["infos"] = [{"episode": {"r": value, "l": 3}}]
    with pytest.raises(ValueError, match=rf"return is {value}: only finite rewards"):
        recorder._on_step()


@pytest.mark.parametrize(("value", "text"), [(999.4, "999"), (999.6, "1,000"), (20.0, "20.0"), (-0.5, "−0.500"), (None, "–")])
def test_numbers_have_three_digits_or_all_of_an_integer_part(value, text):
    assert report.number(value) == text


def test_an_algorithm_that_tells_callbacks_of_no_episodes_is_compared(monkeypatch):
    """sb3-contrib's ARS."""
    monkeypatch.setattr(backends.signal, "signal", lambda *_: None)  # this process goes on
    (run,) = Plan.create({**PLAN, "arms": ["ars"], "seeds": 1}).runs()
    told = []
    outcome = backends.attempt(run, told.append)
    assert told[0] == 0  # where it begins: one that does not get out of its first reset() is named, too
    assert not isinstance(outcome, str), outcome
    assert outcome["episodes.csv"] == b"timesteps,return,length\n"
