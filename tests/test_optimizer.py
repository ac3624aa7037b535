"""A step is the optimizer's own step, whichever way is taken, for the parameters that the optimizer holds."""

import copy
import math

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sb3_adaptive_kl import AdaptiveKLPPO
from sb3_adaptive_kl.fast.eager import one_kernel
from tests.conftest import CASES, NEEDS_COMPILER, collect, parameters

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}


def network():
    th.manual_seed(0)
    return th.nn.Sequential(th.nn.Linear(3, 4), th.nn.Tanh(), th.nn.Linear(4, 2))


def give_gradients(network, step, present=(0, 1, 2, 3)):
    """Random ones, the same for the same step; None for the parameters that are not present."""
    generator = th.Generator().manual_seed(step)
    for i, parameter in enumerate(network.parameters()):
        gradient = th.randn(parameter.shape, generator=generator)
        parameter.grad = gradient if i in present else None


OPTIMIZERS = {
    "adam": (lambda p: th.optim.Adam(p, 0.01), True),
    "adam with options": (
        lambda p: th.optim.Adam(p, 0.01, weight_decay=0.1, maximize=True, betas=(0.8, 0.9), eps=1e-5),
        True,
    ),
    "amsgrad": (lambda p: th.optim.Adam(p, 0.01, amsgrad=True), False),
    "adamw": (lambda p: th.optim.AdamW(p, 0.01, weight_decay=0.1), True),
    "foreach chosen": (lambda p: th.optim.Adam(p, 0.01, foreach=True), False),
    "not fused chosen": (lambda p: th.optim.Adam(p, 0.01, fused=False), False),
    "sgd": (lambda p: th.optim.SGD(p, 0.01, momentum=0.9), False),
    "rmsprop": (lambda p: th.optim.RMSprop(p, 0.01), False),
    "a group for each": (lambda p: th.optim.Adam([{"params": [parameter]} for parameter in p], 0.01), False),
}


# LBFGS steps with a closure, SparseAdam takes sparse gradients, and Muon (torch 2.9) matrices only
NOT_FOR_NETWORKS = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}
ALL_OF_TORCH = [value for name, value in vars(th.optim).items() if isinstance(value, type) and name not in NOT_FOR_NETWORKS]


@pytest.mark.parametrize("optimizer", ALL_OF_TORCH)
def test_steps_with_every_optimizer_of_torch(optimizer):
    networks = network(), network()
    theirs, ours = (optimizer(net.parameters(), lr=0.01) for net in networks)
    for update in range(2):
        with one_kernel(ours) as take_step:
            for i in range(2):
                for net in networks:
                    give_gradients(net, 2 * update + i)
                theirs.step()
                take_step()
    for expected, parameter in zip(*(net.parameters() for net in networks), strict=True):
        assert th.allclose(parameter, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_equals_the_optimizers(name):
    """The same parameters and the same state, whichever way is taken, over two updates."""
    optimizer, bare = OPTIMIZERS[name]
    theirs, ours = network(), network()
    optimizers = [optimizer(net.parameters()) for net in (theirs, ours)]
    for net, one in zip((theirs, ours), optimizers, strict=True):
        give_gradients(net, 0)
        one.step()  # it makes the state
    for update in range(2):
        with one_kernel(optimizers[1]) as take_step:
            assert (take_step != optimizers[1].step) == bare
            for i in range(3):
                give_gradients(theirs, 3 * update + i)
                give_gradients(ours, 3 * update + i)
                for group in (*optimizers[0].param_groups, *optimizers[1].param_groups):
                    group["lr"] = 0.01 / (1 + i)  # a rule may change it within an update
                optimizers[0].step()
                take_step()
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert th.allclose(parameter, other, rtol=1e-5, atol=1e-7)
    our_state, their_state = optimizers[1].state_dict(), optimizers[0].state_dict()
    assert our_state["param_groups"] == their_state["param_groups"]
    for key, state in their_state["state"].items():
        assert state.keys() == our_state["state"][key].keys()
        for entry, other in zip(state.values(), our_state["state"][key].values(), strict=True):
            assert entry is other is None or th.allclose(entry, other, rtol=1e-5, atol=1e-9)


def test_gradients_that_come_and_go():
    """Adam moves what has a gradient now, and only that: the bare step must not move yesterday's parameters."""
    nets = network(), network()
    optimizers = [th.optim.Adam(net.parameters(), 0.01) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        give_gradients(net, 0)
        optimizer.step()
    for update in range(2):  # in the second, the parameters have moved unequally often
        with one_kernel(optimizers[1]) as take_step:
            assert (take_step == optimizers[1].step) == (update == 1)
            for i, present in enumerate([(0, 1, 2, 3), (0, 1), (0, 1, 2, 3), (2, 3), (0, 1, 2, 3), (0,)]):
                for net in nets:
                    give_gradients(net, 10 * update + i, present)
                optimizers[0].step()
                take_step()
    for theirs, ours in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert th.allclose(theirs, ours, rtol=1e-5, atol=1e-7)


def test_optimizer_step_hooks_are_called():
    net = network()
    optimizer = th.optim.Adam(net.parameters())
    calls = []
    give_gradients(net, 0)
    optimizer.step()
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    with one_kernel(optimizer) as take_step:
        for _ in range(3):
            take_step()
    assert len(calls) == 3


def test_wrapper_of_the_optimizers_step_is_called():
    """As a scheduler of torch sets it on the instance."""
    model = CASES["box"].build(AdaptiveKLPPO, **SMALL).learn(64)
    calls, step = [], model.policy.optimizer.step
    model.policy.optimizer.step = lambda: calls.append(1) or step()
    model.learn(64)
    assert len(calls) == 4


def test_parameters_of_the_optimizer_alone_are_trained():
    """One that the policy uses and does not have moves as PPO moves it, and goes back with an undone update."""
    moved = []
    for algorithm in (PPO, AdaptiveKLPPO):
        model = CASES["box"].build(algorithm, n_steps=64, batch_size=64, n_epochs=1, max_grad_norm=1e6)
        scale = th.nn.Parameter(th.ones(1))
        model.policy.optimizer.add_param_group({"params": [scale]})
        model.policy.action_net.register_forward_hook(lambda module, args, output, scale=scale: output * scale)
        moved.append(collect(model))
        model.train()
        moved[-1] = scale.item()
    assert moved[0] != 1.0
    assert moved[1] == pytest.approx(moved[0], abs=1e-6)
    collect(model)
    model.rollout_buffer.advantages[:] = math.nan
    before = scale.item()
    with pytest.warns(UserWarning, match="undone"):
        model.train()
    assert scale.item() == before


def test_gradients_are_left_as_ppo_leaves_them():
    """Those of the last minibatch, clipped; a parameter outside of the optimizer does not add up gradients over the steps."""
    model = collect(CASES["box"].build(AdaptiveKLPPO, **SMALL))
    model.train()
    gradients = [parameter.grad for parameter in model.policy.parameters()]
    assert th.nn.utils.get_total_norm(gradients) <= model.max_grad_norm * (1 + 1e-5)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    group = model.policy.optimizer.param_groups[0]
    # By identity: tensors compare by their values
    group["params"] = [parameter for parameter in group["params"] if parameter is not model.policy.log_std]
    del model.policy.optimizer.state[model.policy.log_std]
    collect(model).train()
    assert model.policy.log_std.grad is None


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
    model.policy.value_net.weight.grad = th.ones_like(model.policy.value_net.weight)  # a callback's own
    layers.requires_grad_(False)
    model.learn(64)
    assert th.equal(layers[0].weight, before)
    layers.requires_grad_(True)
    model.learn(64)
    assert not th.equal(layers[0].weight, before)


class Transposed(FlattenExtractor):
    """Uses its weight such that the gradient has another memory layout than the weight."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        generator = th.Generator().manual_seed(0)
        self.weight = th.nn.Parameter(th.randn(4, 3, 3, generator=generator))
        self._features_dim = 12

    def forward(self, observations):
        return th.einsum("bi,hoi->bho", super().forward(observations), self.weight).flatten(1)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=NEEDS_COMPILER)])
def test_gradients_of_another_memory_layout(compile, monkeypatch):
    """Adam's fused kernel reads flat memory: it must give what torch's plain step gives."""
    kwargs = {"policy_kwargs": {"features_extractor_class": Transposed}, "learning_rate": 1e-2, "compile": compile, **SMALL}
    fast = CASES["box"].build(AdaptiveKLPPO, **kwargs).learn(2 * 64)
    monkeypatch.setenv("SB3_ADAPTIVE_KL_FAST", "0")
    plain = CASES["box"].build(AdaptiveKLPPO, **{**kwargs, "compile": False}).learn(2 * 64)
    assert (parameters(fast) - parameters(plain)).abs().max() < 1e-5


def test_memory_layout_may_change_after_an_update(monkeypatch):
    results = []
    for fast in ("1", "0"):
        monkeypatch.setenv("SB3_ADAPTIVE_KL_FAST", fast)
        model = CASES["cnn"].build(AdaptiveKLPPO, **SMALL).learn(64)
        model.policy.to(memory_format=th.channels_last)
        collect(model).train()
        results.append([parameter.detach().clone() for parameter in model.policy.parameters()])
    for with_fast, without in zip(*results, strict=True):
        assert (with_fast - without).abs().max() < 1e-5


def test_parameter_that_is_a_part_of_a_tensor(monkeypatch):
    """Adam's kernel would take it for one piece of memory, in the first update as in later ones."""
    results = []
    for fast in ("1", "0"):
        monkeypatch.setenv("SB3_ADAPTIVE_KL_FAST", fast)
        model = CASES["box"].build(AdaptiveKLPPO, **SMALL)
        layer, whole = model.policy.mlp_extractor.policy_net[0], th.zeros(64, 8)
        whole[:, :3] = layer.weight.detach()
        layer.weight = th.nn.Parameter(whole[:, :3])
        model.policy.optimizer.param_groups[0]["params"] = list(model.policy.parameters())
        results.append(parameters(model.learn(64)))
        assert not whole[:, 3:].any()
    assert (results[0] - results[1]).abs().max() < 1e-6


def test_amsgrad_may_be_switched_off(monkeypatch):
    results = []
    for fast in ("1", "0"):
        monkeypatch.setenv("SB3_ADAPTIVE_KL_FAST", fast)
        model = CASES["box"].build(AdaptiveKLPPO, policy_kwargs={"optimizer_kwargs": {"amsgrad": True}}, **SMALL).learn(64)
        model.policy.optimizer.param_groups[0]["amsgrad"] = False
        results.append(parameters(model.learn(64)))
    assert (results[0] - results[1]).abs().max() < 1e-6


def test_global_step_hooks_are_called():
    model = CASES["box"].build(AdaptiveKLPPO, **SMALL).learn(64)
    calls = []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    try:
        model.learn(64)
    finally:
        handle.remove()
    assert len(calls) == 4


def test_batch_size_of_numpy():
    CASES["box"].build(AdaptiveKLPPO, **{**SMALL, "batch_size": np.int64(32)}).learn(64)


def test_no_nan_gradient_is_left_by_an_undone_update():
    model = collect(CASES["box"].build(AdaptiveKLPPO, **SMALL))
    model.rollout_buffer.advantages[:] = math.nan
    with pytest.warns(UserWarning, match="undone"):
        model.train()
    assert all(parameter.grad is None for parameter in model.policy.parameters())
