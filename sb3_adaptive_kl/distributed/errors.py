"""The errors of training with several processes."""


class LostRanks(RuntimeError):
    """A collective could not be completed: another rank has ended, or did not arrive in time."""


class RankFailure(RuntimeError):
    """Training has ended because another rank failed. The message names the rank and the cause."""


class RanksDisagree(ValueError):
    """The ranks hold different arguments, or different parameters. The message says which."""
