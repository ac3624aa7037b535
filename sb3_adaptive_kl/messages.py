"""Warnings that point at the user's line, and suggestions for misspelled names."""

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

# Frames of these packages stand between a warning and the line that called learn()
_PACKAGES = ("sb3_adaptive_kl", "stable_baselines3", "sb3_contrib", "torch")


def warn_user(message: str) -> None:
    """
    Warn at the line outside of SB3 and this package that has led here.

    :param message: names the argument, its value and the remedy
    """
    # warnings.warn has skip_file_prefixes for this, from Python 3.12 on
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def suggestion(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """
    End a message with the known name closest to a misspelled one, if any is close.

    :param name: what the user wrote
    :param names: the known names
    :param cutoff: how close, from 0 to 1
    """
    matches = get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f", did you mean {matches[0]!r}?" if matches else ""
