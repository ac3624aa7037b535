"""What all tests share: one torch thread per process, and the algorithm on every kind of space and policy."""

import functools
import importlib
import json
import runpy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.envs import (
    FakeImageEnv,
    IdentityEnv,
    IdentityEnvMultiBinary,
    IdentityEnvMultiDiscrete,
    SimpleMultiObsEnv,
)
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_adaptive_kl import step
from sb3_adaptive_kl.arguments import settings_at
from sb3_adaptive_kl.objective import MinibatchMetrics
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from tests.ranks import Ranks

# For tests of compile=True; with an older torch it warns and does not compile
NEEDS_COMPILER = pytest.mark.skipif(th.__version__ < (2, 13), reason="compile=True needs torch 2.13")
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="torch finds no GPU (CUDA)"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    th.set_num_threads(1)


@functools.wraps(th.compile)
def traced(function: Callable[..., Any], *, options: Mapping[str, Any], _compile: Any = th.compile, **kwargs: Any) -> Any:
    """``th.compile`` without Inductor: the function is traced and guarded, and what was traced runs as it is."""
    return _compile(function, backend="eager", options={"guard_filter_fn": options["guard_filter_fn"]}, **kwargs)


@pytest.fixture(params=["traced", pytest.param("compiled", marks=pytest.mark.slow)])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    For tests of what ``compile=True`` does around the compiled code, which takes 20 seconds of compiling for each function and
    each size of minibatch: only the slow tests generate it.
    """
    if request.param == "traced":
        monkeypatch.setattr(th, "compile", traced)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    processes = Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.stop()


class Case(NamedTuple):
    """A policy and an environment to run the algorithm on."""

    policy: str
    make_env: Callable[[], gym.Env]
    kwargs: Mapping[str, Any] = MappingProxyType({})

    def build(self, algorithm: type[OnPolicyAlgorithm], **kwargs: Any) -> Any:
        return algorithm(self.policy, self.make_env(), **{"seed": 0, "device": "cpu", **self.kwargs, **kwargs})


def pendulum() -> gym.Env:
    return gym.make("Pendulum-v1")


def image(**kwargs: Any) -> gym.Env:
    env = FakeImageEnv(screen_height=36, screen_width=36, **kwargs)
    env.observation_space.seed(0)  # SB3 seeds only the action space, and this environment shows samples
    return env


def multi_input() -> gym.Env:
    np.random.seed(0)  # this environment draws its images when it is created
    return SimpleMultiObsEnv(random_start=False)


def squashed() -> dict[str, Any]:
    return {"use_sde": True, "policy_kwargs": {"squash_output": True}}


CASES = {
    "box": Case("MlpPolicy", pendulum),
    "gsde": Case("MlpPolicy", pendulum, {"use_sde": True, "sde_sample_freq": 4}),
    "gsde-expln": Case("MlpPolicy", pendulum, {"use_sde": True, "policy_kwargs": {"use_expln": True, "full_std": False}}),
    "gsde-squashed": Case("MlpPolicy", pendulum, squashed()),
    "discrete": Case("MlpPolicy", lambda: IdentityEnv(4)),
    "multidiscrete": Case("MlpPolicy", lambda: IdentityEnvMultiDiscrete(3)),
    "multibinary": Case("MlpPolicy", lambda: IdentityEnvMultiBinary(3)),
    "cnn": Case("CnnPolicy", lambda: image(action_dim=3)),
    "cnn-continuous": Case("CnnPolicy", lambda: image(discrete=False)),
    "dict": Case("MultiInputPolicy", multi_input),
    "separate-extractors": Case(
        "CnnPolicy",
        lambda: image(action_dim=3),
        {"policy_kwargs": {"share_features_extractor": False}},
    ),
}
# The families of action distributions, on small networks
FAMILIES = {name: CASES[name] for name in ("box", "gsde", "gsde-squashed", "discrete", "multidiscrete", "multibinary")}


def collect(model: OnPolicyAlgorithm, callback: MaybeCallback = None) -> Any:
    """The model with one rollout collected, and not yet trained on it."""
    model.train = lambda: None  # type: ignore[method-assign]
    model.learn(model.n_steps * model.n_envs, callback)
    del model.train
    return model


def remember(model: Any) -> OldPolicy:
    """The model's policy as it is now, remembered on the rollout it has collected."""
    return OldPolicy(model.policy, model.rollout_buffer, model.kl_divergence)


def minibatch_loss(
    model: Any, old_policy: OldPolicy, rollout_data: Any, index: th.Tensor, **changes: Any
) -> tuple[th.Tensor, MinibatchMetrics]:
    """The loss of one minibatch and its parts, under the model's settings with some of them changed."""
    settings = settings_at(model, model._current_progress_remaining)._replace(**changes)
    loss, metrics = step.minibatch_loss(model.policy, old_policy, rollout_data, index, settings)
    return loss, MinibatchMetrics(*metrics)


def parameters(model: OnPolicyAlgorithm) -> th.Tensor:
    """All parameters in one vector, a copy."""
    return th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])


def logged(model: OnPolicyAlgorithm) -> dict[str, float]:
    """What the last update wrote to the logger, without the prefix."""
    values = model.logger.name_to_value.items()
    return {key.removeprefix("train/"): value for key, value in values if key.startswith("train/")}


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], str]]:
    """
    Run a command of the zoo as ``python -m rl_zoo3.…`` would, in ``tmp_path``, and return what it prints. It runs in this
    process: another would import everything for longer than most of these tests take.
    """
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.chdir(tmp_path)

    def zoo(command: str) -> str:
        script, *arguments = command.split()
        monkeypatch.setattr("sys.argv", [script, *arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_module(f"rl_zoo3.{script}", run_name="__main__", alter_sys=True)
        return "".join(capsys.readouterr())

    yield zoo
    pyplot.close("all")


# ---------------------------------------------------------------- compare


@pytest.fixture
def fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_adaptive_kl.compare import intervals

    monkeypatch.setattr(intervals, "SAMPLES", 1000)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    """Write a finished run to disk: final returns, episodes as (time step, return), updates as (kl, target[, step scale])."""
    from sb3_adaptive_kl.compare.plan import Run  # they import the zoo
    from sb3_adaptive_kl.compare.ruler import Ruler
    from sb3_adaptive_kl.compare.store import Result

    def make(
        final=(0.0,), episodes=((100, 1.0),), updates=(), budget=1000, threshold=None, random=(0.0,), env="E", arm="a", seed=0
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "episodes.csv").write_text("timesteps,return,length\n" + "".join(f"{t},{r},1\n" for t, r in episodes))
        rows = "".join(
            f"{i},{kl},{kl},{'' if target is None else 1.0},{target or ''},{''.join(map(str, scale))},3e-4\n"
            for i, (kl, target, *scale) in enumerate(updates)
        )
        (folder / "updates.csv").write_text(f"{','.join(Ruler.COLUMNS)}\n{rows}")
        run = Run(env, arm, "ppo_kl", seed, {"n_timesteps": budget}, 1, (), "")
        summary = {
            **asdict(run),
            "final_returns": list(final),
            "random_returns": list(random),
            "reward_threshold": threshold,
            "timesteps": budget,
            "seconds": 1.0,
            "machine": "here",
        }
        (folder / "run.json").write_text(json.dumps(summary))
        return Result.read(run, folder)

    return make
