"""bf16_gemm against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quantkit.ops as ops

from .cpu_cases import FLOATS, call, check_refused, reference

SHAPES = ((1, 1), (3, 45), (64, 256), (130, 1101), (40, 600))
STEP = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", FLOATS)
def test_like_fp64(dtype: torch.dtype) -> None:
    for rows, cols in SHAPES:
        weight = torch.randn(rows, cols + 1).bfloat16()[:, 1:]
        packed = ops.pack_bf16(weight)
        assert torch.equal(packed, reference("pack_bf16", weight))
        for m in (1, 3, 6, 15):
            x = torch.randn(m, cols + 3).to(dtype)[:, 1 : cols + 1]
            bias = torch.randn(rows).to(dtype) if m % 2 else None
            exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
            if bias is not None:
                exact, size = exact + bias.double(), size + bias.double().abs()
            bound = (cols + 4) * 2**-24 * size
            for y in (call("bf16_gemm", x, packed, bias, rows), reference("bf16_gemm", x, packed, bias, rows)):
                assert y.dtype == dtype
                error = (y.double() - exact).abs()
                assert (error <= bound + STEP[dtype] * (exact.abs() + bound) + 2**-25 * (dtype != torch.float32)).all()


def test_nan_stays_in_its_row_and_column() -> None:
    weight, x = torch.randn(70, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    weight[66, 5], x[3, 7] = float("nan"), float("inf")
    y = ops.bf16_gemm(x, ops.pack_bf16(weight), 70)
    expected = torch.zeros(8, 70, dtype=torch.bool)
    expected[3], expected[:, 66] = True, True
    assert torch.equal(~y.isfinite(), expected)


def test_refuses() -> None:
    weight, x = torch.zeros(70, 96).bfloat16(), torch.ones(2, 96)
    packed: Any = ops.pack_bf16(weight)
    check_refused("pack_bf16", "weight must be 2-D torch.bfloat16, got 2-D torch.float32", x)
    check_refused("pack_bf16", "in_features must be positive, got 0", weight[:, :0])
    check_refused("pack_bf16", "weight must have its last dimension contiguous", weight.T)
    check_refused("bf16_gemm", r"packed must be what pack_bf16 makes of \[70, 90\]", x[:, :90], packed, None, 70)
    check_refused("bf16_gemm", r"packed must be what pack_bf16 makes of \[170, 96\]", x, packed, None, 170)
    check_refused("bf16_gemm", "x must be 2-D", x[0], packed, None, 70)
    check_refused("bf16_gemm", "bias must be contiguous torch.float32", x, packed, torch.zeros(71), 70)


def test_compiles() -> None:
    weight = torch.randn(70, 96).bfloat16()
    torch.library.opcheck(torch.ops.quantkit.pack_bf16.default, (weight,))
    arguments = (torch.randn(3, 96), ops.pack_bf16(weight), torch.randn(70), 70)
    torch.library.opcheck(torch.ops.quantkit.bf16_gemm.default, arguments)
    assert call("bf16_gemm", torch.zeros(0, 96), arguments[1], None, 70).shape == (0, 70)
