"""
When a rank fails, all end, soon, and say whose fault it was.

A rank that fails writes the reason to the group's store, and its process ends. That breaks the collective in which the others
wait; they look up the reason, and raise an error with it. (If the process lives on, they wait until the group's timeout.) A
killed rank writes nothing: it is the one that is missing when all others have reported to the store.
"""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sb3_adaptive_kl.distributed.ranks import LostRanks, is_parallel, rank, world_size

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# How long ranks that lost another one wait for its reason, or for the reports of the others
GRACE_SECONDS = 3.0
POLL_SECONDS = 0.05


class RankFailure(RuntimeError):
    """Training has ended because another rank failed. The message names the rank and the cause."""


@contextmanager
def ending_together() -> Iterator[None]:
    """
    End all ranks if one of them raises.

    :raises RankFailure: if another rank has raised, was killed, or did not arrive within the group's timeout
    """
    if not is_parallel():
        yield
        return
    from torch.distributed.distributed_c10d import _get_default_store  # torch can be built without

    store = _get_default_store()
    store.delete_key(_key(rank()))  # of an earlier failure that the caller has caught
    try:
        yield
    except LostRanks as error:
        raise RankFailure(f"{_find_cause(store)} Training has ended on all ranks: continue from a checkpoint.") from error
    except BaseException as error:
        _report(store, "".join(traceback.format_exception_only(error)).strip())
        raise


def _key(of_rank: int) -> str:
    return f"sb3_adaptive_kl/failure/{of_rank}"


def _report(store: "Store", reason: str) -> None:
    """Write why this rank ends: ``""`` if it lost another one."""
    with suppress(RuntimeError):  # the rank that held the store has gone: there is nobody left to read it
        store.set(_key(rank()), reason)


def _find_cause(store: "Store") -> str:
    """Find the rank because of which the others end, and its reason."""
    others = [other for other in range(world_size()) if other != rank()]
    _report(store, "")
    deadline = time.monotonic() + GRACE_SECONDS
    silent = others
    try:
        while silent and time.monotonic() < deadline:
            silent = [other for other in others if not store.check([_key(other)])]
            for other in set(others) - set(silent):
                reason = store.get(_key(other)).decode()
                if reason:
                    return f"Rank {other} of {world_size()} failed: {reason}."
            time.sleep(POLL_SECONDS)
    except RuntimeError:
        return "The rank that holds the group's store (rank 0, unless torchrun holds it) has ended without a message."
    if not silent:
        return "The connection between the ranks was lost, though all of them are alive."
    named = f"Rank {silent[0]} of {world_size()} has" if len(silent) == 1 else f"Ranks {silent} of {world_size()} have"
    return (
        f"{named} ended without a message (killed, perhaps for lack of memory), or did not arrive within the group's timeout."
    )
