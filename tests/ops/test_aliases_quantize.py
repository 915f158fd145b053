"""Quantization in the words of vLLM and sgl-kernel: what their kernels make of the same arguments, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.aliases  # noqa: F401  registers what is tested
from quantkit import ops

pytestmark = pytest.mark.usefixtures("opchecked")

E4M3, INT8 = torch.float8_e4m3fn, torch.int8
Q = torch.ops.quantkit


def x_of(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def as_fp8(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(E4M3)


def assert_codes(got: Tensor, wanted: Tensor) -> None:
    """Equal but for a step of the code where x / scale is within rounding of a tie, which few are."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    if got.dtype == INT8:
        away = (got.int() - wanted.int()).abs()
    else:
        away = (got.view(torch.uint8).int() - wanted.view(torch.uint8).int()).abs()
    assert int(away.max()) <= 1 and int(away.sum()) <= 2 + got.numel() // 100


def test_fp8_with_given_scales() -> None:
    x = x_of(6, 256)
    for scale, group, wide in (
        (torch.tensor(0.02), None, torch.tensor(0.02)),
        (torch.rand(256) + 0.1, [-1, 1], None),
        (torch.rand(6) + 0.1, [1, -1], None),
        (torch.rand(6, 2) + 0.1, None, None),
        (torch.rand(3, 4) + 0.1, [2, 64], None),
    ):
        out = torch.empty(6, 256, dtype=E4M3)
        Q.static_scaled_fp8_quant(out, x, scale, group)
        if wide is None:
            wide = scale[None] if group == [-1, 1] else scale[:, None] if scale.dim() == 1 else scale
            wide = wide.repeat_interleave(6 // wide.shape[0], 0).repeat_interleave(256 // wide.shape[1], 1)
        assert_codes(out, as_fp8(x.float() * (1 / wide)))
    with pytest.raises(RuntimeError, match="quantkit::static_scaled_fp8_quant: a 1-D scale needs group_shape"):
        Q.static_scaled_fp8_quant(out, x, torch.ones(6), None)


def test_fp8_with_dynamic_scales() -> None:
    x = x_of(5, 96)
    x[2] = 0
    out, scale = torch.full((8, 96), 3.0).to(E4M3), torch.empty(1)
    Q.dynamic_scaled_fp8_quant(out, x, scale)  # more rows than x: padding, which stays as it is
    assert torch.equal(scale, x.abs().amax().float().reshape(1) / 448)
    assert_codes(out[:5], as_fp8(x.float() / scale))
    assert (out[5:].float() == 3).all()
    for bound in (None, torch.tensor([4.0])):
        out, scale = torch.empty(5, 96, dtype=E4M3), torch.empty(5, 1)
        Q.dynamic_per_token_scaled_fp8_quant(out, x, scale, bound)
        amax = x.float().abs().amax(1, keepdim=True)
        wanted = (amax if bound is None else amax.clamp(max=4.0)).div(448).clamp(min=1 / (448 * 512))
        assert torch.equal(scale, wanted)
        assert_codes(out, as_fp8(x.float() / wanted))


def test_int8() -> None:
    x = x_of(7, 64, torch.float16)
    for azp in (None, torch.tensor([-20], dtype=torch.int32), torch.tensor([300], dtype=torch.int32)):
        out = torch.empty(7, 64, dtype=INT8)
        Q.static_scaled_int8_quant(out, x, torch.tensor([0.05]), azp)
        wanted = torch.round(x.float() / 0.05) + (0 if azp is None else azp)
        assert_codes(out, wanted.clamp(-128, 127).to(INT8))
    out, scale = torch.empty(7, 64, dtype=INT8), torch.empty(7, 1)
    Q.dynamic_scaled_int8_quant(out, x, scale, None)
    assert torch.equal(scale, x.float().abs().amax(1, keepdim=True) / 127)
    assert_codes(out, torch.round(x.float() / scale).to(INT8))
    # Zero is not in the range of these: the offset is outside int8.
    x, offset = x.abs() + 5, torch.empty(7, 1, dtype=torch.int32)
    Q.dynamic_scaled_int8_quant(out, x, scale, offset)
    low, high = x.float().aminmax(dim=1, keepdim=True)
    assert torch.equal(scale, (high - low) / 255)
    assert torch.equal(offset, torch.round(-128 - low / scale).int()) and int(offset.max()) < -128
    assert_codes(out, (torch.round(x.float() / scale) + offset).clamp(-128, 127).to(INT8))


GROUPED: dict[str, Callable[..., Any]] = {
    "per_token_group_fp8_quant": lambda *a: Q.per_token_group_fp8_quant(*a, False, False),
    "per_token_group_quant_int8": lambda *a: Q.per_token_group_quant_int8(*a[:-1]),
    "sgl_per_token_group_quant_int8": lambda *a: Q.sgl_per_token_group_quant_int8(*a[:-1]),
    "sgl_per_token_group_quant_fp8": lambda *a: Q.sgl_per_token_group_quant_fp8(*a),
    "sgl_per_token_group_quant_8bit": lambda *a: Q.sgl_per_token_group_quant_8bit(*a),
    "sgl_per_token_group_quant_8bit_v2": lambda *a: Q.sgl_per_token_group_quant_8bit_v2(*a, False, None),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups(name: str) -> None:
    x = x_of(5, 256)
    x[1, :128] = 0
    dtype, limit = (INT8, 127.0) if "int8" in name else (E4M3, 448.0)
    for powers in (False,) if dtype == INT8 else (False, True):
        out, scale = torch.empty(5, 256, dtype=dtype), torch.empty(2, 5).t()  # column-major, as TMA wants it
        GROUPED[name](x, out, scale, 128, 1e-10, -limit, limit, powers)
        wanted = x.float().view(5, 2, 128).abs().amax(-1).clamp(min=1e-10) / limit
        if powers:
            wanted = torch.exp2(torch.ceil(torch.log2(wanted)))
        assert torch.equal(scale, wanted)
        scaled = (x.float().view(5, 2, 128) / wanted.unsqueeze(-1)).view(5, 256)
        assert_codes(out, as_fp8(scaled) if dtype == E4M3 else torch.round(scaled).clamp(-128, 127).to(INT8))
        assert scale.stride() == (1, 5)


def test_sgl_alone() -> None:
    x = x_of(6, 128)
    out, scale = torch.empty(6, 64, dtype=E4M3), torch.empty(6, 2)
    Q.sgl_per_token_group_quant_8bit_v2(x, out, scale, 32, 1e-10, -448.0, 448.0, False, True, None)
    gated = ops.silu_mul(x[:, :64], x[:, 64:])
    assert_codes(out, as_fp8((gated.float().view(6, 2, 32) / scale[..., None]).view(6, 64)))
    with pytest.raises(RuntimeError, match="masked_m is not offered"):
        Q.sgl_per_token_group_quant_8bit_v2(x, out, scale, 32, 1e-10, -448.0, 448.0, False, True, scale)
    out, scale = torch.empty(6, 128, dtype=E4M3), torch.tensor([0.01])
    Q.sgl_per_tensor_quant_fp8(x, out, scale, True)
    assert_codes(out, as_fp8(x.float() / 0.01))
    Q.sgl_per_tensor_quant_fp8(x, out, scale, False)
    assert torch.equal(scale, x.float().abs().amax().reshape(1) / 448)
    scale = torch.empty(6, 1)
    Q.sgl_per_token_quant_fp8(x, out, scale)
    assert torch.equal(scale, x.float().abs().amax(1, keepdim=True) / 448)
    assert_codes(out, as_fp8(x.float() / scale))
    codes, scale = Q.per_token_quant_int8_cpu(x)
    assert_codes((codes.int() - 128).to(INT8), torch.round(x.float() / scale[:, None]).to(INT8))
    assert codes.dtype == torch.uint8 and scale.shape == (6,)


def test_fp4() -> None:
    x, rows, groups = x_of(130, 96), 130, 6
    number = ops.nvfp4_global_scale(x.float().abs().amax())
    codes, scales = Q.scaled_fp4_quant(x, number, False)
    local = (number * (x.float().view(rows, groups, 16).abs().amax(-1) / 6)).to(E4M3)
    assert torch.equal(scales.view(E4M3).float(), local.float())
    wanted = ops.quantize_fp4(x, local.float() / number, 16)
    assert torch.equal(codes, wanted)
    _, swizzled = Q.scaled_fp4_quant(x, number, True)
    assert swizzled.dtype == torch.int32 and swizzled.shape == (256, 2)
    flat = swizzled.view(torch.uint8).flatten()
    for m, k in ((0, 0), (1, 5), (37, 2), (127, 4), (128, 3), (129, 5)):  # PTX's scale_vec::4X layout
        place = (m // 128 * 2 + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
        assert flat[place] == local.view(torch.uint8)[m, k]
    out, out_scale = torch.empty_like(codes), torch.empty_like(swizzled)
    Q.scaled_fp4_quant.out(x, number, True, output=out, output_scale=out_scale)
    assert torch.equal(out, codes) and torch.equal(out_scale, swizzled)
    out.zero_(), out_scale.zero_()
    Q.scaled_fp4_quant(out, x, out_scale, number)
    assert torch.equal(out, codes) and torch.equal(out_scale, swizzled)


def test_compile_and_nothing() -> None:
    def both(x: Tensor) -> tuple[Tensor, ...]:
        out, scale = torch.empty(x.shape, dtype=E4M3), torch.empty(x.shape[0], 1)
        Q.dynamic_per_token_scaled_fp8_quant(out, x, scale, None)
        codes, scales = Q.scaled_fp4_quant(x, torch.ones(1), True)
        Q.sgl_per_token_quant_fp8(x + 1, out, scale)
        return out.float(), scale + 1, codes, scales

    for rows in (4, 130):
        x = x_of(rows, 64)
        for one, other in zip(torch.compile(both, fullgraph=True)(x), both(x), strict=True):
            assert torch.equal(one, other)
    out = torch.empty(0, 64, dtype=INT8)
    Q.dynamic_scaled_int8_quant(out, x_of(0, 64), torch.empty(0, 1), None)
    Q.static_scaled_int8_quant(out, x_of(0, 64), torch.ones(1), None)
    Q.static_scaled_fp8_quant(out.view(E4M3), x_of(0, 64), torch.ones(1))
    with pytest.raises(RuntimeError, match=r"quantkit::dynamic_scaled_int8_quant: result must be \[130, 64\]"):
        Q.dynamic_scaled_int8_quant(out, x, torch.empty(130, 1), None)
