"""PPO with an adaptive KL penalty, for Stable-Baselines3."""

from sb3_adaptive_kl.penalty import AdaptivePenalty, FixedPenalty, PenaltyRule, ProportionalPenalty
from sb3_adaptive_kl.ppo import AdaptiveKLPPO

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLPPO",
    "AdaptivePenalty",
    "FixedPenalty",
    "PenaltyRule",
    "ProportionalPenalty",
    "__version__",
]
