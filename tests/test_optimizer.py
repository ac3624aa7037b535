"""A step along given gradients is the optimizer's own step, fast and plain; clipping is torch's."""

import copy

import pytest
import torch as th
from stable_baselines3 import PPO

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.fast.optimizer import FastOptimizerStep, FusedAdam
from sb3_adaptive_kl.step import OptimizerStep, clip_gradients
from tests.conftest import CASES, parameters

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


def network():
    th.manual_seed(0)
    return th.nn.Sequential(th.nn.Linear(3, 4), th.nn.Tanh(), th.nn.Linear(4, 2))


def gradients_of(network, step):
    generator = th.Generator().manual_seed(step)
    return [th.randn(parameter.shape, generator=generator) for parameter in network.parameters()]


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_clipping_is_torchs(max_norm):
    net = network()
    gradients = gradients_of(net, 0)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = th.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    ours, our_norm = clip_gradients([*gradients, None], max_norm)
    assert our_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert ours.pop() is None
    for parameter, gradient in zip(net.parameters(), ours, strict=True):
        assert th.allclose(parameter.grad, gradient, rtol=1e-5, atol=0)


def test_clipping_leaves_gradients_that_share_memory_alone():
    shared = th.ones(4)
    (first, second), norm = clip_gradients([shared, shared], 1.0)
    assert norm == 8**0.5
    assert th.allclose(first, second)
    assert (shared == 1).all()


@pytest.mark.parametrize(
    ("optimizer", "fast"),
    [
        (lambda p: th.optim.Adam(p, 0.01), True),
        (lambda p: th.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True, maximize=True, betas=(0.8, 0.9)), True),
        (lambda p: th.optim.AdamW(p, 0.01, weight_decay=0.1), True),
        (lambda p: th.optim.Adam(p, 0.01, foreach=True), False),
        (lambda p: th.optim.Adam(p, 0.01, fused=False), False),
        (lambda p: th.optim.SGD(p, 0.01, momentum=0.9), False),
        (lambda p: th.optim.Adam([{"params": [parameter]} for parameter in p], 0.01), False),
    ],
)
@pytest.mark.parametrize("kind", [OptimizerStep, FastOptimizerStep])
def test_step_equals_the_optimizers(optimizer, fast, kind):
    """The same parameters and the same state, whichever way is taken; a parameter without a gradient stays."""
    theirs, ours = network(), network()
    frozen = th.nn.Parameter(th.ones(1))
    their_optimizer, our_optimizer = (optimizer([*net.parameters(), frozen]) for net in (theirs, ours))
    step = kind(our_optimizer, [*ours.parameters(), frozen])
    for i in range(5):
        for parameter, gradient in zip(theirs.parameters(), gradients_of(theirs, i), strict=True):
            parameter.grad = gradient
        their_optimizer.step()
        step.take([*gradients_of(ours, i), None])
    if kind is FastOptimizerStep:
        assert (FusedAdam.of(our_optimizer) is not None) == fast
    assert frozen == 1
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert th.allclose(parameter, other, rtol=1e-5, atol=1e-7)
    our_state, their_state = our_optimizer.state_dict(), their_optimizer.state_dict()
    assert our_state["param_groups"] == their_state["param_groups"]
    for key, state in their_state["state"].items():
        assert state.keys() == our_state["state"][key].keys()
        assert all(th.allclose(state[name], our_state["state"][key][name], rtol=1e-5, atol=1e-9) for name in state)


def test_gradients_that_come_and_go():
    """Adam moves what has a gradient now, and only that: the fast step must not move yesterday's parameters."""
    nets = network(), network()
    optimizers = [th.optim.Adam(net.parameters(), 0.01) for net in nets]
    step = FastOptimizerStep(optimizers[1], list(nets[1].parameters()))
    for i, present in enumerate([(0, 1), (0, 1, 2, 3), (0, 1, 2, 3), (2, 3), (0, 1, 2, 3)]):
        gradients = [gradient if j in present else None for j, gradient in enumerate(gradients_of(nets[0], i))]
        for parameter, gradient in zip(nets[0].parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizers[0].step()
        step.take(gradients)
    for theirs, ours in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert th.allclose(theirs, ours, rtol=1e-5, atol=1e-7)


def test_optimizer_step_hooks_are_called():
    net = network()
    optimizer = th.optim.Adam(net.parameters())
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    step = FastOptimizerStep(optimizer, list(net.parameters()))
    for i in range(3):
        step.take(gradients_of(net, i))
    assert len(calls) == 3
    assert FusedAdam.of(optimizer) is None


def test_checkpoints_are_exchanged_with_ppo(tmp_path):
    """The optimizer's state is stock Adam's, and continues in either algorithm."""
    for first, second in ((PPO, AdaptiveKLPPO), (AdaptiveKLPPO, PPO)):
        model = CASES["box"].build(first, **SMALL).learn(2 * 64)
        assert model.policy.optimizer.param_groups[0]["fused"] is None
        other = CASES["box"].build(second, **SMALL)
        other.set_parameters(copy.deepcopy(model.get_parameters()), exact_match=True)
        assert th.equal(parameters(other), parameters(model))
        other.learn(64)
        steps = {state["step"].item() for state in other.policy.optimizer.state.values()}
        assert steps == {3 * 2 * 2}


@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.SGD])
def test_parameters_frozen_during_a_run_do_not_move(optimizer):
    """Nor along an old gradient, as they would if one were left behind."""
    model = (
        CASES["box"].build(AdaptiveKLPPO, n_steps=64, batch_size=32, policy_kwargs={"optimizer_class": optimizer}).learn(64)
    )
    layers = model.policy.mlp_extractor.policy_net
    before = layers[0].weight.clone()
    assert all(parameter.grad is None for parameter in model.policy.parameters())
    model.policy.value_net.weight.grad = th.ones_like(model.policy.value_net.weight)  # a callback's own
    layers.requires_grad_(False)
    model.learn(64)
    assert th.equal(layers[0].weight, before)
    layers.requires_grad_(True)
    model.learn(64)
    assert not th.equal(layers[0].weight, before)
