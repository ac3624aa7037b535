"""
Everything that exists only for speed. Without this folder the package trains the same policies, more slowly.

No other part of the package knows torch's compiler, the state of Adam, or the private parts of SB3's policies.
"""
