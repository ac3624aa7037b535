"""Several processes train one policy, as one process would with all of their environments."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from rl_zoo3.callbacks import RawStatisticsCallback, SaveVecNormalizeCallback
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecNormalize

import sb3_adaptive_kl
from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.arguments import settings_at
from sb3_adaptive_kl.distributed.callbacks import callbacks_of_this_rank
from sb3_adaptive_kl.distributed.synchronization import RanksDisagree, pooled
from sb3_adaptive_kl.execution import Execution
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.step import Update
from tests.ranks import Ranks

N_STEPS = 32
ARGUMENTS = {"n_steps": N_STEPS, "n_epochs": 4, "learning_rate": 0.001, "target_kl": 0.01, "seed": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    processes = Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.stop()


def filled(n_envs: int, first_env: int, **arguments: Any) -> AdaptiveKLPPO:
    """A model whose rollout holds the transitions of some environments of a fixed data set."""
    model = AdaptiveKLPPO("MlpPolicy", make_vec_env("Pendulum-v1", n_envs), **{**ARGUMENTS, **arguments})
    model._setup_learn(10_000)
    random = np.random.default_rng(0)
    buffer = model.rollout_buffer
    buffer.reset()
    observations = random.normal(size=(N_STEPS, 4, 3)).astype(np.float32)
    actions = random.normal(size=(N_STEPS, 4, 1)).astype(np.float32)
    advantages = random.normal(1.0, 3.0, size=(N_STEPS, 4)).astype(np.float32)
    envs = slice(first_env, first_env + n_envs)
    for step in range(N_STEPS):
        seen, taken = th.as_tensor(observations[step, envs]), th.as_tensor(actions[step, envs])
        with th.no_grad():
            values, log_prob, _ = model.policy.evaluate_actions(seen, taken)
        buffer.add(observations[step, envs], actions[step, envs], np.zeros(n_envs), np.zeros(n_envs), values, log_prob)
    buffer.advantages[:] = advantages[:, envs]
    buffer.returns[:] = buffer.advantages + buffer.values
    return model


def trained(n_envs: int, arguments: dict[str, Any]) -> tuple[dict[str, th.Tensor], float, dict[str, float]]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = filled(n_envs, n_envs * rank, batch_size=N_STEPS * n_envs, **arguments)
    logged: dict[str, float] = {}
    for _ in range(2):
        model.train()
        logged = {key: value for key, value in model.logger.name_to_value.items() if key != "time/compilation"}
    return model.policy.state_dict(), model.kl_coef, logged


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"kl_rule": "predictive", "clip_range": "outliers", "target_kl": 1e-4},
        {"kl_rule": "fixed", "init_kl_coef": 0.05, "kl_ceiling": 1.0, "target_kl": 1e-6},
        {"kl_cutoff_coef": 1000.0, "kl_cutoff_factor": 0.1, "target_kl": 1e-4},
        {"kl_stop_factor": 1.0, "normalize_advantage": False, "target_kl": 1e-4},
        {"kl_divergence": "k3", "learning_rate_rule": "adaptive"},
        {"compile": True, "kl_cutoff_coef": 1000.0, "kl_cutoff_factor": 0.1, "target_kl": 1e-4},
    ],
    ids=str,
)
def test_two_ranks_equal_one_process(ranks: Ranks, arguments: dict[str, Any]) -> None:
    parameters, kl_coef, logged = trained(4, arguments)
    if "kl_ceiling" in arguments:
        assert logged["train/step_scale"] < 1
    for theirs, their_kl_coef, their_log in ranks.run(trained, 2, arguments):
        assert theirs.keys() == parameters.keys()
        for name in parameters:
            assert th.allclose(theirs[name], parameters[name], rtol=0, atol=1e-6), name
        assert their_kl_coef == pytest.approx(kl_coef, rel=1e-4)
        assert their_log == pytest.approx(logged, rel=1e-3, abs=1e-6)


def stepped(ends: list[int]) -> tuple[list[float], dict[str, th.Tensor], float]:
    """Take one step on a part of the transitions: those up to this rank's end that are not the previous rank's."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = filled(4, 0, normalize_advantage=False, ent_coef=0.1, policy_kwargs={"optimizer_class": th.optim.SGD})
    old_policy = OldPolicy(model.policy, model.rollout_buffer, model._host)
    index = th.arange(*([0, *ends][rank : rank + 2]))
    update = Update(model.policy, model._host, old_policy, model._execution.optimizer_step(model.policy))
    settings = settings_at(model, 1.0)
    result = model._execution.take_step(update, model.rollout_buffer._get_samples(index.numpy()), index, settings)
    return result.metrics.tolist(), model.policy.state_dict(), result.grad_norm.item()


def test_every_transition_counts_the_same_on_whatever_rank(ranks: Ranks) -> None:
    metrics, parameters, grad_norm = stepped([100])
    for their_metrics, theirs, their_grad_norm in ranks.run(stepped, [10, 100]):
        assert their_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        assert their_grad_norm == pytest.approx(grad_norm, rel=1e-4)
        for name in parameters:
            assert th.allclose(theirs[name], parameters[name], rtol=0, atol=1e-6), name


def learned(
    algorithm: str = "AdaptiveKLPPO", callback: Any = None, normalize: bool = False, **arguments: Any
) -> dict[str, Any]:
    """Train on this rank, and tell what it is left with."""
    policy, env = ("MlpLstmPolicy" if "Recurrent" in algorithm else "MlpPolicy"), make_vec_env(make_env, 2)
    if normalize:
        env = VecNormalize(env)
    settings = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 5, "device": "cpu", "verbose": 1}
    model = getattr(sb3_adaptive_kl, algorithm)(policy, env, **settings)
    model.learn(512, callback=callback() if callable(callback) else callback)
    return outcome(model)


def outcome(model: AdaptiveKLPPO) -> dict[str, Any]:
    normalized = model.get_vec_normalize_env()
    return {
        "parameters": th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()]),
        "optimizer": model.policy.optimizer.state_dict()["state"][0]["exp_avg"],
        "kl_coef": model.kl_coef,
        "num_timesteps": model.num_timesteps,
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
        "undone": model._undone_updates,
        "observations": model.rollout_buffer.observations,
        "statistics": None if normalized is None else vars(normalized.obs_rms),
        "seeds": [env.unwrapped.np_random_seed for env in model.get_env().unwrapped.envs],
        "logs": model.logger.output_formats != [],
    }


def make_env() -> gym.Env:
    return Masked(gym.make("CartPole-v1"))


class Masked(gym.Wrapper):
    """Allows all actions, for MaskablePPO."""

    def action_masks(self) -> np.ndarray:
        return np.ones(2, dtype=bool)


def check_same_model(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert th.equal(first["parameters"], second["parameters"])
    assert th.equal(first["optimizer"], second["optimizer"])
    for name in ("kl_coef", "num_timesteps", "episodes", "undone"):
        assert repr(first[name]) == repr(second[name]), name  # NaN is not equal to itself


@pytest.mark.parametrize("algorithm", ["AdaptiveKLPPO", "MaskableAdaptiveKLPPO", "RecurrentAdaptiveKLPPO"])
def test_all_ranks_hold_the_same_model(ranks: Ranks, algorithm: str) -> None:
    first, second = ranks.run(learned, algorithm)
    check_same_model(first, second)
    assert first["num_timesteps"] == 512
    assert len(first["episodes"]) > 0
    # Each rank collects its own transitions, from environments of its own; one of them logs
    assert not np.array_equal(first["observations"], second["observations"])
    assert (first["seeds"], second["seeds"]) == ([5, 6], [7, 8])
    assert (first["logs"], second["logs"]) == (True, False)


def test_statistics_of_vec_normalize_are_pooled(ranks: Ranks) -> None:
    first, second = (one["statistics"] for one in ranks.run(learned, "AdaptiveKLPPO", None, True))
    assert first["count"] == second["count"] == pytest.approx(512 + 2 * 2, abs=1e-3)  # and what reset() returned
    np.testing.assert_array_equal(first["mean"], second["mean"])
    np.testing.assert_array_equal(first["var"], second["var"])


def test_pooled_statistics_are_those_of_all_the_data() -> None:
    data = np.random.default_rng(0).normal(1e4, 3.0, size=(4, 100, 2))
    before, alone = RunningMeanStd(shape=(2,)), RunningMeanStd(shape=(2,))
    before.update(data[0])
    after = [before.copy() for _ in range(3)]
    for one, its_data in zip(after, data[1:], strict=True):
        one.update(its_data)
    alone.update(data.reshape(-1, 2))
    result = pooled(before, after)
    assert result.count == pytest.approx(alone.count)
    np.testing.assert_allclose(result.mean, alone.mean, rtol=1e-12)
    np.testing.assert_allclose(result.var, alone.var, rtol=1e-6)


class ListOfUser(CallbackList):
    """Has a class of its own, and perhaps a behavior of its own."""


def test_callbacks_that_write_files_run_on_rank_0_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoints, mine = CheckpointCallback(10, str(tmp_path)), StopTrainingOnMaxEpisodes(5)
    nested = EveryNTimesteps(10, CheckpointCallback(1, str(tmp_path)))
    harmless = EveryNTimesteps(10, StopTrainingOnMaxEpisodes(5))
    of_zoo = [SaveVecNormalizeCallback(1, str(tmp_path)), RawStatisticsCallback()]
    in_list = ListOfUser([mine, EvalCallback(make_env())])
    callback = [checkpoints, in_list, nested, harmless, *of_zoo]
    first = callbacks_of_this_rank(callback, progress_bar=True).callbacks[1:]
    assert first[:-1] == callback
    assert isinstance(first[-1], ProgressBarCallback)
    monkeypatch.setattr("sb3_adaptive_kl.distributed.callbacks.rank", lambda: 1)
    reduced, *rest = callbacks_of_this_rank(callback, progress_bar=True).callbacks[1:]
    assert type(reduced) is ListOfUser
    assert reduced.callbacks == [mine]
    assert rest == [harmless]
    assert len(in_list.callbacks) == 2  # that of the user has not changed


def learned_with_one_normalized() -> None:
    env = make_vec_env("CartPole-v1", 1)
    model = AdaptiveKLPPO("MlpPolicy", VecNormalize(env) if dist.get_rank() == 0 else env, n_steps=64, device="cpu")
    model.learn(128)


def test_ranks_must_agree_on_normalization(ranks: Ranks) -> None:
    for error in ranks.run(learned_with_one_normalized):
        assert isinstance(error, RanksDisagree)
        assert "the use of VecNormalize is True on rank 0, but False on rank 1" in str(error)


class StopsOnOneRank(BaseCallback):
    """Stops rank 1 in the middle of its second rollout."""

    def _on_step(self) -> bool:
        return not (dist.get_rank() == 1 and self.n_calls == 80)


def test_a_callback_that_stops_one_rank_stops_all(ranks: Ranks) -> None:
    first, second = ranks.run(learned, "AdaptiveKLPPO", StopsOnOneRank)
    check_same_model(first, second)
    assert first["num_timesteps"] == 2 * 2 * 2 * 64


class ChangesOneRank(BaseCallback):
    """Sets an attribute of the model on rank 1 only."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        self.name, self.value = name, value

    def _on_rollout_end(self) -> None:
        if dist.get_rank() == 1:
            setattr(self.model, self.name, self.value)

    def _on_step(self) -> bool:
        return True


class MovesOneRank(BaseCallback):
    """Changes the last bits of a parameter on rank 1 only."""

    def _on_rollout_start(self) -> None:
        if dist.get_rank() == 1:
            with th.no_grad():
                next(self.model.policy.parameters()).mul_(1 + 1e-6)

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (ChangesOneRank("n_epochs", 3), "n_epochs is 2 on rank 0, but 3 on rank 1"),
        (ChangesOneRank("target_kl", 0.5), "target_kl is 0.01 on rank 0, but 0.5 on rank 1"),
        (MovesOneRank(), "the checksum of the parameters is "),
    ],
)
def test_ranks_that_disagree_all_say_where(ranks: Ranks, callback: BaseCallback, message: str) -> None:
    for error in ranks.run(learned, "AdaptiveKLPPO", callback):
        assert isinstance(error, RanksDisagree)
        assert message in str(error)


def learned_for_different_times() -> None:
    AdaptiveKLPPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(128 + 128 * dist.get_rank())


def test_ranks_must_train_for_the_same_time(ranks: Ranks) -> None:
    for error in ranks.run(learned_for_different_times):
        assert isinstance(error, RanksDisagree)
        assert "total_timesteps is 128 on rank 0, but 256 on rank 1" in str(error)


class OneRewardIsNaN(gym.Wrapper):
    """Gives one NaN as a reward, on rank 1 only."""

    n_calls = 0

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        self.n_calls += 1
        return observation, math.nan if dist.get_rank() == 1 and self.n_calls == 20 else reward, *rest


def learned_from_nan(without_fast: bool) -> dict[str, Any]:
    model = AdaptiveKLPPO("MlpPolicy", OneRewardIsNaN(make_env()), n_steps=64, batch_size=32, n_epochs=2, device="cpu")
    if without_fast:
        model._execution = Execution()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The update at 128 timesteps produced a non-finite")
        model.learn(256)
    return outcome(model)


@pytest.mark.parametrize("without_fast", [False, True])
def test_nan_on_one_rank_undoes_the_update_on_all(ranks: Ranks, without_fast: bool) -> None:
    first, second = ranks.run(learned_from_nan, without_fast)
    check_same_model(first, second)
    assert first["undone"] == 1
    assert first["parameters"].isfinite().all()


class FailsOnOneRank(ActorCriticPolicy):
    """Cannot be evaluated on rank 1, in the second minibatch of the first update, as if its distributions were invalid."""

    n_calls = 0

    def evaluate_actions(self, *args: Any) -> Any:
        self.n_calls += 1
        # In a step, and in the sweep that then asks about the policy
        if dist.get_rank() == 1 and self.n_calls in (3, 4):
            raise ValueError("invalid distribution")
        return super().evaluate_actions(*args)


def learned_with_failing_policy() -> dict[str, Any]:
    model = AdaptiveKLPPO(FailsOnOneRank, make_env(), n_steps=64, batch_size=32, n_epochs=2, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The update at 128 timesteps produced a non-finite")
        model.learn(256)
    return outcome(model)


def test_a_policy_that_diverged_on_one_rank_undoes_the_update_on_all(ranks: Ranks) -> None:
    first, second = ranks.run(learned_with_failing_policy)
    check_same_model(first, second)
    assert first["undone"] == 1


class Normalized(FlattenExtractor):
    """A feature extractor with a batch normalization, whose running statistics are buffers."""

    def __init__(self, observation_space: gym.spaces.Space) -> None:
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(super().forward(observations))


def learned_with_batch_norm() -> tuple[dict[str, Any], th.Tensor]:
    sizes = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "kl_ceiling": 1.0}
    model = AdaptiveKLPPO(
        "MlpPolicy", make_env(), policy_kwargs={"features_extractor_class": Normalized}, device="cpu", **sizes
    )
    model.learn(512)
    return outcome(model), model.policy.features_extractor.norm.running_mean


def test_running_statistics_of_the_policy_are_the_same_on_all_ranks(ranks: Ranks) -> None:
    (first, mean), (second, their_mean) = ranks.run(learned_with_batch_norm)
    check_same_model(first, second)
    assert th.equal(mean, their_mean)
    assert (mean != 0).all()


def resumed(path: str) -> dict[str, Any]:
    model = AdaptiveKLPPO.load(path, make_vec_env(make_env, 2), device="cpu")
    model.learn(256, reset_num_timesteps=False)
    return outcome(model)


def saved(path: str) -> None:
    model = AdaptiveKLPPO("MlpPolicy", make_vec_env(make_env, 2), n_steps=64, batch_size=32, n_epochs=2, device="cpu")
    model.learn(256, callback=CheckpointCallback(64, path, name_prefix="all"))
    model.save(f"{path}/end")


def test_checkpoints_are_ordinary_ones(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(saved, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all_256_steps.zip", "end.zip"]
    assert resumed(str(tmp_path / "end"))["num_timesteps"] == 512
    assert PPO.load(tmp_path / "end", device="cpu", custom_objects={"clip_range": 0.2}).num_timesteps == 256
    first, second = ranks.run(resumed, str(tmp_path / "all_256_steps.zip"))
    check_same_model(first, second)
    assert first["num_timesteps"] == 512


def learned_with_model_older_than_group() -> dict[str, Any]:
    """The model is made as if there was no group, with one seed for all ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        model = AdaptiveKLPPO("MlpPolicy", make_vec_env(make_env, 2), n_steps=64, batch_size=32, seed=5, device="cpu")
    model.learn(256)
    return outcome(model)


def test_a_model_older_than_the_group_gets_the_seeds_of_its_rank(ranks: Ranks) -> None:
    first, second = ranks.run(learned_with_model_older_than_group)
    check_same_model(first, second)
    assert not np.array_equal(first["observations"], second["observations"])
