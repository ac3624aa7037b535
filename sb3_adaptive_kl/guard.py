"""An update that leaves non-finite numbers is undone, as if it had never been made."""

from copy import deepcopy

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy


class Checkpoint:
    """
    The parameters, buffers and optimiser state of a policy at one moment.

    :param policy: the policy to copy from, and to restore
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy
        # copy.deepcopy(policy) would fail: gSDE's exploration matrices and the last distribution carry a graph
        self.policy_state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        self.optimizer_state = deepcopy(policy.optimizer.state_dict())

    def restore(self) -> None:
        """Put the policy and its optimiser back to where they were."""
        self.policy.load_state_dict(self.policy_state)
        self.policy.optimizer.load_state_dict(self.optimizer_state)


def is_finite(policy: ActorCriticPolicy) -> bool:
    """Whether every parameter and buffer of the policy is finite."""
    return all(bool(th.isfinite(tensor).all()) for tensor in policy.state_dict().values())
