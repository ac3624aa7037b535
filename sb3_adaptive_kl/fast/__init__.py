"""
Code that only saves time: the same policies are trained without it, more slowly. (Two things that do so are elsewhere: several
minibatches drawn at once, in `rollout/minibatches.py`, and the actor evaluated alone, in `rollout/evaluation.py`.)

No other part of the package knows torch's compiler, or looks behind the public names of SB3's distributions and torch's
optimizers. ``SB3_ADAPTIVE_KL_FAST=0`` in the environment switches it off, to find out whether a problem is in here.
"""
