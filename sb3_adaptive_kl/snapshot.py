"""A copy of the policy and its optimizer's state, to undo or shorten an update."""

from copy import deepcopy

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.step import optimized_parameters


class Snapshot:
    """
    The parameters, buffers and optimizer state of a policy at one moment.

    :param policy: the policy to copy from, and to restore
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.optimizer = policy.optimizer
        # Not copy.deepcopy(policy): gSDE's exploration matrices and the last distribution carry a graph. Not state_dict():
        # it leaves out non-persistent buffers, and may hold things that are not tensors. Frozen parameters, too: a moving
        # average of others is frozen. A dict keeps each once: the optimizer may move parameters that the policy does not have
        tensors = [*policy.parameters(), *policy.buffers(), *optimized_parameters(policy.optimizer)]
        self.tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self.saved = [tensor.detach().clone() for tensor in self.tensors]
        self.optimizer_state = deepcopy(policy.optimizer.state_dict())

    def restore(self) -> None:
        """Restore the policy and its optimizer."""
        with th.no_grad():
            for tensor, saved in zip(self.tensors, self.saved, strict=True):
                tensor.copy_(saved)
        self.optimizer.load_state_dict(self.optimizer_state)

    def still_finite(self) -> bool:
        """Check that every number that was finite still is. A constant −inf, as in an attention mask, does no harm."""
        still = [(tensor.isfinite() | ~saved.isfinite()).all() for tensor, saved in zip(self.tensors, self.saved, strict=True)]
        # One synchronization with the device. Parts of a policy may be on others
        return bool(th.stack([each.to(still[0].device) for each in still]).all())
