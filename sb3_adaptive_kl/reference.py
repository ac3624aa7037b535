"""
A reference policy: a policy you trust, from which the one in training is kept from straying.

The loss gains c · E[KL] between the policy and a frozen one, over the same states as the rest of it, as in Ziegler et al. 2019
(https://arxiv.org/abs/1909.08593). This module interprets the argument; ``rollout/reference.py`` evaluates the policy.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import cloudpickle
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule

from sb3_adaptive_kl.arguments import check_choice, check_kl_coef, check_number, check_schedule, value_at
from sb3_adaptive_kl.control import apply_rule
from sb3_adaptive_kl.penalty import AdaptivePenalty

DIRECTIONS = ("reverse", "forward")


@dataclass(frozen=True)
class ReferencePolicy:
    """
    A frozen policy to stay close to, and how. In the zoo's files it is a mapping of the same names,
    ``reference_policy: {policy: clone.zip, target_kl: 0.5}``.

    :param policy: the policy itself, which is copied and saved with the model; or the path of a file, which is read again
        wherever the model is trained: a model saved by PPO, A2C, TRPO, MaskablePPO, RecurrentPPO or an algorithm of this
        package, or one of SB3's feed-forward policies saved by ``policy.save()``. Its action space and observation space are
        those of the environment.
    :param kl_coef: c, ≥ 0: a number, or a function of the current progress remaining (from 1 to 0), such as
        ``lambda progress: progress`` for a penalty that fades. 0 measures and logs the KL only. Next to normalized advantages,
        c lets the KL grow to roughly 1/(2c²) nats, which is no bound. With ``target_kl``, the first value of a coefficient
        that moves.
    :param target_kl: The KL to the reference to hold, in nats, > 0: after every update, the coefficient is moved by the rule
        of :class:`~sb3_adaptive_kl.AdaptivePenalty`, within ``kl_coef_bounds``, but not lowered while the KL rises.
        ``None`` (default): it follows ``kl_coef``.
    :param direction: ``"reverse"`` (default) KL(policy‖reference), mode-seeking: forbids what the reference never does, and
        lets the policy drop some of what it does; ``"forward"`` KL(reference‖policy), mass-covering: keeps everything that the
        reference does, and lets the policy add to it
    """

    policy: BasePolicy | str
    kl_coef: float | Schedule = 1.0
    target_kl: float | None = None
    direction: str = "reverse"

    def __post_init__(self) -> None:
        if isinstance(self.policy, Path):  # a file saved with one on Linux cannot be loaded on Windows
            object.__setattr__(self, "policy", str(self.policy))

    def __repr__(self) -> str:
        policy = repr(self.policy) if isinstance(self.policy, str) else type(self.policy).__name__
        return f"ReferencePolicy({policy}, {self.kl_coef}, {self.target_kl}, {self.direction!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        policy = frozen_bytes(self.policy) if isinstance(self.policy, BasePolicy) else self.policy
        return _restored, (policy, self.kl_coef, self.target_kl, self.direction)


def interpret_reference(value: Any) -> ReferencePolicy:
    """
    Interpret ``reference_policy``.

    :param value: the argument: a policy, a path, a ``ReferencePolicy`` or a mapping of its fields
    :return: the same as a ``ReferencePolicy``
    :raises ValueError: if it is something else, or one of its fields is out of range
    """
    if isinstance(value, Mapping):
        names = [field.name for field in fields(ReferencePolicy)]
        for name in value:
            check_choice("reference_policy: argument", name, tuple(names))
        if "policy" not in value:
            raise ValueError(f"reference_policy={dict(value)!r} has no 'policy': add the path of a saved model")
        value = ReferencePolicy(**value)
    spec: ReferencePolicy = value if isinstance(value, ReferencePolicy) else ReferencePolicy(value)
    if not isinstance(spec.policy, str) and not tells_probabilities(spec.policy):
        remedy = "pass a policy with get_distribution(), such as model.policy, or a saved model's path, or ReferencePolicy(…)"
        if isinstance(spec.policy, BaseAlgorithm):
            remedy = "that is a model, pass its policy, reference_policy=model.policy"
        kind: Any = spec.policy if isinstance(spec.policy, type) else type(spec.policy)
        raise ValueError(f"reference_policy={kind.__name__}: {remedy}")
    check_schedule("reference_policy: kl_coef", spec.kl_coef, ">= 0", "0 only measures the KL")
    if spec.target_kl is not None:
        check_number(
            "reference_policy: target_kl", spec.target_kl, "> 0, in nats", "with None, the coefficient follows kl_coef"
        )
    if spec.target_kl is not None and callable(spec.kl_coef):
        raise ValueError("reference_policy: target_kl moves the coefficient, and a schedule of kl_coef does, too: pass one")
    check_choice("reference_policy: direction", spec.direction, DIRECTIONS)
    return spec


def reference_kl_coef(
    spec: ReferencePolicy, running: float | None, bounds: tuple[float, float], progress_remaining: float
) -> float | None:
    """
    Compute the coefficient of the next update.

    :param spec: the argument, interpreted
    :param running: where a target moves it, the coefficient after the last update; None before the first
    :param bounds: of β and of this coefficient
    :param progress_remaining: from 1 (beginning) to 0 (end)
    :return: c, or None for a constant 0
    :raises ValueError: if a schedule returns an invalid coefficient, or one that a target moves is beyond its bounds
    """
    if spec.target_kl is None:
        # Not penalized, then, and its gradient not computed. A schedule that reaches 0 is not compiled again
        if not spec.kl_coef:
            return None
        return value_at("reference_policy: kl_coef", spec.kl_coef, progress_remaining)
    name, coef, remedy = "reference_policy: kl_coef", spec.kl_coef, "target_kl moves it from there"
    if running is not None:
        name, coef, remedy = "reference_kl_coef", running, "pass load() another, or None to begin with kl_coef"
    check_kl_coef(name, coef, bounds, remedy)
    return float(coef)  # type: ignore[arg-type]  # not a schedule, next to a target


def adapted_kl_coef(
    spec: ReferencePolicy, kl_coef: float | None, before: float, kl: float, bounds: tuple[float, float]
) -> float | None:
    """
    Move the coefficient after an update towards its target.

    :param spec: the argument, interpreted
    :param kl_coef: c of this update
    :param before: the KL to the reference before it in nats
    :param kl: the same after it, on the same states
    :param bounds: of β and of this coefficient
    :return: what the next update begins with: None where there is no target
    """
    if spec.target_kl is None or kl_coef is None:
        return None
    # On its way to the target already. It takes many updates, and a coefficient that was halved after each of them could not
    # stop the policy where it arrives. Equal after an update that was undone, which says nothing about the coefficient
    if before <= kl < spec.target_kl:
        return kl_coef
    return apply_rule(AdaptivePenalty(), kl_coef, kl, spec.target_kl, bounds)[0]


def tells_probabilities(policy: Any) -> bool:
    """Whether this is a policy, and stochastic. (sb3-contrib's MaskableActorCriticPolicy is not an ActorCriticPolicy.)"""
    return isinstance(policy, BasePolicy) and hasattr(policy, "get_distribution")


def frozen_bytes(policy: BasePolicy) -> bytes:
    """
    Serialize a policy without its optimizer, for any device.

    :param policy: it is not changed
    :raises ValueError: if it cannot be pickled
    """
    # Not copy.deepcopy(policy), which fails where its last distribution carries a graph
    bare = object.__new__(type(policy))
    bare.__dict__.update(vars(policy))
    bare.__dict__["optimizer"] = None
    data = BytesIO()
    try:
        th.save(bare, data, pickle_module=cloudpickle)
    except (TypeError, AttributeError, pickle.PickleError) as error:
        raise ValueError(
            f"reference_policy={type(policy).__name__} cannot be copied ({error}): save its model, and pass the path"
        ) from error
    return data.getvalue()


def from_frozen_bytes(data: bytes) -> BasePolicy:
    """Restore what ``frozen_bytes`` returned, on the CPU."""
    return th.load(BytesIO(data), map_location="cpu", weights_only=False)  # type: ignore[no-any-return]


def _restored(policy: bytes | str, *others: Any) -> ReferencePolicy:
    return ReferencePolicy(from_frozen_bytes(policy) if isinstance(policy, bytes) else policy, *others)
