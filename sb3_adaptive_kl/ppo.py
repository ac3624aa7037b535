"""AdaptiveKLPPO: Stable-Baselines3's PPO with an adaptive KL penalty instead of clipping."""

from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_adaptive_kl.algorithm import constructor_arguments
from sb3_adaptive_kl.learning_rate import LearningRateRule
from sb3_adaptive_kl.penalty import PenaltyRule
from sb3_adaptive_kl.reference import ReferencePolicy
from sb3_adaptive_kl.training import KLPenaltyTraining


class AdaptiveKLPPO(KLPenaltyTraining, PPO):  # type: ignore[misc]  # None joins the types of PPO's arguments
    """
    Proximal Policy Optimization algorithm (PPO) (adaptive KL penalty version)

    Paper: https://arxiv.org/abs/1707.06347, section 4::

        L(θ) = E[ r_t(θ) Â_t ] − β · E[ KL( π_old(·|s_t) ‖ π_θ(·|s_t) ) ]

    With the default rule, β is halved for the next update when the KL divergence measured after this one is below
    ``target_kl / 1.5``, and doubled when it is above ``target_kl · 1.5``.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The learning rate, it can be a function
        of the current progress remaining (from 1 to 0)
    :param n_steps: The number of steps to run for each environment per update
        (i.e. rollout buffer size is n_steps * n_envs where n_envs is number of environment copies running in parallel)
    :param batch_size: Minibatch size
    :param n_epochs: Number of epoch when optimizing the surrogate loss
    :param gamma: Discount factor
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator
    :param clip_range: If given, the surrogate is clipped as well (and the penalty stays), as in RLlib: a positive number, or
        a function of the current progress remaining (from 1 to 0). ``"outliers"`` clips at two standard deviations of the
        log-ratio at the target, 2·√(2·target_kl). It is meant for runaway actions, but on some tasks it ends most
        updates below the target. ``None`` (default): no clipping.
    :param clip_range_vf: Clipping parameter for the value function, in units of the return: a positive number, or a
        function of the current progress remaining (from 1 to 0). ``None`` (default): no clipping.
    :param normalize_advantage: Whether to normalize or not the advantage. Without it, β carries the unit of the rewards.
    :param ent_coef: Entropy coefficient for the loss calculation, it can be a function of the current progress remaining
        (from 1 to 0)
    :param vf_coef: Value function coefficient for the loss calculation, it can be a function of the current progress remaining
    :param max_grad_norm: The maximum value for the gradient clipping
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE)
        instead of action noise exploration (default: False)
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE
        Default: -1 (only sample at the beginning of the rollout)
    :param rollout_buffer_class: Rollout buffer class to use. If ``None``, it will be automatically selected.
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param target_kl: d_targ, the KL divergence per update to aim for, in nats, summed over the action dimensions: a
        positive number, or a function of the current progress remaining (from 1 to 0). Not an early-stopping limit as in
        SB3's PPO: for that, see ``kl_stop_factor``.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param init_kl_coef: β before the first update, within ``kl_coef_bounds``. The running value is the attribute ``kl_coef``,
        which ``save`` keeps.
    :param kl_rule: How β moves: ``"adaptive"`` (the paper's rule), ``"predictive"`` (several times within an update, towards
        the KL predicted for its end), ``"fixed"``, ``"proportional"``; with other numbers as a mapping,
        ``{"name": "adaptive", "high": 2.0}``, or as an object, ``AdaptivePenalty(high=2.0)``; any ``PenaltyRule``, or a
        function of β, the KL and its target
    :param kl_coef_bounds: Lowest and highest β, 0 < low ≤ high. ``None``: (1/32, 32) with normalized advantages,
        (1e-6, 1e6) without.
    :param kl_ceiling: Where an update ends above this times ``target_kl``, shorten the actor's step until it does not: ≥ 1;
        1.5 is the upper edge of the paper's band (``None``: never). The critic keeps its step; see
        :func:`~sb3_adaptive_kl.step_back.shorten_step`. The rules for β and the learning rate are given the KL of the whole
        step.
    :param learning_rate_rule: How a factor of ``learning_rate`` moves: ``None`` (default: not at all); ``"balanced"``, the
        second actuator next to a rule for β (lowered while the KL buys less gain than it should, raised while it buys three
        times as much; it needs ``normalize_advantage=True``, and no last minibatch of a single transition);
        ``"adaptive"`` (divided by 1.5 above twice the target, multiplied below half of it, once per update, as in robotics;
        with ``kl_rule="fixed"``, or two controllers answer the same error); with other numbers as a mapping; any
        ``LearningRateRule``, or a function of the factor, the KL, its target and the balance. The running factor is the
        attribute ``learning_rate_scale``, which ``save`` keeps.
    :param kl_divergence: The measure that is penalized and logged: ``"forward"`` KL(old‖new), ``"reverse"`` KL(new‖old), both
        exact; or an estimate from the sampled actions: ``"k3"`` (r − 1) − log r, ``"pearson"`` ½(r − 1)²
    :param kl_cutoff_coef: c of an additional hinge c · max(0, KL − 2 · target_kl)², ≥ 0 (0: none)
    :param kl_stop_factor: Stop the epochs once the KL of a minibatch, beyond that of the first, exceeds this times the
        target, > 0 (``None``: never). β is still adapted to the KL measured in the end.
    :param reference_policy: A frozen policy from which this one is kept from straying, by a second penalty: a
        policy of SB3 or sb3-contrib, which is copied and saved with the model; the path of a saved model, which is read again
        wherever the model is trained; or either with a coefficient, a target or a direction,
        ``ReferencePolicy("clone.zip", target_kl=0.5)``, or the same as a mapping. See
        :class:`~sb3_adaptive_kl.ReferencePolicy`. With a target, the running coefficient is the attribute
        ``reference_kl_coef``, which ``save`` keeps. ``None`` (default): no reference.
    :param compile: Whether to compile the policy's ``forward`` and the gradients of a minibatch with ``torch.compile``, which
        takes seconds to a minute in the first iteration. Where that fails, or torch is older than 2.13, training goes on
        uncompiled, with one warning. In a callback, ``policy.action_dist`` then holds no distribution:
        ``policy.get_distribution(observations)`` gives it.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if an argument is out of its range
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | str | Schedule | None = None,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float | Schedule = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | Schedule = 0.02,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        init_kl_coef: float = 1.0,
        kl_rule: str | dict[str, Any] | PenaltyRule = "adaptive",
        kl_coef_bounds: tuple[float, float] | None = None,
        kl_ceiling: float | None = None,
        learning_rate_rule: str | dict[str, Any] | LearningRateRule | None = None,
        kl_divergence: str = "forward",
        kl_cutoff_coef: float = 0.0,
        kl_stop_factor: float | None = None,
        reference_policy: BasePolicy | str | Path | dict[str, Any] | ReferencePolicy | None = None,
        compile: bool = False,
        _init_setup_model: bool = True,
    ):
        if batch_size is None:  # as contrib's algorithms allow; PPO's constructor cannot compare it
            raise ValueError("batch_size=None must be a whole number: n_steps * n_envs takes the whole rollout at once")
        super().__init__(**constructor_arguments(locals()))
