"""What the emulation of sm_90's bulk copies and warp group products finds: each fault of faults_async.cu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from . import emulated_cuda

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler: set CXX")

# As in tests/cuda_emulation/faults_async.h.
NONE, MISSING_WAIT, FILLED_EARLY, RELEASED_EARLY, MISSING_FENCE, SUMS_EARLY = range(6)
TOO_MANY_BYTES, NOBODY_RELEASES, MISSING_BARRIER, LEFT_UNDER_WAY, MISPLACED = range(6, 11)
SEEDS = range(6)


def rows() -> Tensor:
    return torch.randint(-128, 128, (256, 128), dtype=torch.int8, generator=torch.Generator().manual_seed(7))


def run(kind: int, seed: int) -> Tensor:
    torch.ops.quantkit_emulated.set_seed(seed)
    return torch.ops.quantkit_emulated.async_fault(torch.ops.quantkit_emulated.guarded(rows()), kind)


def test_without_a_fault(library: Any) -> None:
    wanted = rows().sum(1, dtype=torch.int32)
    assert all(torch.equal(run(NONE, seed), wanted) for seed in SEEDS)


@pytest.mark.parametrize(
    ("kind", "seed", "words"),
    [
        (MISSING_FENCE, 0, "a product begins without a fence"),
        (TOO_MANY_BYTES, 0, "deadlock: .* at a barrier in shared memory"),
        (TOO_MANY_BYTES, 1, "deadlock: .* at a barrier in shared memory"),
        (NOBODY_RELEASES, 1, "deadlock: .* at a barrier in shared memory"),
        (LEFT_UNDER_WAY, 0, "before its products were waited for"),
        (MISPLACED, 0, "a vector of 1024 bytes is not aligned"),
    ],
)
def test_errors(library: Any, kind: int, seed: int, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        run(kind, seed)
    assert torch.equal(run(NONE, seed), rows().sum(1, dtype=torch.int32))  # and is fit for use afterwards


@pytest.mark.parametrize("kind", [MISSING_WAIT, FILLED_EARLY, RELEASED_EARLY, SUMS_EARLY, MISSING_BARRIER])
def test_what_shows_in_an_even_or_an_odd_seed(library: Any, kind: int) -> None:
    """Every call in the tests is made with one of each."""
    wanted = rows().sum(1, dtype=torch.int32)

    def shows(seed: int) -> bool:
        try:
            return not torch.equal(run(kind, seed), wanted)
        except RuntimeError as error:
            assert "emulation: " in str(error)
            return True

    assert all(shows(seed) or shows(seed + 1) for seed in (0, 2, 4))
