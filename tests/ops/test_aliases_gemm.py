"""Products in the words of vLLM and sgl-kernel, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import aliases, ops
from quantkit.aliases.quantize import swizzle

from .test_aliases_quantize import E4M3, INT8, Q, as_fp8, x_of

pytestmark = pytest.mark.usefixtures("opchecked")

M, N, K = 5, 80, 272


def codes(rows: int, cols: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == INT8:
        return torch.randint(-128, 128, (rows, cols), generator=generator).to(INT8)
    return as_fp8(torch.randn(rows, cols, generator=generator) * 40)


def scales(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 0.001


def assert_product(got: Tensor, wanted: Tensor, size: Tensor, terms: int) -> None:
    """Rounded to got's dtype, after fp32 sums of `terms` terms of `size` in all."""
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[got.dtype]
    bound = (terms + 8) * 2.0**-24 * size + unit * wanted.abs() + 1e-7
    assert ((got.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("kind", [INT8, E4M3])
def test_scales_of_tokens_and_channels(kind: torch.dtype) -> None:
    a, w = codes(M, K, kind, 0), codes(N, K, kind, 1)
    bias = x_of(1, N)[0]
    for rows, cols, added in ((1, 1, None), (M, N, bias), (1, N, bias), (M, 1, None)):
        sa, sb = scales(rows, 1), scales(1, cols) if rows == 1 else scales(cols, 1)
        step = sa.double() * sb.double().reshape(1, -1)
        wanted = a.double() @ w.double().t() * step + (0 if added is None else added.double())
        size = a.double().abs() @ w.double().abs().t() * step
        for dtype in (torch.bfloat16, torch.float16):
            out = torch.empty(M, N, dtype=dtype)
            same = None if added is None else added.to(dtype)
            Q.cutlass_scaled_mm(out, a, w.t(), sa, sb, same)
            assert_product(out, wanted, size, K)
            op = Q.int8_scaled_mm if kind == INT8 else Q.fp8_scaled_mm
            assert torch.equal(op(a, w.t(), sa, sb, dtype, same), out)
    with pytest.raises(RuntimeError, match="quantkit::cutlass_scaled_mm: b must be column-major"):
        Q.cutlass_scaled_mm(out, a, w.t().contiguous(), sa, sb, None)
    if kind == INT8:
        with pytest.raises(RuntimeError, match="a_scales must have 1 or 5 elements"):
            Q.cutlass_scaled_mm(out, a, w.t(), scales(7, 1), sb, None)


def test_offsets() -> None:
    a, w = codes(M, K, INT8, 0), codes(N, K, INT8, 1)
    sa, sb, bias = scales(M, 1), scales(1, N), x_of(1, N)[0]
    sums = w.sum(1, dtype=torch.int32)
    azp = torch.tensor([[-3], [120], [0], [300], [-500]], dtype=torch.int32)
    out = torch.empty(M, N, dtype=torch.bfloat16)
    for given, adjustment in ((azp, sums), (None, sums * 7)):
        zero = azp.double() if given is not None else 7.0
        exact = (a.double() - zero) @ w.double().t() * (sa.double() * sb.double())
        Q.cutlass_scaled_mm_azp(out, a, w.t(), sa, sb, adjustment.reshape(1, -1), given, bias)
        assert_product(out, exact + bias.double(), exact.abs(), 1)


def test_blocks() -> None:
    m, n, k = 6, 384, 256
    a, w = codes(m, k, E4M3, 0), codes(n, k, E4M3, 1)
    sa, sb = scales(2, m).t(), scales(3, 2).t()
    wide = a.double() * sa.double().repeat_interleave(128, 1)
    weight = w.double() * sb.t().double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    wanted, size = wide @ weight.t(), wide.abs() @ weight.abs().t()
    got = Q.fp8_blockwise_scaled_mm(a, w.t(), sa, sb, torch.bfloat16)
    assert_product(got, wanted, size, k)
    out = torch.empty_like(got)
    Q.cutlass_scaled_mm(out, a, w.t(), sa, sb, None)
    assert torch.equal(out, got)


def test_fp4() -> None:
    m, n, k = 5, 140, 96
    values = []
    for rows, seed in ((m, 0), (n, 1)):
        packed = torch.randint(0, 256, (rows, k // 2), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
        local = (torch.rand(rows, k // 16) * 20).to(E4M3)
        exact = ops.unpack_fp4(packed).double() * local.double().repeat_interleave(16, 1)
        values.append((packed, swizzle(local), exact))
    (a, sa, x), (b, sb, w) = values
    out = torch.empty(m, n, dtype=torch.bfloat16)
    Q.cutlass_scaled_fp4_mm(out, a, b, sa, sb, torch.tensor(0.01))
    assert_product(out, x @ w.t() * 0.01, x.abs() @ w.abs().t() * 0.01, k + k // 16)


def test_frozen_weights_are_packed_once(monkeypatch: Any) -> None:
    a, w = codes(M, K, INT8, 0), codes(N, K, INT8, 1)
    sa, sb = scales(M, 1), scales(1, N)
    calls = []
    pack = ops.pack_w8a8
    monkeypatch.setattr(ops, "pack_w8a8", lambda c: calls.append(c) or pack(c))
    wanted = Q.int8_scaled_mm(a, w.t(), sa, sb, torch.float16, None)
    Q.int8_scaled_mm(a, w.t(), sa, sb, torch.float16, None)
    assert len(calls) == 2
    aliases.freeze(w)
    aliases.freeze(w.t())  # the same memory
    for _ in range(3):
        assert torch.equal(Q.int8_scaled_mm(a, w.t(), sa, sb, torch.float16, None), wanted)
    assert len(calls) == 3
    aliases.thaw(w)
    w.neg_()
    assert not torch.equal(Q.int8_scaled_mm(a, w.t(), sa, sb, torch.float16, None), wanted)
    with pytest.raises(ValueError, match="is not frozen"):
        aliases.thaw(w)


def test_compile_and_nothing() -> None:
    a, w = codes(M, K, E4M3, 0), codes(N, K, E4M3, 1)
    sa, sb = scales(M, 1), scales(1, N)

    def step(a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(a.shape[0], w.shape[0], dtype=torch.bfloat16)
        Q.cutlass_scaled_mm(out, a, w.t(), sa, sb, None)
        return out + 1, Q.fp8_scaled_mm(a, w.t(), sa, sb, torch.float16, None)

    for one, other in zip(torch.compile(step, fullgraph=True)(a, w), step(a, w), strict=True):
        assert torch.equal(one, other)
    assert Q.fp8_scaled_mm(a[:0], w.t(), sa[:0], sb, torch.float16, None).shape == (0, N)
    for supports in (Q.cutlass_scaled_mm_supports_fp8, Q.cutlass_scaled_mm_supports_block_fp8):
        assert supports(80) and not supports(75)
    assert Q.cutlass_scaled_mm_supports_fp4(80) in (True, False)
