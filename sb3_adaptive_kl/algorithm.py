"""
The base of the algorithms: the penalty's arguments, its state, and SB3's hooks around training.
"""

import math
from collections import OrderedDict
from dataclasses import replace
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule, TensorDict

from sb3_adaptive_kl.arguments import OUTLIERS, check_arguments, check_minibatches, kl_coef_limits
from sb3_adaptive_kl.fast.eager import fast_collection, is_enabled
from sb3_adaptive_kl.learning_rate import LearningRateRule
from sb3_adaptive_kl.messages import suggestion, warn_user
from sb3_adaptive_kl.penalty import PenaltyRule
from sb3_adaptive_kl.reference import ReferencePolicy, interpret_reference, reference_kl_coef
from sb3_adaptive_kl.rollout.reference import Reference

if TYPE_CHECKING:
    from sb3_adaptive_kl.fast.compiled import Compiler

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="KLPenaltyAlgorithm")

# Arguments that the host does not have, or that mean something else there
PENALTY_ARGUMENTS = (
    *("clip_range", "target_kl", "init_kl_coef", "kl_rule", "kl_coef_bounds", "kl_ceiling", "learning_rate_rule"),
    *("kl_divergence", "kl_cutoff_coef", "kl_stop_factor", "reference_policy", "compile"),
)
# What save(), load(), get_parameters() and set_parameters() carry from one update to the next
STATE = ("kl_coef", "learning_rate_scale", "reference_kl_coef")


class KLPenaltyAlgorithm(OnPolicyAlgorithm):
    """
    Holds the arguments and the state of the penalty.

    Arguments are kept as the user gave them, under their own names: ``load()`` writes them past the constructor and then calls
    ``_setup_model()``, which interprets them. They are documented in :class:`~sb3_adaptive_kl.AdaptiveKLPPO`; all others go to
    the host.
    """

    # Arguments of the host that the train step needs, and those of the penalty
    batch_size: int | None
    n_epochs: int
    normalize_advantage: bool
    clip_range_vf: float | Schedule | None
    clip_range: Any
    target_kl: float | Schedule
    init_kl_coef: float
    kl_rule: str | dict[str, Any] | PenaltyRule
    kl_coef_bounds: tuple[float, float] | None
    kl_ceiling: float | None
    learning_rate_rule: str | dict[str, Any] | LearningRateRule | None
    kl_divergence: str
    kl_cutoff_coef: float
    kl_stop_factor: float | None
    reference_policy: BasePolicy | str | Path | dict[str, Any] | ReferencePolicy | None
    compile: bool

    # The state: plain numbers, which save() writes and load() restores
    kl_coef: float
    learning_rate_scale: float = 1.0
    reference_kl_coef: float | None = None  # None without a reference policy, and after an update that held no target
    step_scale: float = 1.0  # of the last update: the share of the actor's step that was kept
    _undone_updates: int = 0
    _undone_in_a_row: int = 0
    _rollouts_at_bound: int = 0  # of β, in a row; negative at the lower bound
    _rollouts_at_limit: int = 0  # of the learning rate's factor, likewise
    _randomness_checked: bool = False

    _compiler: "Compiler | None" = None
    _reference: Reference | None = None

    def __init__(self, *args: Any, _init_setup_model: bool = True, **kwargs: Any) -> None:
        # PPO's constructor would divide by a batch_size of 0, and assert where we can say what to do
        check_minibatches(kwargs["batch_size"], kwargs["n_epochs"], kwargs["normalize_advantage"])
        penalty = {name: kwargs.pop(name) for name in PENALTY_ARGUMENTS}
        # The host would call _setup_model() before the penalty's arguments are there
        super().__init__(*args, **{**kwargs, "_init_setup_model": False})
        vars(self).update(penalty)
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
        self._reference = None
        reference = None if self.reference_policy is None else interpret_reference(self.reference_policy).policy
        # A model that was loaded may only be there to act, and the reference's file gone
        if not (hasattr(self, "kl_coef") and isinstance(reference, str)):
            self._prepare_reference()
        # Keep the running β after load(): it is part of the checkpoint
        self.kl_coef = float(getattr(self, "kl_coef", self.init_kl_coef))
        if self.compile and is_enabled():
            from sb3_adaptive_kl.fast.compiled import Compiler  # not at module level: only users of compile=True need it

            self._compiler = Compiler()

    def _excluded_save_params(self) -> list[str]:
        # Compiled code cannot be saved, and _setup_model makes it anew
        held = self.reference_policy is not None and interpret_reference(self.reference_policy).target_kl is not None
        return [*super()._excluded_save_params(), "_compiler", "_reference", *([] if held else ["reference_kl_coef"])]

    def _prepare_reference(self) -> None:
        """
        Load the reference policy, unless this has been done, and set its coefficient for the next update.

        :raises ValueError: if there is no such policy, or it cannot be compared with the one in training
        """
        if self.reference_policy is None:
            self._reference = self.reference_kl_coef = None
            return
        spec = interpret_reference(self.reference_policy)
        if self._reference is not None and self._reference.spec.kl_coef != spec.kl_coef:
            self.reference_kl_coef = None  # the user has set another: begin with it
        if self._reference is None or self._reference.spec.policy != spec.policy:
            self._reference = Reference(spec, self.policy)
        if isinstance(spec.policy, BasePolicy):  # the user may train the original further
            spec = replace(spec, policy=self._reference.policy)
        if not isinstance(self.reference_policy, str):
            self.reference_policy = spec  # save() can write it, and no other of its forms
        self._reference.spec = spec
        bounds = kl_coef_limits(self.kl_coef_bounds, self.normalize_advantage)
        self.reference_kl_coef = reference_kl_coef(spec, self.reference_kl_coef, bounds, self._current_progress_remaining)

    @classmethod
    def load(cls: type[SelfAlgorithm], path: Any, env: Any = None, *args: Any, **kwargs: Any) -> SelfAlgorithm:
        """
        Load a saved model as SB3 does.

        :param path: path to the file, or a file-like object
        :param env: the environment to train on, if any
        :param kwargs: arguments of the constructor, which replace the saved ones
        """
        # SB3 sets whatever it is given, a misspelled name too
        others = kwargs.keys() - signature(super().load).parameters.keys() - signature(cls).parameters.keys() - set(STATE)
        if others:  # attributes, unless they are misspelled
            blank = cls(policy=next(iter(cls.policy_aliases), "MlpPolicy"), env=env, _init_setup_model=False)
        for name in others:
            if not hasattr(blank, name):
                warn_user(f"load({name}=...) is not an argument of {cls.__name__}{suggestion(name, vars(blank))}")
        return super().load(path, env, *args, **kwargs)

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """
        Return the parameters of the policy and of its optimizer as SB3 does.

        :return: a dictionary that ``set_parameters`` accepts, also PPO's; its attribute ``penalty`` holds the coefficients
        """
        # An attribute, which PPO ignores. th.load() accepts OrderedDict with its attributes, and no class of ours
        parameters = OrderedDict(super().get_parameters())
        excluded = self._excluded_save_params()
        vars(parameters)["penalty"] = {name: getattr(self, name) for name in STATE if name not in excluded}
        return parameters

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters as SB3 does, and β where they come from ``get_parameters()``.

        :param load_path_or_dict: path of a saved model, or a dictionary of parameters
        :param exact_match: whether every parameter has to be given
        :param device: where the parameters are put
        """
        super().set_parameters(load_path_or_dict, exact_match=exact_match, device=device)
        vars(self).update(getattr(load_path_or_dict, "penalty", {}))

    def learn(
        self: SelfAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """
        Train as the host does.

        :param total_timesteps: The total number of samples (env steps) to train on
        :param callback: callback(s) called at every step with state of the algorithm.
        :param log_interval: for how many iterations the training info is logged.
        :param tb_log_name: the name of the run for TensorBoard logging (``None``: that of the class)
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging)
        :param args: as for the host: ``progress_bar``, and before it MaskablePPO's ``use_masking``
        :param kwargs: the same by name
        :return: the trained model
        """
        self._prepare_reference()  # before the first rollout, if something is wrong with it
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, *args, **kwargs)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """Collect a rollout as the host does."""
        with fast_collection(self.policy) if self._compiler is None else self._compiler.compiled_collection(self.policy):
            return super().collect_rollouts(*args, **kwargs)


def constructor_arguments(local_variables: dict[str, Any]) -> dict[str, Any]:
    """
    Collect what a constructor was given, from its ``locals()``: its class spells the arguments out for IDEs and ``load()``.
    """
    return {name: value for name, value in local_variables.items() if name not in ("self", "__class__")}


def _python_number(value: Any) -> Any:
    """Convert NumPy's and other numbers, which SB3 rejects, to Python's; return anything else as it is."""
    return float(value) if isinstance(value, Real) else value
