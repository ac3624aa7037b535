"""The distributed variants that need sb3-contrib."""

from sb3_adaptive_kl import MaskableAdaptiveKLPPO, MaskableRecurrentAdaptiveKLPPO, RecurrentAdaptiveKLPPO
from sb3_adaptive_kl.distributed.data_parallel import DataParallel


class DistributedMaskableAdaptiveKLPPO(DataParallel, MaskableAdaptiveKLPPO):  # type: ignore[misc]  # as for AdaptiveKLPPO
    """:class:`~sb3_adaptive_kl.MaskableAdaptiveKLPPO` on all ranks of ``torch.distributed``'s default group."""


class DistributedRecurrentAdaptiveKLPPO(DataParallel, RecurrentAdaptiveKLPPO):  # type: ignore[misc]  # as for AdaptiveKLPPO
    """:class:`~sb3_adaptive_kl.RecurrentAdaptiveKLPPO` on all ranks of ``torch.distributed``'s default group."""


class DistributedMaskableRecurrentAdaptiveKLPPO(  # type: ignore[misc]  # as for AdaptiveKLPPO
    DataParallel, MaskableRecurrentAdaptiveKLPPO
):
    """:class:`~sb3_adaptive_kl.MaskableRecurrentAdaptiveKLPPO` on all ranks of ``torch.distributed``'s default group."""
