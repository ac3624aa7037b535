"""
When a rank fails, all ranks end soon, and name the rank that failed, and why.

A rank that fails writes the reason to the group's store, and closes its connections. That breaks the collective in which the
others wait; they look up the reason, and raise an error with it. A killed rank writes nothing: it is the one without a
connection that has not reported to the store.
"""

import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from sb3_adaptive_kl.distributed.errors import LostRanks, RankFailure
from sb3_adaptive_kl.distributed.ranks import connected_ranks, is_disconnected, is_parallel, rank, world_size

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")
# How long ranks that lost another one wait for its reason and the reports of the others, and rank 0 for its reason to be read
GRACE_SECONDS = 3.0
POLL_SECONDS = 0.05

_sessions = itertools.count()  # as many on all ranks


@contextmanager
def fail_together() -> Iterator[None]:
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
                _report(store, _reason(error))  # before the others notice that this rank disconnects
                raise
    except RankFailure:
        raise
    except LostRanks as error:  # while connecting
        raise _failure(store) from error
    except BaseException as error:
        _report(store, _reason(error))  # not reported yet if it was raised while connecting
        if rank() == 0:  # it may hold the store, which goes when its process ends
            _ask(lambda: _wait_for_reports(store))
        raise


def _failure(store: "Store") -> RankFailure:
    return RankFailure(f"{_find_cause(store)} Training has ended on all ranks: continue from a checkpoint.")


def _reason(error: BaseException) -> str:
    # The store encodes strings as UTF-8, and a message may contain a file name that is not valid UTF-8
    return "".join(traceback.format_exception_only(error)).strip().encode(errors="backslashreplace").decode()


def _report(store: "Store", reason: str) -> None:
    """Tell the other ranks why this one failed. (``_await_reports`` writes ``""`` for one that only lost another.)"""
    _ask(lambda: store.set(str(rank()), reason))


def _find_cause(store: "Store") -> str:
    """Find the rank because of which the others end, and its reason."""
    answer = _ask(lambda: _await_reports(store))
    if answer is None:
        return "The rank that holds the group's store (rank 0, unless torchrun holds it) has ended or does not answer."
    silent, reason = answer
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


def _ask(function: Callable[[], T]) -> T | None:
    """Call a function that asks the store; return ``None`` if the store has gone, or does not answer."""
    answers: list[T] = []

    def call() -> None:
        with suppress(RuntimeError):
            answers.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(2 * GRACE_SECONDS)
    return answers[0] if answers else None


def _await_reports(store: "Store") -> tuple[list[int], str]:
    """Wait, for a limited time, for a reason or for the reports of all; return the ranks without report, and the reason."""
    others = [other for other in range(world_size()) if other != rank()]
    silent, reason = _read_reports(store, others)
    store.set(str(rank()), "")  # not before: rank 0 ends when all have reported
    deadline = time.monotonic() + GRACE_SECONDS
    while silent and not reason and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        silent, reason = _read_reports(store, others)
    return silent, reason


def _read_reports(store: "Store", others: Sequence[int]) -> tuple[list[int], str]:
    """Return the ranks that have not reported, and the first reason of one that failed, ``""`` if none has given one."""
    reported = [other for other in others if store.check([str(other)])]
    reasons = ((other, store.get(str(other)).decode()) for other in reported)
    told = (f"Rank {other} of {world_size()} failed: {reason}." for other, reason in reasons if reason)
    return [other for other in others if other not in reported], next(told, "")


def _wait_for_reports(store: "Store") -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    everyone = [str(other) for other in range(world_size())]
    while not store.check(everyone) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
