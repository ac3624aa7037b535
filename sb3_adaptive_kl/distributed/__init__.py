"""
One policy, trained by several processes: ``DistributedAdaptiveKLPPO`` and its like, for those who ask for it.

Nothing outside of this folder, and of the zoo's command under torchrun, knows ranks.
"""

from typing import Any

from sb3_adaptive_kl.distributed.data_parallel import DataParallel
from sb3_adaptive_kl.distributed.synchronization import RanksDisagree
from sb3_adaptive_kl.ppo import AdaptiveKLPPO

__all__ = ["DataParallel", "DistributedAdaptiveKLPPO", "RanksDisagree"]


class DistributedAdaptiveKLPPO(DataParallel, AdaptiveKLPPO):  # type: ignore[misc]  # as for AdaptiveKLPPO
    """:class:`~sb3_adaptive_kl.AdaptiveKLPPO` on all ranks of ``torch.distributed``'s default group."""


def __getattr__(name: str) -> Any:
    if name.startswith(("DistributedMaskable", "DistributedRecurrent")):
        from sb3_adaptive_kl.distributed import contrib  # it needs sb3-contrib

        return getattr(contrib, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
