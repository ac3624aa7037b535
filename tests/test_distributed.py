"""Several processes train one policy, as one process would with all of their environments."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_adaptive_kl import AdaptiveKLPPO
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


def learned(algorithm: str, folder: str | None = None, callback: Any = None, **arguments: Any) -> dict[str, Any]:
    """Train on this rank, and tell what it is left with."""
    import sb3_adaptive_kl

    policy, env = ("MlpLstmPolicy" if "Recurrent" in algorithm else "MlpPolicy"), make_vec_env(make_env, 2)
    if folder is not None:
        env = VecNormalize(env)
    settings = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 5, "device": "cpu", "verbose": 1, **arguments}
    model = getattr(sb3_adaptive_kl, algorithm)(policy, env, **settings)
    callbacks = [] if callback is None else [callback]
    if folder is not None:
        callbacks.append(CheckpointCallback(64, folder, save_vecnormalize=True))
    model.learn(512, callback=callbacks)
    return {
        "parameters": th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()]),
        "optimizer": model.policy.optimizer.state_dict()["state"][0]["exp_avg"],
        "kl_coef": model.kl_coef,
        "num_timesteps": model.num_timesteps,
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
        "undone": model._undone_updates,
        "observations": model.rollout_buffer.observations,
        "statistics": env.obs_rms if folder is not None else None,
        "seeds": env.seed(None) and [one.unwrapped.np_random_seed for one in env.unwrapped.envs],
        "logged": model.logger.output_formats != [],
    }


def make_env() -> gym.Env:
    return Masked(gym.make("CartPole-v1"))


class Masked(gym.Wrapper):
    """Allows all actions, for MaskablePPO."""

    def action_masks(self) -> np.ndarray:
        return np.ones(2, dtype=bool)


@pytest.mark.parametrize("algorithm", ["AdaptiveKLPPO", "MaskableAdaptiveKLPPO", "RecurrentAdaptiveKLPPO"])
def test_all_ranks_hold_the_same_model(ranks: Ranks, algorithm: str) -> None:
    first, second = ranks.run(learned, algorithm)
    assert th.equal(first["parameters"], second["parameters"])
    assert th.equal(first["optimizer"], second["optimizer"])
    assert first["kl_coef"] == second["kl_coef"]
    assert first["num_timesteps"] == second["num_timesteps"] == 512
    # Each collects its own transitions, and logs all episodes
    assert not np.array_equal(first["observations"], second["observations"])
    assert first["episodes"] == second["episodes"] != []
    assert first["logged"]
    assert not second["logged"]
