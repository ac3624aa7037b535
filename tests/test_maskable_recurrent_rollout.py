"""What callbacks do to an LSTM policy during a rollout under masks: the masks of the transitions stay theirs."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.callbacks import BaseCallback

from sb3_adaptive_kl import MaskableRecurrentAdaptiveKLPPO
from tests.conftest import collect
from tests.test_maskable_recurrent import CASES, SMALL, allowed


def test_callback_may_run_the_policy():
    """Before the rollout, and after the environments have moved on: the masks of the transitions stay theirs."""

    class Curious(BaseCallback):
        def _on_step(self):
            policy, states, starts = self.model.policy, self.model._last_lstm_states, th.zeros(3)
            policy(th.ones(3, 2), states, starts)
            policy(th.ones(3, 2), states, starts, action_masks=None)
            policy(th.ones(3, 2), states, starts, True, np.ones((3, 6)))
            few = RNNStates(*[tuple(state[:, :2].contiguous() for state in part) for part in states])
            assert len(policy(th.ones(2, 2), few, starts[:2])[0]) == 2  # other states than the environments'
            self.model.predict(np.ones((3, 2)), action_masks=np.ones((3, 6)))
            return True

        _on_rollout_start = _on_step

    model = collect(CASES["three-environments"].build(MaskableRecurrentAdaptiveKLPPO, **SMALL), Curious())
    buffer = model.rollout_buffer
    for step, env in np.ndindex(64, 3):
        assert np.array_equal(buffer.action_masks[step, env], allowed(int(buffer.observations[step, env, 0])))


def test_copies_made_during_a_rollout_act_without_its_masks():
    """A frozen opponent plays elsewhere."""
    model, copies = CASES["discrete"].build(MaskableRecurrentAdaptiveKLPPO, **SMALL), []

    def keep(*_):
        if not copies:
            copies.extend((copy.deepcopy(model.policy), pickle.loads(pickle.dumps(model.policy))))
        return True

    collect(model, keep)
    for each in copies:
        taken = {int(each(th.zeros(1), model._last_lstm_states, th.zeros(1))[0]) for _ in range(200)}
        assert taken == set(range(6))  # of which the environment allows three


def test_another_policy_during_a_rollout_is_refused():
    """It would act without masks."""
    model = CASES["discrete"].build(MaskableRecurrentAdaptiveKLPPO, **SMALL)

    def replace(*_):
        model.policy = copy.deepcopy(model.policy)
        return True

    with pytest.raises(RuntimeError, match=r"has acted without masks: a callback may give model\.policy other parameters"):
        model.learn(64, replace)
