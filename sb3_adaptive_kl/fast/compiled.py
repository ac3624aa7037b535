"""
Compiled training: the policy's ``forward``, and the gradients of a minibatch, through ``torch.compile``.

SB3's policies contain things that torch cannot compile. Compiled functions are given a copy of the policy without them, which
shares its networks; the policy itself, which callbacks see, stays as it is.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from math import inf
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs

from sb3_adaptive_kl.fast.compilation import Compilation, NotCompiled
from sb3_adaptive_kl.fast.eager import ACTING, fast_collection, needs_validation
from sb3_adaptive_kl.objective import Settings
from sb3_adaptive_kl.rollout.distributions import forget_distribution, is_stock
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.step import ComputeGradients, compute_gradients, in_layout_of, minibatch_loss, optimized_parameters

# The methods of a policy that evaluate actions
EVALUATING = ("evaluate_actions", "extract_features", "_get_action_dist_from_latent")
# Observations of this space are only converted to float by SB3's preprocess_obs
PREPROCESSED = spaces.Box(-inf, inf, (1,))


class Compiler(Compilation):
    """Compiles both functions of one model."""

    @contextmanager
    def compiled_gradients(self, policy: ActorCriticPolicy, old_policy: OldPolicy) -> Iterator[ComputeGradients]:
        """
        Compile ``compute_gradients`` for one update.

        :param policy: the policy in training
        :param old_policy: remembers the policy before the update
        :return: a context with a function that computes the same up to rounding
        """
        plain = partial(compute_gradients, policy, old_policy)
        hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in optimized_parameters(policy.optimizer))
        if hooked and not self.failed:
            self.give_up("Only backward() calls the hooks on a parameter's gradient")
        if self.failed:
            yield plain
            return
        twin, preprocess = compilable_copy(policy, EVALUATING)
        parameters = [parameter for parameter in optimized_parameters(policy.optimizer) if parameter.requires_grad]

        def compute(rollout_data: Any, index: th.Tensor, settings: Settings) -> tuple[th.Tensor, th.Tensor]:
            preprocessed = rollout_data._replace(observations=preprocess(rollout_data.observations))
            inputs = twin, old_policy, parameters, preprocessed, index, as_tensors(settings, policy.device)
            try:
                gradients, metrics, norm = self.run(clipped_gradients, *inputs)
            except NotCompiled:
                return plain(rollout_data, index, settings)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            return metrics, norm

        policy.optimizer.zero_grad()  # a parameter that was frozen since the last update would still be moved by its gradient
        with th._dynamo.config.patch(trace_autograd_ops=True):  # let th.autograd.grad be compiled, in this thread only
            yield compute

    @contextmanager
    def compiled_collection(self, policy: ActorCriticPolicy) -> Iterator[None]:
        """
        Compile ``policy(observations)`` for one rollout.

        :param policy: the policy that collects
        """
        with fast_collection(policy):
            if self.failed or needs_validation(policy):
                yield
                return
            policy.forward = forward = CompiledForward(policy, self)  # type: ignore[method-assign]
            try:
                yield
            finally:
                forward.compilation = None  # for a wrapper that a callback has set around it, and which stays
                if vars(policy).get("forward") is forward:
                    del policy.forward

    def log(self, logger: Logger) -> None:
        """Log the seconds spent compiling since the last call, if any."""
        if self.seconds > 0:
            logger.record("time/compilation", self.seconds)
        self.seconds = 0.0


class CompiledForward:
    """Stands in for a policy's ``forward`` during a rollout. It is not copied with the policy: a callback may keep copies."""

    def __init__(self, policy: ActorCriticPolicy, compilation: Compilation) -> None:
        self.policy, self.own_forward = policy, policy.forward
        self.actor, self.preprocess = compilable_copy(policy, ACTING)
        self.compilation: Compilation | None = compilation  # None after the rollout

    def __call__(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        # The rollout is over, or a callback exports the policy
        if self.compilation is None or th.jit.is_tracing() or th.compiler.is_compiling():  # type: ignore[attr-defined,no-untyped-call]
            return self.own_forward(obs, *args, **kwargs)
        if isinstance(masks := kwargs.get("action_masks"), np.ndarray):  # torch compiles functions of tensors only
            kwargs["action_masks"] = th.as_tensor(masks, device=self.policy.device)
        try:
            return self.compilation.run(act, self.actor, self.preprocess(obs), *args, **kwargs)
        except NotCompiled:
            return self.own_forward(obs, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # A policy that is copied or unpickled finds its class's method under this name
        return getattr, (self.policy, "forward")


def act(actor: ActorCriticPolicy, observations: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a policy's own ``forward`` on preprocessed observations."""
    result = type(actor).forward(actor, observations, *args, **kwargs)  # a copied policy has one of its own
    forget_distribution(actor)  # compiled code cannot leave a new object behind
    return result


def clipped_gradients(
    policy: ActorCriticPolicy,
    old_policy: OldPolicy,
    parameters: Sequence[th.Tensor],
    rollout_data: Any,
    index: th.Tensor,
    settings: Settings,
) -> tuple[list[th.Tensor | None], th.Tensor, th.Tensor]:
    """
    Compute what ``compute_gradients`` leaves in ``.grad``, as a function of tensors.

    :param parameters: the parameters to differentiate with respect to; the others as for ``minibatch_loss``
    :return: their gradients, clipped, ``None`` where the loss does not depend on one; metrics; norm before clipping
    """
    loss, metrics = minibatch_loss(policy, old_policy, rollout_data, index, settings)
    gradients = th.autograd.grad(loss, parameters, allow_unused=True)
    forget_distribution(policy)  # compiled code cannot leave a new object behind
    # One vector: compiled, the norm of the norms takes as long as all the rest
    norm = th.linalg.vector_norm(th.cat([gradient.flatten() for gradient in gradients if gradient is not None]))
    scale = (settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    clipped = [None if gradient is None else gradient * scale for gradient in gradients]
    return list(map(in_layout_of, parameters, clipped)), metrics, norm


def compilable_copy(policy: ActorCriticPolicy, methods: tuple[str, ...]) -> tuple[ActorCriticPolicy, Callable[[Any], Any]]:
    """
    Copy a policy for torch's compiler: it shares the networks and the action distribution, and expects preprocessed
    observations, since SB3's ``preprocess_obs`` reads NumPy arrays.

    :param policy: the policy
    :param methods: the methods that will be called, ``ACTING`` or ``EVALUATING``
    :return: the copy, and the function that preprocesses its observations. A policy with methods of the user's is not copied:
        they may ask for the space, or write to ``self``
    """
    forget_distribution(policy)  # it would be compiled twice: with and without a distribution evaluated before
    action_dist: Any = getattr(policy, "action_dist", None)
    # SB3 takes the choices of MultiDiscrete from a NumPy array; torch cannot compile a split by NumPy's integers
    if isinstance(n_choices := getattr(action_dist, "action_dims", None), list):
        action_dist.action_dims = [int(n) for n in n_choices]
    if not all(is_stock(policy, name) for name in methods):
        return policy, lambda observations: observations
    twin = copy.copy(policy)
    space = policy.observation_space
    keys = space.spaces if isinstance(space, spaces.Dict) else None
    twin.observation_space = PREPROCESSED if keys is None else spaces.Dict(dict.fromkeys(keys, PREPROCESSED))
    return twin, lambda observations: preprocess_obs(observations, space, normalize_images=policy.normalize_images)


@lru_cache(maxsize=8)  # not at every step
def as_tensors(settings: Settings, device: th.device) -> Settings:
    """
    Convert numbers to scalar tensors, which ``torch.compile`` treats as inputs instead of constants.

    :param settings: the numbers of an update
    :param device: where the loss is computed
    :return: the same settings; ``None`` and booleans stay, since they decide which terms there are
    """

    def convert(value: Any) -> Any:
        # One type for all: an int, or a number of NumPy's, would be compiled again. th.tensor() would wait for a GPU
        return value if value is None or isinstance(value, bool) else th.full((), value, device=device, dtype=th.float32)

    return Settings(*map(convert, settings))
