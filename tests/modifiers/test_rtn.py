"""Round to nearest as a modifier: against fp64, and what it asks of a layer's one forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantkit.calibration.statistics import Statistics
from quantkit.calibration.sweep import Layer
from quantkit.config.presets import PRESETS
from quantkit.config.recipe import QuantizationModifier
from quantkit.config.schemes import QuantizationArgs
from quantkit.errors import CheckpointError
from quantkit.formats import compressed_tensors as ct
from quantkit.modifiers.activations import static_scale
from quantkit.modifiers.rtn import RoundToNearest, quantize_weight
from quantkit.plan import PlannedModule
from quantkit.quantized import QuantizedTensor


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.weights: dict[str, QuantizedTensor] = {}
        self.inputs: dict[str, tuple[Tensor, Tensor | None]] = {}

    def weight(self, module: str, quantized: QuantizedTensor) -> None:
        self.weights[module] = quantized

    def input(self, module: str, scale: Tensor, zero_point: Tensor | None) -> None:
        self.inputs[module] = (scale, zero_point)


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


def test_one_forward_runs_with_quantized_weights_and_gives_the_ranges() -> None:
    linear = nn.Linear(64, 32, bias=False)
    original = linear.weight.data.clone()
    kept = Kept()
    planned = PlannedModule("m", 32, 64, "F32", PRESETS["FP8"], QuantizationModifier(scheme="FP8"))
    modifier = RoundToNearest({"m": planned}, kept, scale_dtype=lambda _: torch.float32, packs=ct.packs)
    layer = Layer(0, "layers.0", {"m": linear, "other": nn.Linear(2, 2)})
    untouched = layer.linears["other"].weight
    modifier.prepare(layer)
    assert modifier.second_forward is False
    assert torch.equal(linear.weight, kept.weights["m"].dequantize()) and not torch.equal(linear.weight, original)
    assert layer.linears["other"].weight is untouched
    x = torch.randn(100, 64)
    modifier.finish(layer, {"m": Statistics.of(x, "x")})
    scale, zero_point = kept.inputs["m"]
    assert zero_point is None and float(scale) == pytest.approx(float(x.abs().max()) / 448, rel=1e-7)


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
