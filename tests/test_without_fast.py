"""What is in ``fast`` only saves time: without it the same policies are trained."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib.common.envs import InvalidActionEnvDiscrete

from sb3_adaptive_kl import AdaptiveKLPPO, MaskableAdaptiveKLPPO, MaskableRecurrentAdaptiveKLPPO, RecurrentAdaptiveKLPPO
from sb3_adaptive_kl.arguments import settings_at
from sb3_adaptive_kl.fast import eager
from sb3_adaptive_kl.metrics import UpdateMetrics
from tests.conftest import collect, logged, parameters

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}


def train_all():
    """Parameters and KL after two updates of each algorithm."""
    masked = InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3)
    models = {
        "ppo": AdaptiveKLPPO("MlpPolicy", gym.make("Pendulum-v1"), **SMALL),
        "maskable": MaskableAdaptiveKLPPO("MlpPolicy", masked, **SMALL),
        "recurrent": RecurrentAdaptiveKLPPO("MlpLstmPolicy", gym.make("CartPole-v1"), **SMALL),
        "both": MaskableRecurrentAdaptiveKLPPO("MlpLstmPolicy", masked, **SMALL),
    }
    results = {}
    for name, model in models.items():
        model.learn(2 * 64)
        results[name] = np.append(parameters(model).numpy(), logged(model)["kl"])
    return results


def test_training_without_fast_gives_the_same_numbers(monkeypatch):
    with_fast = train_all()
    monkeypatch.setenv("SB3_ADAPTIVE_KL_FAST", "0")
    # What is skipped otherwise
    monkeypatch.setattr(eager, "_unvalidated", None)
    monkeypatch.setattr(eager, "bare_adam", None)
    without = train_all()
    assert set(without) == {"ppo", "maskable", "recurrent", "both"}
    for name, expected in with_fast.items():
        np.testing.assert_allclose(without[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_nothing_is_compiled_without_fast(monkeypatch):
    monkeypatch.setenv("SB3_ADAPTIVE_KL_FAST", "0")
    monkeypatch.setattr(th, "compile", None)
    model = AdaptiveKLPPO("MlpPolicy", gym.make("Pendulum-v1"), compile=True, **SMALL).learn(64)
    assert "time/compilation" not in model.logger.name_to_value


def test_compiling_with_an_old_torch_warns(monkeypatch):
    monkeypatch.setattr(th, "compile", lambda model, *, fullgraph: model)
    with pytest.warns(UserWarning, match=r"compile=True: .*torch 2\.13 or newer is needed"):
        model = AdaptiveKLPPO("MlpPolicy", gym.make("Pendulum-v1"), compile=True, **SMALL)
    assert model.learn(64)._n_updates > 0  # without another warning, which would be an error


def test_nan_at_the_first_minibatch_is_undone(monkeypatch):
    """Here torch's distributions validate their arguments: the first evaluation raises, and there is nothing to log."""
    monkeypatch.setenv("SB3_ADAPTIVE_KL_FAST", "0")
    model = collect(AdaptiveKLPPO("MlpPolicy", gym.make("Pendulum-v1"), **SMALL))
    model.rollout_buffer.observations[:] = np.nan
    before = parameters(model)
    with pytest.raises(ValueError, match="Expected parameter loc"):  # the old policy cannot be evaluated either
        model.train()
    model.rollout_buffer.observations[:] = 0.0
    model.rollout_buffer.advantages[:] = np.nan
    with pytest.warns(UserWarning, match="was undone"):
        model.train()
    assert (parameters(model) == before).all()


def test_update_without_a_minibatch_logs_nothing():
    model = collect(AdaptiveKLPPO("MlpPolicy", gym.make("Pendulum-v1"), **SMALL))
    metrics = UpdateMetrics()
    metrics.log(model.logger, settings_at(model, 1.0))
    assert metrics.finite()
    assert not logged(model)
