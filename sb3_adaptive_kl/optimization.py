"""From the gradients of one minibatch to new parameters."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
from torch.optim.adam import adam

Gradients = Sequence[th.Tensor | None]  # None for a parameter that the loss does not depend on


def clip_gradients(gradients: Gradients, max_norm: float) -> tuple[Gradients, th.Tensor]:
    """
    Gradients scaled such that their norm, all of them taken as one vector, is at most ``max_norm``.

    What ``th.nn.utils.clip_grad_norm_`` computes, but as a function, and in few operations instead of two per gradient.

    :param gradients: of any shapes
    :param max_norm: > 0
    :return: the scaled gradients, and the norm before
    """
    present = [gradient for gradient in gradients if gradient is not None]
    norm = th.linalg.vector_norm(th.cat([gradient.flatten() for gradient in present]))
    scaled = iter(th._foreach_mul(present, (max_norm / (norm + 1e-6)).clamp(max=1.0)))
    return [None if gradient is None else next(scaled) for gradient in gradients], norm


class AdamStep(NamedTuple):
    """
    A step of torch's Adam or AdamW, without what ``optimizer.step()`` does around it: that takes longer than the step itself.

    Everything it reads and writes is collected once per update; the state stays the optimiser's own, as it saves and loads it.
    """

    parameters: list[th.Tensor]
    exp_avgs: list[th.Tensor]
    exp_avg_sqs: list[th.Tensor]
    max_exp_avg_sqs: list[th.Tensor]
    steps: list[th.Tensor]
    lr: th.Tensor
    options: dict[str, Any]

    @classmethod
    def of(cls, optimizer: th.optim.Optimizer) -> "AdamStep | None":
        """
        :return: None if the optimiser is another, has taken no step yet, has several groups of parameters, or if the user
            chose how it is computed or has to be told of its steps
        """
        if not _is_plain_adam(optimizer):
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
            # A tensor, since a schedule would otherwise be compiled anew for each of its values
            th.as_tensor(group["lr"], dtype=th.float64),
            {"beta1": beta1, "beta2": beta2, **options},
        )

    def take(self, gradients: Gradients) -> None:
        """
        :param gradients: one for each of ``parameters``
        """
        present = [gradient for gradient in gradients if gradient is not None]
        if len(present) != len(self.parameters):
            raise ValueError("a parameter that was moved before has no gradient: AdamStep cannot tell which")
        compiling = th.compiler.is_compiling()
        # One kernel on the CPU; elsewhere, where the steps are counted on the CPU, torch chooses
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


class OptimizerStep:
    """
    A step of any optimiser: the fast one where it can be, ``optimizer.step()`` where not.

    :param optimizer: whose parameters are to be moved
    :param parameters: those that gradients will be given for
    """

    def __init__(self, optimizer: th.optim.Optimizer, parameters: Sequence[th.Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.adam = AdamStep.of(optimizer)

    @property
    def whole(self) -> AdamStep | None:
        """``adam``, if it moves all of ``parameters``: some may have been frozen, or left out, and be needed now."""
        return self.adam if self.adam is not None and self._moves(self.parameters) else None

    def _moves(self, parameters: Sequence[th.Tensor]) -> bool:
        """Whether it is these, in this order, that ``adam`` has a state for."""
        mine = [] if self.adam is None else self.adam.parameters
        return len(mine) == len(parameters) and all(map(operator.is_, mine, parameters))

    @property
    def awaits_state(self) -> bool:
        """Whether ``adam`` will be there after the first step of all, which makes its state."""
        return self.adam is None and not self.optimizer.state and _is_plain_adam(self.optimizer)

    def take(self, gradients: Gradients) -> None:
        """
        :param gradients: one for each of ``parameters``
        """
        pairs = list(zip(self.parameters, gradients, strict=True))
        if self.adam is not None and self._moves([parameter for parameter, gradient in pairs if gradient is not None]):
            self.adam.take(gradients)
            return
        self._forget_gradients()
        for parameter, gradient in pairs:
            parameter.grad = gradient
        with _in_few_operations(self.optimizer):
            self.optimizer.step()
        self._forget_gradients()
        # The first step of all has made Adam's state
        self.adam = AdamStep.of(self.optimizer)

    def _forget_gradients(self) -> None:
        """An old one would go on moving a parameter that has been frozen since; ``zero_grad()``, which takes longer."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


@contextmanager
def _in_few_operations(optimizer: th.optim.Optimizer) -> Iterator[None]:
    """Within, an optimiser of torch's takes all parameters at once, as it does by itself on a GPU, unless the user chose."""
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


def _is_plain_adam(optimizer: th.optim.Optimizer) -> bool:
    """Whether it is torch's, with one group of parameters, the way to compute it left to torch, and nobody listening."""
    group, *others = optimizer.param_groups
    # AdamW is computed by Adam's function where they share their options
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or "decoupled_weight_decay" not in group or others:
        return False
    chosen = group["foreach"] is not None or group["fused"] is not None or group["capturable"] or group["differentiable"]
    heard = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer)
    return not chosen and not heard
