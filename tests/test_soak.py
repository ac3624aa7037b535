"""Long runs, and many models in one process, take no more memory than short ones and one."""

import gc
from pathlib import Path

import pytest

from sb3_adaptive_kl import AdaptiveKLPPO
from tests.conftest import CASES, NEEDS_COMPILER

SMALL = {"n_steps": 16, "batch_size": 8, "n_epochs": 1, "kl_rule": "predictive", "kl_ceiling": 1.5, "clip_range": "outliers"}
MIB = 2**20
STATM = Path("/proc/self/statm")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not STATM.exists(), reason="reads the resident memory from /proc")]


def resident() -> float:
    """Memory of this process in MiB."""
    gc.collect()
    return int(STATM.read_text().split()[1]) * 4096 / MIB


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_COMPILER)])
@pytest.mark.filterwarnings("ignore:kl_coef has been at its")
def test_memory_is_flat_over_a_thousand_updates(compiled):
    model = CASES["box"].build(AdaptiveKLPPO, compile=compiled, **SMALL).learn(300 * 16)
    before = resident()
    model.learn(1000 * 16)
    assert resident() - before < 1


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_COMPILER)])
def test_memory_of_models_is_given_back(compiled):
    sizes = []
    for _ in range(25):
        CASES["box"].build(AdaptiveKLPPO, compile=compiled, **SMALL).learn(2 * 16)
        sizes.append(resident())
    # torch keeps what it has compiled: some 4 MiB for each model
    assert sizes[-1] - sizes[4] < (100 if compiled else 2)
