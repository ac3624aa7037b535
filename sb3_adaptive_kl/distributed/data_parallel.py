"""
The hooks of the algorithm that differ where several processes train one policy.

All ranks call ``learn()``, and each collects its own rollouts; the update and everything that is decided in it are the same on
all ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import explained_variance

from sb3_adaptive_kl.arguments import settings_at
from sb3_adaptive_kl.distributed.callbacks import callbacks_of_this_rank
from sb3_adaptive_kl.distributed.gradients import gradients_of_all_ranks, normalized_over_ranks
from sb3_adaptive_kl.distributed.ranks import check_group, gather, gather_objects, wait_for_all_ranks
from sb3_adaptive_kl.distributed.synchronization import (
    all_parameters,
    average_buffers,
    broadcast_parameters,
    check_agreement,
    checksum,
    overwrite,
    pool_kl,
    pooled,
    running_statistics,
)
from sb3_adaptive_kl.objective import Settings
from sb3_adaptive_kl.ppo import AdaptiveKLPPO
from sb3_adaptive_kl.rollout.old_policy import OldPolicy, RolloutKL
from sb3_adaptive_kl.step import ComputeGradients, optimized_parameters
from sb3_adaptive_kl.training import KLPenaltyTraining

# What the update depends on besides arguments
COMPARED_STATE = ("n_envs", "num_timesteps", "_n_updates", "learning_rate_scale", "_undone_in_a_row")
# All arguments of ours and of the hosts', but those that may differ between ranks
MAY_DIFFER = {"env", "device", "verbose", "tensorboard_log", "reference_policy", "_init_setup_model"}
COMPARED = sorted({*signature(AdaptiveKLPPO).parameters, *COMPARED_STATE} - MAY_DIFFER)
NORMALIZATION = ("norm_obs", "norm_obs_keys", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon")

CAUSES_OF_DIFFERENCE = "a callback has changed it on some ranks only, or their machines do not compute the same"


class DataParallel(KLPenaltyTraining):
    """
    Mixin that lets all ranks of ``torch.distributed``'s default group train one policy.

    Put it before the algorithm: ``class DistributedAdaptiveKLPPO(DataParallel, AdaptiveKLPPO)``. N ranks make the same update
    as one process with N times the environments and minibatches. ``num_timesteps`` and ``total_timesteps`` count the
    transitions of all ranks, and logged episodes are those of all ranks. ``learn()`` raises ``RanksDisagree`` on all ranks if
    they hold different arguments or parameters, and torch's ``RuntimeError`` if another rank has ended or does not arrive.

    :raises ValueError: if there is no process group; by ``learn()``, with a ``kl_cutoff_coef``
    """

    _ended_episodes: list[tuple[int, dict[str, Any], bool]]  # time step, info and done

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_group(type(self).__name__)
        if dist.get_rank() > 0:
            kwargs["verbose"] = 0
        super().__init__(*args, **kwargs)

    # ---------------------------------------------------------------- the update

    def train(self) -> None:
        """Train as the host does, and check that all ranks end with the same parameters."""
        super().train()
        # Not of buffers, which are averaged before each update, and may differ in between
        states = [entry for state in self.policy.optimizer.state_dict()["state"].values() for entry in state.values()]
        tensors = [*all_parameters(self.policy), *(entry for entry in states if isinstance(entry, th.Tensor))]
        check_agreement({"the checksum of the parameters": checksum(tensors)}, CAUSES_OF_DIFFERENCE)

    def _optimize(self, *args: Any) -> None:
        super()._optimize(*args)
        average_buffers(self.policy)

    @contextmanager
    def _minibatch_gradients(self, old_policy: OldPolicy) -> Iterator[ComputeGradients]:
        with super()._minibatch_gradients(old_policy) as of_this_rank:
            yield gradients_of_all_ranks(of_this_rank, old_policy)

    def _minibatches(self, settings: Settings) -> Iterator[tuple[Any, th.Tensor]]:
        minibatches = super()._minibatches(settings)
        return normalized_over_ranks(minibatches) if settings.normalize_advantage else minibatches

    def _measure_kl(self, old_policy: OldPolicy) -> RolloutKL:
        return pool_kl(super()._measure_kl(old_policy))

    def _critic_parameters(self, old_policy: OldPolicy) -> set[int]:
        # Only those that every rank counts as the critic's: a rank may probe other branches of a network
        mine, parameters = super()._critic_parameters(old_policy), optimized_parameters(self.policy.optimizer)
        everywhere = gather(th.tensor([id(parameter) in mine for parameter in parameters]).to(th.uint8)).all(dim=0)
        return {id(parameters[i]) for i in everywhere.nonzero()}

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
        super().set_random_seed(None if seed is None else seed + dist.get_rank() * self.n_envs)

    def save(self, path: str | Path | BufferedIOBase, *args: Any, **kwargs: Any) -> None:
        """
        Save as SB3 does. Only rank 0 writes to a path, and the file gets its name when it is complete: a killed process leaves
        ``.NAME.zip.unfinished`` at most.

        :param path: path to the file, or a file-like object
        """
        if not isinstance(path, str | Path):
            super().save(path, *args, **kwargs)
        elif dist.get_rank() == 0:
            target = Path(path) if Path(path).suffix else Path(f"{path}.zip")  # as SB3 completes it
            unfinished = target.with_name(f".{target.name}.unfinished")
            super().save(unfinished, *args, **kwargs)
            unfinished.replace(target)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """Collect as the host does, then pool episodes, statistics and the decision to continue over all ranks."""
        assert self.ep_info_buffer is not None
        assert self.ep_success_buffer is not None
        before = self.ep_info_buffer.copy(), self.ep_success_buffer.copy()  # the same on all ranks
        self._ended_episodes = []
        statistics = running_statistics(self.get_vec_normalize_env())
        old_statistics = deepcopy(statistics)  # the same on all ranks
        of_this_rank = super().collect_rollouts(*args, **kwargs), self.num_timesteps, self._ended_episodes, statistics
        continue_training, num_timesteps, episodes, new_statistics = zip(*gather_objects(of_this_rank), strict=True)
        self.num_timesteps = max(num_timesteps)
        self.ep_info_buffer, self.ep_success_buffer = before
        for _, info, done in sorted(chain.from_iterable(episodes), key=lambda ended: ended[0]):
            super()._update_info_buffer([info], np.array([done]))
        overwrite(statistics, [pooled(old, new) for old, *new in zip(old_statistics, *new_statistics, strict=True)])
        average_buffers(self.policy)
        self._check_agreement({}, CAUSES_OF_DIFFERENCE)  # a callback may have changed something
        return all(continue_training)

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        for info, done in zip(infos, np.zeros(len(infos)) if dones is None else dones, strict=True):
            if done or "episode" in info:
                logged: dict[str, Any] = {key: info[key] for key in ("episode", "is_success") if key in info}
                self._ended_episodes.append((self.num_timesteps, logged, bool(done)))

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        """Give all ranks the state of rank 0, if they were given the same arguments."""
        wait_for_all_ranks()
        normalize = self.get_vec_normalize_env()
        self._check_agreement(
            {
                "algorithm": type(self).__name__,
                "total_timesteps": total_timesteps,
                "reset_num_timesteps": reset_num_timesteps,
                "observation_space": self.observation_space,
                "action_space": self.action_space,
                "the shapes of the policy's parameters": [tuple(parameter.shape) for parameter in all_parameters(self.policy)],
                "VecNormalize": normalize and {name: getattr(normalize, name) for name in NORMALIZATION},
            },
            "let all ranks call learn() with the same arguments, on models that were made or loaded in the same way",
        )
        broadcast_parameters(self)
        if dist.get_rank() > 0:
            self.verbose = 0
            self.set_logger(Logger(folder=None, output_formats=[]))
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        statistics = running_statistics(normalize)  # after the environments were reset
        overwrite(statistics, gather_objects(statistics)[0])
        return result

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        return super()._init_callback(callbacks_of_this_rank(callback, progress_bar), progress_bar=False)

    def _check_agreement(self, facts: dict[str, Any], explanation: str) -> None:
        """Check these facts, and all that decides about an update. Arguments that a user's subclass adds may differ."""
        facts = {**facts, **{name: getattr(self, name, None) for name in COMPARED}}
        facts |= settings_at(self, self._current_progress_remaining)._asdict()  # the values of schedules, too
        facts["learning_rate"] = self.lr_schedule(self._current_progress_remaining)
        reference = self._reference  # its file may lie elsewhere on another machine
        facts["reference_policy"] = reference and {**vars(reference.spec), "policy": checksum(reference.policy.parameters())}
        facts["the choice of trainable parameters"] = [parameter.requires_grad for parameter in all_parameters(self.policy)]
        check_agreement(facts, explanation)
        if self.kl_cutoff_coef:  # the hinge of a mean is not the mean of the ranks' hinges
            raise ValueError(f"kl_cutoff_coef={self.kl_cutoff_coef!r} needs one process: pass 0, and a kl_ceiling")

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_ended_episodes"]
