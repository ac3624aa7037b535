"""Several processes train one policy, as one process would with all of their environments."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env

import sb3_adaptive_kl
from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.arguments import settings_at
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.step import Update
from tests.conftest import NEEDS_COMPILER
from tests.ranks import Ranks, check_same_model, learned, make_env, outcome

N_STEPS, N_ENVS = 32, 4
POLICIES = {"RecurrentAdaptiveKLPPO": "MlpLstmPolicy"}


def model_of(algorithm: str, n_envs: int, **arguments: Any) -> AdaptiveKLPPO:
    sizes = {"n_steps": N_STEPS, "batch_size": N_STEPS * n_envs, "n_epochs": 4, "seed": 0, "device": "cpu"}
    env = "Pendulum-v1" if algorithm == "AdaptiveKLPPO" else make_env
    constructor = getattr(sb3_adaptive_kl, algorithm)
    policy = POLICIES.get(algorithm, "MlpPolicy")
    model = constructor(policy, make_vec_env(env, n_envs), **{**sizes, "learning_rate": 0.001, **arguments})
    model._setup_learn(10_000)
    return model


def rollout_of(algorithm: str) -> dict[str, np.ndarray]:
    """Collect a rollout with one process, and give it advantages for which normalization matters."""
    model = model_of(algorithm, N_ENVS)
    _, callback = model._setup_learn(10_000)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    random = np.random.default_rng(0)
    model.rollout_buffer.advantages = random.normal(1.0, 3.0, size=(N_STEPS, N_ENVS)).astype(np.float32)
    arrays = {name: value for name, value in vars(model.rollout_buffer).items() if isinstance(value, np.ndarray)}
    return arrays | {"returns": arrays["values"] + model.rollout_buffer.advantages}


def with_rollout(model: AdaptiveKLPPO, rollout: dict[str, np.ndarray], first_env: int) -> AdaptiveKLPPO:
    """Give a model the part of a rollout that its environments would have collected."""
    buffer = model.rollout_buffer
    for name, value in rollout.items():
        envs = range(first_env, first_env + buffer.n_envs)
        setattr(buffer, name, np.take(value, envs, axis=value.shape.index(N_ENVS)))
    buffer.full, buffer.generator_ready = True, False
    return model


def trained(algorithm: str, rollout: dict[str, np.ndarray], n_envs: int, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Make two full-batch updates with this rank's part of a rollout."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    logged: dict[str, float] = {}
    model = with_rollout(model_of(algorithm, n_envs, **arguments), rollout, n_envs * rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "randint", lambda _: 0)  # where contrib's buffers cut a sequence in two
        for _ in range(2):
            model.train()
            logged = {key: value for key, value in model.logger.name_to_value.items() if key != "time/compilation"}
    return model.policy.state_dict(), model.kl_coef, logged


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        ("AdaptiveKLPPO", {}),
        ("AdaptiveKLPPO", {"kl_rule": "predictive", "clip_range": "outliers", "target_kl": 1e-4}),
        ("AdaptiveKLPPO", {"kl_rule": "fixed", "init_kl_coef": 0.05, "kl_ceiling": 1.0, "target_kl": 1e-6}),
        ("AdaptiveKLPPO", {"kl_cutoff_coef": 1000.0, "kl_cutoff_factor": 0.1, "target_kl": 1e-4}),
        ("AdaptiveKLPPO", {"kl_stop_factor": 1.0, "normalize_advantage": False, "target_kl": 1e-4}),
        ("AdaptiveKLPPO", {"kl_divergence": "k3", "learning_rate_rule": "adaptive"}),
        pytest.param(
            "AdaptiveKLPPO",
            {"compile": True, "kl_cutoff_coef": 1000.0, "kl_cutoff_factor": 0.1, "target_kl": 1e-4},
            marks=NEEDS_COMPILER,
        ),
        ("MaskableAdaptiveKLPPO", {"ent_coef": 0.01}),
        ("RecurrentAdaptiveKLPPO", {"kl_rule": "predictive", "kl_ceiling": 1.5}),
    ],
    ids=str,
)
def test_two_ranks_equal_one_process(ranks: Ranks, algorithm: str, arguments: dict[str, Any]) -> None:
    rollout = rollout_of(algorithm)
    parameters, kl_coef, logged = trained(algorithm, rollout, N_ENVS, arguments)
    if arguments.get("kl_ceiling") == 1.0:
        assert logged["train/step_scale"] < 1
    for theirs, their_kl_coef, their_log in ranks.run(trained, algorithm, rollout, N_ENVS // 2, arguments):
        assert theirs.keys() == parameters.keys()
        for name in parameters:
            assert th.allclose(theirs[name], parameters[name], rtol=0, atol=1e-6), name
        assert their_kl_coef == pytest.approx(kl_coef, rel=1e-4)
        assert their_log == pytest.approx(logged, rel=1e-3, abs=1e-6)


def stepped(rollout: dict[str, np.ndarray], ends: list[int]) -> tuple[list[float], dict[str, th.Tensor], float]:
    """Take one step on a part of the transitions: those up to this rank's end that are not the previous rank's."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    arguments = {"normalize_advantage": False, "ent_coef": 0.1, "policy_kwargs": {"optimizer_class": th.optim.SGD}}
    model = with_rollout(model_of("AdaptiveKLPPO", N_ENVS, **arguments), rollout, 0)
    old_policy = OldPolicy(model.policy, model.rollout_buffer, model._adapter)
    index = th.arange(*([0, *ends][rank : rank + 2]))
    update = Update(model.policy, model._adapter, old_policy, model._execution.optimizer_step(model.policy))
    settings = settings_at(model, 1.0)
    result = model._execution.take_step(update, model.rollout_buffer._get_samples(index.numpy()), index, settings)
    return result.metrics.tolist(), model.policy.state_dict(), result.grad_norm.item()


def test_transitions_are_weighted_equally_across_ranks(ranks: Ranks) -> None:
    rollout = rollout_of("AdaptiveKLPPO")
    metrics, parameters, grad_norm = stepped(rollout, [100])
    for their_metrics, theirs, their_grad_norm in ranks.run(stepped, rollout, [10, 100]):
        assert their_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        assert their_grad_norm == pytest.approx(grad_norm, rel=1e-4)
        for name in parameters:
            assert th.allclose(theirs[name], parameters[name], rtol=0, atol=1e-6), name


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


def learned_compiled_on_one_rank() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._dynamo.config.disable", dist.get_rank() == 1)
        return learned(compile=True)


@NEEDS_COMPILER
def test_ranks_stay_the_same_where_only_one_can_compile(ranks: Ranks) -> None:
    first, second = ranks.run(learned_compiled_on_one_rank)
    check_same_model(first, second)


def learned_twice() -> dict[str, Any]:
    """Train, freeze the actor, and train again, with a progress bar."""
    model = AdaptiveKLPPO(
        "MlpPolicy", make_vec_env(make_env, 2), n_steps=64, batch_size=32, kl_cutoff_coef=1000.0, device="cpu"
    )
    model.learn(256)
    model.policy.mlp_extractor.policy_net.requires_grad_(False)
    model.policy.action_net.requires_grad_(False)
    model.learn(256, reset_num_timesteps=False, progress_bar=True)
    return outcome(model)


def test_learn_goes_on_with_a_frozen_actor(ranks: Ranks) -> None:
    first, second = ranks.run(learned_twice)
    check_same_model(first, second)
    assert (first["num_timesteps"], first["undone"]) == (512, 0)


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
    saved(str(tmp_path / "alone"))
    for checkpoint in (tmp_path / "all_256_steps.zip", tmp_path / "alone" / "end.zip"):
        first, second = ranks.run(resumed, str(checkpoint))
        check_same_model(first, second)
        assert first["num_timesteps"] == 512
