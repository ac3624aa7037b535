"""Test MaskableRecurrentAdaptiveKLPPO: masks and padding together."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvMultiDiscrete
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_adaptive_kl import MaskableAdaptiveKLPPO, MaskableRecurrentAdaptiveKLPPO, RecurrentAdaptiveKLPPO
from sb3_adaptive_kl.maskable_recurrent import evaluate_policy
from sb3_adaptive_kl.maskable_recurrent.policies import MaskableRecurrentActorCriticPolicy
from sb3_adaptive_kl.rollout.old_policy import sweep
from tests.conftest import Case, collect, image, logged, multi_input, parameters, pendulum
from tests.test_recurrent import AsBox, assert_padding_changes_nothing, lstm

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


def allowed(step):
    """Two of six actions are forbidden, other ones in every step."""
    mask = np.ones(6, dtype=bool)
    mask[[step % 6, (step + 2) % 6]] = False
    return mask


class Clock(gym.Env):
    """Episodes of some steps. The masks follow from the observation, so that a test knows them without the buffer."""

    action_space = spaces.Discrete(6)
    observation_space = spaces.Box(0, np.inf, (2,))

    def __init__(self, length=7):
        self.length, self.time, self.last = length, 0, 0

    def observation(self):
        return np.array([self.time, self.last], dtype=np.float32)

    def reset(self, **kwargs):
        self.time = 0
        return self.observation(), {}

    def step(self, action):
        assert self.action_masks()[action]
        self.time, self.last = self.time + 1, action
        return self.observation(), float(action == self.time % 6), self.time == self.length, False, {}

    def action_masks(self):
        return allowed(self.time)


def clocks():
    """Episodes end at different steps, and most rollouts end within one."""
    return DummyVecEnv([lambda: Clock(7), lambda: Clock(4), lambda: Clock(100)])


def masked(env):
    """Forbid the first choice, and others at times."""
    first = env.action_space.nvec if isinstance(env.action_space, spaces.MultiDiscrete) else [env.action_space.n]
    return ActionMasker(env, lambda env: np.concatenate([np.arange(n) > np.random.randint(2) for n in first]))


CASES = {
    "discrete": Case("MlpLstmPolicy", lambda: InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3, ep_length=11), lstm()),
    "three-environments": Case("MlpLstmPolicy", clocks, lstm()),
    "multidiscrete": Case(
        "MlpLstmPolicy", lambda: AsBox(InvalidActionEnvMultiDiscrete([3, 4], n_invalid_actions=2, ep_length=11)), lstm()
    ),
    "multibinary": Case(
        "MlpLstmPolicy", lambda: AsBox(InvalidActionEnvMultiBinary(4, n_invalid_actions=2, ep_length=11)), lstm()
    ),
    "shared-lstm": Case("MlpLstmPolicy", clocks, lstm(shared_lstm=True, enable_critic_lstm=False)),
    "actor-lstm-only": Case("MlpLstmPolicy", clocks, lstm(enable_critic_lstm=False, n_lstm_layers=2)),
    "cnn": Case("CnnLstmPolicy", lambda: masked(image(action_dim=3)), lstm()),
    "dict": Case("MultiInputLstmPolicy", lambda: masked(multi_input()), lstm()),
}


@pytest.mark.parametrize("case", CASES)
def test_update_uses_the_masks_and_hidden_states_of_the_rollout(case):
    """With unchanged parameters, the update computes the log-probabilities of the rollout. Invalid actions have none."""
    model = collect(CASES[case].build(MaskableRecurrentAdaptiveKLPPO, **SMALL))
    sizes = []
    for data, _, evaluation in sweep(model.policy, model.rollout_buffer, True, 256):
        assert th.allclose(evaluation.log_prob, evaluation.old_log_prob, atol=1e-5)
        assert evaluation.log_prob.min() > -10  # that of an invalid action is about −1e8
        probabilities = evaluation.distribution.log_probs.exp()
        masks = data.action_masks[data.mask > 0.5] > 0.5
        assert (probabilities[~masks] == 0).all()
        assert (probabilities[masks] > 0).all()
        assert (~masks).sum() > 0
        sizes.append((len(data.mask), len(masks)))
    n_rows, n_transitions = np.sum(sizes, axis=0)
    assert n_transitions == 64 * model.n_envs
    assert case != "three-environments" or n_rows > n_transitions  # there is padding


def stepwise_logits(model, observations, episode_starts):
    """The logits without masks, one step after the other with torch's LSTM alone, shape (n_steps, n_envs, 6)."""
    lstm, logits = model.policy.lstm_actor, []
    state = tuple(th.zeros(1, observations.shape[1], lstm.hidden_size) for _ in range(2))
    with th.no_grad():
        for observation, start in zip(th.as_tensor(observations), th.as_tensor(episode_starts), strict=True):
            output, state = lstm(observation[None], tuple(part * (1 - start)[None, :, None] for part in state))
            logits.append(model.policy.action_net(model.policy.mlp_extractor.forward_actor(output[0])))
    return th.stack(logits).double().numpy()


def test_kl_is_that_of_valid_actions_in_valid_steps():
    """The logged KL of an update, by hand: without padding, and with the probabilities of the four allowed actions."""
    model = collect(CASES["three-environments"].build(MaskableRecurrentAdaptiveKLPPO, learning_rate=0.01, **SMALL))
    observations, starts = model.rollout_buffer.observations.copy(), model.rollout_buffer.episode_starts.copy()
    before = stepwise_logits(model, observations, starts)
    model.train()
    after = stepwise_logits(model, observations, starts)
    kl = []
    for step, env in np.ndindex(64, 3):
        valid = allowed(int(observations[step, env, 0]))
        old, new = (np.exp(logits[step, env, valid]) for logits in (before, after))
        old, new = old / old.sum(), new / new.sum()
        kl.append(np.sum(old * np.log(old / new)))
    assert len(set(observations[:, :, 0].argmax(axis=0))) == 3  # episodes of three lengths: sequences were padded
    assert logged(model)["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert logged(model)["kl_max"] == pytest.approx(np.max(kl), rel=1e-4)
    assert np.mean(kl) > 1e-3


@pytest.mark.parametrize("case", ["three-environments", "multibinary", "actor-lstm-only", "dict"])
def test_padding_does_not_change_kl_loss_or_gradients(case):
    assert_padding_changes_nothing(collect(CASES[case].build(MaskableRecurrentAdaptiveKLPPO, ent_coef=0.01, **SMALL)))


class WithoutMemory(MaskableRecurrentActorCriticPolicy):
    """An LSTM policy that passes the features on, unchanged: what remains is MaskablePPO's policy."""

    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        return features, lstm_states


@pytest.mark.parametrize("case", ["discrete", "three-environments", "multidiscrete", "multibinary"])
def test_without_a_memory_it_is_the_masked_algorithm(case):
    """One minibatch of all transitions, since minibatches of sequences are not shuffled. Three steps of the optimizer."""
    make_env = CASES[case].make_env

    def learned(algorithm, policy, **policy_kwargs):
        env = make_env()
        arguments = {"n_epochs": 3, "learning_rate": 0.01, "ent_coef": 0.01, "policy_kwargs": policy_kwargs, "seed": 0}
        model = algorithm(policy, env, n_steps=64, batch_size=1000, init_kl_coef=3.0, **arguments)
        model.set_random_seed(1)  # the LSTM has drawn its parameters
        model.learn(64)
        return model

    n_features = learned(MaskableAdaptiveKLPPO, "MlpPolicy").policy.features_dim
    masked = learned(MaskableAdaptiveKLPPO, "MlpPolicy")
    both = learned(MaskableRecurrentAdaptiveKLPPO, WithoutMemory, lstm_hidden_size=n_features)
    assert np.array_equal(masked.rollout_buffer.actions, both.rollout_buffer.actions)
    assert np.array_equal(masked.rollout_buffer.action_masks, both.rollout_buffer.action_masks)
    ours = both.policy.state_dict()
    for name, value in masked.policy.state_dict().items():
        assert th.allclose(ours[name], value, atol=2e-6), name
    assert logged(both)["kl"] == pytest.approx(logged(masked)["kl"], rel=1e-3)
    assert logged(both)["kl"] > 1e-3


class AnyAction(Clock):
    """Every action is valid, and the masks say so."""

    def step(self, action):
        self.time, self.last = self.time + 1, action
        return self.observation(), float(action == self.time % 6), self.time == self.length, False, {}

    def action_masks(self):
        return np.ones(6, dtype=bool)


def multidiscrete():
    return ActionMasker(AsBox(IdentityEnvMultiDiscrete(3, ep_length=11)), lambda env: np.ones(6, dtype=bool))


@pytest.mark.parametrize(
    ("policy", "make_env", "use_masking"),
    [
        ("MlpLstmPolicy", lambda: DummyVecEnv([lambda: AnyAction(7), lambda: AnyAction(4)]), True),
        ("MlpLstmPolicy", lambda: DummyVecEnv([lambda: AnyAction(7), lambda: AnyAction(4)]), False),
        ("MlpLstmPolicy", multidiscrete, True),
        ("CnnLstmPolicy", lambda: ActionMasker(image(action_dim=3), lambda env: np.ones(3)), True),
        ("MultiInputLstmPolicy", lambda: ActionMasker(multi_input(), lambda env: [True] * 4), False),
    ],
    ids=["discrete", "discrete-unmasked", "multidiscrete", "cnn", "dict"],
)
def test_where_everything_is_allowed_it_is_the_recurrent_algorithm(policy, make_env, use_masking):
    """
    The same actions, minibatches and steps. Not to the bit: sb3-contrib normalizes the logits of a masked distribution twice,
    which rounds. (MultiBinary has other networks there.)
    """
    case = Case(policy, make_env, lstm())
    recurrent = case.build(RecurrentAdaptiveKLPPO, **SMALL).learn(64)
    both = case.build(MaskableRecurrentAdaptiveKLPPO, **SMALL).learn(64, use_masking=use_masking)
    assert np.array_equal(recurrent.rollout_buffer.actions, both.rollout_buffer.actions)
    assert (parameters(both) - parameters(recurrent)).abs().max() < 1e-5
    assert logged(both)["kl"] == pytest.approx(logged(recurrent)["kl"], rel=1e-2)


@pytest.mark.parametrize("case", ["three-environments", "multibinary", "shared-lstm", "dict"])
def test_save_load_predict_and_continue(case, tmp_path):
    model = CASES[case].build(MaskableRecurrentAdaptiveKLPPO, **SMALL).learn(2 * 64)
    model.save(tmp_path / "model")
    loaded = MaskableRecurrentAdaptiveKLPPO.load(tmp_path / "model", env=model.get_env())
    assert loaded.kl_coef == model.kl_coef
    n_envs, observation = model.n_envs, model.env.reset()
    masks = np.stack(model.env.env_method("action_masks")).astype(bool)
    for deterministic in (True, False):
        action, state = loaded.predict(observation, episode_start=np.ones(n_envs, bool), action_masks=masks)
        second, _ = loaded.predict(observation, state, np.zeros(n_envs, bool), deterministic, action_masks=masks)
        assert len(action) == len(second) == n_envs
    assert th.equal(parameters(loaded), parameters(model))
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps > model.num_timesteps
    assert not th.equal(parameters(loaded), parameters(model))


def test_predict_takes_only_allowed_actions():
    model = CASES["discrete"].build(MaskableRecurrentAdaptiveKLPPO)
    for action in range(6):
        mask = np.arange(6) == action
        assert model.predict(0, action_masks=mask, deterministic=bool(action % 2))[0] == action
        assert model.predict(0, action_masks=mask.tolist())[0] == action
    assert {int(model.predict(0)[0]) for _ in range(200)} == set(range(6))
    # A mask is that of one call
    model.predict(0, action_masks=mask)
    state = (th.zeros(1, 1, 16), th.zeros(1, 1, 16))
    distribution, _ = model.policy.get_distribution(th.zeros(1), state, th.zeros(1))
    assert (distribution.distribution.probs > 0.01).all()
    distribution, _ = model.policy.get_distribution(th.zeros(1), state, th.zeros(1), action_masks=mask)
    assert np.array_equal(distribution.distribution.probs.flatten() > 0, mask)


def test_memory_matters_to_predict():
    model = CASES["three-environments"].build(MaskableRecurrentAdaptiveKLPPO)
    probabilities = []
    state = None
    for start in ([True] * 3, [False] * 3, [False, True, False]):
        _, state = model.predict(np.ones((3, 2), np.float32), state, np.array(start), action_masks=np.ones((3, 6)))
        probabilities.append(model.policy.action_dist.distribution.probs)
    first, second, third = probabilities
    assert not th.allclose(first[0], second[0], atol=1e-6)
    assert th.allclose(first[1], third[1], atol=1e-6)  # an episode began
    assert not th.allclose(second[2], third[2], atol=1e-6)


def test_nothing_allowed_is_everything_allowed():
    """As with MaskablePPO: boards where no move exists end no training."""
    make_env = lambda: ActionMasker(AnyAction(7), lambda env: np.full(6, env.unwrapped.time != 3))  # noqa: E731
    model = Case("MlpLstmPolicy", make_env, lstm()).build(MaskableRecurrentAdaptiveKLPPO, **SMALL).learn(128)
    assert logged(model)["kl"] > 0
    assert logged(model)["undone_updates"] == 0


def test_compiled_falls_back_to_the_bit():
    """As for RecurrentAdaptiveKLPPO, see test_compiled.py."""
    case = CASES["three-environments"]
    eager = case.build(MaskableRecurrentAdaptiveKLPPO, **SMALL).learn(3 * 64)
    compiled = case.build(MaskableRecurrentAdaptiveKLPPO, compile=True, **SMALL)
    with pytest.warns(UserWarning, match="compile=True: torch.compile cannot be used"):
        compiled.learn(3 * 64)
    assert th.equal(parameters(compiled), parameters(eager))


def test_policies_of_contrib_are_refused():
    with pytest.raises(ValueError, match="policy=RecurrentActorCriticPolicy must subclass MaskableRecurrentActorCriticPolicy"):
        MaskableRecurrentAdaptiveKLPPO(RecurrentAdaptiveKLPPO.policy_aliases["MlpLstmPolicy"], Clock())


def test_continuous_actions_are_refused():
    with pytest.raises(NotImplementedError, match=r"Box.*Must be of type Gym Spaces: Discrete, MultiDiscrete"):
        MaskableRecurrentAdaptiveKLPPO("MlpLstmPolicy", pendulum())


def test_environment_without_masks_is_named():
    model = MaskableRecurrentAdaptiveKLPPO("MlpLstmPolicy", make_vec_env("CartPole-v1", 2), **SMALL, **lstm())
    with pytest.raises(ValueError, match=r"no method action_masks\(\): add it, or wrap .*ActionMasker.*use_masking=False"):
        model.learn(64)
    for env in (model.get_env(), gym.make("CartPole-v1")):
        with pytest.raises(ValueError, match=r"no method action_masks\(\): .*use_masking=False allows every action"):
            evaluate_policy(model, env)
    assert model.learn(64, use_masking=False).num_timesteps == 128
    assert evaluate_policy(model, model.get_env(), 1, use_masking=False)[0] > 0


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.ones(5), r"action_masks of shape \(1, 5\): Discrete\(6\) needs 6 booleans for each of 1 observations"),
        ([np.ones(3), np.ones(4)], r"action_masks\(\) must return one array"),
        (None, r"action_masks of shape \(1,\): Discrete\(6\) needs 6 booleans for each of 1 observations"),
    ],
    ids=["wrong length", "ragged", "None"],
)
def test_masks_of_the_wrong_length_are_refused(masks, message):
    env = ActionMasker(AnyAction(), lambda env: masks)
    model = MaskableRecurrentAdaptiveKLPPO("MlpLstmPolicy", env, **SMALL, **lstm())
    with pytest.raises(ValueError, match=message):
        model.learn(64)
    with pytest.raises(ValueError, match=message):
        evaluate_policy(model, model.get_env())
    with pytest.raises(ValueError, match=r"action_masks of shape \(2, 6\): Discrete\(6\) needs 6 booleans for each of 1"):
        model.predict(np.zeros(2), action_masks=np.ones((2, 6)))
    assert model.learn(64, use_masking=False).num_timesteps == 64  # no mask stays behind
