"""absmax and minmax."""

from __future__ import annotations

import pytest
import torch

from .cpu_cases import BLOCKS, FLOATS, KINDS, call, check, check_compiles, check_refused, matrices, matrix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_like_the_reference(dtype: torch.dtype, kind: str) -> None:
    for x in matrices(dtype, kind):
        for block in BLOCKS:
            check("absmax", x, block)
            check("minmax", x, block)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_propagates_from_every_place(dtype: torch.dtype, sign: float) -> None:
    for place in range(67):
        x = torch.full((2, 67), 3.0, dtype=dtype)
        x[1, place] = torch.tensor(float("nan")).copysign(torch.tensor(sign)).to(dtype)
        for block in ([-1, -1], [1, -1], [-1, 1], [2, 8]):
            found = call("absmax", x, block), *call("minmax", x, block)
            where = call("absmax", torch.arange(2 * 67).reshape(2, 67).eq(67 + place).float(), block) == 1
            for values in found:
                assert torch.equal(values.isnan(), where)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int], block: list[int]) -> None:
    check("absmax", torch.zeros(shape), block)
    check("minmax", torch.zeros(shape), block)


@pytest.mark.parametrize("rows", [1, 31, 500, 3000])
def test_threads_leave_no_trace(rows: int) -> None:
    x = matrix(rows, 100, torch.bfloat16, "normal")
    wanted = call("absmax", x, [-1, 1]), *call("minmax", x, [-1, 1]), call("absmax", x, [-1, -1])
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 7):
            torch.set_num_threads(n)
            found = call("absmax", x, [-1, 1]), *call("minmax", x, [-1, 1]), call("absmax", x, [-1, -1])
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", ["absmax", "minmax"])
def test_refuses(op: str) -> None:
    x = torch.ones(4, 6)
    check_refused(op, rf"quantkit::{op}: x must be 2-D \[rows, cols\], got 3-D", x[None], [1, -1])
    check_refused(op, rf"quantkit::{op}: block must be \[rows, cols\], got \[1\]", x, [1])
    check_refused(op, rf"quantkit::{op}: block sizes must be positive, .* got \[0, 1\]", x, [0, 1])
    check_refused(op, rf"quantkit::{op}: x must be float32, .* got torch.float64", x.double(), [1, -1])
    with pytest.raises(RuntimeError, match=rf"quantkit::{op}: x must have its last dimension contiguous, .* \[1, 6\]"):
        call(op, x.t(), [1, -1])


@pytest.mark.parametrize("op", ["absmax", "minmax"])
def test_compiles(op: str) -> None:
    check_compiles(op, torch.randn(5, 70), [1, 32])
    check_compiles(op, torch.randn(4, 0, dtype=torch.bfloat16), [-1, 1])
