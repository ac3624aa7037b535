"""The faster ``Execution``: leaner policies and optimizers, and with ``compile=True`` compiled ones."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.distributed.ranks import is_parallel
from sb3_adaptive_kl.execution import Execution
from sb3_adaptive_kl.fast.collection import act, fast_collection
from sb3_adaptive_kl.fast.compilation import Compilation, Compiled, NotCompiled
from sb3_adaptive_kl.fast.compiled_step import CompiledSteps
from sb3_adaptive_kl.fast.minibatches import minibatches_in_blocks
from sb3_adaptive_kl.fast.optimizer import FastOptimizerStep
from sb3_adaptive_kl.fast.sb3_policies import EVALUATING, make_compilable, preprocessing_outside, without_validation
from sb3_adaptive_kl.objective import Settings
from sb3_adaptive_kl.step import StepResult, Update, trainable_parameters


class FastExecution(Execution):
    """
    Collects and trains as ``Execution`` does, in less time.

    :param compile: whether to compile the policy's ``forward`` and the train step
    """

    def __init__(self, compile: bool) -> None:
        self.compilation = Compilation() if compile else None
        if self.compilation is not None:
            self.compiled_act = Compiled(act, self.compilation)
            self.compiled_steps = CompiledSteps(self.compilation)
        self._preprocess: Callable[[Any], Any] | None = None  # while steps are taken, if they are compiled

    def collecting(self, policy: ActorCriticPolicy) -> AbstractContextManager[None]:
        if self.compilation is None:
            return fast_collection(policy, compiled_act=None)
        make_compilable(policy)
        return fast_collection(policy, self.compiled_act)

    def updating(self, policy: ActorCriticPolicy) -> AbstractContextManager[None]:
        # torch's distributions skip their argument checks: NaN is caught once, in the measured KL
        return without_validation(policy)

    @contextmanager
    def stepping(self, policy: ActorCriticPolicy) -> Iterator[None]:
        if self.compilation is None or self.compilation.failed:
            yield
            return
        make_compilable(policy)
        with preprocessing_outside(policy, EVALUATING) as self._preprocess, self.compilation.tracing_gradients():
            try:
                yield
            finally:
                self._preprocess = None

    def optimizer_step(self, policy: ActorCriticPolicy) -> FastOptimizerStep:
        return FastOptimizerStep(policy.optimizer, trainable_parameters(policy))

    def minibatches(self, buffer: RolloutBuffer, batch_size: int | None) -> Iterator[tuple[Any, th.Tensor]]:
        return minibatches_in_blocks(buffer, batch_size)

    def take_step(self, update: Update, rollout_data: Any, index: th.Tensor, settings: Settings) -> StepResult:
        """Choose between the ways to step. All have the signature of ``eager_step``."""
        if self.compilation is None or self._preprocess is None:
            return super().take_step(update, rollout_data, index, settings)

        rollout_data = rollout_data._replace(observations=self._preprocess(rollout_data.observations))
        optimizer = update.optimizer
        assert isinstance(optimizer, FastOptimizerStep)  # see optimizer_step
        if self.compilation.failed or optimizer.needs_first_step:
            return super().take_step(update, rollout_data, index, settings)
        try:
            if is_parallel():
                return self.compiled_steps.step_of_all_ranks(update, rollout_data, index, settings)
            if optimizer.fused_adam is None or settings.kl_stop_factor is not None:
                return self.compiled_steps.step_with_compiled_gradients(update, rollout_data, index, settings)
            return self.compiled_steps.whole_step(update, rollout_data, index, settings)
        except NotCompiled:
            return super().take_step(update, rollout_data, index, settings)

    def pop_compile_seconds(self) -> float:
        return 0.0 if self.compilation is None else self.compilation.pop_seconds()
