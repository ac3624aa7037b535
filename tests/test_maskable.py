"""Test MaskableAdaptiveKLPPO, which adds the KL penalty to sb3-contrib's MaskablePPO."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.wrappers import ActionMasker

from sb3_adaptive_kl import MaskableAdaptiveKLPPO
from sb3_adaptive_kl.rollout.distributions import action_distribution
from sb3_adaptive_kl.rollout.old_policy import sweep
from tests.conftest import Case, collect, logged, parameters, remember


class MaskedDict(gym.ObservationWrapper):
    """The same task with a dict observation."""

    def __init__(self):
        super().__init__(InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3))
        self.observation_space = spaces.Dict({"state": self.env.observation_space})

    def observation(self, observation):
        return {"state": observation}

    def action_masks(self):
        return self.env.action_masks()


class Forbidding(InvalidActionEnvDiscrete):
    def action_masks(self):
        return np.zeros(6, dtype=bool) if self.current_step % 10 == 3 else np.ones(6, dtype=bool)


class ForbiddingOneDimension(InvalidActionEnvMultiDiscrete):
    """The second dimension, with 4 choices, sometimes has no valid choice."""

    def action_masks(self):
        return [True] * 3 + [self.current_step % 10 != 3] * 4


class ForbiddingOneSwitch(InvalidActionEnvMultiBinary):
    def action_masks(self):
        return [True] * 4 + [self.current_step % 10 != 3] * 2 + [True] * 2


CASES = {
    "discrete": Case("MlpPolicy", lambda: InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3)),
    "multidiscrete": Case("MlpPolicy", lambda: InvalidActionEnvMultiDiscrete(dims=[3, 4], n_invalid_actions=2)),
    "multibinary": Case("MlpPolicy", lambda: InvalidActionEnvMultiBinary(dims=4, n_invalid_actions=2)),
    "dict": Case("MultiInputPolicy", MaskedDict),
}
SOMETIMES_NOTHING_ALLOWED = {
    "discrete, sometimes nothing": Case("MlpPolicy", lambda: Forbidding(dim=6, n_invalid_actions=1)),
    "multidiscrete, sometimes nothing": Case("MlpPolicy", lambda: ForbiddingOneDimension(dims=[3, 4], n_invalid_actions=1)),
    "multibinary, sometimes nothing": Case("MlpPolicy", lambda: ForbiddingOneSwitch(dims=4, n_invalid_actions=1)),
}
FULL_BATCH = {"n_steps": 128, "batch_size": 128, "n_epochs": 1, "learning_rate": 0.01, "ent_coef": 0.01}
SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


@pytest.mark.parametrize("batch_size", [128, None])
@pytest.mark.parametrize("case", CASES | SOMETIMES_NOTHING_ALLOWED)
def test_first_update_equals_maskable_ppo(case, batch_size):
    """This holds for any β, see test_first_update.py."""
    kwargs = {**FULL_BATCH, "batch_size": batch_size}
    host = (CASES | SOMETIMES_NOTHING_ALLOWED)[case].build(MaskablePPO, **kwargs).learn(128)
    ours = (CASES | SOMETIMES_NOTHING_ALLOWED)[case].build(MaskableAdaptiveKLPPO, init_kl_coef=30.0, **kwargs)
    start = parameters(ours)
    ours.learn(128)
    assert (parameters(ours) - start).abs().max() > 1e-3
    assert (parameters(ours) - parameters(host)).abs().max() < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_kl_of_masked_distributions(case):
    """Compare with probabilities that are normalized over the valid choices by hand."""
    model = collect(CASES[case].build(MaskableAdaptiveKLPPO, **SMALL))
    old_policy = remember(model)
    masks = th.as_tensor(model.rollout_buffer.action_masks).bool()
    before = old_policy.distribution.log_probs.exp()
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.1 * th.randn(parameter.shape, generator=th.Generator().manual_seed(0)))
    after = remember(model).distribution.log_probs.exp()
    assert (before[~masks] == 0).all()
    assert (after[~masks] == 0).all()
    terms = th.where(masks, before * (before.log() - after.log()), 0.0)
    assert th.allclose(old_policy.divergence_on_rollout().mean(), terms.sum(dim=1).mean(), rtol=1e-4)
    assert terms.sum() > 0.1


def test_masked_actions_contribute_zero_with_finite_gradients():
    model = collect(CASES["discrete"].build(MaskableAdaptiveKLPPO, **SMALL))
    with th.no_grad():
        model.policy.action_net.bias[:] = th.tensor([1e4, -1e4, 0.0, 0.0, 1e4, 0.0])  # Extreme for masked and valid actions
    observations = th.tensor([0, 1])
    masks = th.tensor([[False, False, True, True, False, True], [False, False, False, True, False, False]])
    model.policy.evaluate_actions(observations, th.tensor([3, 3]), action_masks=masks)
    new = action_distribution(model.policy.action_dist)
    old = type(new)(new.log_probs.detach().clone())
    with th.no_grad():
        model.policy.action_net.bias += th.randn(6, generator=th.Generator().manual_seed(0))
    model.policy.evaluate_actions(observations, th.tensor([3, 3]), action_masks=masks)
    kl = old.kl(action_distribution(model.policy.action_dist))
    assert kl[0] > 0
    assert kl[1] == 0  # Only one valid action
    kl.sum().backward()
    gradient = model.policy.action_net.bias.grad
    assert th.isfinite(gradient).all()
    assert (gradient[[0, 1, 4]] == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_update_uses_the_masks_of_the_rollout(case):
    """With unchanged parameters, the update computes the same log-probabilities as the rollout."""
    model = collect(CASES[case].build(MaskableAdaptiveKLPPO, **SMALL))
    for _, _, evaluation in sweep(model.policy, model.rollout_buffer, True, 64):
        assert th.allclose(evaluation.log_prob, evaluation.old_log_prob, atol=1e-5)


def test_where_nothing_is_allowed_the_policy_cannot_move():
    """As with MaskablePPO, all choices are then equally likely: boards where no move exists end no training."""
    model = collect(
        SOMETIMES_NOTHING_ALLOWED["discrete, sometimes nothing"].build(MaskableAdaptiveKLPPO, learning_rate=0.01, **SMALL)
    )
    nothing = th.as_tensor(model.rollout_buffer.action_masks).sum(dim=-1).flatten() == 0
    old_policy = remember(model)
    model.train()
    kl = old_policy.divergence_on_rollout()
    assert 0 < nothing.sum() < len(nothing)
    assert (kl[nothing] == 0).all()
    assert (kl[~nothing] > 0).all()


def test_save_load_predict_and_continue(tmp_path):
    model = CASES["discrete"].build(MaskableAdaptiveKLPPO, **SMALL).learn(3 * 64)
    model.save(tmp_path / "model")
    loaded = MaskableAdaptiveKLPPO.load(tmp_path / "model", env=CASES["discrete"].make_env())
    assert loaded.kl_coef == model.kl_coef != model.init_kl_coef
    assert isinstance(loaded, MaskablePPO)
    mask = np.array([False] * 5 + [True])
    action, _ = loaded.predict(0, action_masks=mask)
    assert action == 5
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps == 4 * 64


@pytest.mark.parametrize("arguments", [{"use_masking": False}, (None, 1, "name", True, False)], ids=["name", "position"])
def test_masking_can_be_disabled(arguments):
    """By name, and where MaskablePPO has it: this environment has no masks to ask for."""
    model = CASES["discrete"].build(MaskableAdaptiveKLPPO, **SMALL)
    model.learn(64, **arguments) if isinstance(arguments, dict) else model.learn(64, *arguments)
    assert logged(model)["kl"] > 0


@pytest.mark.parametrize(
    "make_env",
    [
        lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10),
        pytest.param(lambda: InvalidActionEnvMultiDiscrete(dims=[4, 4], n_invalid_actions=3), marks=pytest.mark.slow),
        pytest.param(lambda: InvalidActionEnvMultiBinary(dims=6, n_invalid_actions=3), marks=pytest.mark.slow),
    ],
    ids=["discrete", "multidiscrete", "multibinary"],
)
def test_learns_with_invalid_actions(make_env):
    """The reward is 1 if the action equals the observation, for 100 steps. sb3-contrib's tests require a return of 90."""
    model = MaskableAdaptiveKLPPO(
        "MlpPolicy",
        make_env(),
        n_steps=512,
        batch_size=128,
        learning_rate=4e-3,
        gamma=0.4,
        target_kl=0.03,
        seed=0,
        device="cpu",
    )
    untrained, _ = evaluate_policy(model, make_env(), n_eval_episodes=5, warn=False)
    model.learn(20 * 512)
    trained, _ = evaluate_policy(model, make_env(), n_eval_episodes=20, warn=False)
    assert untrained < 40
    assert trained > 90


@pytest.mark.parametrize("masks", [np.ones(5), None], ids=["wrong length", "None"])
def test_masks_of_the_wrong_length_are_refused(masks):
    env = ActionMasker(InvalidActionEnvDiscrete(dim=6, n_invalid_actions=1), lambda env: masks)
    model = MaskableAdaptiveKLPPO("MlpPolicy", env, n_steps=64, batch_size=32, device="cpu")
    with pytest.raises(ValueError, match=r"action_masks of shape \(1.*\): Discrete\(6\) needs 6 booleans for each of 1 obs"):
        model.learn(64)
    assert model.learn(64, use_masking=False).num_timesteps == 64


@pytest.mark.parametrize("use_masking", [True, False])
def test_other_errors_of_a_rollout_are_the_users(use_masking):
    class Broken(InvalidActionEnvDiscrete):
        def step(self, action):
            raise RuntimeError("the simulator is gone")

    model = MaskableAdaptiveKLPPO("MlpPolicy", Broken(dim=6, n_invalid_actions=1), n_steps=64, device="cpu")
    with pytest.raises(RuntimeError, match="the simulator is gone"):
        model.learn(64, use_masking=use_masking)
