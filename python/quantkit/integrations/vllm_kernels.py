"""vLLM's interfaces for quantized Linears (as of 0.32), served by quantkit's CPU ops. Imported by the plugin alone."""

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


def _keep(layer: torch.nn.Module, name: str, tensor: Tensor | None) -> None:
    """Replace a parameter of the layer; vLLM's loader is done with it."""
    delattr(layer, name)
    setattr(layer, name, None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _channelwise(scale: Tensor, widths: list[int]) -> Tensor:
    """A scale for each output from one for each fused part."""
    return torch.cat([part.expand(width) for part, width in zip(scale.flatten(), widths, strict=True)])


class QuantkitInt8LinearKernel(Int8ScaledMMLinearKernel):
    """int8 weights per tensor or channel; activations per token, or per tensor with a static scale."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> Able:
        return True, None

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
        return True, None

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


class QuantkitWNA16LinearKernel(MPLinearKernel):
    """int4 and int8 weights per group or channel, with zero points or not; activations stay as they are."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> Able:
        known = (scalar_types.uint4b8, scalar_types.uint8b128, scalar_types.uint4)
        if c.weight_type not in known:
            return False, f"weights of {c.weight_type}"
        if c.act_type not in FLOATS:
            return False, f"activations of {c.act_type}"
        if c.group_size > 0 and c.partition_weight_shape[0] % c.group_size:
            return False, f"{c.partition_weight_shape[0]} inputs in groups of {c.group_size}"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        words, scale, zero = self._get_weight_params(layer)
        self.num_bits: int = self.config.weight_type.size_bits
        inputs, self.out_features = self.config.partition_weight_shape
        self.group_size = self.config.group_size
        # GPTQ holds all three as [inputs, outputs], compressed-tensors as [outputs, inputs].
        codes = words.data.t() if words.input_dim == 0 else words.data
        scales = scale.data.t() if getattr(scale, "output_dim", 0) == 1 else scale.data
        layer.quantkit_zero_point = None
        if self.config.zero_points:
            assert zero is not None and self.w_zp_name is not None
            stored = zero.data if getattr(zero, "output_dim", 0) == 1 else zero.data.t()
            points = ops.unpack_int32(stored.contiguous(), self.num_bits, self.out_features).t().contiguous()
            layer.quantkit_zero_point = torch.nn.Parameter(points, requires_grad=False)
        if self.w_zp_name is not None and zero is not None:
            _keep(layer, self.w_zp_name, None)
        _keep(layer, self.w_q_name, ops.pack_wna16(codes.contiguous(), self.num_bits, inputs))
        _keep(layer, self.w_s_name, scales.reshape(self.out_features, -1).contiguous())

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = ops.wna16_gemm(
            _rows(x),
            getattr(layer, self.w_q_name),
            getattr(layer, self.w_s_name),
            self.num_bits,
            self.out_features,
            self.group_size,
            weight_zero_point=layer.quantkit_zero_point,
            bias=bias,
        )
        return out.reshape(*x.shape[:-1], self.out_features)
