"""
Everything that exists only for speed: the same policies are trained without it, more slowly.

No other part of the package knows torch's compiler, or looks behind the public names of SB3's distributions and torch's
optimizers. ``SB3_ADAPTIVE_KL_FAST=0`` in the environment switches it off, to find out whether a problem is in here.
"""
