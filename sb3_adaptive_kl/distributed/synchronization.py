"""What the ranks exchange around an update: the policy at the start, statistics and episodes after each rollout."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from io import BytesIO
from numbers import Real
from typing import Any

import torch as th
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from sb3_adaptive_kl.algorithm import KLPenaltyAlgorithm
from sb3_adaptive_kl.distributed.ranks import gather, gather_objects
from sb3_adaptive_kl.rollout.old_policy import RolloutKL
from sb3_adaptive_kl.step import optimized_parameters


class RanksDisagree(ValueError):
    """The ranks hold different arguments, or different parameters. The message says which."""


def comparable(value: Any) -> Any:
    """Reduce a value to what ranks can compare: of objects such as functions, whose ``repr`` has an address, the class."""
    if isinstance(value, Real | str | type | spaces.Space | None):
        return value
    if is_dataclass(value):
        return type(value), {field.name: comparable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: comparable(value[name]) for name in sorted(value, key=str)}
    return tuple(map(comparable, value)) if isinstance(value, list | tuple) else type(value)


def check_agreement(facts: Mapping[str, Any], explanation: str) -> None:
    """
    Check that all ranks state the same facts. *Collective.*

    :param facts: name → value
    :param explanation: ends the message: a cause or a remedy
    :raises RanksDisagree: on all ranks, with the first fact that differs
    """
    of_ranks = gather_objects({name: repr(comparable(value)) for name, value in facts.items()})
    for name, first in of_ranks[0].items():
        for rank, stated in enumerate(of_ranks):
            if stated.get(name) != first:  # all ranks raise the same error
                raise RanksDisagree(f"{name} is {first} on rank 0, but {stated.get(name)} on rank {rank}: {explanation}")


def checksum(tensors: Iterable[th.Tensor]) -> int:
    """
    Digest tensors.

    :param tensors: on any device
    :return: a number that is the same on ranks where every bit of them is
    """
    digest = 0
    for tensor in tensors:
        digest = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(th.uint8).numpy().tobytes(), digest)
    return digest


def all_parameters(policy: ActorCriticPolicy) -> list[th.Tensor]:
    """List the parameters of the policy and those that only its optimizer holds, in the same order on all ranks."""
    return list(dict.fromkeys([*policy.parameters(), *optimized_parameters(policy.optimizer)]))


def broadcast_parameters(model: KLPenaltyAlgorithm) -> None:
    """
    Overwrite the policy, its optimizer's parameters and its state with those of rank 0. *Collective.*

    :param model: with the same networks on all ranks
    """
    parameters = all_parameters(model.policy)
    # By torch.save, not as objects: tensors would be put on the GPU of rank 0
    saved = BytesIO()
    th.save((dict(model.get_parameters()), [parameter.detach() for parameter in parameters]), saved)
    of_rank_0 = [saved.getvalue()]
    dist.broadcast_object_list(of_rank_0)
    registered, values = th.load(BytesIO(of_rank_0[0]), map_location="cpu", weights_only=False)
    model.set_parameters(registered)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def average_buffers(policy: ActorCriticPolicy) -> None:
    """
    Average the policy's floating-point buffers, such as the statistics of a batch normalization. *Collective.*

    :param policy: the policy
    """
    for tensor in filter(th.is_floating_point, policy.buffers()):
        of_ranks = gather(tensor.flatten())
        # Rounding must not move what is the same on all ranks
        same = (of_ranks == of_ranks[0]).all(dim=0)
        with th.no_grad():
            tensor.copy_(th.where(same, of_ranks[0], of_ranks.mean(dim=0)).view_as(tensor))


def pool_kl(kl: RolloutKL) -> RolloutKL:
    """
    Combine what the ranks have measured, each on as many transitions. *Collective.*

    :param kl: the divergences on this rank's rollout, in nats
    :return: the divergences over the transitions of all ranks
    """
    of_ranks = gather(th.tensor(kl, dtype=th.float64))
    means, largest = RolloutKL(*of_ranks.mean(dim=0).tolist()), RolloutKL(*of_ranks.amax(dim=0).tolist())
    return means._replace(max=largest.max)


def running_statistics(normalize: VecNormalize | None) -> list[RunningMeanStd]:
    """
    List the running statistics of normalized environments, of observations and of returns.

    :param normalize: the environments, or None for none
    :return: the statistics themselves, not copies
    """
    if normalize is None:
        return []
    observations = normalize.obs_rms if normalize.norm_obs else {}
    return [*observations.values(), normalize.ret_rms] if isinstance(observations, dict) else [observations, normalize.ret_rms]


def overwrite(statistics: Sequence[RunningMeanStd], values: Sequence[RunningMeanStd]) -> None:
    """
    Set running statistics in place.

    :param statistics: of this rank's environments
    :param values: what they become
    """
    for one, value in zip(statistics, values, strict=True):
        vars(one).update(vars(value.copy()))


def pooled(before: RunningMeanStd, after: Sequence[RunningMeanStd]) -> RunningMeanStd:
    """
    Combine running statistics that began as the same.

    :param before: what all began with
    :param after: what each of them has become, by data of its own
    :return: the statistics of what was before, and of all the data
    """
    result = after[0].copy()
    for one in after[1:]:
        result.combine(one)
        result.update_from_moments(before.mean, before.var, -before.count)  # it is in both
    return result
