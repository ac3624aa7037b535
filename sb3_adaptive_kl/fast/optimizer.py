"""Faster optimizer steps: Adam's fused kernel without ``optimizer.step()`` around it, all parameters at once elsewhere."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
from torch.optim.adam import adam

from sb3_adaptive_kl.step import Gradients, OptimizerStep


class FusedAdam(NamedTuple):
    """
    A step of torch's Adam or AdamW. The bookkeeping of ``optimizer.step()`` takes longer than the step itself.

    Its tensors are collected once per update; they stay the optimizer's own state, which it saves and loads. The learning rate
    is read once per update, too: a change within an update takes effect in the next one.
    """

    parameters: list[th.Tensor]
    exp_avgs: list[th.Tensor]
    exp_avg_sqs: list[th.Tensor]
    max_exp_avg_sqs: list[th.Tensor]
    steps: list[th.Tensor]
    lr: th.Tensor
    options: dict[str, Any]

    @classmethod
    def of(cls, optimizer: th.optim.Optimizer) -> "FusedAdam | None":
        """
        Collect the state of an optimizer.

        :param optimizer: any optimizer
        :return: ``None`` unless this is stock Adam or AdamW: one group, default flags, no step hooks, at least one step taken
        """
        if not _is_stock_adam(optimizer):
            return None
        (group,) = optimizer.param_groups
        parameters = [parameter for parameter in group["params"] if optimizer.state.get(parameter)]
        if not parameters:
            return None
        states = [optimizer.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        options = {name: group[name] for name in ("amsgrad", "eps", "maximize", "weight_decay", "decoupled_weight_decay")}
        return cls(
            parameters,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states if group["amsgrad"]],
            [state["step"] for state in states],
            # A tensor, since each value of a schedule would otherwise be compiled again
            th.as_tensor(group["lr"], dtype=th.float64),
            {"beta1": beta1, "beta2": beta2, **options},
        )

    def take(self, gradients: Gradients) -> None:
        """
        Move the parameters.

        :param gradients: one for each of ``parameters``
        :raises ValueError: if a parameter has no gradient
        """
        present = [gradient for gradient in gradients if gradient is not None]
        if len(present) != len(self.parameters):
            raise ValueError("a parameter that was moved before has no gradient: FusedAdam cannot tell which")
        compiling = th.compiler.is_compiling()
        # Fused only on the CPU: elsewhere the kernel needs Adam's step counts on the device, where they are not
        fused = None if compiling or self.parameters[0].device.type != "cpu" else True
        state = (self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.steps)
        with th.no_grad():
            adam(
                self.parameters,
                present,
                *state,
                fused=fused,
                capturable=compiling,
                lr=self.lr if compiling else self.lr.item(),
                **self.options,
            )


class FastOptimizerStep(OptimizerStep):
    """``FusedAdam`` where possible, ``optimizer.step()`` with all parameters at once elsewhere."""

    def __init__(self, optimizer: th.optim.Optimizer, parameters: Sequence[th.Tensor]) -> None:
        super().__init__(optimizer, parameters)
        self._adam = FusedAdam.of(optimizer)

    @property
    def fused_adam(self) -> FusedAdam | None:
        """Adam's step, if it moves all ``parameters``: one that was frozen until now has no state yet."""
        return self._adam if self._moves(self.parameters) else None

    @property
    def needs_first_step(self) -> bool:
        """Whether Adam's state is still to be made, by its first step."""
        return self._adam is None and not self.optimizer.state and _is_stock_adam(self.optimizer)

    def take(self, gradients: Gradients) -> None:
        present = [parameter for parameter, gradient in zip(self.parameters, gradients, strict=True) if gradient is not None]
        if self._adam is not None and self._moves(present):
            self._adam.take(gradients)
            return
        with _foreach(self.optimizer):
            super().take(gradients)
        self._adam = FusedAdam.of(self.optimizer)  # the first step of all makes Adam's state

    def _moves(self, parameters: Sequence[th.Tensor]) -> bool:
        """Whether Adam has a state for these parameters, in this order, and for no others."""
        mine = [] if self._adam is None else self._adam.parameters
        return len(mine) == len(parameters) and all(map(operator.is_, mine, parameters))


@contextmanager
def _foreach(optimizer: th.optim.Optimizer) -> Iterator[None]:
    """Let one of torch's optimizers take all parameters at once, as it does by default on a GPU, unless the user chose."""
    groups = [
        group
        for group in optimizer.param_groups
        if type(optimizer).__module__.startswith("torch.optim.")
        and group.get("foreach", False) is None
        and not (group.get("fused") or group.get("differentiable"))
    ]
    for group in groups:
        group["foreach"] = True
    try:
        yield
    finally:
        for group in groups:
            group["foreach"] = None


def _is_stock_adam(optimizer: th.optim.Optimizer) -> bool:
    """Whether this is torch's Adam or AdamW with one group, default flags and no step hooks."""
    group, *others = optimizer.param_groups
    # AdamW is computed by Adam's function where they share their options
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or "decoupled_weight_decay" not in group or others:
        return False
    chosen = group["foreach"] is not None or group["fused"] is not None or group["capturable"] or group["differentiable"]
    hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer)
    return not chosen and not hooked
