"""What is collected is what the host would collect, eager and compiled; NaN is told before an environment sees it."""

import copy
import functools
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_adaptive_kl import AdaptiveKLPPO
from tests.conftest import CASES, FAMILIES, NEEDS_COMPILER, Case, collect, pendulum

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}
COMPILE = pytest.mark.parametrize("compile", [False, pytest.param(True, marks=NEEDS_COMPILER)])


@pytest.mark.parametrize("case", FAMILIES)
def test_rollout_is_the_hosts(case):
    """Bootstrapping, the ends of episodes, gSDE's noise and its resets: same seed, same buffer as PPO's."""
    kwargs = {"n_steps": 256, "batch_size": 256}
    theirs, ours = (collect(FAMILIES[case].build(algorithm, **kwargs)).rollout_buffer for algorithm in (PPO, AdaptiveKLPPO))
    assert ours.episode_starts[1:].any()
    for name in ("observations", "actions", "rewards", "advantages", "returns", "values", "log_probs"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


class NaNAfterAWhile(gym.ObservationWrapper):
    """From the tenth step on a sensor fails."""

    n_seen = 0

    def observation(self, observation):
        self.n_seen += 1
        return np.full_like(observation, np.nan) if self.n_seen > 10 else observation

    def step(self, action):
        assert np.isfinite(action).all(), "the environment was given NaN"
        return super().step(action)


class Float(gym.ObservationWrapper):
    """Observations that can be NaN."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 1, env.observation_space.shape)

    def observation(self, observation):
        return np.asarray(observation, dtype=np.float32)


@pytest.mark.usefixtures("compiler")
@COMPILE
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "multibinary"])
def test_nan_never_reaches_the_environment(env, compile):
    """Torch's distributions do not check what is collected, but a NaN observation of one environment ends it all the same."""
    healthy, ill = (Float(CASES[env].make_env()) if env in CASES else gym.make(env) for _ in range(2))
    envs = DummyVecEnv([lambda: healthy, lambda: NaNAfterAWhile(ill)])
    model = AdaptiveKLPPO("MlpPolicy", envs, compile=compile, seed=0, device="cpu", **SMALL)
    with pytest.raises(ValueError, match=r"log-probability of an action is NaN.*VecCheckNan"):
        model.learn(64)
    assert "forward" not in vars(model.policy)
    assert not compile or not model._compiler.failed


def test_forward_of_the_users_finds_torchs_checks():
    """It may rely on them."""

    class Careful(ActorCriticPolicy):
        def forward(self, obs, deterministic=False):
            try:
                return super().forward(obs, deterministic)
            except ValueError:  # of torch's distribution, at a NaN
                caught.append(obs)
                return super().forward(th.zeros_like(obs), deterministic)

    for algorithm in (PPO, AdaptiveKLPPO):
        caught = []
        collect(Case(Careful, lambda: NaNAfterAWhile(pendulum())).build(algorithm, **SMALL))
        assert len(caught) > 0


@pytest.mark.usefixtures("compiler")
@COMPILE
def test_policy_copied_by_a_callback_is_its_own(compile):
    copies = []
    model = CASES["box"].build(AdaptiveKLPPO, compile=compile, **SMALL)
    model.learn(64, callback=lambda *_: copies.append(copy.deepcopy(model.policy)) if not copies else None)
    observation = th.zeros(1, 3)
    with th.no_grad():
        copies[0].value_net.bias += 5.0
        assert not th.equal(copies[0](observation)[1], model.policy(observation)[1])
    assert copies[0].forward.__func__ is type(model.policy).forward
    model.policy = copies[0]
    assert (collect(model).rollout_buffer.values > 3.0).any()
    assert "forward" not in vars(copies[0])


def test_policy_pickled_by_a_callback_is_its_own():
    pickled = []
    model = CASES["box"].build(AdaptiveKLPPO, **SMALL)
    model.learn(64, callback=lambda *_: pickled.append(pickle.dumps(model.policy)) if not pickled else None)
    again = pickle.loads(pickled[0])
    assert again.forward.__func__ is type(model.policy).forward
    assert again.forward.__self__ is again


@pytest.mark.usefixtures("compiler")
@COMPILE
def test_copy_acts_for_itself_in_the_same_rollout(compile):
    model = CASES["box"].build(AdaptiveKLPPO, compile=compile, **SMALL)
    values = []

    def play_against_a_copy(*_):
        opponent = copy.deepcopy(model.policy)
        with th.no_grad():
            opponent.value_net.bias += 5.0
            values.append([policy(obs=th.ones(1, 3))[1].item() for policy in (model.policy, opponent)])
        return True

    collect(model, play_against_a_copy)
    assert len(values) == 64
    assert all(theirs == pytest.approx(ours + 5.0) for ours, theirs in values)


@pytest.mark.usefixtures("compiler")
@COMPILE
def test_what_a_callback_does_to_the_policy_is_obeyed(compile):
    """New values of a parameter, another network, noise drawn anew: from the next step on."""
    model = CASES["gsde"].build(AdaptiveKLPPO, compile=compile, n_steps=12, batch_size=12, sde_sample_freq=-1)

    def meddle(variables, _):
        if model.num_timesteps == 4:
            model.policy.value_net.bias.data.fill_(5.0)
            model.policy.value_net.weight.data.zero_()
        if model.num_timesteps == 8:
            model.policy.value_net = th.nn.Linear(64, 1)
            th.nn.init.constant_(model.policy.value_net.bias, -3.0)
            th.nn.init.zeros_(model.policy.value_net.weight)
            model.policy.action_dist.exploration_mat.data.zero_()
            model.policy.action_dist.exploration_matrices.data.zero_()
        return True

    collect(model, meddle)
    values = model.rollout_buffer.values.flatten()
    assert (values[4:8] == 5.0).all()
    assert (values[8:] == -3.0).all()
    assert (values[:4] != 5.0).all()
    means, _ = model.policy.predict(model.rollout_buffer.observations[:, 0], deterministic=True)
    noise = np.abs(model.rollout_buffer.actions[:, 0] - means).flatten()
    assert (noise[:8] > 1e-4).all()
    assert (noise[8:] < 1e-6).all()


@pytest.mark.usefixtures("compiler")
@COMPILE
def test_what_a_users_policy_remembers_stays_with_it(compile):
    class Remembers(ActorCriticPolicy):
        n_seen = 0

        def extract_features(self, obs, features_extractor=None):
            self.n_seen += not self.training
            return super().extract_features(obs, features_extractor)

    model = AdaptiveKLPPO(Remembers, gym.make("Pendulum-v1"), compile=compile, seed=0, device="cpu", **SMALL)
    assert collect(model).policy.n_seen >= 64


def counting(function, calls):
    """A decorator as users write it: ``functools.wraps`` copies ``__module__``, too."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.usefixtures("compiler")
@COMPILE
@pytest.mark.parametrize("method", ["forward", "extract_features", "_get_action_dist_from_latent"])
def test_wrapper_set_on_the_policy_is_called_and_kept(method, compile):
    model = CASES["box"].build(AdaptiveKLPPO, compile=compile, **SMALL)
    calls = []
    wrapper = counting(getattr(model.policy, method), calls)
    setattr(model.policy, method, wrapper)
    collect(model)
    assert len(calls) >= SMALL["n_steps"]
    assert vars(model.policy)[method] is wrapper


def test_wrapper_of_the_class_is_called():
    calls = []
    policy = type("Wrapped", (ActorCriticPolicy,), {"forward": counting(ActorCriticPolicy.forward, calls)})
    collect(AdaptiveKLPPO(policy, gym.make("Pendulum-v1"), device="cpu", **SMALL))
    assert len(calls) == SMALL["n_steps"]


@pytest.mark.usefixtures("compiler")
@COMPILE
def test_wrapper_set_during_a_rollout_is_kept(compile):
    model = CASES["box"].build(AdaptiveKLPPO, compile=compile, **SMALL)
    calls = []

    def wrap_once(*_):
        if model.num_timesteps == 10:
            model.policy.forward = counting(model.policy.forward, calls)
        return True

    collect(model, wrap_once)
    assert len(calls) == SMALL["n_steps"] - 10
    assert "forward" in vars(model.policy)
    # It calls the policy from now on, and not the copy that acted during that rollout
    model.policy.value_net = th.nn.Linear(64, 1)
    th.nn.init.zeros_(model.policy.value_net.weight)
    th.nn.init.constant_(model.policy.value_net.bias, 3.0)
    with th.no_grad():
        assert model.policy(th.zeros(1, 3))[1] == 3.0
    assert model.policy.action_dist.distribution is not None  # compiled code leaves none


@NEEDS_COMPILER
@pytest.mark.usefixtures("compiler")
def test_distribution_in_a_callback_of_a_compiled_rollout():
    """Compiled code leaves none behind; get_distribution() gives it."""
    model = CASES["box"].build(AdaptiveKLPPO, compile=True, **SMALL)
    seen = []

    def look(*_):
        seen.append(model.policy.action_dist.distribution)
        with th.no_grad():
            assert model.policy.get_distribution(th.zeros(1, 3)).distribution.mean.shape == (1, 1)
        model.policy.action_dist.distribution = None
        return True

    collect(model, look)
    assert seen == [None] * SMALL["n_steps"]


@NEEDS_COMPILER
@pytest.mark.usefixtures("compiler")
def test_wrapper_of_evaluate_actions_sees_the_observations_of_the_rollout():
    """Compiled, SB3's own methods are given preprocessed ones; an integer image shows the difference."""
    model = CASES["cnn"].build(AdaptiveKLPPO, compile=True, **SMALL)
    dtypes = set()
    evaluate_actions = model.policy.evaluate_actions

    @functools.wraps(evaluate_actions)
    def wrapper(observations, actions):
        dtypes.add(observations.dtype)
        return evaluate_actions(observations, actions)

    model.policy.evaluate_actions = wrapper
    # It preprocesses by itself, which torch cannot compile
    with pytest.warns(UserWarning, match="torch.compile cannot be used"):
        model.learn(64)
    assert dtypes == {th.uint8}
