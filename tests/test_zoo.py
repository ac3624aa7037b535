"""RL Baselines3 Zoo: its own commands, word for word, with `--algo ppo_kl`."""

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import rl_zoo3.utils
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule

from sb3_adaptive_kl.arguments import value_at
from sb3_adaptive_kl.zoo import complete_registry, hyperparameter_file, hyperparameters, parse_trust_region, torchrun
from sb3_adaptive_kl.zoo.launcher import SCRIPTS, main
from sb3_adaptive_kl.zoo.programs import provide_programs
from sb3_adaptive_kl.zoo.registry import COMPLETED

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "SDL_VIDEODRIVER": "dummy"}


def run(folder: Path, *arguments: str, expect: int = 0, **environment: str) -> str:
    """Run ``python arguments`` in the folder and return its output."""
    child = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True
    )
    assert child.returncode == expect, child.stdout + child.stderr
    return child.stdout + child.stderr


def saved_kl_coef(path: Path) -> float:
    with zipfile.ZipFile(path) as archive:
        return yaml.safe_load(archive.read("data"))["kl_coef"]


def test_train_enjoy_record_continue_and_plot(zoo, tmp_path):
    train = "train --algo ppo_kl --env CartPole-v1 -n 2048 --eval-freq 1024 --eval-episodes 2 -f logs"
    output = zoo(f"{train} --seed 1 --save-freq 1024")
    assert "hyperparams/ppo_kl.yml" in output
    folder = tmp_path / "logs" / "ppo_kl" / "CartPole-v1_1"
    agent = folder / "CartPole-v1.zip"
    assert (folder / "evaluations.npz").exists()
    assert len(list(folder.glob("rl_model_*_steps.zip"))) == 2

    assert "Mean reward: " in zoo("enjoy --algo ppo_kl --env CartPole-v1 -f logs --no-render -n 600")

    zoo("record_video --algo ppo_kl --env CartPole-v1 -f logs -n 50")
    assert list(folder.glob("videos/*.mp4"))

    # Training continues from the saved β, not from the init_kl_coef of the yml: a fixed β does not change
    kl_coef = saved_kl_coef(agent)
    assert kl_coef != 1.0
    zoo(f"{train} --seed 2 -i {agent} -params kl_rule:'fixed' target_kl:'lin_0.03'")
    assert saved_kl_coef(tmp_path / "logs" / "ppo_kl" / "CartPole-v1_2" / "CartPole-v1.zip") == kl_coef

    zoo("plots.plot_train -a ppo_kl -e CartPole-v1 -f logs -w 20")
    assert "|CartPole-v1 |" in zoo("plots.all_plots -a ppo_kl -e CartPole-v1 -f logs -o results")
    zoo("plots.plot_from_file -i results -o scores.svg")
    assert (tmp_path / "scores.svg").stat().st_size > 0


def test_console_command_trains_with_subproc_progress_bar_and_tensorboard(tmp_path):
    """`rl_zoo3 train` is the same as `python -m rl_zoo3.train`. Pendulum has a Box action space."""
    command = "train --algo ppo_kl --env Pendulum-v1 -n 1024 --eval-freq -1 -f logs --vec-env subproc -P -tb tensorboard"
    command = [Path(sys.executable).parent / "rl_zoo3", *command.split(), "-params", "n_envs:1", "n_steps:1024"]
    child = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "1,024" in child.stdout  # the progress bar
    assert (tmp_path / "logs" / "ppo_kl" / "Pendulum-v1_1" / "Pendulum-v1.zip").exists()
    assert list(tmp_path.glob("tensorboard/Pendulum-v1/AdaptiveKLPPO_1/events.out.tfevents.*"))


@pytest.mark.slow
def test_record_training_needs_no_python_and_ffmpeg_on_the_path(zoo, tmp_path):
    """record_training starts a child process for each checkpoint. This PATH has no suitable `python` or `ffmpeg`."""
    zoo("train --algo ppo_kl --env CartPole-v1 -n 4096 --eval-freq -1 --save-freq 2048 -f logs")
    record = "-m rl_zoo3.record_training --algo ppo_kl --env CartPole-v1 -f logs -n 20 --gif"
    run(tmp_path, *record.split(), PATH="/usr/bin:/bin")
    videos = tmp_path / "logs" / "ppo_kl" / "CartPole-v1_1" / "videos"
    for name in ("training.mp4", "training.gif"):
        assert (videos / name).stat().st_size > 1000


def test_programs_are_put_on_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "")
    provide_programs()
    assert Path(shutil.which("python")).parent == Path(sys.executable).parent
    version = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith("ffmpeg version")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-m rl_zoo3.record_training -n 5", True),
        ("-mrl_zoo3.record_training", True),
        ("-W ignore -m rl_zoo3.record_training", True),
        ("-m rl_zoo3.train --algo ppo_kl", False),
        ("-c 1", False),
    ],
)
def test_only_record_training_gets_the_programs(monkeypatch, arguments, expected):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "orig_argv", ["python", *arguments.split()])
    monkeypatch.setattr(rl_zoo3.utils, "create_test_env", rl_zoo3.utils.create_test_env)  # is restored
    monkeypatch.setattr(rl_zoo3.utils, COMPLETED, False)
    complete_registry(rl_zoo3.utils)
    assert (shutil.which("ffmpeg") is not None) == expected


def test_missing_ffmpeg_names_the_package_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(SystemExit, match="pip install imageio-ffmpeg"):
        provide_programs()


def test_recurrent_algorithm_trains_and_plays(zoo):
    zoo("train --algo ppo_kl_lstm --env CartPoleNoVel-v1 -n 512 --eval-freq -1 -f logs")
    output = zoo("enjoy --algo ppo_kl_lstm --env CartPoleNoVel-v1 -f logs --no-render -n 100")
    assert "Mean reward: " in output or "Episode Reward" in output


@pytest.mark.slow
def test_trial_of_a_search_can_be_trained(zoo, tmp_path):
    """Two processes share one Optuna journal. A trial has the penalty, not a clip range, and can be trained."""
    storage = "--storage study.log --study-name kl"
    train = "train --algo ppo_kl --env CartPole-v1 -n 300 --eval-freq -1 -f logs"
    search = f"-m rl_zoo3.{train} -optimize --n-trials 2 --n-evaluations 1 --no-optim-plots {storage}".split()
    with (tmp_path / "printed").open("w") as printed:  # both processes write here
        options = {"cwd": tmp_path, "env": ENVIRONMENT, "stdout": printed, "stderr": printed}
        searches = [subprocess.Popen([sys.executable, *search, "--seed", seed], **options) for seed in "01"]
        codes = [child.wait() for child in searches]
    assert codes == [0, 0], (tmp_path / "printed").read_text()
    finished = re.findall(r"Trial (\d) finished", (tmp_path / "printed").read_text())
    assert sorted(finished) == ["0", "1", "2", "3"]
    output = zoo(f"{train} {storage} --trial-id 1")
    assert "Loading from Optuna study" in output
    (config,) = [path.read_text() for path in tmp_path.glob("logs/ppo_kl/CartPole-v1_*/CartPole-v1/config.yml")]
    for name in ("target_kl", "init_kl_coef", "kl_rule"):
        assert f"- {name}\n" in config
    assert "- clip_range\n    - outliers\n" in config  # the entry's, not a clip range of the search


def test_launcher_names_an_unknown_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sb3-adaptive-kl zoo", "trian"])
    with pytest.raises(SystemExit, match="unknown script 'trian', did you mean 'train'"):
        main()
    monkeypatch.setattr(sys, "argv", ["sb3-adaptive-kl zoo", "--help"])
    main()
    assert "usage: " in capsys.readouterr().out


STARTS_EVERY_SCRIPT = f"""
import sys
from sb3_adaptive_kl.zoo import main
for script in {SCRIPTS}:
    sys.argv = ["zoo", script, "--help"]
    try:
        main()
    except SystemExit as error:
        print(script, "exits with", error.code)
"""


def assert_every_script_has_started(output):
    """Each parses its arguments under `__main__`, with our algorithms among the choices."""
    assert re.findall(r"^(\S+) exits with 0$", output, flags=re.MULTILINE) == list(SCRIPTS)
    assert output.count("ppo_kl,ppo_kl_lstm") >= 3  # train, enjoy and record_video list the algorithms


@pytest.mark.filterwarnings("ignore")
def test_launcher_starts_every_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])  # is restored
    exec(STARTS_EVERY_SCRIPT, {})
    assert_every_script_has_started(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["zoo"])
    with pytest.raises(SystemExit, match=r"usage: python -m sb3_adaptive_kl\.zoo SCRIPT"):
        runpy.run_module("sb3_adaptive_kl.zoo", run_name="__main__", alter_sys=True)


def test_launcher_starts_every_script_and_trains_with_the_hook_switched_off(tmp_path):
    """The zoo alone does not know the algorithm."""
    arguments = ["train", "--algo", "ppo_kl", "--env", "CartPole-v1", "-n", "2048", "--eval-freq", "-1", "-f", "logs"]
    code = f"""
import runpy
import sys
sys.argv = {arguments}
try:
    runpy.run_module("rl_zoo3.train", run_name="__main__", alter_sys=True)
except SystemExit as error:
    print("the zoo exits with", error.code)
{STARTS_EVERY_SCRIPT}
sys.argv = ["zoo", *{arguments}]
runpy.run_module("sb3_adaptive_kl.zoo", run_name="__main__", alter_sys=True)
import rl_zoo3.enjoy  # by name, from the package: imported before the registration
print("enjoy offers masks:", rl_zoo3.enjoy.create_test_env.__name__, hasattr(rl_zoo3.create_test_env, "__wrapped__"))
"""
    output = run(tmp_path, "-c", code, SB3_ADAPTIVE_KL_ZOO="0")
    assert "enjoy offers masks: create_test_env True" in output
    assert "invalid choice: 'ppo_kl'" in output
    assert "the zoo exits with 2" in output
    assert_every_script_has_started(output)
    assert "hyperparams/ppo_kl.yml" in output
    assert (tmp_path / "logs" / "ppo_kl" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


def test_hyperparameters_are_found_in_the_repository_and_in_the_wheel(tmp_path, monkeypatch):
    package = tmp_path / "sb3_adaptive_kl"
    monkeypatch.setattr(hyperparameters, "__file__", str(package / "zoo" / "hyperparameters.py"))
    assert hyperparameter_file("ppo_kl") == tmp_path / "hyperparams" / "ppo_kl.yml"
    (package / "hyperparams").mkdir(parents=True)
    assert hyperparameter_file("ppo_kl") == package / "hyperparams" / "ppo_kl.yml"


def test_an_algorithm_of_the_users_keeps_its_name_under_torchrun(monkeypatch):
    """Processes that torchrun starts train one agent each, where there is no distributed version."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="rl_zoo3.train"))
    monkeypatch.setattr(torchrun.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(rl_zoo3.utils.ALGOS, "ppo_kl", PPO)
    torchrun.join_ranks(SimpleNamespace(algo="ppo_kl", optimize_hyperparameters=True))
    assert not torchrun.dist.is_initialized()


def test_names_of_the_zoo_are_not_replaced(monkeypatch):
    from rl_zoo3 import hyperparams_opt

    monkeypatch.setattr(rl_zoo3.utils, "create_test_env", rl_zoo3.utils.create_test_env)  # is restored
    registries = rl_zoo3.utils.ALGOS, hyperparams_opt.HYPERPARAMS_SAMPLER, hyperparams_opt.HYPERPARAMS_CONVERTER
    for registry in registries:
        monkeypatch.setitem(registry, "ppo_kl", "the zoo's own")
    for module in (rl_zoo3.utils, hyperparams_opt):
        monkeypatch.setattr(module, COMPLETED, False)
        complete_registry(module)
    assert {registry["ppo_kl"] for registry in registries} == {"the zoo's own"}


def test_search_space_replaces_the_clip_range_by_the_penalty():
    """The search space is PPO's with the penalty in place of the clip range. The algorithm gets the suggested values."""
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    ask = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask
    hosts = {"ppo_kl": "ppo", "ppo_kl_lstm": "ppo_lstm", "ppo_kl_mask": "ppo", "ppo_kl_mask_lstm": "ppo_lstm"}
    for algo, host in hosts.items():
        trial, theirs = ask(), ask()
        sampled = HYPERPARAMS_SAMPLER[algo](trial, n_actions=2, n_envs=1, additional_args={})
        HYPERPARAMS_SAMPLER[host](theirs, n_actions=2, n_envs=1, additional_args={})
        ours = trial.distributions
        penalty = {"target_kl", "init_kl_coef", "kl_rule"}
        assert ours.keys() == theirs.distributions.keys() - {"clip_range"} | penalty
        assert ours["target_kl"] == optuna.distributions.FloatDistribution(0.003, 0.1, log=True)
        converted = HYPERPARAMS_CONVERTER[algo](trial.params)
        assert {name: converted[name] for name in penalty} == {name: sampled[name] for name in penalty}
        assert "clip_range" not in sampled
        assert converted.keys() == sampled.keys()


def test_strings_of_the_trust_region_are_parsed():
    assert parse_trust_region({"ent_coef": "lin_0.01", "vf_coef": 0.5})["ent_coef"](0.5) == pytest.approx(0.005)
    schedule = parse_trust_region({"target_kl": "lin_0.03"})["target_kl"]
    assert isinstance(schedule, LinearSchedule)  # of SB3: a saved agent does not need the zoo
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([0.03, 0.015, 0.0])
    assert parse_trust_region({"target_kl": "clip_0.2"})["target_kl"] == pytest.approx(0.02)
    schedule = parse_trust_region({"target_kl": "clip_lin_0.2"})["target_kl"]
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([0.02, 0.005, 0.0])
    for name in ("clip_range", "clip_range_vf"):
        assert parse_trust_region({name: "lin_0.2"})[name](0.5) == pytest.approx(0.1)
        assert parse_trust_region({name: "2e-1"})[name] == 0.2  # a string in yml 1.1
    for text in ("lin_1e-1", "1e-1"):
        reference = parse_trust_region({"reference_policy": {"policy": "a.zip", "kl_coef": text}})["reference_policy"]
        assert reference == {"policy": "a.zip", "kl_coef": reference["kl_coef"]}
        assert value_at("kl_coef", reference["kl_coef"], 1.0) == pytest.approx(0.1)
    unchanged = {"target_kl": 0.03, "clip_range": "outliers", "clip_range_vf": None, "learning_rate": "lin_0.1"}
    assert parse_trust_region(unchanged) == unchanged


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "target_kl",
            "lin_abc lin_0.02_0.01 lin_0 lin_-1 lin_nan clip_ clip_0 clip_lin_ lin_clip_0.2 Clip_0.2",
            "write lin_0.02",
        ),
        ("clip_range", "lin_0 clip_0.2", "must be a positive number, lin_0.2, outliers, or null"),
        ("clip_range_vf", "lin_0 clip_0.2 outliers", "must be a positive number or lin_0.2"),
    ],
)
def test_other_strings_of_the_trust_region_are_named(name, values, message):
    for value in values.split():
        with pytest.raises(ValueError, match=f"{name}='{value}':? {message}"):
            parse_trust_region({name: value})


def experiment_manager(algo: str):
    from rl_zoo3.exp_manager import ExperimentManager  # not at module level, since it registers environments

    return ExperimentManager(argparse.Namespace(), algo, "CartPole-v1", "logs")


@pytest.mark.parametrize("clip_range", ["outliers", None])
def test_zoo_accepts_our_clip_ranges_beside_its_own_schedules(clip_range):
    manager = experiment_manager("ppo_kl")
    processed = manager._preprocess_schedules({"clip_range": clip_range, "target_kl": "clip_0.2", "learning_rate": "lin_0.1"})
    assert processed["clip_range"] == clip_range
    assert processed["target_kl"] == pytest.approx(0.02)
    assert processed["learning_rate"](0.5) == pytest.approx(0.05)


def test_other_algorithms_have_the_zoos_hyperparameters_and_errors():
    """PPO cannot train with our clip ranges: the zoo must go on rejecting them."""
    manager = experiment_manager("ppo")
    assert Path(manager.config).is_relative_to(Path(rl_zoo3.utils.__file__).parent)
    with pytest.raises(ValueError, match="Invalid value for clip_range: None"):
        manager._preprocess_schedules({"clip_range": None})
    with pytest.raises(ValueError, match="not enough values to unpack"):
        manager._preprocess_schedules({"clip_range": "outliers"})
    assert manager._preprocess_schedules({"target_kl": "lin_0.03"}) == {"target_kl": "lin_0.03"}


def test_registration_twice_is_registration_once(monkeypatch):
    """The launcher registers, too, where the start-up hook has done so: ranks would join twice, and masks be wrapped twice."""
    from rl_zoo3 import exp_manager

    joined = []
    monkeypatch.setattr(hyperparameters, "join_ranks", joined.append)
    create_test_env = rl_zoo3.utils.create_test_env
    for module in (exp_manager, rl_zoo3.utils):
        complete_registry(module)
    manager = experiment_manager("ppo_kl")
    assert joined == [manager]
    assert (
        vars(exp_manager)[COMPLETED] is exp_manager.__spec__
    )  # a module that is reloaded has another, and is registered again
    assert rl_zoo3.utils.create_test_env is create_test_env


def test_missing_conf_file_is_an_error(zoo):
    """The packaged hyperparameters do not stand in for a file that the user named."""
    with pytest.raises(FileNotFoundError, match=r"missing\.yml"):
        zoo("train --algo ppo_kl --env CartPole-v1 -n 64 -f logs --conf-file missing.yml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "n_timesteps", "least"),
    [
        ("CartPole-v1", 5000, 500.0),
        ("LunarLander-v3", 8000, 230.0),
        ("LunarLanderContinuous-v3", 6000, 230.0),
        ("Pendulum-v1", 6000, -200.0),
        ("Swimmer-v5", 5000, 250.0),
    ],
)
def test_trained_agent_reaches_its_return(zoo, env, n_timesteps, least):
    """The shipped agents reach the returns of docs/results.md, here over fewer episodes."""
    output = zoo(f"enjoy --algo ppo_kl --env {env} -f {REPOSITORY}/trained_agents --no-render -n {n_timesteps}")
    n, mean = map(float, re.search(r"(\d+) Episodes\s+Mean reward: (-?[\d.]+)", output).groups())
    assert mean >= least
    page = (REPOSITORY / "docs" / "results.md").read_text().replace("−", "-")
    row = re.search(rf"^\| {env} \| [\d,]+ \| [^|]+ \| (-?[\d.]+) ± ([\d.]+) ", page, flags=re.MULTILINE)
    published, deviation = map(float, row.groups())
    assert mean == pytest.approx(published, abs=3 * deviation / n**0.5 + 0.01)
