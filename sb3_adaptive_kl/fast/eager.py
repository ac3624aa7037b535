"""
Less work around the arithmetic of uncompiled training: no argument validation, all parameters in one optimizer kernel.

Each context changes one object of the model for a time. Only code written in SB3 or sb3-contrib is treated this way: a method
of the user's may rely on what would be left out.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import BernoulliDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.optim import optimizer as torch_optimizer

from sb3_adaptive_kl.fast.sequences import sequences_at_once
from sb3_adaptive_kl.rollout.distributions import is_stock, replaced
from sb3_adaptive_kl.rollout.minibatches import has_sequences, to_device
from sb3_adaptive_kl.step import optimized_parameters

# The methods of a policy that act
ACTING = ("forward", "extract_features", "_get_action_dist_from_latent")
# Options of torch's optimizers: how a step is computed, unless the user chose
DEFAULTS = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
# Adam's state of a parameter, besides its step count
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# How torch's errors begin when it samples from NaN: categoricals, and Bernoullis
NAN_MESSAGES = ("probability tensor contains", "Expected p_in >= 0")


def is_enabled() -> bool:
    """Whether to save time; see the package's docstring."""
    return os.environ.get("SB3_ADAPTIVE_KL_FAST", "1") != "0"


@contextmanager
def fast_collection(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    Let ``policy(observations)`` give the same actions in less time, and raise a ValueError instead of returning NaN.

    :param policy: the policy that collects
    """
    if not is_enabled():
        yield
        return
    hook = policy.register_forward_hook(raise_for_nan)
    try:
        with nullcontext() if needs_validation(policy) else without_validation(policy):
            yield
    except RuntimeError as error:
        if str(error).startswith(NAN_MESSAGES):
            raise nan_error(policy) from error
        raise
    finally:
        hook.remove()


def needs_validation(policy: ActorCriticPolicy) -> bool:
    """
    Whether the user's code may rely on torch's validation, or sampling from NaN would end all use of the GPU in this process.
    """
    # torch's Bernoulli asserts in the kernel; its categoricals raise the errors above
    is_fatal = policy.device.type == "cuda" and isinstance(getattr(policy, "action_dist", None), BernoulliDistribution)
    return is_fatal or not all(is_stock(policy, name) for name in ACTING)


def raise_for_nan(policy: Any, args: Any, result: Any) -> None:
    """Raise ValueError if a policy's ``forward`` has returned a NaN log-probability."""
    # A NaN observation or parameter always makes a log-probability NaN, whatever the distribution
    if result[2].isnan().any():
        raise nan_error(policy)


def nan_error(policy: ActorCriticPolicy) -> ValueError:
    """Describe where a NaN may come from."""
    return ValueError(
        "the log-probability of an action is NaN: wrap the environment in VecCheckNan to find a NaN observation; if there "
        "is none, the policy's parameters are extreme: lower learning_rate="
        f"{policy.optimizer.param_groups[0]['lr']:g}"
    )


@contextmanager
def fast_update(policy: ActorCriticPolicy, buffer: RolloutBuffer) -> Iterator[None]:
    """
    Let an update draw the same samples, and evaluate the policy to the same numbers, in less time.

    :param policy: the policy in training; the caller checks for NaN, which torch's distributions would have refused
    :param buffer: its rollout buffer
    """
    if not is_enabled():
        yield
        return
    sequences = sequences_at_once(policy, buffer) if has_sequences(buffer) else nullcontext()
    with without_validation(policy), asynchronous_copies(buffer), sequences:
        yield


@contextmanager
def without_validation(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    Let ``policy.action_dist`` skip torch's validation for a time, by a class that differs in nothing else.

    :param policy: the model's policy; the caller checks for NaN
    """
    action_dist: Any = getattr(policy, "action_dist", None)
    if not is_stock(action_dist, "proba_distribution"):
        yield
        return
    family: Any = type(action_dist)
    action_dist.__class__ = _unvalidated(family)
    try:
        yield
    finally:
        action_dist.__class__ = family


@cache
def _unvalidated(family: Any) -> type:
    make = family.proba_distribution
    # torch's own switch is global. Here one method looks up `Normal` and its like in a namespace of its own. torch's compiler
    # would look up the originals in the module, if it had the module's name
    namespace = {name: value for name, value in make.__globals__.items() if name != "__name__"}
    for name, value in make.__globals__.items():
        if isinstance(value, type) and issubclass(value, th.distributions.Distribution):
            namespace[name] = partial(value, validate_args=False)
    method = FunctionType(make.__code__, namespace, closure=make.__closure__)

    def reduce(self: Any) -> tuple[Any, ...]:
        # A copy that a callback makes or pickles during a rollout is of the family itself
        return object.__new__, (family,), vars(self)

    return type(family.__name__, (family,), {"proba_distribution": method, "__reduce__": reduce})


def asynchronous_copies(buffer: RolloutBuffer) -> AbstractContextManager[None]:
    """
    Let a buffer's samples be copied to a GPU while it computes.

    :param buffer: a rollout buffer; one of the user's that overrides ``to_torch`` runs its own code
    """
    if buffer.device.type != "cuda" or not is_stock(buffer, "to_torch"):
        return nullcontext()
    return replaced(buffer, to_torch=lambda array, copy=True: to_device(array, buffer.device))


@contextmanager
def one_kernel(optimizer: th.optim.Optimizer) -> Iterator[Callable[[], object]]:
    """
    Let one of torch's optimizers take all parameters at once, unless the user chose: Adam by its fused kernel, others by
    ``foreach``, which is the default on a GPU (and Adam's there, until it is bare).

    :param optimizer: any optimizer
    :return: a context with the function to call instead of ``optimizer.step``
    """
    groups = optimizer.param_groups
    is_torchs = type(optimizer).__module__.startswith("torch.optim.") and "foreach" in groups[0]
    chosen = any(group.get(name, default) != default for group in groups for name, default in DEFAULTS.items())
    if chosen or not is_torchs or not is_enabled():
        yield optimizer.step
        return
    parameters = optimized_parameters(optimizer)
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    devices = {parameter.device for parameter in parameters}
    # The fused kernel knows no complex numbers, and reads parameters and moments as flat memory, so that they must have the
    # same layout, without gaps
    can_fuse = type(optimizer) in (th.optim.Adam, th.optim.AdamW) and all(
        parameter.is_floating_point()
        and parameter.stride() == th.empty_like(parameter).stride()
        and not parameter._post_accumulate_grad_hooks  # they may leave another layout
        and all(state[name].stride() == parameter.stride() for name in MOMENTS if name in state)
        for parameter, state in zip(parameters, states, strict=True)
    )
    # optimizer.step() would need Adam's step counts on the GPU, where those of a checkpoint are not
    flag = "fused" if can_fuse and all(device.type == "cpu" for device in devices) else "foreach"
    # User code that listens to optimizer.step()
    listeners = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    global_listeners = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    hooked = any(listeners) or any(global_listeners) or "step" in vars(optimizer)
    counts = {float(state.get("step", 0)) for state in states}
    on_one_device = len(devices) == 1 and parameters[0].device.type in ("cpu", "cuda")
    is_plain = can_fuse and len(groups) == 1 and not groups[0]["amsgrad"] and not hooked
    # One step count stands for all. Before its first step a parameter has no state: the optimizer itself makes it
    bare = is_plain and on_one_device and len(counts) == 1 and all(states)
    for group in groups:
        group[flag] = True
    try:
        with bare_adam(optimizer) if bare else nullcontext(optimizer.step) as take_step:
            yield take_step
    finally:
        for group in groups:
            group[flag] = None


@contextmanager
def bare_adam(optimizer: th.optim.Optimizer) -> Iterator[Callable[[], object]]:
    """
    Take Adam's fused step without the bookkeeping of ``optimizer.step()``, which takes longer than the step itself.

    :param optimizer: Adam or AdamW with one group, without amsgrad, all of whose parameters have moved equally often before
    :return: a context with a function that does what ``optimizer.step`` does, for one update
    """
    (group,) = optimizer.param_groups
    parameters, states = group["params"], [optimizer.state[parameter] for parameter in group["params"]]
    exp_avgs, exp_avg_sqs = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    options = {name: group[name] for name in ("eps", "maximize", "weight_decay", "amsgrad")}
    options["beta1"], options["beta2"] = group["betas"]
    kernel: Any = th._fused_adamw_ if group["decoupled_weight_decay"] else th._fused_adam_
    # One for all: to advance every parameter's takes as long as the kernel. A GPU's reads it as a float32 of its own
    home = states[0]["step"].device
    count = states[0]["step"].to(parameters[0].device, th.float32, copy=True)
    counts = [count] * len(parameters)

    @th.no_grad()
    def step() -> None:
        gradients = [parameter.grad for parameter in parameters]
        if states and any(gradient is None for gradient in gradients):  # a branch that no state took: its parameters stay
            write_back()
        if not states:
            optimizer.step()
            return
        count.add_(1)
        kernel(parameters, gradients, exp_avgs, exp_avg_sqs, [], counts, lr=group["lr"], **options)

    def write_back() -> None:
        taken = count.to(home)
        while states:  # once: afterwards the optimizer counts by itself
            states.pop()["step"].copy_(taken)

    try:
        yield step
    finally:
        write_back()
