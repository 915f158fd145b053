"""The CUDA sources of rms_norm, silu_mul and rotary_embedding, run on the CPU: against fp64, and codes against the
numbers that they are made from, bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantkit import ops

from . import emulated_cuda
from .cuda_cases import FLOATS, assert_same
from .test_pointwise import CODES, assert_close, norm64

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler: set CXX")
# Within a chunk, a warp, beyond what the block's registers keep (8192), and ragged ends of each.
SHAPES = ((1, 1), (3, 7), (5, 264), (2, 3, 100), (4, 2600), (2, 8207))


def rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_gate(emulated: Any, shape: tuple[int, ...]) -> None:
    dtype = FLOATS[SHAPES.index(shape) % 3]
    x, other, weight = rows(shape, dtype), rows(shape, dtype, 1), rows(shape[-1:], dtype, 2)
    # A thread sums up to 8 * 4 * (1 + cols / 8192) squares, a tree of ten levels the threads; then four roundings.
    error = (8 * 4 * (1 + shape[-1] / 8192) / 2 + 16) * 2.0**-24
    for residual in (None, other):
        out, total = emulated("rms_norm", (x, residual, weight, 1e-5))
        assert (total.numel() == 0) == (residual is None)
        assert residual is None or torch.equal(total, (x.float() + other.float()).to(dtype))
        assert_close(out, norm64(x if residual is None else total, weight, 1e-5), error)
        for codes in CODES:
            found = emulated("rms_norm_quant", (x, residual, weight, 1e-5, codes))
            wanted = ops.int8_quant_per_token(out)[:2] if codes == torch.int8 else ops.fp8_quant_per_token(out, codes)
            assert_same("rms_norm_quant", found, (*wanted, total))
    gated, wide = emulated("silu_mul", (x * 8, other)), x.double() * 8
    power = (float(wide.abs().max()) * 1.5 * 0.7 + 12) * 2.0**-24
    assert_close(gated, wide * torch.sigmoid(wide) * other.double(), power, absolute=2.0**-100)
    for codes in CODES:
        found = emulated("silu_mul_quant", (x * 8, other, codes))
        wanted = ops.int8_quant_per_token(gated)[:2] if codes == torch.int8 else ops.fp8_quant_per_token(gated, codes)
        assert_same("silu_mul_quant", found, wanted)


def test_halves_of_one_tensor_nan_and_nothing(emulated: Any) -> None:
    both = rows((9, 74), torch.bfloat16)
    gate, up = both.split(37, -1)
    assert torch.equal(emulated("silu_mul", (gate, up)), emulated("silu_mul", (gate.contiguous(), up.contiguous())))
    x = rows((3, 40), torch.float32)
    x[1, 3] = float("nan")
    out, _ = emulated("rms_norm", (x, None, torch.ones(40), 1e-5))
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    for shape in ((0, 5), (3, 0)):
        empty = torch.zeros(shape)
        assert emulated("silu_mul", (empty, empty)).shape == shape
        assert emulated("rms_norm", (empty, empty, torch.ones(shape[-1]), 1e-5))[0].shape == shape


@pytest.mark.parametrize("shape", [(2, 3, 5, 64, 64), (1, 1, 1, 16, 10), (2, 4, 7, 80, 24), (3, 2, 4, 6, 0)])
def test_rotary(emulated: Any, shape: tuple[int, ...]) -> None:
    batch, heads, tokens, size, turned = shape
    for dtype in FLOATS:
        x = rows((batch, tokens, heads, size), dtype).transpose(1, 2)
        for n in (1, batch):
            angle = torch.randn(n, tokens, turned, generator=torch.Generator().manual_seed(1))
            args = (x, angle.cos().to(dtype), angle.sin().to(dtype))
            # Products and sums rounded one by one, as torch does.
            assert_same("rotary_embedding", emulated("rotary_embedding", args), ops.rotary_embedding(*args))


def test_refusals(emulated: Any) -> None:
    x = torch.ones(4, 6)
    for op, words, args in (
        ("rms_norm", r"weight must be torch.float32 \[6\]", (x, None, torch.ones(5), 1e-5)),
        ("rms_norm", "epsilon must not be negative", (x, None, torch.ones(6), -1.0)),
        ("silu_mul", "up must have gate's shape and dtype", (x, x.half())),
        ("silu_mul_quant", "there must be a column", (x[:, :0], x[:, :0], torch.int8)),
        ("rotary_embedding", "cos must be torch.float32", (torch.ones(1, 2, 3, 8), x, x)),
    ):
        with pytest.raises(RuntimeError, match=f"quantkit::{op}: .*{words}"):
            emulated(op, args)
