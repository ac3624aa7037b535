"""
The base of the three algorithms: the penalty's arguments, its state, and SB3's hooks around training.
"""

import math
from numbers import Real
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import Schedule

from sb3_adaptive_kl.arguments import OUTLIERS, check_arguments, check_minibatches
from sb3_adaptive_kl.distributed.algorithm import DistributedAlgorithm
from sb3_adaptive_kl.execution import Execution
from sb3_adaptive_kl.learning_rate import LearningRateRule
from sb3_adaptive_kl.penalty import PenaltyRule
from sb3_adaptive_kl.rollout.hosts import Host


class KLPenaltyAlgorithm(DistributedAlgorithm):
    """
    Holds the arguments and the state of the penalty.

    Arguments are kept as the user gave them, under their own names: ``load()`` writes them past the constructor and then calls
    ``_setup_model()``, which interprets them. They are documented in :class:`~sb3_adaptive_kl.AdaptiveKLPPO`; all others go to
    the host.
    """

    # The host's arguments that the train step needs
    batch_size: int | None
    n_epochs: int
    normalize_advantage: bool
    clip_range_vf: float | Schedule | None

    # The state: plain numbers, which save() writes and load() restores
    kl_coef: float
    learning_rate_scale: float = 1.0
    step_scale: float = 1.0  # of the last update: the share of the actor's step that was kept
    _undone_updates: int = 0
    _undone_in_a_row: int = 0
    _rollouts_at_bound: int = 0  # in a row; negative at the lower bound

    _host: Host = Host()
    _execution: Execution

    def __init__(
        self,
        *args: Any,
        clip_range: float | str | Schedule | None,
        target_kl: float | Schedule,
        init_kl_coef: float,
        kl_rule: str | PenaltyRule,
        kl_tolerance: float,
        kl_factor: float,
        kl_coef_bounds: tuple[float, float] | None,
        kl_ceiling: float | None,
        learning_rate_rule: str | LearningRateRule | None,
        kl_divergence: str,
        kl_cutoff_coef: float,
        kl_cutoff_factor: float,
        kl_stop_factor: float | None,
        compile: bool,
        _init_setup_model: bool,
        **kwargs: Any,
    ) -> None:
        # PPO's constructor would divide by a batch_size of 0, and assert where we can say what to do
        check_minibatches(kwargs["batch_size"], kwargs["n_epochs"], kwargs["normalize_advantage"])
        super().__init__(*args, **kwargs, _init_setup_model=False)
        self.clip_range = clip_range
        self.target_kl = target_kl
        self.init_kl_coef = init_kl_coef
        self.kl_rule = kl_rule
        self.kl_tolerance = kl_tolerance
        self.kl_factor = kl_factor
        self.kl_coef_bounds = kl_coef_bounds
        self.kl_ceiling = kl_ceiling
        self.learning_rate_rule = learning_rate_rule
        self.kl_divergence = kl_divergence
        self.kl_cutoff_coef = kl_cutoff_coef
        self.kl_cutoff_factor = kl_cutoff_factor
        self.kl_stop_factor = kl_stop_factor
        self.compile = compile
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        check_arguments(self)
        # The hosts turn clip_range into a schedule here, and accept Python's numbers and functions only
        clip_range = self.clip_range
        without_schedule = clip_range is None or clip_range == OUTLIERS
        self.clip_range = math.inf if without_schedule else _python_number(clip_range)
        self.clip_range_vf = _python_number(self.clip_range_vf)
        super()._setup_model()
        if without_schedule:
            self.clip_range = clip_range
        # Keep the running β after load(): it is part of the checkpoint
        self.kl_coef = float(getattr(self, "kl_coef", self.init_kl_coef))
        self._execution = choose_execution(self.compile)

    def _excluded_save_params(self) -> list[str]:
        # Compiled code cannot be saved, and _setup_model makes it anew
        return [*super()._excluded_save_params(), "_execution"]

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may overshoot total_timesteps; a linear schedule would then give a negative learning rate
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        if self.learning_rate_rule is not None:
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                for group in optimizer.param_groups:
                    group["lr"] *= self.learning_rate_scale

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """Collect a rollout as the host does."""
        with self._execution.collecting(self.policy):
            return super().collect_rollouts(*args, **kwargs)


def choose_execution(compile: bool) -> Execution:
    """
    Choose how a model collects and trains. The folder ``fast`` relies on private parts of torch and SB3: without it, training
    goes on, only slower.

    :param compile: whether to use ``torch.compile``
    :return: ``FastExecution``, or ``Execution`` if the folder is missing and ``compile`` is False
    :raises ModuleNotFoundError: if the folder is missing and ``compile`` is True
    """
    try:
        from sb3_adaptive_kl.fast.execution import FastExecution
    except ModuleNotFoundError as error:
        if compile or error.name not in ("sb3_adaptive_kl.fast", "sb3_adaptive_kl.fast.execution"):
            raise
        return Execution()
    return FastExecution(compile)


def _python_number(value: Any) -> Any:
    """Convert NumPy's and other numbers, which SB3 rejects, to Python's; return anything else as it is."""
    return float(value) if isinstance(value, Real) else value
