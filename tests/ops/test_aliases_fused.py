"""RMS norm and SiLU in the words of vLLM and sgl-kernel: what their kernels make of the same, in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import quantkit.aliases  # noqa: F401  registers what is tested

from .test_aliases_quantize import E4M3, INT8, Q, as_fp8, assert_codes, x_of

pytestmark = pytest.mark.usefixtures("opchecked")

EPS = 1e-5


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()).to(x.dtype)


def gated(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def close(got: Tensor, wanted: Tensor) -> None:
    """To a rounding of bf16."""
    torch.testing.assert_close(got.double(), wanted.double(), rtol=2**-7, atol=1e-6)


def test_norm_and_gate() -> None:
    x, residual, weight = x_of(5, 96), x_of(5, 96, seed=1), x_of(1, 96, seed=2)[0]
    total = (x.float() + residual.float()).bfloat16()
    out = torch.empty_like(x)
    Q.rmsnorm(out, x, weight, EPS, True)
    close(out, norm(x, weight))
    for call in (
        lambda a, b: Q.fused_add_rmsnorm(a, b, weight, EPS, False),
        lambda a, b: Q.fused_add_rms_norm(a, b, weight, EPS),
    ):
        a, b = x.clone(), residual.clone()
        call(a, b)
        close(a, norm(total, weight))
        assert torch.equal(b, total)
    a, b = x.clone(), residual.clone()
    Q.fused_add_rms_norm(a, b, None, EPS)
    close(a, norm(total, torch.ones(96)))
    out = torch.empty(5, 48, dtype=x.dtype)
    Q.silu_and_mul(out, x)
    close(out, gated(x))


@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_with_codes(with_residual: bool) -> None:
    x, weight = x_of(6, 256), x_of(1, 256, seed=2)[0]
    given = x_of(6, 256, seed=1) if with_residual else None
    total = x if given is None else (x.float() + given.float()).bfloat16()
    Q.rmsnorm(normed := torch.empty_like(x), total, weight, EPS, False)

    for dtype, limit in ((INT8, 127.0), (E4M3, 448.0)):
        for bound in (None,) if dtype == INT8 else (None, torch.tensor(2.0)):
            residual = None if given is None else given.clone()
            out, scale = torch.empty(6, 256, dtype=dtype), torch.empty(6, 1)
            Q.rms_norm_dynamic_per_token_quant(out, x, weight, scale, EPS, bound, residual)
            amax = normed.float().abs().amax(1, keepdim=True)
            assert torch.equal(scale, (amax if bound is None else amax.clamp(max=2.0)) / limit)
            scaled = normed.float() / scale
            assert_codes(out, torch.round(scaled).to(INT8) if dtype == INT8 else as_fp8(scaled))
            assert residual is None or torch.equal(residual, total)
        for transposed in (False, True):
            residual = None if given is None else given.clone()
            scale = torch.empty(2, 6).t() if transposed else torch.empty(6, 2)
            Q.rms_norm_per_block_quant(out, x, weight, scale, EPS, None, residual, 128, transposed)
            assert torch.equal(scale, normed.float().view(6, 2, 128).abs().amax(-1) / limit)
            scaled = (normed.float().view(6, 2, 128) / scale[..., None]).view(6, 256)
            assert_codes(out, torch.round(scaled).to(INT8) if dtype == INT8 else as_fp8(scaled))
            assert residual is None or torch.equal(residual, total)
    residual, step = None if given is None else given.clone(), torch.tensor([0.03])
    if residual is None:
        Q.rms_norm_static_fp8_quant(out, x, weight, step, EPS)
    else:
        Q.fused_add_rms_norm_static_fp8_quant(out, x, residual, weight, step, EPS)
        assert torch.equal(residual, total)
    assert_codes(out, as_fp8(normed.float() * (1 / step)))


def test_gate_with_codes() -> None:
    x = x_of(6, 512)
    Q.silu_and_mul(made := torch.empty(6, 256, dtype=x.dtype), x)
    out = torch.empty(6, 256, dtype=E4M3)
    Q.silu_and_mul_quant(out, x, torch.tensor([0.05]))
    assert_codes(out, as_fp8(made.float() * (1 / torch.tensor(0.05))))
    for scale in (torch.empty(6, 4), torch.empty(4, 6).t()):
        Q.silu_and_mul_per_block_quant(out, x, scale, 64, None, scale.stride(0) == 1)
        assert torch.equal(scale, made.float().view(6, 4, 64).abs().amax(-1) / 448)
        assert_codes(out, as_fp8((made.float().view(6, 4, 64) / scale[..., None]).view(6, 256)))
    number = torch.tensor([10.0])
    codes, scales = Q.scaled_fp4_quant(made, number, True)
    out, out_scale = torch.empty_like(codes), torch.empty_like(scales)
    Q.silu_and_mul_nvfp4_quant(out, out_scale, x, number)
    assert torch.equal(out, codes) and torch.equal(out_scale, scales)


def test_writes_survive_compilation() -> None:
    weight = torch.ones(64, dtype=torch.bfloat16)

    def step(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        hidden, rest = x * 2, residual + 1
        Q.fused_add_rms_norm(hidden, rest, weight, EPS)
        out, scale = torch.empty(x.shape, dtype=INT8), torch.empty(x.shape[0], 1)
        Q.rms_norm_dynamic_per_token_quant(out, hidden, weight, scale, EPS, None, rest)
        return hidden, rest, out, scale

    args = (x_of(4, 64), x_of(4, 64, seed=1))
    for one, other in zip(torch.compile(step, fullgraph=True)(*args), step(*args), strict=True):
        assert torch.equal(one, other)
