"""RL Baselines3 Zoo: its own commands, word for word, as child processes, with `--algo ppo_kl`."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import optuna
import pytest
import rl_zoo3.utils
import yaml

from sb3_adaptive_kl.zoo import HOSTS, complete_registry, provide_programs

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "SDL_VIDEODRIVER": "dummy"}


def run(folder: Path, *arguments: str, expect: int = 0, **environment: str) -> str:
    """Run ``python arguments`` in the folder, and return what it printed."""
    child = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True
    )
    assert child.returncode == expect, child.stdout + child.stderr
    return child.stdout + child.stderr


def zoo(folder: Path, command: str, **kwargs) -> str:
    return run(folder, "-m", *f"rl_zoo3.{command}".split(), **kwargs)


def saved_kl_coef(path: Path) -> float:
    with zipfile.ZipFile(path) as archive:
        return yaml.safe_load(archive.read("data"))["kl_coef"]


def test_train_enjoy_record_continue_and_plot(tmp_path):
    train = "train --algo ppo_kl --env CartPole-v1 -n 6144 --eval-freq 2048 --eval-episodes 2 -f logs"
    output = zoo(tmp_path, f"{train} --seed 1 --save-freq 2048")
    assert "hyperparams/ppo_kl.yml" in output
    folder = tmp_path / "logs" / "ppo_kl" / "CartPole-v1_1"
    agent = folder / "CartPole-v1.zip"
    assert (folder / "evaluations.npz").exists()
    assert len(list(folder.glob("rl_model_*_steps.zip"))) == 3

    assert "Mean reward: " in zoo(tmp_path, "enjoy --algo ppo_kl --env CartPole-v1 -f logs --no-render -n 600")

    zoo(tmp_path, "record_video --algo ppo_kl --env CartPole-v1 -f logs -n 50")
    assert list(folder.glob("videos/*.mp4"))

    # Continued with a fixed β: it is the one that was saved, not the init_kl_coef of the yml
    kl_coef = saved_kl_coef(agent)
    assert kl_coef != 1.0
    zoo(tmp_path, f"{train} --seed 2 -i {agent} -params kl_rule:'fixed' target_kl:'lin_0.03'")
    assert saved_kl_coef(tmp_path / "logs" / "ppo_kl" / "CartPole-v1_2" / "CartPole-v1.zip") == kl_coef

    zoo(tmp_path, "plots.plot_train -a ppo_kl -e CartPole-v1 -f logs")
    assert "|CartPole-v1 |" in zoo(tmp_path, "plots.all_plots -a ppo_kl -e CartPole-v1 -f logs -o results")
    zoo(tmp_path, "plots.plot_from_file -i results -o scores.svg")
    assert (tmp_path / "scores.svg").stat().st_size > 0


def test_the_zoos_console_command(tmp_path):
    """`rl_zoo3 train` is `python -m rl_zoo3.train`, here on a Box action space, in processes, with a bar and tensorboard."""
    command = [Path(sys.executable).parent / "rl_zoo3", "train", "--algo", "ppo_kl", "--env", "Pendulum-v1", "-n", "4096"]
    options = ["--eval-freq", "-1", "-f", "logs", "--vec-env", "subproc", "-P", "-tb", "tensorboard"]
    child = subprocess.run([*command, *options], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "4,096" in child.stdout  # the bar
    assert (tmp_path / "logs" / "ppo_kl" / "Pendulum-v1_1" / "Pendulum-v1.zip").exists()
    assert list(tmp_path.glob("tensorboard/Pendulum-v1/AdaptiveKLPPO_1/events.out.tfevents.*"))


@pytest.mark.slow
def test_record_training_with_the_ffmpeg_and_python_that_are_there(tmp_path):
    """A child process for each checkpoint. The PATH has neither a `python` nor an `ffmpeg` that would do."""
    zoo(tmp_path, "train --algo ppo_kl --env CartPole-v1 -n 4096 --eval-freq -1 --save-freq 2048 -f logs")
    record = "record_training --algo ppo_kl --env CartPole-v1 -f logs -n 20 --gif"
    zoo(tmp_path, record, PATH="/usr/bin:/bin")
    videos = tmp_path / "logs" / "ppo_kl" / "CartPole-v1_1" / "videos"
    for name in ("training.mp4", "training.gif"):
        assert (videos / name).stat().st_size > 1000


def test_record_training_finds_its_programs_or_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    provide_programs()
    assert Path(shutil.which("python")).parent == Path(sys.executable).parent
    version = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith("ffmpeg version")

    for arguments, yes in {"-m rl_zoo3.record_training -n 5": True, "-mrl_zoo3.record_training": True, "-c 1": False}.items():
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr(sys, "orig_argv", ["python", *arguments.split()])
        complete_registry(rl_zoo3.utils)
        assert (shutil.which("ffmpeg") is not None) == yes

    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(SystemExit, match="pip install imageio-ffmpeg"):
        provide_programs()


def test_recurrent(tmp_path):
    zoo(tmp_path, "train --algo ppo_kl_lstm --env CartPoleNoVel-v1 -n 512 --eval-freq -1 -f logs")
    output = zoo(tmp_path, "enjoy --algo ppo_kl_lstm --env CartPoleNoVel-v1 -f logs --no-render -n 100")
    assert "Mean reward: " in output or "Episode Reward" in output


def test_search_and_replay_of_a_trial(tmp_path):
    """The search space has the penalty in the place of the clip range, and its trials can be trained from the storage."""
    storage = "--storage study.log --study-name kl"
    train = "train --algo ppo_kl --env CartPole-v1 -n 300 --eval-freq -1 -f logs"
    search = f"-m rl_zoo3.{train} -optimize --n-trials 2 --n-evaluations 1 --no-optim-plots {storage}".split()
    with (tmp_path / "printed").open("w") as printed:  # by both, which share the journal
        options = {"cwd": tmp_path, "env": ENVIRONMENT, "stdout": printed, "stderr": printed}
        searches = [subprocess.Popen([sys.executable, *search, "--seed", seed], **options) for seed in "01"]
        codes = [child.wait() for child in searches]
    assert codes == [0, 0], (tmp_path / "printed").read_text()
    finished = re.findall(r"Trial (\d) finished", (tmp_path / "printed").read_text())
    assert sorted(finished) == ["0", "1", "2", "3"]
    output = zoo(tmp_path, f"{train} {storage} --trial-id 1")
    assert "Loading from Optuna study" in output
    (config,) = [path.read_text() for path in tmp_path.glob("logs/ppo_kl/CartPole-v1_*/CartPole-v1/config.yml")]
    for name in ("target_kl", "init_kl_coef", "kl_factor", "kl_rule"):
        assert f"- {name}\n" in config
    assert "clip_range" not in config


def test_hook_can_be_switched_off_and_the_launcher_does_without(tmp_path):
    off = {"SB3_ADAPTIVE_KL_ZOO": "0"}
    arguments = "train --algo ppo_kl --env CartPole-v1 -n 2048 --eval-freq -1 -f logs"
    assert "invalid choice: 'ppo_kl'" in zoo(tmp_path, arguments, expect=2, **off)
    output = run(tmp_path, "-m", "sb3_adaptive_kl.zoo", *arguments.split(), **off)
    assert "hyperparams/ppo_kl.yml" in output
    assert (tmp_path / "logs" / "ppo_kl" / "CartPole-v1_1" / "CartPole-v1.zip").exists()
    assert "usage: python -m sb3_adaptive_kl.zoo SCRIPT" in run(tmp_path, "-m", "sb3_adaptive_kl.zoo", expect=1)


def test_hook_costs_next_to_nothing(tmp_path):
    """At interpreter start it is imported in under 1 ms, and nothing else is. The best of three: the machine is shared."""
    times = []
    for _ in range(3):
        lines = run(tmp_path, "-X", "importtime", "-c", "pass").splitlines()
        assert not [line for line in lines if line.rsplit("|")[-1].strip() in ("sb3_adaptive_kl", "torch", "typing")]
        (hook,) = [line for line in lines if line.endswith("sb3_adaptive_kl_zoo_hook")]
        times.append(int(hook.split("|")[1]))
    assert min(times) < 1000  # microseconds, with what it imports


def test_a_broken_installation_leaves_the_zoo_working(tmp_path):
    code = "import sys; sys.modules['sb3_adaptive_kl'] = None; import rl_zoo3; print(sorted(rl_zoo3.ALGOS))"
    output = run(tmp_path, "-W", "always::UserWarning", "-c", code)
    assert output.count("could not register with rl-zoo3") == 1
    assert "'ppo'" in output
    assert "ppo_kl" not in output.splitlines()[-1]


def test_a_name_of_the_zoos_own_is_left_to_it(tmp_path):
    code = """
import rl_zoo3.utils as utils, rl_zoo3.hyperparams_opt as search
from sb3_adaptive_kl.zoo import complete_registry
registries = utils.ALGOS, search.HYPERPARAMS_SAMPLER, search.HYPERPARAMS_CONVERTER
for registry in registries:
    registry["ppo_kl"] = "the zoo's own"
complete_registry(utils)
complete_registry(search)
print({registry["ppo_kl"] for registry in registries})
"""
    assert """{"the zoo's own"}""" in run(tmp_path, "-c", code)


def test_search_space():
    """PPO's, with the penalty in the place of the clip range. What a trial suggests is what the algorithm is given."""
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    ask = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask
    for algo, host in HOSTS.items():
        trial, theirs = ask(), ask()
        sampled = HYPERPARAMS_SAMPLER[algo](trial, n_actions=2, n_envs=1, additional_args={})
        HYPERPARAMS_SAMPLER[host](theirs, n_actions=2, n_envs=1, additional_args={})
        ours = trial.distributions
        penalty = {"target_kl", "init_kl_coef", "kl_factor", "kl_rule"}
        assert ours.keys() == theirs.distributions.keys() - {"clip_range"} | penalty
        assert ours["target_kl"] == optuna.distributions.FloatDistribution(0.003, 0.1, log=True)
        converted = HYPERPARAMS_CONVERTER[algo](trial.params)
        assert {name: converted[name] for name in penalty} == {name: sampled[name] for name in penalty}
        assert "clip_range" not in sampled
        assert converted.keys() == sampled.keys()


def test_linear_targets():
    from rl_zoo3.exp_manager import ExperimentManager

    preprocess = ExperimentManager._preprocess_schedules
    schedule = preprocess({"target_kl": "lin_0.03"})["target_kl"]
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([0.03, 0.015, 0.0])
    assert preprocess({"target_kl": 0.03}) == {"target_kl": 0.03}
    for wrong in ("lin_abc", "lin_0.02_0.01", "lin_0", "lin_-1", "lin_nan"):
        with pytest.raises(ValueError, match=f"target_kl='{wrong}': a linear schedule is written lin_0.02"):
            preprocess({"target_kl": wrong})


def test_a_missing_file_of_the_users_is_not_replaced_by_ours(tmp_path):
    output = zoo(tmp_path, "train --algo ppo_kl --env CartPole-v1 -n 64 -f logs --conf-file missing.yml", expect=1)
    assert "missing.yml" in output.splitlines()[-1]


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
def test_trained_agent(env, n_timesteps, least):
    """The agents that come along do what docs/results.md says, but for fewer episodes."""
    output = zoo(REPOSITORY, f"enjoy --algo ppo_kl --env {env} -f trained_agents --no-render -n {n_timesteps}")
    mean = float(re.search(r"Mean reward: (-?[\d.]+)", output)[1])
    assert mean >= least
    assert re.search(rf"^\| {env} \| \d", (REPOSITORY / "docs" / "results.md").read_text(), flags=re.MULTILINE)
