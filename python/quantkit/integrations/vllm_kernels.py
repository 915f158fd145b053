"""vLLM's interfaces for quantized Linears (as of 0.32), served by quantkit's ops. Imported by the plugin alone.

Nothing here depends on the device: the ops have kernels for the CPU and for CUDA that take the same layouts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    FP8ScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
)
from vllm.scalar_type import scalar_types

from .. import ops

Able = tuple[bool, str | None]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MIN_CAPABILITY = 80  # of GPUs; vLLM asks for none on a CPU


def _keep(layer: torch.nn.Module, name: str, tensor: Tensor | None) -> None:
    """Replace a parameter of the layer; vLLM's loader is done with it."""
    delattr(layer, name)
    setattr(layer, name, None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _supported(capability: int | None) -> Able:
    if capability is not None and capability < MIN_CAPABILITY:
        return False, f"needs SM{MIN_CAPABILITY}, this is SM{capability}"
    return True, None


def _int8_per_token(layer: Any) -> bool:
    """Whether the checkpoint wants this Linear's inputs in int8 per token: of packed weights, which vLLM otherwise
    treats as weight-only, it says so on the layer alone (for another kernel).
    """
    inputs = getattr(layer, "_humming_input_quant_config", None) or {}
    return (inputs.get("num_bits"), inputs.get("type"), inputs.get("strategy")) == (8, "int", "token")


def _channelwise(scale: Tensor, widths: list[int]) -> Tensor:
    """A scale for each output from one for each fused part."""
    return torch.cat([part.expand(width) for part, width in zip(scale.flatten(), widths, strict=True)])


class QuantkitInt8LinearKernel(Int8ScaledMMLinearKernel):
    """int8 weights per tensor or channel; activations per token, or per tensor with a static scale."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> Able:
        return _supported(compute_capability)

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> Able:
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        weight_name, scale_name, input_name, zero_name, _ = self.layer_param_names
        weight, scale, input_scale, zero, _ = self._get_layer_params(layer)
        self.out_features = weight.shape[0]
        scale = scale.data.float().flatten()
        if not self.config.is_channelwise and len(layer.logical_widths) > 1:
            scale = _channelwise(scale, layer.logical_widths)
        _keep(layer, weight_name, ops.pack_w8a8(weight.data.contiguous()))
        _keep(layer, scale_name, scale.contiguous())
        if self.config.is_static_input_scheme:
            _keep(layer, input_name, input_scale.data.float().reshape(1))
            if zero is not None:
                _keep(layer, zero_name, zero.data.to(torch.int8).reshape(1))

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        packed, scale, input_scale, zero, _ = self._get_layer_params(layer)
        out = ops.w8a8_gemm(
            _rows(x),
            packed,
            scale,
            self.out_features,
            input_scale=input_scale,
            input_zero_point=zero,
            symmetric=self.config.input_symmetric,
            bias=bias,
        )
        return out.reshape(*x.shape[:-1], self.out_features)


class QuantkitFp8LinearKernel(FP8ScaledMMLinearKernel):
    """FP8 e4m3 weights per tensor, channel or block; activations per token or group, or static per tensor."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> Able:
        return _supported(compute_capability)

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> Able:
        if c.out_dtype not in FLOATS:
            return False, f"results of {c.out_dtype}"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, scale = layer.weight.data, self._scale(layer).data.float()
        blocks = self.config.weight_quant_key.scale.group_shape
        # Per tensor and per channel vLLM holds the weight as [inputs, outputs], per block as it is stored.
        codes = weight.t() if getattr(layer.weight, "output_dim", 0) == 1 else weight
        self.out_features = codes.shape[0]
        if blocks.is_per_tensor():
            self.block, scale = [-1, -1], scale.reshape(1, 1)
        elif blocks.is_per_channel():
            self.block, scale = [1, -1], scale.reshape(self.out_features, 1)
        else:
            self.block = [blocks.row, blocks.col]
        how = self.config.activation_quant_key.scale
        groups = how.group_shape
        self.static = how.static
        self.input_block = [-1, -1] if how.static or groups.is_per_tensor() else [1, -1]
        if groups.is_per_group():
            self.input_block = [1, groups.col]
        if how.static:
            layer.input_scale = torch.nn.Parameter(layer.input_scale.data.float().reshape(1), requires_grad=False)
        _keep(layer, "weight", ops.pack_fp8(codes.contiguous()))
        layer.quantkit_scale = torch.nn.Parameter(scale.contiguous(), requires_grad=False)

    @staticmethod
    def _scale(layer: Any) -> Any:
        inverse = getattr(layer, "weight_scale_inv", None)
        return layer.weight_scale if inverse is None else inverse

    def apply_weights(self, layer: Any, x: Any, bias: Tensor | None = None) -> Tensor:
        out = ops.fp8_gemm(
            _rows(x),
            layer.weight,
            layer.quantkit_scale,
            self.block,
            self.out_features,
            input_scale=layer.input_scale if self.static else None,
            input_block=self.input_block,
            bias=bias,
        )
        return out.reshape(*x.shape[:-1], self.out_features)

    def apply_scaled_mm(self, **_: Any) -> Tensor:
        raise AssertionError("apply_weights does all of it")


class _PackedLinearKernel(MPLinearKernel):
    """What the kernels for weights of 4 and 8 bits share: the layer holds `packed`, scales and zero points under the
    names that vLLM chose, or `quantkit_...`; `int8_inputs` says which op multiplies.
    """

    num_bits: int
    out_features: int
    int8_inputs: bool

    @classmethod
    def get_min_capability(cls) -> int:
        return MIN_CAPABILITY

    def _hold(self, layer: Any, words: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        """words, scale and zero_point as compressed-tensors has them: [outputs, inputs] and [outputs, groups]."""
        inputs, self.out_features = self.config.partition_weight_shape
        if self.int8_inputs:
            packed, scale = ops.pack_w4a8(words.contiguous(), inputs), ops.pack_w4a8_scales(scale)
            zero_point = None if zero_point is None else ops.pack_w4a8_scales(zero_point)
        else:
            packed, scale = ops.pack_wna16(words.contiguous(), self.num_bits, inputs), scale.contiguous()
        _keep(layer, self.w_q_name, packed)
        _keep(layer, self.w_s_name, scale)
        layer.quantkit_zero_point = (
            None if zero_point is None else torch.nn.Parameter(zero_point.contiguous(), requires_grad=False)
        )

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        packed, scale = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        rows, zero_point, size = _rows(x), layer.quantkit_zero_point, self.config.group_size
        if self.int8_inputs:
            out = ops.w4a8_gemm(rows, packed, scale, self.out_features, size, weight_zero_point=zero_point, bias=bias)
        else:
            out = ops.wna16_gemm(
                rows, packed, scale, self.num_bits, self.out_features, size, weight_zero_point=zero_point, bias=bias
            )
        return out.reshape(*x.shape[:-1], self.out_features)


class QuantkitWNA16LinearKernel(_PackedLinearKernel):
    """int4 and int8 weights per group or channel in int32 words, with zero points or not; activations stay as they are,
    or are int8 per token where the checkpoint says so and weights have 4 bits.
    """

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> Able:
        known = (scalar_types.uint4b8, scalar_types.uint8b128, scalar_types.uint4, scalar_types.uint8)
        if c.weight_type not in known:
            return False, f"weights of {c.weight_type}"
        if c.act_type not in FLOATS:
            return False, f"activations of {c.act_type}"
        if c.group_size > 0 and c.partition_weight_shape[0] % c.group_size:
            return False, f"{c.partition_weight_shape[0]} inputs in groups of {c.group_size}"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        words, scale, zero = self._get_weight_params(layer)
        self.num_bits = self.config.weight_type.size_bits
        self.int8_inputs = self.num_bits == 4 and _int8_per_token(layer)
        outputs = self.config.partition_weight_shape[1]
        # GPTQ holds all three as [inputs, outputs], compressed-tensors as [outputs, inputs].
        codes = words.data.t() if words.input_dim == 0 else words.data
        scales = scale.data.t() if getattr(scale, "output_dim", 0) == 1 else scale.data
        points = None
        if self.config.zero_points:
            assert zero is not None and self.w_zp_name is not None
            stored = zero.data if getattr(zero, "output_dim", 0) == 1 else zero.data.t()
            points = ops.unpack_int32(stored.contiguous(), self.num_bits, outputs).t()
        if self.w_zp_name is not None and zero is not None:
            _keep(layer, self.w_zp_name, None)
        self._hold(layer, codes, scales.reshape(outputs, -1), points)


class QuantkitW4A8LinearKernel(_PackedLinearKernel):
    """int4 weights per group or channel, stored as int8; activations int8 per token, symmetric."""

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> Able:
        if c.weight_type != scalar_types.int4:
            return False, f"weights of {c.weight_type}"
        if c.act_type not in FLOATS:
            return False, f"activations of {c.act_type}"
        if c.zero_points:
            return False, "zero points with int4 weights in int8"
        inputs = c.partition_weight_shape[0]
        if c.group_size > 0 and (inputs % c.group_size or c.group_size % 4):
            return False, f"{inputs} inputs in groups of {c.group_size}"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        codes, scale, _ = self._get_weight_params(layer)
        self.num_bits, self.int8_inputs = 4, True
        if "weight" in layer._parameters and layer.weight is codes:
            del layer.weight  # vLLM registers it under both names
        self._hold(layer, ops.pack_int32(codes.data.contiguous(), 4), scale.data, None)
