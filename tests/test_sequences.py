"""Test the fast way through sequences: an LSTM is given whole sequences, in blocks with a bounded number of padded steps."""

import math
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv

from sb3_adaptive_kl import MaskableRecurrentAdaptiveKLPPO, PredictivePenalty, RecurrentAdaptiveKLPPO
from sb3_adaptive_kl.fast import sequences
from sb3_adaptive_kl.fast.sequences import in_blocks, into_blocks, sequences_at_once
from sb3_adaptive_kl.rollout.evaluation import evaluate
from sb3_adaptive_kl.rollout.minibatches import minibatches
from tests import test_maskable_recurrent
from tests.conftest import Case, collect, image, multi_input, parameters
from tests.test_recurrent import CASES, lstm

ALIKE = {"n_steps": 64, "batch_size": 24, "n_epochs": 2, "clip_range": 0.2, "ent_coef": 0.01}
# PPO with clipping, except for a negligible penalty
NO_PENALTY = {"init_kl_coef": 1e-8, "kl_rule": "fixed", "kl_coef_bounds": (1e-9, 1)}
EPISODES = {
    **{name: CASES[name] for name in ("discrete", "multidiscrete", "gsde", "box")},
    "cartpoles": Case("MlpLstmPolicy", lambda: make_vec_env("CartPole-v1", n_envs=3, seed=0), lstm()),
    "two-layers": Case("MlpLstmPolicy", lambda: make_vec_env("CartPole-v1", n_envs=2, seed=0), lstm(n_lstm_layers=2)),
    "shared-lstm": Case(
        "MlpLstmPolicy", lambda: gym.make("CartPole-v1"), lstm(shared_lstm=True, enable_critic_lstm=False, n_lstm_layers=2)
    ),
    "actor-lstm-only": Case("MlpLstmPolicy", lambda: gym.make("CartPole-v1"), lstm(enable_critic_lstm=False)),
    "cnn": Case("CnnLstmPolicy", lambda: gym.wrappers.TimeLimit(image(action_dim=3), 9), lstm()),
    "dict": Case("MultiInputLstmPolicy", lambda: gym.wrappers.TimeLimit(multi_input(), 9), lstm()),
}


def train_counting_calls(model):
    """Train once; return the steps and sequences that the actor's LSTM was given by each of its calls with a graph."""
    calls = []
    with model.policy.lstm_actor.register_forward_hook(
        lambda module, args, output: calls.append(args[0].shape[:2]) if th.is_grad_enabled() else None
    ):
        model.train()
    return calls


@pytest.mark.parametrize("case", EPISODES)
def test_update_with_several_episodes_per_minibatch_equals_recurrent_ppo(case):
    host = EPISODES[case].build(RecurrentPPO, **ALIKE)
    n_transitions = 64 * host.n_envs
    host.learn(n_transitions)
    ours = EPISODES[case].build(RecurrentAdaptiveKLPPO, **NO_PENALTY, **ALIKE)
    start = parameters(ours)
    ours.learn(n_transitions)
    if case not in ("gsde", "box"):  # Pendulum's episodes are longer
        assert host.rollout_buffer.episode_starts.sum() >= n_transitions / 24
    assert (parameters(ours) - start).abs().max() > 1e-3
    assert (parameters(ours) - parameters(host)).abs().max() < 1e-6


def test_lstm_is_given_whole_sequences(monkeypatch):
    """Episodes of 10 steps: a minibatch of 24 steps takes one call, where sb3-contrib's policy needs 10."""
    model = collect(CASES["discrete"].build(RecurrentAdaptiveKLPPO, n_steps=48, batch_size=24, n_epochs=2))
    calls = train_counting_calls(model)
    assert len(calls) == 4
    assert all(n_steps > 5 for n_steps, _ in calls)

    monkeypatch.setenv("SB3_ADAPTIVE_KL_FAST", "0")
    calls = train_counting_calls(model)
    assert len(calls) > 20
    assert all(n_steps == 1 for n_steps, _ in calls)


def test_one_long_episode_does_not_make_the_lstm_quadratic():
    """One episode of 500 steps and 500 of a single one: sb3-contrib pads the minibatch of 1000 to 250,500."""
    model = collect(CASES["discrete"].build(RecurrentAdaptiveKLPPO, n_steps=1000, batch_size=None, n_epochs=1))
    starts = np.ones(1000, dtype=np.float32)
    starts[251:750] = 0
    model.rollout_buffer.episode_starts = starts[:, None]
    calls = train_counting_calls(model)
    assert 1000 <= sum(n_steps * n_sequences for n_steps, n_sequences in calls) <= 2000
    assert len(calls) <= 3  # the random split cuts the long episode in two


@given(st.lists(st.one_of(st.integers(1, 4), st.integers(1, 300)), min_size=1, max_size=60))
def test_blocks_hold_each_transition_once_and_little_padding(lengths):
    """Within a block, sequences follow their own steps; blocks halve, so that there are few of them."""
    lengths = np.sort(lengths)[::-1]
    first = np.cumsum([0, *lengths[:-1]])
    blocks = into_blocks(first, lengths, np.zeros(len(lengths)), th.device("cpu")).blocks
    sizes = [block.n_sequences for block in blocks]
    assert sum(block.n_steps * block.n_sequences for block in blocks) <= 2 * lengths.sum()
    assert sizes[0] == len(lengths)
    assert all(after <= before / 2 for before, after in pairwise(sizes))
    assert len(blocks) <= 1 + math.log2(len(lengths))
    found, start = {}, 0
    for block in blocks:
        for row, cell in zip(block.rows.tolist(), block.cells.tolist(), strict=True):
            step, sequence = divmod(cell, block.n_sequences)
            assert found.setdefault(row, (sequence, start + step)) == (sequence, start + step)
        start += block.n_steps
    assert len(found) == lengths.sum() == sum(len(block.rows) for block in blocks)
    assert found == {first[i] + t: (i, t) for i, length in enumerate(lengths) for t in range(length)}


@pytest.mark.parametrize("n_layers", [1, 2])
def test_blocks_give_what_each_sequence_gives_alone(n_layers):
    """Outputs and gradients, with lengths that need several blocks, in another order than the minibatch's."""
    lengths, order = np.array([2, 30, 1, 1, 5, 1, 1, 1]), np.array([1, 4, 0, 2, 3, 5, 6, 7])
    first = np.cumsum([0, *lengths[:-1]])
    begins = np.array([1.0, 0, 1, 0, 1, 0, 1, 1])
    th.manual_seed(0)
    network = th.nn.LSTM(3, 4, n_layers).double()
    features = th.randn(lengths.sum(), 3, dtype=th.float64, requires_grad=True)
    hidden, cell = th.randn(2, n_layers, len(lengths), 4, dtype=th.float64)
    weight = th.randn(lengths.sum(), 4, dtype=th.float64)

    arranged = into_blocks(first[order], lengths[order], begins[order], th.device("cpu"))
    assert len(arranged.blocks) > 1
    outputs, _ = in_blocks(features, (hidden[:, order], cell[:, order]), arranged, network)
    alone = []
    for i, (start, length) in enumerate(zip(first, lengths, strict=True)):
        keep = 1 - begins[i]
        output, _ = network(features[start : start + length], (keep * hidden[:, i], keep * cell[:, i]))
        alone.append(output)
    expected = th.cat(alone)
    th.testing.assert_close(outputs, expected)
    inputs = [features, *network.parameters()]
    th.testing.assert_close(
        th.autograd.grad((outputs * weight).sum(), inputs), th.autograd.grad((expected * weight).sum(), inputs)
    )


@pytest.mark.parametrize(
    ("algorithm", "case"),
    [
        (RecurrentAdaptiveKLPPO, EPISODES["cartpoles"]),
        (MaskableRecurrentAdaptiveKLPPO, test_maskable_recurrent.CASES["three-environments"]),
    ],
    ids=["unmasked", "masked"],
)
def test_draws_are_the_buffers_without_padding(algorithm, case):
    """Also where an environment ends within an episode, and with hidden states that differ from step to step."""
    model = collect(case.build(algorithm, n_steps=64))
    buffer, rng = model.rollout_buffer, np.random.default_rng(0)
    buffer.episode_starts[0] = 0
    for name in ("hidden_states_pi", "cell_states_pi", "hidden_states_vf", "cell_states_vf"):
        setattr(buffer, name, rng.normal(size=buffer.hidden_state_shape).astype(np.float32))

    def evaluate_all():
        np.random.seed(1)
        drawn = minibatches(buffer, 50)
        return [(data, index, evaluate(model.policy, data, needs_distribution=False)) for data, index in drawn]

    padded = evaluate_all()
    with sequences_at_once(model.policy, buffer):
        ours = evaluate_all()
    assert len(ours) == len(padded) == 4
    for (one, index, evaluation), (other, expected_index, expected) in zip(ours, padded, strict=True):
        assert index.equal(expected_index)
        assert one._fields == other._fields
        for name in set(one._fields) - {"lstm_states", "episode_starts", "mask"}:
            expected_field = getattr(other, name)[other.mask > 0.5]
            assert getattr(one, name).equal(expected_field.float() if name == "actions" else expected_field)
        th.testing.assert_close(evaluation.values, expected.values)
        th.testing.assert_close(evaluation.log_prob, expected.log_prob)


@pytest.mark.parametrize("method", sequences.EVALUATING)
def test_policies_of_the_user_run_their_own_code(method, monkeypatch):
    """A method that the user has written is given what sb3-contrib gives it: padded tensors, and one step at a time."""
    function = RecurrentActorCriticPolicy.__dict__.get(method) or getattr(RecurrentActorCriticPolicy, method)
    static = isinstance(function, staticmethod)

    def theirs(*args, **kwargs):
        return (function.__func__ if static else function)(*args, **kwargs)

    policy = type("Theirs", (RecurrentActorCriticPolicy,), {method: staticmethod(theirs) if static else theirs})
    monkeypatch.setattr(sequences, "in_blocks", None)
    model = collect(Case(policy, lambda: IdentityEnv(4, ep_length=11), lstm()).build(RecurrentAdaptiveKLPPO, **ALIKE))
    calls = train_counting_calls(model)
    assert all(n_steps == 1 for n_steps, _ in calls)


def test_lstms_of_the_user_run_as_contribs_policy_runs_them(monkeypatch):
    monkeypatch.setattr(sequences, "in_blocks", None)
    model = collect(CASES["discrete"].build(RecurrentAdaptiveKLPPO, **ALIKE))
    model.policy.lstm_critic.__class__ = type("Theirs", (th.nn.LSTM,), {})
    model.train()


def test_rule_may_ask_the_policy_during_an_update():
    """It is given what sb3-contrib's policy is given: tensors."""

    class Curious(PredictivePenalty):
        def within_update(self, kl_coef, *args):
            actions.append(model.predict(np.zeros(model.observation_space.shape), deterministic=True)[0])
            return kl_coef

    actions = []
    model = CASES["box"].build(RecurrentAdaptiveKLPPO, kl_rule=Curious(), **ALIKE)
    model.learn(64)
    assert len(actions) > 1


def test_policy_and_buffer_are_restored_after_an_update_that_fails(monkeypatch):
    model = collect(CASES["box"].build(RecurrentAdaptiveKLPPO, **ALIKE))
    policy, buffer = model.policy, model.rollout_buffer

    def fail(*_):
        assert "_process_sequence" in vars(policy)
        assert "_get_samples" in vars(buffer)
        raise KeyError("stop")

    monkeypatch.setattr(model, "_optimize", fail)
    with pytest.raises(KeyError, match="stop"):
        model.train()
    assert "_process_sequence" not in vars(policy)
    assert "_get_samples" not in vars(buffer)
