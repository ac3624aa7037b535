"""Sums over ranks of one machine go through shared memory, and are those that gloo would give."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch as th
import torch.distributed as dist
from sb3_adaptive_kl.distributed.errors import LostRanks
from sb3_adaptive_kl.distributed.shared_memory import SLOT, SharedMemory

from sb3_adaptive_kl.distributed import ranks as distributed_ranks
from sb3_adaptive_kl.distributed import shared_memory
from sb3_adaptive_kl.distributed.ranks import connected_ranks, sum_over_ranks
from tests.ranks import Ranks

TENSORS = (
    th.arange(6.0).view(2, 3),
    th.linspace(0, 1, 11_107),
    th.tensor([1e300, -1.0], dtype=th.float64),
    th.tensor([1, 0, 2**60]),
    th.ones(SLOT),  # too long to be shared
)


def sums(folder: Path, with_delays: bool) -> tuple[list[th.Tensor], bool]:
    """Add up multiples of each tensor several times; a rank that is late must still find what the others wrote."""
    results = []
    delays = random.Random(dist.get_rank())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "IN_MEMORY", folder)
        with connected_ranks():
            for factor in range(1, 9):
                for tensor in TENSORS:
                    if with_delays and delays.random() < 0.2:
                        time.sleep(0.002)
                    results.append(sum_over_ranks(tensor * factor * (1 + dist.get_rank())))
            return results, distributed_ranks._connection.shared_memory is not None


def sums_with_failing_step(folder: Path, step: str) -> tuple[list[th.Tensor], bool]:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to mmap") if step == "from_file" else OSError(24, "Too many open files")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(th if step == "from_file" else SharedMemory, step, fail)
        return sums(folder, with_delays=False)


@pytest.mark.parametrize("step", ["from_file", "map", "listen", "connect", "accept"])
def test_gloo_sums_where_one_rank_cannot_share_memory(ranks: Ranks, tmp_path: Path, step: str) -> None:
    for results, shared in ranks.run(sums_with_failing_step, tmp_path, step):
        assert not shared
        assert len(results) == 8 * len(TENSORS)
        assert th.equal(results[0], 3 * TENSORS[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shares", [True, False])
def test_sums_over_ranks(ranks: Ranks, tmp_path: Path, shares: bool) -> None:
    folder = tmp_path if shares else tmp_path / "missing"
    expected = [3 * tensor * factor for factor in range(1, 9) for tensor in TENSORS]
    for results, shared in ranks.run(sums, folder, shares):
        assert shared == shares
        for result, correct in zip(results, expected, strict=True):
            assert result.dtype == correct.dtype
            th.testing.assert_close(result, correct, rtol=1e-6, atol=0)
    assert not list(tmp_path.iterdir())


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


def test_nothing_is_left_behind_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_memory, "IN_MEMORY", tmp_path)
    monkeypatch.setattr(shared_memory, "SLOT", 2**50)
    with pytest.raises(OSError, match=r"No space left|too large"):
        shared_memory.make_folder(2)
    assert not list(tmp_path.iterdir())
