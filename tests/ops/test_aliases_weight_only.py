"""int4 and int8 weights in vLLM's and sgl-kernel's formats, made here by tables as their sources have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.aliases  # noqa: F401  registers what is tested

from .test_aliases_gemm import assert_product
from .test_aliases_quantize import INT8, Q, x_of

pytestmark = pytest.mark.usefixtures("opchecked")

M, N, K, GROUP = 5, 128, 256, 64
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
TYPES = {(4, True): 1125899906843648, (4, False): 1125899907892224, (8, False): 1125899923621888}


def pack(codes: Tensor, bits: int, axis: int) -> Tensor:
    """Unsigned codes to int32 words along `axis`, the first in the lowest bits."""
    codes = codes.movedim(axis, -1).unflatten(-1, (-1, 32 // bits)).long()
    words = (codes << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().movedim(-1, axis)


class Weight:
    """Codes [K, N], scales and zero points [G, N], and what they stand for."""

    def __init__(self, bits: int, zeros: bool, groups: int = K // GROUP, order: bool = False) -> None:
        generator = torch.Generator().manual_seed(bits + groups)
        self.bits, self.codes = bits, torch.randint(0, 1 << bits, (K, N), generator=generator)
        self.scale = (torch.rand(groups, N, generator=generator) * 0.02 + 0.01).half()
        middle = 1 << (bits - 1)
        # GPTQ's first format keeps them less one: from 1 on.
        self.zero = torch.randint(1, 1 << bits, (groups, N), generator=generator) if zeros else None
        group = torch.arange(K) // (K // groups)
        self.g_idx = group[torch.randperm(K, generator=generator)] if order else group
        self.perm = torch.argsort(self.g_idx, stable=True)
        offset = torch.full((groups, N), middle) if self.zero is None else self.zero
        self.values = (self.codes - offset[self.g_idx]).double() * self.scale[self.g_idx].double()

    def qzeros(self, less: int) -> Tensor:
        zero = self.zero if self.zero is not None else torch.full_like(self.scale, 1 << (self.bits - 1)).long()
        return pack(zero - less, self.bits, 1)

    def check(self, got: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        wanted, size = x.double() @ self.values, x.double().abs() @ self.values.abs()
        # The sums of codes and of zero points are kept apart, so that a term counts for more.
        assert_product(got, wanted + (0 if bias is None else bias.double()), 8 * size, K)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("order", [False, True])
def test_gptq(bits: int, order: bool) -> None:
    w, x = Weight(bits, True, order=order), x_of(M, K, torch.float16)
    qweight, g_idx = pack(w.codes, bits, 0), w.g_idx.int()
    w.check(Q.gptq_gemm(x, qweight, w.qzeros(0), w.scale, g_idx, False, True, bits), x)
    w.check(Q.gptq_gemm(x, qweight, w.qzeros(1), w.scale, g_idx, False, False, bits), x)
    w.check(Q.gptq_gemm(x, qweight, w.qzeros(1), w.scale, g_idx, False, bits), x)
    shuffled, perm = qweight.clone(), w.perm.int() if order else torch.empty(0, dtype=torch.int32)
    Q.gptq_shuffle(shuffled, perm, bits)
    w.check(Q.gptq_gemm(x, shuffled, w.qzeros(1), w.scale, perm, True, False, bits), x)
    w.check(Q.gptq_gemm(x, shuffled, w.qzeros(1), w.scale, perm, True, bits), x)
    if not order:
        w.check(Q.gptq_gemm(x, qweight, w.qzeros(1), w.scale, False, False, bits), x)
    with pytest.raises(RuntimeError, match="quantkit::gptq_gemm: codes must have 4 or 8 bits, got 3"):
        Q.gptq_gemm(x, qweight, w.qzeros(0), w.scale, g_idx, False, True, 3)


def awq_packed(codes: Tensor) -> Tensor:
    return pack(codes.unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1), 4, 1)


def test_awq() -> None:
    w, x = Weight(4, True), x_of(M, K, torch.float16)
    assert w.zero is not None
    args = (awq_packed(w.codes), w.scale, awq_packed(w.zero))
    w.check(Q.awq_gemm(x, *args, 8), x)
    for dequantized in (Q.awq_dequantize(*args, 0, 0, 0), Q.awq_dequantize(*args)):
        assert torch.equal(dequantized, w.values.half())


def scale_order(groups: int) -> list[int]:
    if groups > 1:
        return [i + 8 * j for i in range(8) for j in range(8)]
    return [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def marlin_order(values: Tensor, order: list[int]) -> Tensor:
    return values.reshape(-1, len(order))[:, order].reshape(values.shape)


@pytest.mark.parametrize(
    ("kind", "groups", "order"),
    [
        ((4, False), 4, False),
        ((4, False), 4, True),
        ((4, False), 1, False),
        ((8, False), 4, False),
        ((4, True), 4, False),
    ],
)
def test_marlin(kind: tuple[int, bool], groups: int, order: bool) -> None:
    bits, zeros = kind
    w, x = Weight(bits, zeros, groups, order), x_of(M, K)
    w.scale = w.scale.bfloat16()
    offset = w.zero if w.zero is not None else torch.full((groups, N), 1 << (bits - 1))
    w.values = (w.codes - offset[w.g_idx]).double() * w.scale[w.g_idx].double()
    perm = w.perm.int() if order else torch.empty(0, dtype=torch.int32)
    b_zeros = None
    if zeros:
        assert w.zero is not None
        made = awq_packed(w.codes)
        packed = Q.awq_marlin_repack(made, K, N, bits, False)
        assert torch.equal(Q.awq_marlin_repack(made, K, N, bits), packed)
        moved = marlin_order(w.zero, scale_order(2)).unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1)
        b_zeros = pack(moved, 4, 1)
    else:
        qweight = pack(w.codes, bits, 0)
        packed = Q.gptq_marlin_repack(qweight, perm, K, N, bits, False)
        assert torch.equal(Q.gptq_marlin_repack(qweight, perm, K, N, bits), packed)
        if not order:
            assert torch.equal(Q.gptq_marlin_repack(qweight, K, N, bits, False), packed)
    assert packed.dtype == torch.int32 and packed.shape == (K // 16, N * 16 * bits // 32)
    bias = x_of(1, N)[0]
    scales, workspace = marlin_order(w.scale, scale_order(groups)), torch.zeros(8, dtype=torch.int32)
    head = (x, None, packed, marlin_order(bias, scale_order(1)), scales, None, None, b_zeros)
    tail = (workspace, TYPES[kind], M, N, K)
    w.check(Q.marlin_gemm(*head, w.g_idx[w.perm].int(), perm, *tail, True, False, True, False), x, bias)
    if not order:
        w.check(Q.marlin_gemm(*head, *tail, False, True, False), x, bias)
    with pytest.raises(RuntimeError, match="quantkit::marlin_gemm: b_type_id must be that of u4"):
        Q.marlin_gemm(*head, workspace, 3, M, N, K, False, True, False)


@pytest.mark.parametrize("zeros", [False, True])
def test_vllm_cpu(zeros: bool) -> None:
    w, x, bias = Weight(4, zeros), x_of(M, K), x_of(1, N)[0]
    blocks = pack(w.codes, 4, 1).view(K, -1, 2).permute(1, 0, 2).reshape(-1, K * 2).contiguous()
    out = torch.empty(M, N, dtype=torch.bfloat16)
    Q.cpu_gemm_wna16(x, blocks, out, w.scale, w.qzeros(0) if zeros else None, bias, 8, "vec")
    w.check(out, x, bias)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_experts(bits: int, zeros: bool) -> None:
    tokens, top_k, experts, block = 6, 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (experts, N, K), generator=generator)
    scale = (torch.rand(experts, N, K // GROUP, generator=generator) * 0.01 + 0.01).bfloat16()
    zero = torch.randint(0, 1 << bits, (experts, N, K // GROUP), generator=generator)
    if bits == 4:
        qweight, qzeros = codes[..., ::2] | codes[..., 1::2] << 4, zero[:, ::2] | zero[:, 1::2] << 4
    else:
        qweight, qzeros = codes, zero
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    chosen[:, 0][chosen[:, 0] == 1] = 0  # and an expert that few have
    weights, x = torch.rand(tokens, top_k, generator=generator), x_of(tokens, K)
    ids, owners = [], []
    for expert in range(experts):
        mine = (chosen.flatten() == expert).nonzero().flatten().tolist()
        padded = mine + [tokens * top_k] * (-len(mine) % block)
        ids += padded
        owners += [expert] * (len(padded) // block)
    past = torch.tensor([len(ids)], dtype=torch.int32)
    ids += [0] * block  # beyond the end anything may be
    owners += [2]
    given = [torch.tensor(v, dtype=torch.int32) for v in (ids, owners)]
    middle = zero if zeros else torch.full_like(zero, 1 << (bits - 1))
    values = (codes - middle.repeat_interleave(GROUP, 2)).double() * scale.double().repeat_interleave(GROUP, 2)
    for row_weights in (None, weights):
        out = torch.empty(tokens, top_k, N, dtype=torch.bfloat16)
        how: Any = (top_k, block, 64, 64, bits)
        zero_points = qzeros.to(torch.uint8) if zeros else None
        Q.moe_wna16_gemm(x, out, qweight.to(torch.uint8), scale, zero_points, row_weights, *given, past, *how)
        wanted = torch.einsum("tk,tcnk->tcn", x.double(), values[chosen])
        size = torch.einsum("tk,tcnk->tcn", x.double().abs(), values[chosen].abs())
        factor = torch.ones(tokens, top_k, 1) if row_weights is None else row_weights.unsqueeze(2)
        # Rounded once as a product, once more when it is weighed.
        assert_product(out, wanted * factor, 8 * size + 2.0**15 * wanted.abs(), K)


def test_permutation_and_repacking_compile() -> None:
    x, perm = x_of(M, K), torch.randperm(K).int()
    assert torch.equal(Q.permute_cols(x, perm), x[:, perm])
    w = Weight(4, True, order=True)
    qweight = pack(w.codes, 4, 0)

    def step(x: Tensor, qweight: Tensor) -> tuple[Tensor, Tensor]:
        y = Q.gptq_gemm(x, qweight, w.qzeros(0), w.scale, w.g_idx.int(), False, True, 4)
        return y * 2, Q.gptq_marlin_repack(qweight, w.perm.int(), K, N, 4, False) + 1

    compiled = torch.compile(step, fullgraph=True)
    for one, other in zip(compiled(x.half(), qweight), step(x.half(), qweight), strict=True):
        assert torch.equal(one, other)
    assert x.dtype != INT8
