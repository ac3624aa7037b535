"""MaskableRecurrentAdaptiveKLPPO learns what neither masks nor a memory can learn alone; and how it is evaluated."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback as ContribsCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy as contribs_evaluate_policy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_adaptive_kl import MaskableAdaptiveKLPPO, MaskableRecurrentAdaptiveKLPPO
from sb3_adaptive_kl.maskable_recurrent import MaskableEvalCallback, evaluate_policy


class NearerToTheFirst(gym.Env):
    """
    At first one action is allowed, 0 or 5, and shown. Two steps later two random ones are allowed, and not shown: the reward
    is 1 for the one that is nearer to the first. Without a memory, 1 of 2 is right; without masks, 1 of 3, since an invalid
    action ends the episode with 0.
    """

    action_space = spaces.Discrete(6)
    observation_space = spaces.Box(0, 1, (3,))

    def observation(self):
        return np.array([self.time == 0 and self.first == 0, self.time == 0 and self.first == 5, self.time == 2], np.float32)

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.time, self.first = 0, self.np_random.choice([0, 5])
        self.pair = self.np_random.choice(6, 2, replace=False)
        return self.observation(), {}

    def action_masks(self):
        return np.isin(np.arange(6), ([self.first], np.arange(6), self.pair)[self.time])

    def step(self, action):
        if not self.action_masks()[action]:
            return self.observation(), 0.0, True, False, {}
        is_last = self.time == 2
        reward = float(is_last and abs(action - self.first) == np.abs(self.pair - self.first).min())
        self.time += not is_last
        return self.observation(), reward, is_last, False, {}


def environments(seed=0):
    return make_vec_env(NearerToTheFirst, n_envs=16, seed=seed)


def build(algorithm, env=None, **kwargs):
    lstm = {"lstm_hidden_size": 16, "enable_critic_lstm": False, "net_arch": []}
    has_memory = algorithm is MaskableRecurrentAdaptiveKLPPO
    return algorithm(
        "MlpLstmPolicy" if has_memory else "MlpPolicy",
        env or environments(),
        n_steps=16,
        batch_size=256,
        n_epochs=4,
        learning_rate=0.03,
        target_kl=0.2,
        policy_kwargs=lstm if has_memory else {},
        seed=0,
        device="cpu",
        **kwargs,
    )


@pytest.mark.filterwarnings("ignore:kl_coef has been at its lower bound")  # where there is nothing more to learn
@pytest.mark.parametrize(
    ("algorithm", "use_masking", "least", "most"),
    [
        (MaskableRecurrentAdaptiveKLPPO, True, 0.9, 1.0),
        (MaskableAdaptiveKLPPO, True, 0.3, 0.7),
        (MaskableRecurrentAdaptiveKLPPO, False, 0.0, 0.5),
    ],
    ids=["masks and memory", "masks", "memory"],
)
def test_learns_a_task_that_needs_masks_and_a_memory(algorithm, use_masking, least, most, tmp_path):
    """During training, afterwards, and with the best model that was saved."""
    settings = {"n_eval_episodes": 100, "eval_freq": 380, "best_model_save_path": tmp_path, "verbose": 0}
    callback = MaskableEvalCallback(environments(100), **settings, use_masking=use_masking)
    model = build(algorithm).learn(24 * 256, callback, use_masking=use_masking)
    assert callback.model is model
    best = algorithm.load(tmp_path / "best_model", device="cpu")
    for agent in (model, best):
        mean_return, _ = evaluate_policy(agent, environments(200), n_eval_episodes=200, use_masking=use_masking)
        assert least <= mean_return <= most
    assert least <= callback.best_mean_reward <= most


def test_evaluations_that_lose_the_state_are_refused():
    """sb3-contrib's do not pass it on where they pass masks: an agent with a memory would be judged without it."""
    model = build(MaskableRecurrentAdaptiveKLPPO)
    message = r"predict\(state=None\) within an episode .* take those of sb3_adaptive_kl.maskable_recurrent"
    with pytest.raises(ValueError, match=message):
        contribs_evaluate_policy(model, environments())
    with pytest.raises(ValueError, match=message):
        model.learn(256, ContribsCallback(environments(), eval_freq=8))


def test_statistics_of_the_training_are_used_and_left_alone():
    """As with SB3's EvalCallback: VecNormalize is found through the model that is evaluated."""
    env, eval_env = VecNormalize(environments()), VecNormalize(environments(100), training=False, norm_reward=False)
    model = build(MaskableRecurrentAdaptiveKLPPO, env).learn(512, MaskableEvalCallback(eval_env, eval_freq=32, verbose=0))
    assert np.array_equal(eval_env.obs_rms.mean, model.get_vec_normalize_env().obs_rms.mean)
    assert eval_env.obs_rms.count == pytest.approx(33 * 16, abs=0.01)  # the reset, and 32 steps


def test_single_environment_is_evaluated():
    model = build(MaskableRecurrentAdaptiveKLPPO)
    returns, lengths = evaluate_policy(model, NearerToTheFirst(), 20, warn=False, return_episode_rewards=True)
    assert lengths == [3] * 20  # an invalid action would have ended an episode early
    assert set(returns) <= {0.0, 1.0}
