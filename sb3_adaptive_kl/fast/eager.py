"""
Less work around the arithmetic of uncompiled training: no argument validation, all parameters in one optimizer kernel.

Each context changes one setting for a time. Only code written in SB3 or sb3-contrib is treated this way: a method of the
user's may rely on what would be left out.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Distribution
from torch.optim import optimizer as torch_optimizer

from sb3_adaptive_kl.rollout.distributions import is_stock
from sb3_adaptive_kl.step import optimized_parameters

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
        with without_validation(policy):
            yield
    except RuntimeError as error:
        if str(error).startswith(NAN_MESSAGES):
            raise nan_error(policy) from error
        raise
    finally:
        hook.remove()


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
def without_validation(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    Let torch's distributions skip the validation of their arguments, which costs as much as evaluating them.

    :param policy: the model's policy. A distribution of the user's may rely on being validated. The caller checks for NaN
    """
    is_stocks = is_stock(getattr(policy, "action_dist", None), "proba_distribution")
    # Where it is off, it stays off. (To restore what was found would leave it off if models in two threads overlap)
    if not is_enabled() or not is_stocks or not Distribution._validate_args:
        yield
        return
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(True)


@contextmanager
def one_kernel(optimizer: th.optim.Optimizer) -> Iterator[Callable[[], object]]:
    """
    Let one of torch's optimizers take all parameters at once, unless the user chose: Adam by its fused kernel, others by
    ``foreach``, which is the default on a GPU.

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
    # Elsewhere the fused kernel needs Adam's step counts on the device, where they are not. It knows no complex numbers, and
    # reads parameters and moments as flat memory, so that they must have the same layout
    can_fuse = type(optimizer) in (th.optim.Adam, th.optim.AdamW) and all(
        parameter.device.type == "cpu"
        and parameter.is_floating_point()
        and all(state[name].stride() == parameter.stride() for name in MOMENTS if name in state)
        for parameter, state in zip(parameters, states, strict=True)
    )
    flag = "fused" if can_fuse else "foreach"
    # User code that listens to optimizer.step()
    listeners = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    global_listeners = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    hooked = any(listeners) or any(global_listeners) or "step" in vars(optimizer)
    counts = {float(state.get("step", 0)) for state in states}
    bare = can_fuse and not hooked and len(groups) == 1 and not groups[0]["amsgrad"] and len(counts) == 1 and all(states)
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
    count = states[0]["step"].clone()  # one for all: to advance every parameter's takes as long as the kernel
    counts = [count] * len(parameters)
    is_bare = True

    @th.no_grad()
    def step() -> None:
        gradients = [parameter.grad for parameter in parameters]
        if is_bare and any(gradient is None for gradient in gradients):  # a branch that no state took: its parameters stay
            stop()
        if not is_bare:
            optimizer.step()
            return
        count.add_(1)
        kernel(parameters, gradients, exp_avgs, exp_avg_sqs, [], counts, lr=group["lr"], **options)

    def stop() -> None:
        nonlocal is_bare
        is_bare = False
        for state in states:
            state["step"].copy_(count)

    try:
        yield step
    finally:
        if is_bare:
            stop()
