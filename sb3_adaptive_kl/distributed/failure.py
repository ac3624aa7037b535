"""
When a rank fails, all end, soon, and say whose fault it was.

A rank that fails writes the reason to the group's store, and closes its connections. That breaks the collective in which the
others wait; they look up the reason, and raise an error with it. A killed rank writes nothing: it is the one without a
connection that has not reported to the store.
"""

import itertools
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sb3_adaptive_kl.distributed.ranks import LostRanks, connected_ranks, is_disconnected, is_parallel, rank, world_size

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# How long ranks that lost another one wait for its reason and the reports of the others, and rank 0 for its reason to be read
GRACE_SECONDS = 3.0
POLL_SECONDS = 0.05

_sessions = itertools.count()  # as many on all ranks


class RankFailure(RuntimeError):
    """Training has ended because another rank failed. The message names the rank and the cause."""


@contextmanager
def ending_together() -> Iterator[None]:
    """
    Connect the ranks, and end all of them if one of them raises. *Collective.*

    :raises RankFailure: if another rank has raised, was killed, or did not arrive within the group's timeout
    """
    if not is_parallel():
        yield
        return
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store  # torch can be built without

    store = PrefixStore(f"sb3_adaptive_kl/{next(_sessions)}", _get_default_store())
    try:
        with connected_ranks():
            try:
                yield
            except LostRanks as error:
                raise _failure(store) from error
            except BaseException as error:
                _report(store, "".join(traceback.format_exception_only(error)).strip())
                raise
    except LostRanks as error:  # while connecting
        raise _failure(store) from error
    except RankFailure:
        raise
    except BaseException:
        if rank() == 0:  # it may hold the store, which goes when its process ends
            _wait_for_reports(store)
        raise


def _failure(store: "Store") -> RankFailure:
    return RankFailure(f"{_find_cause(store)} Training has ended on all ranks: continue from a checkpoint.")


def _report(store: "Store", reason: str) -> None:
    """Write why this rank ends: ``""`` if it lost another one."""
    with suppress(RuntimeError):  # the rank that held the store has gone: there is nobody left to read it
        store.set(str(rank()), reason)


def _find_cause(store: "Store") -> str:
    """Find the rank because of which the others end, and its reason."""
    others = [other for other in range(world_size()) if other != rank()]
    try:
        silent, reason = _read_reports(store, others)
        _report(store, "")  # not before: rank 0 ends when all have reported
        deadline = time.monotonic() + GRACE_SECONDS
        while silent and not reason and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            silent, reason = _read_reports(store, others)
    except RuntimeError:
        return "The rank that holds the group's store (rank 0, unless torchrun holds it) has ended without a message."
    if reason:
        return reason
    # A slow rank that has not noticed yet is still connected
    lost = [other for other in silent if is_disconnected(other)] or silent
    if not lost:
        return "The connection between the ranks was lost, though all of them are alive."
    named = f"Rank {lost[0]} of {world_size()} has" if len(lost) == 1 else f"Ranks {lost} of {world_size()} have"
    return (
        f"{named} ended without a message (killed, perhaps for lack of memory), or did not arrive within the group's timeout."
    )


def _read_reports(store: "Store", others: Sequence[int]) -> tuple[list[int], str]:
    """Return the ranks that have not reported, and the first reason of one that failed, ``""`` if none has given one."""
    reported = [other for other in others if store.check([str(other)])]
    reasons = ((other, store.get(str(other)).decode()) for other in reported)
    told = (f"Rank {other} of {world_size()} failed: {reason}." for other, reason in reasons if reason)
    return [other for other in others if other not in reported], next(told, "")


def _wait_for_reports(store: "Store") -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    everyone = [str(other) for other in range(world_size())]
    with suppress(RuntimeError):
        while not store.check(everyone) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
