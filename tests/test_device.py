"""
Updates on a GPU, and what they wait for there.

What the tests marked ``ON_GPU`` claim, other files prove on the CPU. Those that need no GPU count what one would wait for:
torch's ``meta`` device has no numbers, so that reading one is an error, and so is mixing it with the CPU.
"""

import copy
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch as th
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_adaptive_kl import AdaptiveKLPPO, MaskableAdaptiveKLPPO, RecurrentAdaptiveKLPPO
from sb3_adaptive_kl.arguments import penalty_rule, settings_at
from sb3_adaptive_kl.control import SegmentedControl
from sb3_adaptive_kl.fast import eager
from sb3_adaptive_kl.fast.eager import asynchronous_copies, fast_update, one_kernel
from sb3_adaptive_kl.metrics import UpdateMetrics
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from tests.conftest import CASES, CUDA, FAMILIES, NEEDS_COMPILER, Case, collect, logged, parameters, pendulum
from tests.test_optimizer import OPTIMIZERS, give_gradients, network

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to run PPO on the GPU")
ON_GPU = pytest.mark.parametrize("device", [CUDA])
SMALL = {"n_steps": 64, "batch_size": 16, "n_epochs": 4}
SMALL_LSTM = {"policy_kwargs": {"lstm_hidden_size": 16}}
SET_UPS = {
    **{name: (AdaptiveKLPPO, PPO, case) for name, case in CASES.items()},
    **{
        f"masked {name}": (MaskableAdaptiveKLPPO, MaskablePPO, Case("MlpPolicy", make_env))
        for name, make_env in {
            "discrete": lambda: InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3),
            "multidiscrete": lambda: InvalidActionEnvMultiDiscrete(dims=[3, 4], n_invalid_actions=2),
            "multibinary": lambda: InvalidActionEnvMultiBinary(dims=4, n_invalid_actions=2),
        }.items()
    },
    "lstm": (RecurrentAdaptiveKLPPO, RecurrentPPO, Case("MlpLstmPolicy", pendulum, SMALL_LSTM)),
}


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    """A GPU's convolutions round to 10 bits otherwise."""
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)


def on(device, model):
    """The same model with its rollout, on another device."""
    model.policy.to(device)
    model.device = model.rollout_buffer.device = th.device(device)
    return model


class Waits(TorchDispatchMode):
    """Counts what makes a GPU's queue run empty: on the CPU tensors turned into numbers, on a GPU what torch warns about."""

    def __init__(self, device):
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += self.device == "cpu" and function is th.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        if self.device == "cuda":
            self.caught = warnings.catch_warnings(record=True)
            self.messages = self.caught.__enter__()
            warnings.simplefilter("always")
            th.cuda.set_sync_debug_mode("warn")
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        if self.device == "cuda":
            th.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(*args)
            self.count = sum("called a synchronizing" in str(message.message) for message in self.messages)


# ---------------------------------------------------------------- what an update waits for


@pytest.mark.parametrize("name", ["gsde", "discrete", "multidiscrete", "multibinary", "dict", "masked discrete", "lstm"])
@pytest.mark.parametrize("device", ["meta", CUDA])
def test_an_update_waits_once_per_segment(device, name, monkeypatch):
    """And never for a minibatch, though both controllers look at each segment."""
    algorithm, _, case = SET_UPS[name]
    kwargs = {"kl_rule": {"name": "predictive", "segments": 4}, "learning_rate_rule": "balanced", "n_steps": 32}
    model = on(device, collect(case.build(algorithm, batch_size=4, n_epochs=1, **kwargs)))
    waits = []
    if device == "meta":
        # Each reads numbers, once per update
        monkeypatch.setattr(OldPolicy, "_check_distribution", lambda *_: None)
        monkeypatch.setattr("sb3_adaptive_kl.rollout.old_policy.can_leave_the_critic_out", lambda *_: False)

        def read(self):
            if not waits or waits[-1] != self.n_minibatches:
                waits.append(self.n_minibatches)
            return th.zeros(self.n_minibatches, len(self._minibatches[0]))

        monkeypatch.setattr(UpdateMetrics, "_read", read)

    def minibatches(settings):
        for rollout_data, index in type(model)._minibatches(model, settings):
            assert index.device.type == device  # torch would copy it at each use
            yield rollout_data, index

    monkeypatch.setattr(model, "_minibatches", minibatches)

    def update():
        settings = settings_at(model, 1.0)
        control = SegmentedControl(penalty_rule(model.kl_rule), model._steps_per_update, (1e-6, 1e6))
        buffer = model.rollout_buffer
        with fast_update(model.policy, buffer):
            old_policy = OldPolicy(model.policy, buffer)
            with Waits(device) if device == "cuda" else nullcontext() as counted:
                model._optimize(old_policy, control, settings, UpdateMetrics())
        return counted

    counted = update()
    if device == "meta":
        assert waits == [2, 4, 6]
        return
    counted = update()  # the first one has made Adam's state, and pinned memory
    # And for Adam's step count, before and after. sb3-contrib's masked distributions copy a constant for each minibatch:
    # docs/performance.md says so, until they do not
    assert (counted.count <= 3 + 2) != name.startswith("masked")


def test_waits_do_not_grow_with_the_minibatches(device):
    """Of a whole update, with all that is measured and logged around its steps."""
    counts = []
    for n_epochs in (1, 4):
        model = on(device, collect(CASES["box"].build(AdaptiveKLPPO, **{**SMALL, "n_epochs": n_epochs})))
        model.train()
        with Waits(device) as waits:
            model.train()
        counts.append(waits.count)
    assert counts[0] == counts[1]
    assert device == "cpu" or counts[0] <= 15


def test_samples_are_copied_to_a_gpu_asynchronously(monkeypatch):
    """During an update, and unless the user's buffer has another way."""

    class Mine(RolloutBuffer):
        def to_torch(self, array, copy=True):
            return super().to_torch(array, copy)

    copied = []
    monkeypatch.setattr(eager, "to_device", lambda array, device: copied.append((array, device)))
    for buffer_class, is_stock in ((RolloutBuffer, True), (Mine, False)):
        model = CASES["box"].build(AdaptiveKLPPO, rollout_buffer_class=buffer_class, **SMALL)
        buffer = model.rollout_buffer
        with asynchronous_copies(buffer):  # on the CPU
            assert "to_torch" not in vars(buffer)
        buffer.device = th.device("cuda")
        with asynchronous_copies(buffer):
            assert ("to_torch" in vars(buffer)) == is_stock
            if is_stock:
                buffer.to_torch(buffer.rewards)
        assert "to_torch" not in vars(buffer)
    ((array, device),) = copied
    assert array.shape == (64, 1)
    assert device.type == "cuda"


@pytest.mark.parametrize("name", FAMILIES)
def test_validation_stays_where_nan_is_fatal(name, monkeypatch):
    policy = FAMILIES[name].build(AdaptiveKLPPO, **SMALL).policy
    assert not eager.needs_validation(policy)
    monkeypatch.setattr(type(policy), "device", th.device("cuda"))
    assert eager.needs_validation(policy) == (name == "multibinary")


# ---------------------------------------------------------------- the same numbers


@ON_GPU
@pytest.mark.parametrize("name", SET_UPS)
def test_first_update_equals_ppo(device, name):
    """On the CPU: test_first_update.py, test_maskable.py, test_recurrent.py."""
    ours, theirs, case = SET_UPS[name]
    full_batch = {"n_steps": 128, "batch_size": 128, "n_epochs": 1, "learning_rate": 0.01, "ent_coef": 0.01}
    models = [case.build(algorithm, device=device, **full_batch).learn(128) for algorithm in (theirs, ours)]
    assert next(models[1].policy.parameters()).is_cuda
    assert (parameters(models[0]) - parameters(models[1])).abs().max() < 5e-5


def both(device, name, **kwargs):
    """The same update on the same rollout, on the CPU and on the GPU."""
    algorithm, _, case = SET_UPS[name]
    models = [collect(case.build(algorithm, **{**SMALL, **kwargs})) for _ in range(2)]
    on(device, models[1]).rollout_buffer = copy.deepcopy(models[0].rollout_buffer)
    models[1].rollout_buffer.device = th.device(device)
    for model in models:
        np.random.seed(0)
        model.train()
    return models


@ON_GPU
@pytest.mark.parametrize("name", SET_UPS)
def test_an_update_equals_that_of_the_cpu(device, name):
    cpu, gpu = both(device, name, learning_rate=1e-4)
    assert (parameters(cpu) - parameters(gpu).cpu()).abs().max() < 2e-5
    assert logged(gpu)["kl"] == pytest.approx(logged(cpu)["kl"], rel=0.02)
    assert gpu.kl_coef == cpu.kl_coef


@ON_GPU
@pytest.mark.parametrize("name", ["box", "masked discrete", "lstm"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"kl_rule": "predictive", "learning_rate_rule": "balanced"},
        {"kl_rule": "predictive", "kl_ceiling": 1.5, "target_kl": 1e-4, "learning_rate": 3e-3},
        {"kl_divergence": "k3", "clip_range": "outliers", "kl_cutoff_coef": 10.0, "kl_stop_factor": 100.0},
    ],
    ids=["predictive", "step back", "everything else"],
)
def test_options_equal_those_of_the_cpu(device, name, kwargs):
    """On the CPU: test_predictive.py, test_step_back.py, test_training.py."""
    cpu, gpu = both(device, name, **kwargs)
    assert (parameters(cpu) - parameters(gpu).cpu()).abs().max() < cpu.learning_rate  # one of 16 steps of Adam
    assert gpu.kl_coef == pytest.approx(cpu.kl_coef, rel=0.05)
    assert gpu.step_scale == pytest.approx(cpu.step_scale, rel=0.05)
    assert (gpu.step_scale < 1) == ("kl_ceiling" in kwargs)


@ON_GPU
@pytest.mark.parametrize("name", ["box", "lstm"])
def test_an_update_that_diverged_is_undone(device, name):
    """On the CPU: test_guard.py."""
    algorithm, _, case = SET_UPS[name]
    model = collect(case.build(algorithm, device=device, **SMALL))
    model.train()
    before, state = parameters(model), copy.deepcopy(model.policy.optimizer.state_dict()["state"])
    model.lr_schedule = lambda progress: float("nan")
    with pytest.warns(UserWarning, match="undone"):
        model.train()
    assert th.equal(parameters(model), before)
    for index, entry in model.policy.optimizer.state_dict()["state"].items():
        assert all(th.equal(value, state[index][key]) for key, value in entry.items())


@ON_GPU
@pytest.mark.parametrize("case", FAMILIES)
def test_nan_in_collection_is_an_error_that_leaves_the_gpu_alive(device, case):
    """On the CPU: test_collection.py. A GPU whose kernel has failed an assertion cannot be used any more."""
    model = FAMILIES[case].build(AdaptiveKLPPO, device=device, **SMALL)
    with th.no_grad():
        next(model.policy.parameters()).fill_(th.nan)
        model.policy.action_net.bias.fill_(th.nan)
    with pytest.raises(ValueError, match=r"NaN|nan"):
        model.learn(64)
    assert th.ones(2, device=device).sum().item() == 2


@ON_GPU
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("loaded", [False, True])
def test_step_equals_the_optimizers(device, name, loaded):
    """On the CPU: test_optimizer.py. ``load()`` leaves the step counts on the GPU."""
    optimizer, bare = OPTIMIZERS[name]
    nets = [network().to(device) for _ in range(2)]
    optimizers = [optimizer(net.parameters()) for net in nets]

    def gradients(i, present=(0, 1, 2, 3)):
        for net in nets:
            net.cpu(), give_gradients(net, i, present), net.to(device)

    gradients(0)
    for one in optimizers:
        one.step()
        for state in one.state.values():
            if loaded and "step" in state:
                state["step"] = state["step"].to(device)
    with one_kernel(optimizers[1]) as take_step:
        assert (take_step != optimizers[1].step) == bare
        for i, present in enumerate([(0, 1, 2, 3), (0, 1, 2, 3), (0, 1)]):  # a branch that no state took
            gradients(1 + i, present)
            optimizers[0].step()
            take_step()
    for net, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert th.allclose(net, other, rtol=1e-4, atol=1e-6)
    states = [one.state_dict()["state"] for one in optimizers]
    for index, entry in states[0].items():
        for key, value in entry.items():
            assert value.device == states[1][index][key].device
            assert th.allclose(value, states[1][index][key], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- from one device to the other


@ON_GPU
@pytest.mark.parametrize("name", ["box", "masked discrete", "lstm"])
@pytest.mark.parametrize("to_gpu", [True, False])
def test_saved_on_one_device_and_loaded_on_the_other(device, name, to_gpu, tmp_path):
    """On the CPU: test_save_load.py, test_reference_files.py."""
    source, target = ("cpu", device) if to_gpu else (device, "cpu")
    algorithm, _, case = SET_UPS[name]
    reference = case.build(algorithm, device=source, seed=1).policy
    model = case.build(algorithm, device=source, reference_policy=reference, **SMALL).learn(128)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=case.make_env(), device=target)
    assert loaded.kl_coef == model.kl_coef
    assert th.equal(parameters(loaded).cpu(), parameters(model).cpu())
    loaded.learn(128)
    assert logged(loaded)["reference_kl"] > 0
    assert parameters(loaded).device.type == target
    assert loaded.policy.optimizer.state_dict()["state"][0]["step"].item() > 0


@ON_GPU
def test_random_numbers_of_the_gpu_are_left_alone(device):
    """By the sweeps before and after the steps; the steps of these policies draw none."""
    model = collect(CASES["gsde"].build(AdaptiveKLPPO, device=device, **SMALL))
    before = th.cuda.get_rng_state()
    model.train()
    assert th.equal(th.cuda.get_rng_state(), before)


@ON_GPU
@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["box", "multibinary", "masked discrete"])
def test_compiled_equals_uncompiled(device, name):
    """On the CPU: test_compiled.py."""
    algorithm, _, case = SET_UPS[name]
    runs = [case.build(algorithm, device=device, compile=compile, **SMALL).learn(128) for compile in (False, True)]
    assert not runs[1]._compiler.failed
    assert (parameters(runs[0]) - parameters(runs[1])).abs().max() < 1e-3
