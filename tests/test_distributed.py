"""Several processes train one policy, as one process would with all of their environments."""

from functools import partial
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
from sb3_adaptive_kl import AdaptiveKLPPO, distributed
from sb3_adaptive_kl.arguments import settings_at
from sb3_adaptive_kl.distributed import DistributedAdaptiveKLPPO
from sb3_adaptive_kl.distributed.gradients import gradients_of_all_ranks
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.step import compute_gradients
from tests.conftest import NEEDS_COMPILER, logged, traced
from tests.ranks import SMALL, Ranks, check_same_model, learned, make_env, outcome
from tests.test_users_networks import Fourier

N_STEPS, N_ENVS = 32, 4


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def model_of(algorithm: str, n_envs: int, **arguments: Any) -> AdaptiveKLPPO:
    """The algorithm, distributed on a rank and plain in a process by itself."""
    sizes = {"n_steps": N_STEPS, "batch_size": N_STEPS * n_envs, "n_epochs": 4, "seed": 0, "device": "cpu"}
    env = "Pendulum-v1" if algorithm == "AdaptiveKLPPO" else make_env
    constructor = (
        getattr(distributed, f"Distributed{algorithm}") if dist.is_initialized() else getattr(sb3_adaptive_kl, algorithm)
    )
    policy = "MlpLstmPolicy" if algorithm == "RecurrentAdaptiveKLPPO" else "MlpPolicy"
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
    """Make two full-batch updates with this rank's part of a rollout. Only rank 1 can compile."""
    model = with_rollout(model_of(algorithm, n_envs, **arguments), rollout, n_envs * rank())
    with pytest.MonkeyPatch.context() as patch, th._dynamo.config.patch(disable=rank() == 0):
        patch.setattr(np.random, "randint", lambda _: 0)  # where contrib's buffers cut a sequence in two
        patch.setattr(th, "compile", traced)
        for _ in range(2):
            model.train()
    assert ("time/compilation" in model.logger.name_to_value) == (model.compile and rank() == 1)
    return model.policy.state_dict(), model.kl_coef, logged(model)


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        ("AdaptiveKLPPO", {"kl_rule": "predictive", "clip_range": "outliers", "target_kl": 1e-4}),
        ("AdaptiveKLPPO", {"kl_rule": "predictive", "learning_rate_rule": "balanced", "target_kl": 1e-4}),
        ("AdaptiveKLPPO", {"kl_rule": "fixed", "init_kl_coef": 0.05, "kl_ceiling": 1.0, "target_kl": 1e-6}),
        ("AdaptiveKLPPO", {"kl_stop_factor": 1.0, "normalize_advantage": False, "target_kl": 1e-4}),
        ("AdaptiveKLPPO", {"kl_divergence": "k3", "learning_rate_rule": "adaptive", "kl_rule": "fixed"}),
        pytest.param("AdaptiveKLPPO", {"compile": True, "kl_rule": "predictive", "target_kl": 1e-4}, marks=NEEDS_COMPILER),
        ("AdaptiveKLPPO", {"policy_kwargs": {"features_extractor_class": Fourier}, "target_kl": 1e-4}),  # complex weights
        ("MaskableAdaptiveKLPPO", {"ent_coef": 0.01}),
        ("RecurrentAdaptiveKLPPO", {"kl_rule": "predictive", "kl_ceiling": 1.5}),
    ],
    ids=str,
)
def test_two_ranks_equal_one_process(ranks: Ranks, algorithm: str, arguments: dict[str, Any]) -> None:
    rollout = rollout_of(algorithm)
    parameters, kl_coef, log = trained(algorithm, rollout, N_ENVS, {**arguments, "compile": False})
    if arguments.get("kl_ceiling") == 1.0:
        assert log["step_scale"] < 1
    of_ranks = ranks.run(trained, algorithm, rollout, N_ENVS // 2, arguments)
    for theirs, their_kl_coef, their_log in of_ranks:
        assert theirs.keys() == parameters.keys()
        for name in parameters:
            assert th.allclose(theirs[name], parameters[name], rtol=0, atol=1e-6), name
        assert their_kl_coef == pytest.approx(kl_coef, rel=1e-4)
        assert their_log == pytest.approx(log, rel=1e-3, abs=1e-6)
        for name, of_rank_0 in of_ranks[0][0].items():
            assert th.equal(theirs[name], of_rank_0), name


def gradients(rollout: dict[str, np.ndarray], ends: list[int]) -> tuple[list[float], list[th.Tensor], float]:
    """Compute the gradients of a part of the transitions: those up to this rank's end that are not the previous rank's."""
    model = with_rollout(model_of("AdaptiveKLPPO", N_ENVS, normalize_advantage=False, ent_coef=0.1), rollout, 0)
    old_policy = OldPolicy(model.policy, model.rollout_buffer)
    compute = partial(compute_gradients, model.policy, old_policy)
    if dist.is_initialized():
        compute = gradients_of_all_ranks(compute, old_policy)
    index = th.arange(*([0, *ends][rank() : rank() + 2]))
    metrics, norm = compute(model.rollout_buffer._get_samples(index.numpy()), index, settings_at(model, 1.0))
    return metrics.tolist(), [parameter.grad for parameter in model.policy.parameters()], norm.item()


def test_transitions_are_weighted_equally_across_ranks(ranks: Ranks) -> None:
    rollout = rollout_of("AdaptiveKLPPO")
    metrics, of_all, norm = gradients(rollout, [100])
    for their_metrics, theirs, their_norm in ranks.run(gradients, rollout, [10, 100]):
        assert their_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        assert their_norm == pytest.approx(norm, rel=1e-4)
        th.testing.assert_close(theirs, of_all, rtol=1e-4, atol=1e-6)


ALGORITHMS = ["AdaptiveKLPPO", "MaskableAdaptiveKLPPO", "RecurrentAdaptiveKLPPO", "MaskableRecurrentAdaptiveKLPPO"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_ranks_hold_the_same_model(ranks: Ranks, algorithm: str) -> None:
    first, second = ranks.run(learned, f"Distributed{algorithm}")
    check_same_model(first, second)
    assert first["num_timesteps"] == 512
    assert len(first["episodes"]) > 0
    # Each rank collects its own transitions, from environments of its own; one of them logs
    assert not np.array_equal(first["observations"], second["observations"])
    assert (first["seeds"], second["seeds"]) == ([5, 6], [7, 8])
    assert (first["logs"], second["logs"]) == (True, False)


def learned_twice() -> dict[str, Any]:
    """Train, freeze the actor, and train again, with a progress bar."""
    model = DistributedAdaptiveKLPPO("MlpPolicy", make_vec_env(make_env, 2), **SMALL)
    model.learn(256)
    model.policy.mlp_extractor.policy_net.requires_grad_(False)
    model.policy.action_net.requires_grad_(False)
    frozen = model.policy.action_net.weight.clone()
    model.learn(256, reset_num_timesteps=False, progress_bar=True)
    assert th.equal(model.policy.action_net.weight, frozen)
    return outcome(model)


def test_learn_goes_on_with_a_frozen_actor(ranks: Ranks) -> None:
    first, second = ranks.run(learned_twice)
    check_same_model(first, second)
    assert (first["num_timesteps"], first["undone"]) == (512, 0)


def learned_with_a_parameter_of_the_optimizer() -> tuple[dict[str, Any], float]:
    """It is not in the policy, and begins with another value on each rank."""
    model = DistributedAdaptiveKLPPO("MlpPolicy", make_vec_env(make_env, 2), **SMALL)
    scale = th.nn.Parameter(th.ones(1) + dist.get_rank())
    model.policy.optimizer.add_param_group({"params": [scale]})
    model.policy.action_net.register_forward_hook(lambda module, args, output: output * scale)
    return outcome(model.learn(256)), scale.item()


def test_parameters_of_the_optimizer_alone_are_the_same_on_all_ranks(ranks: Ranks) -> None:
    (first, scale), (second, of_rank_1) = ranks.run(learned_with_a_parameter_of_the_optimizer)
    check_same_model(first, second)
    assert scale == of_rank_1
    assert 0 < abs(scale - 1) < 0.5  # trained, from rank 0's


def plain(seed: int, path: Path) -> AdaptiveKLPPO:
    model = AdaptiveKLPPO("MlpPolicy", make_vec_env(make_env, 2), seed=seed, **SMALL).learn(256)
    model.save(path / f"{seed}")
    return model


def plain_on_rank(path: Path) -> dict[str, Any]:
    return outcome(plain(dist.get_rank(), path))


def test_plain_algorithms_ignore_the_group(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    for seed, result in enumerate(ranks.run(plain_on_rank, tmp_path)):
        alone = outcome(plain(seed, tmp_path / "alone"))
        check_same_model(result, alone)
        assert np.array_equal(result["observations"], alone["observations"])
        assert (result["logs"], result["num_timesteps"]) == (alone["logs"], 256)
        saved = AdaptiveKLPPO.load(tmp_path / f"{seed}", device="cpu")
        assert th.equal(th.nn.utils.parameters_to_vector(saved.policy.parameters()), result["parameters"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_a_group_the_remedy_is_named(algorithm: str) -> None:
    distributed_class = getattr(distributed, f"Distributed{algorithm}")
    with pytest.raises(ValueError, match=rf"needs a process group: call .*init_process_group.* or use {algorithm}$"):
        distributed_class("MlpPolicy", "CartPole-v1")


def test_group_must_reach_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(ValueError, match="cpu:gloo,cuda:nccl"):
        DistributedAdaptiveKLPPO("MlpPolicy", "CartPole-v1")


def saved(path: Path) -> None:
    model = DistributedAdaptiveKLPPO("MlpPolicy", make_vec_env(make_env, 2), **SMALL)
    model.learn(256, callback=CheckpointCallback(64, str(path), name_prefix="all"))
    model.save(path / "end")


def resumed(path: Path) -> dict[str, Any]:
    cls = DistributedAdaptiveKLPPO if dist.is_initialized() else AdaptiveKLPPO
    return outcome(cls.load(path, make_vec_env(make_env, 2), device="cpu").learn(256, reset_num_timesteps=False))


def test_checkpoints_are_ordinary_ones(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(saved, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all_256_steps.zip", "end.zip"]
    assert resumed(tmp_path / "end")["num_timesteps"] == 512
    assert PPO.load(tmp_path / "end", device="cpu", custom_objects={"clip_range": 0.2}).num_timesteps == 256
    (tmp_path / "alone").mkdir()
    plain(0, tmp_path / "alone")
    for checkpoint in (tmp_path / "all_256_steps.zip", tmp_path / "alone" / "0.zip"):
        first, second = ranks.run(resumed, checkpoint)
        check_same_model(first, second)
        assert first["num_timesteps"] == 512
