"""Round to nearest: the weight's own range gives the scale, each element goes to the nearest code. Needs no data,
except for the ranges of statically quantized activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .. import ops
from ..calibration.statistics import Statistics
from ..calibration.sweep import Layer
from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import CheckpointError
from ..plan import PlannedModule
from ..quantized import QuantizedTensor
from .activations import static_scale
from .sink import Sink

FP8 = torch.float8_e4m3fn


class RoundToNearest:
    """Weights first, since their codes depend on nothing else: the one forward then runs with what will be served,
    and gives the activation ranges as well as the next layer's inputs.
    """

    second_forward = False

    def __init__(
        self,
        modules: Mapping[str, PlannedModule],
        sink: Sink,
        *,
        scale_dtype: Callable[[str], torch.dtype],
        packs: Callable[[QuantizationScheme], bool],
    ) -> None:
        """`modules` are the Linears to quantize; `scale_dtype` tells what a module's weight scale is stored in, `packs`
        whether a scheme's codes go into int32 words.
        """
        self.modules, self.sink = modules, sink
        self.scale_dtype, self.packs = scale_dtype, packs

    def weight(self, module: str, weight: Tensor) -> QuantizedTensor:
        """Quantize one weight and hand it to the sink."""
        scheme = self.modules[module].scheme
        quantized = quantize_weight(
            module, weight, scheme.weights, scale_dtype=self.scale_dtype(module), pack=self.packs(scheme)
        )
        self.sink.weight(module, quantized)
        return quantized

    def prepare(self, layer: Layer) -> None:
        for name, linear in layer.linears.items():
            if name in self.modules:
                quantized = self.weight(name, linear.weight.data)
                linear.weight = nn.Parameter(quantized.dequantize(linear.weight.dtype), requires_grad=False)

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        for name, seen in statistics.items():
            args = self.modules[name].scheme.input_activations
            if args is not None and not args.dynamic:
                self.sink.input(name, *static_scale(seen, args))


def quantize_weight(
    name: str, weight: Tensor, args: QuantizationArgs, *, scale_dtype: torch.dtype, pack: bool
) -> QuantizedTensor:
    """Quantize `weight` [rows, cols] (fp32, fp16, bf16) as `args` say, in one pass over it.

    `scale_dtype` is what the format stores scales in; they are rounded to it before codes are computed. `pack` gives
    int32 words instead of int8 codes. Raises CheckpointError naming the rows if the weight has NaN or Inf.
    """
    rows, cols = weight.shape
    zero_point: Tensor | None = None
    if args.type == "float":
        codes, scale = ops.rtn_fp8(weight, args.block, FP8)
    else:
        q_min, q_max = args.q_range
        codes, scale, zero_point = ops.rtn_int(
            weight,
            args.block,
            q_min=q_min,
            q_max=q_max,
            symmetric=args.symmetric,
            divisor=args.divisor,
            scale_dtype=scale_dtype,
            pack_bits=args.num_bits if pack else 0,
        )
    check_finite(name, weight, scale)
    return QuantizedTensor(codes, scale, None if args.symmetric else zero_point, args, rows, cols, pack)


def check_finite(name: str, weight: Tensor, scale: Tensor) -> None:
    """A NaN or Inf anywhere in a weight shows in the scale of its block; the row is looked up only then."""
    if bool(torch.isfinite(scale).all()):
        return
    bad = (~torch.isfinite(weight.float()).all(dim=1)).nonzero().flatten().tolist()
    shown = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    raise CheckpointError(
        f"{name}: NaN or Inf in row{'s' if len(bad) > 1 else ''} {shown} of {weight.shape[0]}; "
        f"the source checkpoint is damaged, or leave this layer out with ignore_layers"
    )
