"""PPO with an adaptive KL penalty, for Stable-Baselines3."""

from typing import TYPE_CHECKING, Any

from sb3_adaptive_kl.clip_range import clip_equivalent_target
from sb3_adaptive_kl.learning_rate import AdaptiveLearningRate, BalancedLearningRate, LearningRateRule
from sb3_adaptive_kl.penalty import (
    AdaptivePenalty,
    FixedPenalty,
    PenaltyRule,
    PredictivePenalty,
    ProportionalPenalty,
)
from sb3_adaptive_kl.ppo import AdaptiveKLPPO
from sb3_adaptive_kl.presets import HELD
from sb3_adaptive_kl.reference import ReferencePolicy

if TYPE_CHECKING:
    from sb3_adaptive_kl.ppo_contrib import MaskableAdaptiveKLPPO as MaskableAdaptiveKLPPO
    from sb3_adaptive_kl.ppo_contrib import MaskableRecurrentAdaptiveKLPPO as MaskableRecurrentAdaptiveKLPPO
    from sb3_adaptive_kl.ppo_contrib import RecurrentAdaptiveKLPPO as RecurrentAdaptiveKLPPO

__version__ = "0.2.0"

# Without the variants: `from sb3_adaptive_kl import *` has to work where sb3-contrib is not installed
__all__ = [
    "HELD",
    "AdaptiveKLPPO",
    "AdaptiveLearningRate",
    "AdaptivePenalty",
    "BalancedLearningRate",
    "FixedPenalty",
    "LearningRateRule",
    "PenaltyRule",
    "PredictivePenalty",
    "ProportionalPenalty",
    "ReferencePolicy",
    "__version__",
    "clip_equivalent_target",
]

_VARIANTS = ("MaskableAdaptiveKLPPO", "MaskableRecurrentAdaptiveKLPPO", "RecurrentAdaptiveKLPPO")


def __getattr__(name: str) -> Any:
    """The variants are imported on first use, since they need sb3-contrib."""
    if name not in _VARIANTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from sb3_adaptive_kl import ppo_contrib
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("sb3_contrib"):
            raise
        remedy = "pip install '.[contrib]' in the clone, or pip install sb3-contrib"
        raise ImportError(f"{name} needs sb3-contrib: {remedy}") from None
    return getattr(ppo_contrib, name)


def __dir__() -> list[str]:
    return [*globals(), *_VARIANTS]
