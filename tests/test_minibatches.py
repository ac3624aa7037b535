"""Drawing several minibatches at once gives the host's minibatches, to the bit."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_adaptive_kl import AdaptiveKLPPO, MaskableAdaptiveKLPPO
from sb3_adaptive_kl.rollout import minibatches as module
from sb3_adaptive_kl.rollout.evaluation import valid_transitions
from sb3_adaptive_kl.rollout.minibatches import minibatches
from tests.conftest import CASES, Case, collect

MODELS = {
    "box": (CASES["box"], AdaptiveKLPPO),
    "discrete": (CASES["discrete"], AdaptiveKLPPO),
    "cnn": (CASES["cnn"], AdaptiveKLPPO),
    "dict": (CASES["dict"], AdaptiveKLPPO),
    "masked": (Case("MlpPolicy", lambda: InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3)), MaskableAdaptiveKLPPO),
}


def equal(field, other):
    if isinstance(field, dict):
        return field.keys() == other.keys() and all(th.equal(field[key], other[key]) for key in field)
    return th.equal(field, other)


@pytest.mark.parametrize("block_bytes", [1, 10_000, 2**22])
@pytest.mark.parametrize("name", MODELS)
def test_minibatches_are_the_hosts(name, block_bytes, monkeypatch):
    case, algorithm = MODELS[name]
    buffer = collect(case.build(algorithm, n_steps=100, batch_size=25)).rollout_buffer
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    for batch_size in (32, 1, 100, 1000, None):
        np.random.seed(3)
        theirs = list(buffer.get(batch_size))
        state = np.random.random()
        np.random.seed(3)
        ours = list(minibatches(buffer, batch_size))
        assert np.random.random() == state
        np.random.seed(3)
        permutation = th.as_tensor(np.random.permutation(100))
        assert len(theirs) == len(ours)
        assert th.equal(th.cat([index for _, index in ours]), permutation)
        for samples, (our_samples, index) in zip(theirs, ours, strict=True):
            assert type(samples) is type(our_samples)
            assert len(index) == len(samples.advantages)
            assert all(equal(*pair) for pair in zip(samples, our_samples, strict=True))


def test_block_is_not_larger_than_its_bytes(monkeypatch):
    """Images would otherwise be in memory twice."""
    model = collect(CASES["cnn"].build(AdaptiveKLPPO, n_steps=256, batch_size=8))
    drawn = []
    get_samples = model.rollout_buffer._get_samples

    def recording(self, batch_inds, env=None):
        drawn.append(len(batch_inds))
        return get_samples(batch_inds, env)

    monkeypatch.setattr(module, "is_stock", lambda *_: True)
    monkeypatch.setattr(type(model.rollout_buffer), "_get_samples", recording)
    monkeypatch.setattr(module, "BLOCK_BYTES", 100_000)
    assert len(list(minibatches(model.rollout_buffer, 8))) == 32
    assert drawn == [72] * 3 + [40]  # an image has 36 · 36 = 1296 bytes, the rest of a transition a few dozen


@pytest.mark.parametrize("on_the_instance", [False, True])
def test_get_samples_is_restored_after_an_epoch(on_the_instance):
    buffer = collect(CASES["box"].build(AdaptiveKLPPO, n_steps=64)).rollout_buffer
    calls = []
    if on_the_instance:
        get_samples = buffer._get_samples

        @functools.wraps(get_samples)
        def counting(*args):
            calls.append(1)
            return get_samples(*args)

        buffer._get_samples = counting
    before = vars(buffer).get("_get_samples")
    for _ in range(2):
        assert len(list(minibatches(buffer, 16))) == 4
        assert vars(buffer).get("_get_samples") is before
    assert len(calls) == (8 if on_the_instance else 0)


class Backwards(RolloutBuffer):
    """Reads a permutation from its end, by views with a negative stride."""

    def get(self, batch_size=None):
        next(super().get(1))  # flattens the rollout
        backwards = np.random.permutation(self.buffer_size * self.n_envs)[::-1]
        for start in range(0, len(backwards), batch_size):
            yield self._get_samples(backwards[start : start + batch_size])


def test_indices_may_be_any_view():
    buffer = collect(CASES["box"].build(AdaptiveKLPPO, n_steps=64, rollout_buffer_class=Backwards)).rollout_buffer
    drawn = list(minibatches(buffer, 16))
    assert sorted(th.cat([index for _, index in drawn]).tolist()) == list(range(64))
    for samples, index in drawn:
        assert np.array_equal(samples.actions.numpy(), buffer.actions[index.numpy()])


def test_indices_do_not_follow_torchs_default_device():
    with th.device("meta"):
        assert module.to_device(np.arange(3), th.device("cpu")).tolist() == [0, 1, 2]


def test_only_sequences_are_padded():
    """A field of this name in the samples of the user's buffer may mean anything."""
    mask = th.tensor([1.0, 0.0])
    assert valid_transitions(SimpleNamespace(mask=mask)) is None
    assert valid_transitions(SimpleNamespace(mask=mask, lstm_states=())).tolist() == [True, False]
