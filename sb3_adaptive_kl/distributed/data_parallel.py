"""
The hooks of the algorithm that differ where several processes train one policy.

All ranks call ``learn()``, and each collects its own rollouts; the update and everything that is decided in it are the same on
all ranks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from inspect import signature
from io import BufferedIOBase
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import explained_variance

from sb3_adaptive_kl.distributed.callbacks import callbacks_of_this_rank
from sb3_adaptive_kl.distributed.gradients import gradients_of_all_ranks, normalized_over_ranks
from sb3_adaptive_kl.distributed.ranks import check_group, gather, gather_objects, rank, wait_for_all_ranks
from sb3_adaptive_kl.distributed.synchronization import (
    PooledNormalization,
    average_buffers,
    broadcast_policy,
    check_agreement,
    checksum,
    pool_kl,
)
from sb3_adaptive_kl.objective import Settings
from sb3_adaptive_kl.rollout.old_policy import OldPolicy, RolloutKL
from sb3_adaptive_kl.step import ComputeGradients
from sb3_adaptive_kl.training import KLPenaltyTraining

# Compare the parameters of all ranks once in this many rollouts
ROLLOUTS_BETWEEN_CHECKSUMS = 10
# Arguments that may differ between ranks, since they change nothing in the update
RANK_SPECIFIC_ARGUMENTS = ("verbose", "tensorboard_log")
COMPARED_PACKAGES = ("sb3_adaptive_kl", "stable_baselines3", "sb3_contrib")
# What the update depends on besides arguments
COMPARED_STATE = ("n_envs", "num_timesteps", "_n_updates", "kl_coef", "learning_rate_scale", "_undone_in_a_row")

CHECKSUM = "the checksum of the parameters"
CAUSES_OF_DIFFERENCE = "a callback has changed it on some ranks only, or their machines do not compute the same"

SelfDataParallel = TypeVar("SelfDataParallel", bound="DataParallel")
Episodes = list[tuple[int, list[dict[str, Any]], list[bool]]]  # time step, infos and dones of those that ended


class DataParallel(KLPenaltyTraining):
    """
    Mixin that lets all ranks of ``torch.distributed``'s default group train one policy.

    Put it before the algorithm: ``class DistributedAdaptiveKLPPO(DataParallel, AdaptiveKLPPO)``. N ranks make the same update
    as one process with N times the environments and minibatches. ``num_timesteps`` and ``total_timesteps`` count the
    transitions of all ranks, and logged episodes are those of all ranks.

    :raises ValueError: if there is no process group
    """

    _n_rollouts: int = 0
    _normalization: PooledNormalization
    _ended_episodes: Episodes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_group(type(self).__name__)
        if rank() > 0:
            kwargs["verbose"] = 0
        super().__init__(*args, **kwargs)

    # ---------------------------------------------------------------- the update

    def _optimize(self, *args: Any) -> None:
        super()._optimize(*args)
        average_buffers(self.policy)

    @contextmanager
    def _minibatch_gradients(self, old_policy: OldPolicy) -> Iterator[ComputeGradients]:
        with super()._minibatch_gradients(old_policy) as of_this_rank:
            yield gradients_of_all_ranks(of_this_rank, old_policy)

    def _minibatches(self, settings: Settings) -> Iterator[tuple[Any, th.Tensor]]:
        return normalized_over_ranks(super()._minibatches(settings), self._adapter, settings.normalize_advantage)

    def _measure_kl(self, old_policy: OldPolicy) -> RolloutKL:
        return pool_kl(super()._measure_kl(old_policy), self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs)

    def _critic_parameters(self, old_policy: OldPolicy) -> set[int]:
        # Only those that every rank counts as the critic's: a rank may probe other branches of a network
        mine, parameters = super()._critic_parameters(old_policy), list(self.policy.parameters())
        of_ranks = gather(th.tensor([id(parameter) in mine for parameter in parameters]).to(th.uint8)).bool()
        return {id(parameter) for parameter, everywhere in zip(parameters, of_ranks.all(dim=0), strict=True) if everywhere}

    def _explained_variance(self) -> float:
        buffer = self.rollout_buffer
        values, returns = (gather(th.from_numpy(part.flatten())).flatten() for part in (buffer.values, buffer.returns))
        return float(explained_variance(values.numpy(), returns.numpy()))

    # ---------------------------------------------------------------- SB3's hooks

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of all random generators. Ranks get different ones, as environments of one process do: the environments of
        rank 1 are numbered after those of rank 0.

        :param seed: the same on all ranks; that of rank 0
        """
        super().set_random_seed(None if seed is None else seed + rank() * self.n_envs)

    def learn(self: SelfDataParallel, *args: Any, **kwargs: Any) -> SelfDataParallel:
        """
        Train as the host does, together with all other ranks.

        :raises RuntimeError: if another rank has ended, or does not arrive
        :raises RanksDisagree: if the ranks were given different arguments, or do not end with the same parameters
        """
        super().learn(*args, **kwargs)
        check_agreement({CHECKSUM: checksum(self.policy)}, CAUSES_OF_DIFFERENCE)
        return self

    def save(self, path: str | Path | BufferedIOBase, *args: Any, **kwargs: Any) -> None:
        """
        Save as SB3 does. Only rank 0 writes to a path, and the file gets its name when it is complete: a killed process leaves
        ``.NAME.zip.unfinished`` at most.

        :param path: path to the file, or a file-like object
        """
        if not isinstance(path, str | Path):
            super().save(path, *args, **kwargs)
        elif rank() == 0:
            path = Path(path)
            target = path if path.suffix else Path(f"{path}.zip")  # as SB3 completes it
            unfinished = target.with_name(f".{target.name}.unfinished")
            try:
                super().save(unfinished, *args, **kwargs)
                os.replace(unfinished, target)
            finally:
                unfinished.unlink(missing_ok=True)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """Collect as the host does, then pool episodes, statistics and the decision to continue over all ranks."""
        assert self.ep_info_buffer is not None
        assert self.ep_success_buffer is not None
        before = self.ep_info_buffer.copy(), self.ep_success_buffer.copy()  # the same on all ranks
        self._ended_episodes = []
        continue_training = super().collect_rollouts(*args, **kwargs)
        of_ranks = gather_objects((continue_training, self.num_timesteps, self._ended_episodes))
        all_continue = all(continue_training for continue_training, _, _ in of_ranks)
        self.num_timesteps = max(num_timesteps for _, num_timesteps, _ in of_ranks)
        self.ep_info_buffer, self.ep_success_buffer = before
        for _, infos, dones in sorted(
            (ended for _, _, episodes in of_ranks for ended in episodes), key=lambda ended: ended[0]
        ):
            super()._update_info_buffer(infos, np.array(dones))
        self._normalization.pool()
        average_buffers(self.policy)
        self._check_same_update()
        return all_continue

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        all_dones = [False] * len(infos) if dones is None else dones.tolist()
        ended = [(info, done) for info, done in zip(infos, all_dones, strict=True) if done or "episode" in info]
        if ended:
            logged = [{key: value for key, value in info.items() if key in ("episode", "is_success")} for info, _ in ended]
            self._ended_episodes.append((self.num_timesteps, logged, [done for _, done in ended]))

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        self._start_together(total_timesteps, reset_num_timesteps)
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        return super()._init_callback(callbacks_of_this_rank(callback, progress_bar), progress_bar=False)

    def _start_together(self, total_timesteps: int, reset_num_timesteps: bool) -> None:
        """
        Give all ranks the state of rank 0, and each of them seeds of its own.

        :raises RanksDisagree: if the ranks were given different arguments
        """
        wait_for_all_ranks()
        shapes = [tuple(parameter.shape) for parameter in self.policy.parameters()]
        check_agreement(
            {
                "algorithm": type(self).__name__,
                "total_timesteps": total_timesteps,
                "reset_num_timesteps": reset_num_timesteps,
                "observation_space": self.observation_space,
                "action_space": self.action_space,
                "the shapes of the policy's parameters": shapes,
                "the use of VecNormalize": self.get_vec_normalize_env() is not None,
                **self._facts(),
            },
            "let all ranks call learn() with the same arguments, on models that were made or loaded in the same way",
        )
        broadcast_policy(self.policy)
        self._n_rollouts = 0
        self._normalization = PooledNormalization(self.get_vec_normalize_env())
        if rank() > 0:
            self.verbose = 0
            self.set_logger(Logger(folder=None, output_formats=[]))

    def _check_same_update(self) -> None:
        """
        Check that all ranks are about to make the same update.

        :raises RanksDisagree: if they are not
        """
        facts = self._facts()
        if self._n_rollouts % ROLLOUTS_BETWEEN_CHECKSUMS == 0:
            facts[CHECKSUM] = checksum(self.policy)
        self._n_rollouts += 1
        check_agreement(facts, CAUSES_OF_DIFFERENCE)

    def _facts(self) -> dict[str, Any]:
        """Collect the numbers and names that decide about an update: arguments and state."""
        # Read the signatures of all base classes: a user's subclass may take **kwargs. Arguments that it adds are not compared
        known = [base for base in type(self).__mro__ if base.__module__.split(".")[0] in COMPARED_PACKAGES]
        constructors = [vars(base)["__init__"] for base in known if "__init__" in vars(base)]
        arguments = [name for constructor in constructors for name in signature(constructor).parameters]
        names = {*arguments, *COMPARED_STATE}.difference(RANK_SPECIFIC_ARGUMENTS)
        values = {name: getattr(self, name, None) for name in sorted(names)}
        facts = {name: value for name, value in values.items() if _has_complete_repr(value)}
        facts["the choice of trainable parameters"] = [parameter.requires_grad for parameter in self.policy.parameters()]
        for name in ("learning_rate", "target_kl", "clip_range", "clip_range_vf"):
            value = getattr(self, name, None)
            if callable(value):
                facts[name] = float(value(self._current_progress_remaining))
        return facts

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_normalization", "_ended_episodes", "_n_rollouts"]


def _has_complete_repr(value: Any) -> bool:
    """Whether ``repr(value)`` identifies the value, as that of a number or of one of our rules does."""
    if type(value) in (tuple, list):
        return all(map(_has_complete_repr, value))
    return value is None or isinstance(value, Real | str) or is_dataclass(value)
