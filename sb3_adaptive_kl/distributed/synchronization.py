"""What the ranks exchange around an update: the policy at the start, statistics and episodes after each rollout."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from sb3_adaptive_kl.distributed.ranks import broadcast, gather, gather_objects, rank
from sb3_adaptive_kl.rollout.old_policy import RolloutKL


class RanksDisagree(ValueError):
    """The ranks hold different arguments, or different parameters. The message says which."""


def check_agreement(facts: Mapping[str, Any], explanation: str) -> None:
    """
    Check that all ranks state the same facts. *Collective.*

    :param facts: name → value with a ``repr`` that is the same for equal values
    :param explanation: ends the message: a cause or a remedy
    :raises RanksDisagree: on all ranks, with the first fact that differs
    """
    stated = {name: repr(value) for name, value in facts.items()}
    digest = zlib.crc32(repr(stated).encode())
    if len(set(gather(th.tensor([digest])).flatten().tolist())) == 1:
        return
    all_stated = gather_objects(stated)
    for name in all_stated[0]:
        values = [of_rank.get(name) for of_rank in all_stated]
        if len(set(values)) > 1:
            other = next(i for i, value in enumerate(values) if value != values[0])
            raise RanksDisagree(f"{name} is {values[0]} on rank 0, but {values[other]} on rank {other}: {explanation}")
    raise RanksDisagree(f"the ranks do not even agree on what to compare: {explanation}")


def checksum(policy: ActorCriticPolicy) -> int:
    """
    Digest the parameters and the optimizer's state. (Buffers are averaged before each update, and may differ in between.)

    :param policy: the policy
    :return: a number that is the same on ranks where every bit of them is
    """
    state = policy.optimizer.state_dict()["state"]
    tensors = [*policy.parameters(), *(x for entry in state.values() for x in entry.values() if isinstance(x, th.Tensor))]
    digest = 0
    for tensor in tensors:
        digest = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(th.uint8).numpy().tobytes(), digest)
    return digest


def broadcast_policy(policy: ActorCriticPolicy) -> None:
    """
    Overwrite the policy and its optimizer's state with those of rank 0. *Collective.*

    :param policy: with the same networks on all ranks
    """
    for tensor in [*policy.parameters(), *policy.buffers()]:
        broadcast(tensor)
    optimizer_state = gather_objects(_on_cpu(policy.optimizer.state_dict()) if rank() == 0 else None)[0]
    assert optimizer_state is not None
    policy.optimizer.load_state_dict(optimizer_state)  # moves it to the device of the parameters


def _on_cpu(value: Any) -> Any:
    if isinstance(value, th.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    return [_on_cpu(entry) for entry in value] if isinstance(value, list) else value


def average_buffers(policy: ActorCriticPolicy) -> None:
    """
    Average the policy's floating-point buffers, such as the statistics of a batch normalization. *Collective.*

    :param policy: the policy
    """
    for tensor in policy.buffers():
        if tensor.is_floating_point():
            of_ranks = gather(tensor.flatten())
            # Not the mean of the values, whose rounding would move a buffer that is the same on all ranks
            mean = of_ranks[0] + (of_ranks - of_ranks[0]).mean(dim=0)
            with th.no_grad():
                tensor.copy_(mean.view_as(tensor))


def pool_kl(kl: RolloutKL, n_transitions: int) -> RolloutKL:
    """
    Combine what the ranks have measured, each on its own rollout. *Collective.*

    :param kl: the mean and largest divergence on this rank's rollout, in nats
    :param n_transitions: how many transitions it holds
    :return: mean and largest divergence over the transitions of all ranks
    """
    n, total, largest = gather(th.tensor([n_transitions, n_transitions * kl.mean, kl.max], dtype=th.float64)).unbind(dim=1)
    return RolloutKL((total.sum() / n.sum()).item(), largest.max().item())


class PooledNormalization:
    """
    Keeps the running statistics of ``VecNormalize`` the same on all ranks. *Collective.*

    :param normalize: this rank's normalized environments, or None; they get the statistics of rank 0
    """

    def __init__(self, normalize: VecNormalize | None) -> None:
        self._statistics: list[RunningMeanStd] = []
        if normalize is not None:
            observations = normalize.obs_rms if normalize.norm_obs else {}
            by_key = observations if isinstance(observations, dict) else {"": observations}
            self._statistics = [*by_key.values(), normalize.ret_rms]
        self._before = gather_objects(self._statistics)[0]
        self._set(self._before)

    def pool(self) -> None:
        """Add what any rank has observed since the last call to what all of them knew then. *Collective.*"""
        of_ranks = gather_objects(self._statistics)
        self._before = [pooled(before, after) for before, *after in zip(self._before, *of_ranks, strict=True)]
        self._set(self._before)

    def _set(self, values: list[RunningMeanStd]) -> None:
        for statistics, value in zip(self._statistics, values, strict=True):
            vars(statistics).update(vars(value.copy()))


def pooled(before: RunningMeanStd, after: Sequence[RunningMeanStd]) -> RunningMeanStd:
    """
    Combine running statistics that began as the same.

    :param before: what all began with
    :param after: what each of them has become, by data of its own
    :return: the statistics of what was before, and of all the data
    """
    # Moments about the old mean: sums of squares about 0 would lose the variance of data far from 0
    count = before.count + sum(one.count - before.count for one in after)
    shift = sum((one.mean - before.mean) * one.count for one in after) / count
    squares = sum((one.var + np.square(one.mean - before.mean)) * one.count for one in after)
    squares -= (len(after) - 1) * before.var * before.count
    result = before.copy()
    result.mean, result.var, result.count = before.mean + shift, squares / count - np.square(shift), count
    return result
