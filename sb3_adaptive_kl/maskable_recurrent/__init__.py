"""
LSTM policies with invalid actions: what sb3-contrib has for either, combined.

Rollouts, buffers and policies are those of its RecurrentPPO; masks are added where they act, and nothing is copied. It needs
sb3-contrib.
"""

from sb3_adaptive_kl.maskable_recurrent.evaluation import MaskableEvalCallback, evaluate_policy

__all__ = ["MaskableEvalCallback", "evaluate_policy"]
