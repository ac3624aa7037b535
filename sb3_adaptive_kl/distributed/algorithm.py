"""
SB3's hooks around training, for an algorithm that several processes train together.

Without a process group they do nothing. Within one, all ranks call ``learn()``, and each collects its own rollouts; the train
step (``step.py``) and everything that is decided in it are the same on all ranks.
"""

import os
from dataclasses import is_dataclass
from inspect import signature
from io import BufferedIOBase
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_adaptive_kl.distributed.callbacks import callbacks_of_this_rank
from sb3_adaptive_kl.distributed.failure import fail_together
from sb3_adaptive_kl.distributed.ranks import gather_objects, is_parallel, rank
from sb3_adaptive_kl.distributed.synchronization import (
    PooledNormalization,
    average_buffers,
    broadcast_policy,
    check_agreement,
    checksum,
)

# Compare the parameters of all ranks once in this many rollouts
ROLLOUTS_BETWEEN_CHECKSUMS = 10
# Arguments that may differ between ranks, since they change nothing in the update
RANK_SPECIFIC_ARGUMENTS = ("seed", "verbose", "tensorboard_log")
COMPARED_PACKAGES = ("sb3_adaptive_kl", "stable_baselines3", "sb3_contrib")
# What the update depends on besides arguments
COMPARED_STATE = ("n_envs", "num_timesteps", "_n_updates", "kl_coef", "learning_rate_scale", "_undone_in_a_row")

CHECKSUM = "the checksum of the parameters"
CAUSES_OF_DIFFERENCE = "a callback has changed it on some ranks only, or their machines do not compute the same"

SelfDistributedAlgorithm = TypeVar("SelfDistributedAlgorithm", bound="DistributedAlgorithm")
Episodes = list[tuple[int, list[dict[str, Any]], list[bool]]]  # time step, infos and dones of those that ended


class DistributedAlgorithm(OnPolicyAlgorithm):
    """
    The base of an algorithm that trains one policy on all ranks of ``torch.distributed``'s default group.

    ``num_timesteps`` and ``total_timesteps`` count the transitions of all ranks, and logged episodes are those of all ranks.
    """

    _rank_of_seed: int = 0
    _n_rollouts: int = 0
    _normalization: PooledNormalization
    _ended_episodes: Episodes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if rank() > 0:
            kwargs["verbose"] = 0
        super().__init__(*args, **kwargs)

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of all random generators. Ranks get different ones, as environments of one process do: the environments of
        rank 1 are numbered after those of rank 0.

        :param seed: of rank 0
        """
        self._rank_of_seed = rank()
        super().set_random_seed(None if seed is None else seed + rank() * self.n_envs)

    def learn(self: SelfDistributedAlgorithm, *args: Any, **kwargs: Any) -> SelfDistributedAlgorithm:
        """
        Train as the host does, together with all other ranks.

        :raises RankFailure: if another rank has failed
        :raises RanksDisagree: if the ranks were given different arguments, or do not end with the same parameters
        """
        with fail_together():
            super().learn(*args, **kwargs)
            if is_parallel():
                check_agreement({CHECKSUM: checksum(self.policy)}, CAUSES_OF_DIFFERENCE)
        return self

    def save(self, path: str | Path | BufferedIOBase, *args: Any, **kwargs: Any) -> None:
        """
        Save as SB3 does. Within a process group, only rank 0 writes to a path, and the file gets its name when it is complete:
        a killed process leaves ``.NAME.zip.unfinished`` at most.

        :param path: path to the file, or a file-like object
        """
        if not is_parallel() or not isinstance(path, str | Path):
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
        if not is_parallel():
            return super().collect_rollouts(*args, **kwargs)
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
        if is_parallel():
            all_dones = [False] * len(infos) if dones is None else dones.tolist()
            ended = [(info, done) for info, done in zip(infos, all_dones, strict=True) if done or "episode" in info]
            if ended:
                logged = [{key: value for key, value in info.items() if key in ("episode", "is_success")} for info, _ in ended]
                self._ended_episodes.append((self.num_timesteps, logged, [done for _, done in ended]))

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        if is_parallel():
            self._start_together(total_timesteps, reset_num_timesteps)
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if is_parallel():
            callback, progress_bar = callbacks_of_this_rank(callback, progress_bar), False
        return super()._init_callback(callback, progress_bar)

    def _start_together(self, total_timesteps: int, reset_num_timesteps: bool) -> None:
        """
        Give all ranks the state of rank 0, and each of them seeds of its own.

        :raises RanksDisagree: if the ranks were given different arguments
        """
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
        if self.seed is not None and self._rank_of_seed != rank():  # the model is older than the group
            self.set_random_seed(self.seed)
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
        return [*super()._excluded_save_params(), "_normalization", "_ended_episodes", "_rank_of_seed", "_n_rollouts"]


def _has_complete_repr(value: Any) -> bool:
    """Whether ``repr(value)`` identifies the value, as that of a number or of one of our rules does."""
    if type(value) in (tuple, list):
        return all(map(_has_complete_repr, value))
    return value is None or isinstance(value, Real | str) or is_dataclass(value)
