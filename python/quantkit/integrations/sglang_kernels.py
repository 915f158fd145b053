"""SGLang's schemes for Linears of compressed-tensors checkpoints (as of 0.5.23), served by quantkit's ops. Imported by
the plugin alone.

A scheme is three methods: `create_weights` (SGLang's own here: names, shapes and loaders of what is on disk),
`process_weights_after_loading` (pack once) and `apply_weights` (one call).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from sglang.srt.layers.parameter import PerTensorScaleParameter
from sglang.srt.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Fp8,
    CompressedTensorsW8A8Int8,
    CompressedTensorsWNA16,
)
from torch import Tensor

from .. import ops

MIN_CAPABILITY = 80  # of GPUs


def scheme_for(weights: QuantizationArgs, inputs: QuantizationArgs | None, form: str) -> Any:
    """quantkit's scheme for a Linear whose weights and inputs are quantized so, stored in the format `form`; None where
    SGLang's own is to serve.
    """
    of, by = _kind(weights), None if inputs is None else _kind(inputs)
    if weights.dynamic or (of[0] == "float" and not weights.symmetric):
        return None
    packed = of in (("int", 4), ("int", 8)) and form == "pack-quantized" and weights.actorder != "group"
    packed = packed and weights.strategy in ("channel", "group")
    if inputs is None:
        return QuantkitPackedScheme(weights, False) if packed else None
    # How inputs are cut for their scales, and whether these are in the checkpoint.
    cut, static = _text(inputs.strategy), not inputs.dynamic
    if packed:
        w4a8 = (of[1], by, cut, static) == (4, ("int", 8), "token", False) and inputs.symmetric
        return QuantkitPackedScheme(weights, True) if w4a8 else None
    if of == by == ("int", 8) and form == "int-quantized" and weights.symmetric:
        known = weights.strategy in ("tensor", "channel") and (cut, static) in (("token", False), ("tensor", True))
        return QuantkitInt8Scheme(weights.strategy, static, inputs.symmetric) if known else None
    if of == by == ("float", 8) and form == "float-quantized":
        known = cut == "tensor" or (not static and (cut == "token" or (cut, inputs.group_size) == ("group", 128)))
        known = known and weights.strategy in ("tensor", "channel", "block")
        return QuantkitFp8Scheme(weights, inputs) if known else None
    return None


def _kind(args: QuantizationArgs) -> tuple[str, int]:
    return _text(args.type), args.num_bits


def _text(value: Any) -> str:
    """compressed-tensors keeps its enums as such or as strings, by version."""
    return str(value.value if isinstance(value, Enum) else value)


def _keep(layer: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter of the layer; SGLang's loader is done with it."""
    delattr(layer, name)
    setattr(layer, name, torch.nn.Parameter(tensor.contiguous(), requires_grad=False))


def _by_output(scale: Tensor, widths: list[int]) -> Tensor:
    """[parts] or [N, 1] -> [N]: a fused Linear has a scale for each of its parts."""
    scale = scale.float().flatten()
    if scale.numel() == sum(widths):
        return scale
    return torch.cat([part.expand(width) for part, width in zip(scale, widths, strict=True)])


def _same(values: Tensor, what: str) -> Tensor:
    """The one value [1] that all parts of a fused Linear share."""
    if not bool((values == values.flatten()[0]).all()):
        raise ValueError(f"the parts of a fused Linear read one input and need one {what}, got {values.tolist()}")
    return values.flatten()[:1].clone()


class QuantkitInt8Scheme(CompressedTensorsW8A8Int8):
    """int8 weights per tensor or channel; activations per token, or per tensor with a static scale."""

    @classmethod
    def get_min_capability(cls) -> int:
        return MIN_CAPABILITY

    def create_weights(self, layer: Any, output_partition_sizes: list[int], *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, output_partition_sizes, *args, **kwargs)
        for name in ("input_scale", "input_zero_point") if self.is_static_input_scheme else ():
            # SGLang makes room for one value; its loader looks for one of each part of a fused Linear.
            if name in layer._parameters:
                room = torch.empty(len(output_partition_sizes), dtype=getattr(layer, name).dtype)
                delattr(layer, name)
                parameter = PerTensorScaleParameter(data=room, weight_loader=kwargs["weight_loader"])
                layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.out_features = layer.weight.shape[0]
        _keep(layer, "weight_scale", _by_output(layer.weight_scale.data, layer.logical_widths))
        _keep(layer, "weight", ops.pack_w8a8(layer.weight.data.contiguous()))
        self.input_scale = self.zero_point = None
        if self.is_static_input_scheme:
            self.input_scale = _same(layer.input_scale.data, "input_scale")
            if not self.input_symmetric:
                self.zero_point = _same(layer.input_zero_point.data, "input_zero_point")

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = ops.w8a8_gemm(
            x.reshape(-1, x.shape[-1]),
            layer.weight,
            layer.weight_scale,
            self.out_features,
            input_scale=self.input_scale,
            input_zero_point=self.zero_point,
            symmetric=self.input_symmetric,
            bias=bias,
        )
        return out.reshape(*x.shape[:-1], self.out_features)


class QuantkitFp8Scheme(CompressedTensorsW8A8Fp8):
    """FP8 e4m3 weights per tensor, channel or block; activations per token or group, or static per tensor."""

    def __init__(self, weights: QuantizationArgs, inputs: QuantizationArgs) -> None:
        # Not super's, which looks for a GPU's block kernels.
        self.weight_quant, self.strategy = weights, weights.strategy
        self.weight_block_size = weights.block_structure
        self.is_static_input_scheme = not inputs.dynamic
        self.input_block = {"tensor": [-1, -1], "token": [1, -1], "group": [1, 128]}[_text(inputs.strategy)]

    @classmethod
    def get_min_capability(cls) -> int:
        return MIN_CAPABILITY

    def process_weights_after_loading(self, layer: Any) -> None:
        self.out_features = layer.weight.shape[0]
        scale = layer.weight_scale.data.float()
        if self.weight_block_size is not None:
            self.block = list(self.weight_block_size)
        else:
            self.block, scale = [1, -1], _by_output(scale, layer.logical_widths).reshape(-1, 1)
        _keep(layer, "weight_scale", scale)
        _keep(layer, "weight", ops.pack_fp8(layer.weight.data.contiguous()))
        self.input_scale = _same(layer.input_scale.data, "input_scale") if self.is_static_input_scheme else None

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("quantkit: inputs that a fused norm has quantized are not taken; turn that fusion off")
        out = ops.fp8_gemm(
            x.reshape(-1, x.shape[-1]),
            layer.weight,
            layer.weight_scale,
            self.block,
            self.out_features,
            input_scale=self.input_scale,
            input_block=self.input_block,
            bias=bias,
        )
        return out.reshape(*x.shape[:-1], self.out_features)


class QuantkitPackedScheme(CompressedTensorsWNA16):
    """int4 and int8 weights per group or channel in int32 words, with zero points or not; activations stay in 16 bit,
    or are int8 per token with int4 weights (W4A8), which SGLang has no scheme for.
    """

    def __init__(self, weights: QuantizationArgs, int8_inputs: bool) -> None:
        super().__init__(weights.strategy, weights.num_bits, weights.group_size, weights.symmetric, weights.actorder)
        self.num_bits, self.int8_inputs = weights.num_bits, int8_inputs

    @classmethod
    def get_min_capability(cls) -> int:
        return MIN_CAPABILITY

    def process_weights_after_loading(self, layer: Any) -> None:
        inputs, self.out_features = self.kernel_config.partition_weight_shape
        words, scale, zero = layer.weight_packed.data.contiguous(), layer.weight_scale.data, None
        if not self.symmetric:
            zero = ops.unpack_zero_points(layer.weight_zero_point.data.contiguous(), self.num_bits, self.out_features)
        if self.int8_inputs:
            packed, scale = ops.pack_w4a8(words, inputs), ops.pack_w4a8_scales(scale)
            zero = None if zero is None else ops.pack_w4a8_scales(zero)
        else:
            packed = ops.pack_wna16(words, self.num_bits, inputs)
        _keep(layer, "weight_packed", packed)
        _keep(layer, "weight_scale", scale)
        if zero is not None:
            _keep(layer, "weight_zero_point", zero)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows, packed, scale = x.reshape(-1, x.shape[-1]), layer.weight_packed, layer.weight_scale
        zero = None if self.symmetric else layer.weight_zero_point
        if self.int8_inputs:
            out = ops.w4a8_gemm(
                rows, packed, scale, self.out_features, self.group_size, weight_zero_point=zero, bias=bias
            )
        else:
            out = ops.wna16_gemm(
                rows,
                packed,
                scale,
                self.num_bits,
                self.out_features,
                self.group_size,
                weight_zero_point=zero,
                bias=bias,
            )
        return out.reshape(*x.shape[:-1], self.out_features)
