"""Sums over ranks of one machine go through shared memory, and are those that gloo would give."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch as th
import torch.distributed as dist

from sb3_adaptive_kl.distributed import ranks as distributed_ranks
from sb3_adaptive_kl.distributed.ranks import LostRanks, connected_ranks, sum_over_ranks
from sb3_adaptive_kl.distributed.shared_memory import IN_MEMORY, SLOT
from tests.ranks import Ranks

TENSORS = (
    th.arange(6.0).view(2, 3),
    th.linspace(0, 1, 11_107),
    th.tensor([1e300, -1.0], dtype=th.float64),
    th.tensor([1, 0, 2**60]),
    th.ones(SLOT),  # too long to be shared
)


def sums(is_jerky: bool) -> tuple[list[th.Tensor], bool]:
    """Add up multiples of each tensor several times; a rank that is late must still find what the others wrote."""
    with connected_ranks():
        results = []
        for factor in range(1, 9):
            for tensor in TENSORS:
                if is_jerky and random.random() < 0.2:
                    time.sleep(0.002)
                results.append(sum_over_ranks(tensor * factor * (1 + dist.get_rank())))
        return results, distributed_ranks._shared_memory is not None


def sums_without_room() -> tuple[list[th.Tensor], bool]:
    def no_room(_: int) -> Path:
        raise OSError("no space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_ranks, "make_folder", no_room)
        return sums(is_jerky=False)


@pytest.mark.parametrize(("function", "arguments", "shares"), [(sums, (True,), True), (sums_without_room, (), False)])
def test_sums_over_ranks(ranks: Ranks, function: Callable[..., object], arguments: tuple[bool, ...], shares: bool) -> None:
    expected = [3 * tensor * factor for factor in range(1, 9) for tensor in TENSORS]
    for results, shared in ranks.run(function, *arguments):
        assert shared == shares
        for result, correct in zip(results, expected, strict=True):
            assert result.dtype == correct.dtype
            th.testing.assert_close(result, correct, rtol=1e-6, atol=0)
    assert not list(IN_MEMORY.glob("sb3_adaptive_kl-*"))


def sum_without_partner() -> None:
    """Rank 1 leaves while rank 0 waits for it."""
    with connected_ranks():
        if dist.get_rank() == 0:
            sum_over_ranks(th.ones(3))
        time.sleep(0.5)


def test_a_rank_that_leaves_is_noticed_in_the_sum_that_waits_for_it(ranks: Ranks) -> None:
    first, second = ranks.run(sum_without_partner)
    assert isinstance(first, LostRanks)
    assert second is None
