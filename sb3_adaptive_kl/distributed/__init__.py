"""One policy, trained by all processes of a ``torch.distributed`` group: Heess et al. 2017 (https://arxiv.org/abs/1707.02286)."""

from sb3_adaptive_kl.distributed.errors import RankFailure, RanksDisagree

__all__ = ["RankFailure", "RanksDisagree"]
