"""Round to nearest against fp64, and static input scales."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibration.statistics import Statistics
from quantkit.config.presets import PRESETS
from quantkit.config.schemes import QuantizationArgs
from quantkit.errors import CheckpointError
from quantkit.modifiers.activations import static_scale
from quantkit.modifiers.rtn import quantize_weight


@pytest.mark.parametrize("preset", ["W8A8", "W4A16", "W4A16_ASYM", "W8A16"])
def test_codes_are_the_nearest_in_fp64(preset: str) -> None:
    args = PRESETS[preset].weights
    weight = torch.randn(16, 256)
    quantized = quantize_weight("m", weight, args, scale_dtype=torch.float32, pack=False)
    size = args.group_size or 256
    groups = weight.double().reshape(16, -1, size)
    scale = quantized.scale.double().reshape(16, -1, 1)
    zero = 0.0 if quantized.zero_point is None else quantized.zero_point.double().reshape(16, -1, 1)
    low, high = args.q_range
    exact = groups / scale
    # Ties in fp64 may fall either way in fp32: one rounding of 1 / scale and one of the product.
    nearest = (exact.round() + zero).clamp(low, high)
    codes = quantized.codes.double().reshape(16, -1, size)
    differs = codes != nearest
    assert torch.all(((exact[differs].abs() % 1) - 0.5).abs() < 1e-4)
    if args.symmetric:
        amax = groups.abs().amax(-1, keepdim=True)
        assert torch.allclose(scale, amax / args.divisor, rtol=1e-7)


def test_asymmetric_ranges_reach_both_ends() -> None:
    args = QuantizationArgs(symmetric=False, strategy="tensor")
    x = torch.rand(50, 8) * 3 - 1
    scale, zero_point = static_scale(Statistics.of(x, "x"), args)
    assert zero_point is not None
    codes = (x / scale).round() + zero_point.float()
    assert codes.min() >= -128.5 and codes.max() <= 127.5
    assert codes.max() - codes.min() >= 254


def test_rows_that_are_not_finite_are_named() -> None:
    weight = torch.ones(300, 8)
    weight[[7, 250]] = float("inf")
    with pytest.raises(CheckpointError, match=r"^m: NaN or Inf in rows 7, 250 of 300;"):
        quantize_weight("m", weight, PRESETS["W8A8"].weights, scale_dtype=torch.float32, pack=False)
