"""The distributions with which a policy over images acted need not be evaluated again, if they are still the policy's."""

import copy
import zipfile

import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.fast.recording import acts_as_stock
from sb3_adaptive_kl.rollout.old_policy import CHUNK_PROBE_SIZE, PROBE_SIZE
from tests.conftest import CASES, collect, logged, remember
from tests.test_evaluation import tensors

N_STEPS, N_ENVS = 96, 2
SMALL = {"n_steps": N_STEPS, "batch_size": 32, "n_epochs": 1}


def build(name, **kwargs):
    case = CASES[name]
    env = DummyVecEnv([case.make_env] * N_ENVS)
    for i, one in enumerate(env.envs):
        one.unwrapped.observation_space.seed(i)  # each shows other images
    model = AdaptiveKLPPO(case.policy, env, seed=0, device="cpu", **SMALL, **case.kwargs, **kwargs)
    with th.no_grad():
        model.policy.action_net.weight *= 100  # whose distributions differ: SB3 begins with nearly the same one for all
    return model


def n_evaluated(model):
    """Train, and count the images of which features are computed without a gradient."""
    seen = []

    def note(module, args, output):
        if not th.is_grad_enabled():
            seen.append(len(output))

    hook = model.policy.features_extractor.register_forward_hook(note)
    model.train()
    hook.remove()
    return sum(seen)


@pytest.mark.parametrize("name", ["cnn", "cnn-continuous"])
def test_recorded_distributions_are_those_of_the_policy(name):
    model = collect(build(name))
    recorded = model._recording.take(N_STEPS, N_ENVS)
    for mine, its in zip(tensors(recorded), tensors(remember(model).distribution), strict=True):
        assert th.allclose(mine, its, atol=1e-5)


def test_images_are_evaluated_once_after_the_update_and_a_few_before():
    model = collect(build("cnn"))
    assert n_evaluated(model) == N_STEPS * N_ENVS + PROBE_SIZE + CHUNK_PROBE_SIZE
    assert logged(model)["kl"] > 0


def move(policy):
    with th.no_grad():
        policy.action_net.bias += th.tensor([0.1, 0.0, 0.0])


class Moves(BaseCallback):
    def _on_step(self):
        return True

    def _on_rollout_end(self):
        move(self.model.policy)


class MovesInBetween(BaseCallback):
    def _on_step(self):
        if self.n_calls % N_STEPS == N_STEPS // 2:
            move(self.model.policy)
        return True


class Asks(BaseCallback):
    def _on_step(self):
        with th.no_grad():
            self.model.policy(self.model.policy.obs_to_tensor(self.locals["new_obs"])[0])
        return True


@pytest.mark.parametrize("callback", [Moves, MovesInBetween, Asks])
def test_policy_that_a_callback_has_moved_or_called_is_evaluated_before_the_update(callback):
    model = build("cnn", learning_rate=1e-9)
    model.learn(N_STEPS * N_ENVS)
    kl = logged(model)["kl"]
    collect(model, callback())
    assert n_evaluated(model) >= 2 * N_STEPS * N_ENVS
    assert logged(model)["kl"] == pytest.approx(kl, abs=1e-6)  # what the callback did does not count as a step


def test_nothing_is_recorded_where_it_saves_nothing(monkeypatch):
    assert collect(CASES["box"].build(AdaptiveKLPPO, **SMALL))._recording.take(N_STEPS, 1) is None
    monkeypatch.setenv("SB3_ADAPTIVE_KL_FAST", "0")
    assert collect(build("cnn"))._recording.take(N_STEPS, N_ENVS) is None


def test_recording_is_of_one_rollout_and_is_not_saved(tmp_path):
    model = collect(collect(build("cnn")))
    assert n_evaluated(model) == N_STEPS * N_ENVS + PROBE_SIZE + CHUNK_PROBE_SIZE
    collect(model).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as saved:
        assert b"_recording" not in saved.read("data")


class Copies(BaseCallback):
    def _on_step(self):
        if self.n_calls == 1:
            self.copy = copy.deepcopy(self.model.policy)
        with th.no_grad():
            self.copy(self.copy.obs_to_tensor(self.locals["new_obs"])[0])
        return True


def test_copy_of_the_policy_records_nothing():
    model, callback = build("cnn"), Copies()
    collect(model, callback)
    (its,) = [its for hook in callback.copy._forward_hooks.values() if (its := getattr(hook, "__self__", None)) is not None]
    assert its is not model._recording
    assert its._steps == []
    assert model._recording.take(N_STEPS, N_ENVS) is not None


class OtherLogProb(CategoricalDistribution):
    def log_prob(self, actions):
        return super().log_prob(actions) - 1


def test_users_code_is_not_recorded():
    model = build("cnn")
    model.policy.action_dist = OtherLogProb(3)
    assert not acts_as_stock(model.policy)
    model = build("cnn")
    model.policy.forward = model.policy.forward
    assert acts_as_stock(model.policy)
    model.policy.forward = lambda obs, deterministic=False: type(model.policy).forward(model.policy, obs, deterministic)
    assert not acts_as_stock(model.policy)
