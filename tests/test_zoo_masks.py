"""Masks in RL Baselines3 Zoo, whose scripts know none: `--algo ppo_kl_mask` and `ppo_kl_mask_lstm`."""

import json
import re

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.utils
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from stable_baselines3.common.env_util import make_vec_env

from sb3_adaptive_kl import AdaptiveKLPPO, MaskableAdaptiveKLPPO, MaskableRecurrentAdaptiveKLPPO
from sb3_adaptive_kl.compare.execute import execute, random_action
from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.zoo import hyperparameter_file
from sb3_adaptive_kl.zoo.masks import MaskSource, asking_for_masks

ALGORITHMS = {"ppo_kl_mask": MaskableAdaptiveKLPPO, "ppo_kl_mask_lstm": MaskableRecurrentAdaptiveKLPPO}


class Picky(gym.Env):
    """Which of four actions are valid is drawn in each step, and not observed. An invalid action is an error."""

    action_space = gym.spaces.Discrete(4)
    observation_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def draw(self):
        self.valid = self.np_random.permutation([True, True, False, False])
        return np.zeros(1, dtype=np.float32)

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.time = 0
        return self.draw(), {}

    def step(self, action):
        assert self.valid[action]
        self.time += 1
        return self.draw(), float(action == 0), self.time == 20, False, {}

    def action_masks(self):
        return self.valid


gym.register("Picky-v0", Picky)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_masks_reach_training_evaluation_and_playing(algo, zoo, tmp_path):
    options = f"--algo {algo} --env Picky-v0 -f {tmp_path} --num-threads 1"
    params = "-params n_steps:64 batch_size:64 n_envs:2 normalize:True"
    zoo(f"train {options} -n 256 --eval-freq 128 --n-eval-envs 2 --verbose 0 {params}")
    folder = tmp_path / algo / "Picky-v0_1"
    for name in ("evaluations.npz", "best_model.zip", "Picky-v0/vecnormalize.pkl"):
        assert (folder / name).exists()
    assert "5 Episodes" in zoo(f"enjoy {options} --no-render -n 100 --stochastic")
    # What record_video does: it makes the environments in the same way, and gives them to load()
    env = rl_zoo3.utils.create_test_env("Picky-v0", should_render=False, hyperparams={})
    model = rl_zoo3.utils.ALGOS[algo].load(folder / "best_model.zip", env=env)
    observation, state = env.reset(), None
    for step in range(50):
        action, state = model.predict(observation, state=state, episode_start=np.array([step % 20 == 0]))
        observation, *_ = env.step(action)


def test_random_policy_of_a_comparison_takes_valid_actions():
    """It is worth half as much as the best one: the environment fails at other actions."""
    plan = {"environments": ["Picky-v0"], "arms": ["ppo_kl_mask"], "seeds": 1, "n_timesteps": 32, "params": ["n_steps=32"]}
    (run,) = Plan.create({**plan, "n_eval_episodes": 40}).runs()
    assert np.mean(json.loads(execute(run)["run.json"])["random_returns"]) == pytest.approx(5, abs=1)


@pytest.mark.parametrize(
    ("env", "n_choices"),
    [
        (lambda: InvalidActionEnvDiscrete(5, n_invalid_actions=2), [5]),
        (lambda: InvalidActionEnvMultiDiscrete([3, 4], n_invalid_actions=3), [3, 4]),
        (lambda: InvalidActionEnvMultiBinary(4, n_invalid_actions=2), [2, 2, 2, 2]),
    ],
)
def test_random_actions_are_all_those_that_are_valid(env, n_choices):
    env = make_vec_env(env)
    env.reset()
    masks = np.split(np.concatenate(env.env_method("action_masks")), np.cumsum(n_choices)[:-1])
    actions = np.array([random_action(env) for _ in range(200)]).reshape(200, -1)
    for column, mask in zip(actions.T, masks, strict=True):
        assert set(column) == set(np.flatnonzero(mask))


@pytest.mark.slow
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_masks_reach_the_trials_of_a_search(algo, zoo, tmp_path):
    """The environment fails at an action that is not allowed, and a trial with an error would end the search."""
    search = "-optimize --n-trials 1 --n-startup-trials 0 --n-evaluations 1 --no-optim-plots --num-threads 1 --seed 0"
    output = zoo(f"train --algo {algo} --env Picky-v0 -n 64 -f {tmp_path} {search} -params n_envs:2")
    assert "Number of finished trials:  1" in output
    assert re.search(r"Value:  [\d.]+", output)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_environment_without_masks_is_an_error(algo, zoo):
    without = algo.replace("_mask", "")
    with pytest.raises(ValueError, match=rf"--algo {algo} needs .* action_masks\(\): .*env_wrapper.* take --algo {without}$"):
        zoo(f"train --algo {algo} --env CartPole-v1 -n 64 -f logs --verbose 0")


def test_every_environment_gives_its_own_masks():
    """Also where those of several trials take turns, and where the observations are equal."""
    model = asking_for_masks(MaskableAdaptiveKLPPO)("MlpPolicy", Picky(), device="cpu")
    first, second = (MaskSource(make_vec_env(Picky, n_envs=3, seed=seed)) for seed in (0, 1))
    observations = {first: first.reset(), second: second.reset()}
    for _ in range(20):
        for env in observations:
            action, _ = model.predict(observations[env])
            observations[env], *_ = env.step(action)
    allowed = np.arange(4)[None] == np.full((3, 1), 2)
    action, _ = model.predict(observations[first], action_masks=allowed)  # the caller knows better
    assert (action == 2).all()
    assert {int(model.predict(np.zeros(1))[0]) for _ in range(100)} == {0, 1, 2, 3}  # of no environment


def test_registered_classes_are_the_algorithms():
    assert asking_for_masks(AdaptiveKLPPO) is AdaptiveKLPPO
    for algo, algorithm in ALGORITHMS.items():
        registered = rl_zoo3.utils.ALGOS[algo]
        assert issubclass(registered, algorithm)
        assert registered.__name__ == algorithm.__name__  # of TensorBoard's folder, and of the distributed variant


def test_masks_do_not_change_the_hyperparameters():
    assert hyperparameter_file("ppo_kl_mask") == hyperparameter_file("ppo_kl")
    assert hyperparameter_file("ppo_kl_mask_lstm") == hyperparameter_file("ppo_kl_lstm")
