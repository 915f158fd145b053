"""A Linear whose weight is codes in a kernel's layout: `QuantLinear`, and one small class for each kind of weight.

The weight is packed once, when the module is made, from what a checkpoint holds (`QuantizedTensor`); no full-precision
copy exists at any time. Which kind runs which scheme is a table (`kind_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..formats.source import fake_quantize
from ..formats.stored import describe, describe_scheme
from ..quantized import QuantizedTensor

DEVICES = ("cpu",)


@dataclass(frozen=True)
class Parts:
    """What a QuantLinear is made from: the weight's codes, and the input's quantization: `inputs` None for 16 bit;
    `input_scale` fp32 [1] and `input_zero_point` int8 [1] where it is static (NVFP4's `input_scale` is the global one).
    `bias` [rows] or None.
    """

    weight: QuantizedTensor
    inputs: QuantizationArgs | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    bias: Tensor | None = None


class QuantLinear(nn.Module):
    """y = x W^T + bias with a quantized W. x [..., in_features] in fp32, fp16 or bf16 gives [..., out_features] in x's
    dtype; scales are fp32 whatever the model's dtype is.

    `args` and `inputs` say how weight and input are quantized (None: in 16 bit).
    """

    def __init__(self, weight: QuantizedTensor, inputs: QuantizationArgs | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.cols, weight.rows
        self.args, self.inputs = weight.args, inputs
        self.register_parameter("bias", None)
        # Where the checkpoint's own tensors of this Linear are; None for one that was quantized in memory.
        self.stored: Callable[[], dict[str, Tensor]] | None = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """`state_dict` has what the checkpoint holds: a kernel's layout is nobody else's."""
        if self.stored is None:
            raise RuntimeError(
                f"state_dict: {prefix[:-1]} was quantized in memory (quantkit.swap_linears), and packed weights have "
                "no form to be saved in; to save a quantized model, make it with quantkit.oneshot"
            )
        for name, tensor in self.stored().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"load_state_dict: {prefix[:-1]} is packed for its kernel when it is made and takes no other weights; "
            "load a checkpoint with quantkit.load"
        )

    def extra_repr(self) -> str:
        inputs = "16 bit" if self.inputs is None else describe(self.inputs)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weights={describe(self.args)}, inputs={inputs}"
        )


class PackedLinear(QuantLinear):
    """A QuantLinear with a weight of its own. Buffers are `packed` (a private layout), `weight_scale`, and what else
    the kind needs; none is in `state_dict`.
    """

    packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    # Of several Linears, which are in `state_dict` each on its own.
    part_of_others = False

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.weight, parts.inputs)
        if parts.bias is not None:
            self.bias = nn.Parameter(parts.bias, requires_grad=False)
        self._hold("input_scale", None if parts.input_scale is None else parts.input_scale.float().reshape(1))
        self._hold("input_zero_point", None if parts.input_zero_point is None else parts.input_zero_point.reshape(1))
        self._pack(parts.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.part_of_others:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        """A buffer of this module's own memory."""
        self.register_buffer(name, None if tensor is None else tensor.clone().contiguous(), persistent=False)

    def _pack(self, weight: QuantizedTensor) -> None:
        raise NotImplementedError

    def _multiply(self, x: Tensor) -> Tensor:
        """x [rows, in_features] -> [rows, out_features]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return self._multiply(x)
        return self._multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """`to`, `half`, `bfloat16`: the bias alone changes its dtype. Refused: a device that has no kernels."""
        refuse_device(fn)
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self


class Int8Linear(PackedLinear):
    """int8 weights per channel or tensor, int8 activations per token (computed) or tensor (static)."""

    def _pack(self, weight: QuantizedTensor) -> None:
        self.register_buffer("packed", ops.pack_w8a8(weight.unpacked()), persistent=False)
        self._hold("weight_scale", weight.scale.float().reshape(-1))

    def _multiply(self, x: Tensor) -> Tensor:
        assert self.inputs is not None
        return ops.w8a8_gemm(
            x,
            self.packed,
            self.weight_scale,
            self.out_features,
            input_scale=self.input_scale,
            input_zero_point=self.input_zero_point,
            symmetric=self.inputs.symmetric,
            bias=self.bias,
        )


class Int8MixedLinear(Int8Linear):
    """LLM.int8(): int8 weights per channel, int8 activations per token but for columns with outliers."""

    def _multiply(self, x: Tensor) -> Tensor:
        assert self.inputs is not None and self.inputs.outlier_threshold is not None
        return ops.int8_mixed_gemm(
            x,
            self.packed,
            self.weight_scale,
            self.out_features,
            threshold=self.inputs.outlier_threshold,
            bias=self.bias,
        )


class Int4Int8Linear(PackedLinear):
    """int4 weights per group or channel, int8 activations per token."""

    def _pack(self, weight: QuantizedTensor) -> None:
        self.group_size = weight.args.group_size or -1
        self.register_buffer("packed", ops.pack_w4a8(_words(weight), weight.cols), persistent=False)
        self._hold("weight_scale", ops.pack_w4a8_scales(_as_stored(weight.scale)))
        zero_point = weight.zero_point
        self._hold("weight_zero_point", None if zero_point is None else ops.pack_w4a8_scales(zero_point))

    def _multiply(self, x: Tensor) -> Tensor:
        return ops.w4a8_gemm(
            x,
            self.packed,
            self.weight_scale,
            self.out_features,
            self.group_size,
            weight_zero_point=self.weight_zero_point,
            bias=self.bias,
        )


class IntLinear(PackedLinear):
    """int4 or int8 weights per group or channel, multiplied by 16-bit activations.

    Activations of a scheme that no integer kernel takes are rounded first to what their codes can hold.
    """

    perm: Tensor | None

    def _pack(self, weight: QuantizedTensor) -> None:
        args = weight.args
        self.num_bits, self.group_size = args.num_bits, args.group_size or -1
        perm = column_order(weight)
        packed = ops.pack_wna16(_words(weight), args.num_bits, weight.cols, perm=perm)
        self.register_buffer("packed", packed, persistent=False)
        for name, values in (("weight_scale", _as_stored(weight.scale)), ("weight_zero_point", weight.zero_point)):
            self._hold(name, None if values is None else ops.pack_wna16_scales(values.expand(weight.rows, -1)))
        self._hold("perm", perm)

    def _multiply(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            scale, zero_point = self.input_scale, self.input_zero_point
            x = fake_quantize(
                x,
                self.inputs,
                None if scale is None else scale.reshape(1, 1),
                None if zero_point is None else zero_point.reshape(1, 1),
            )
        return ops.wna16_gemm(
            x,
            self.packed,
            self.weight_scale,
            self.num_bits,
            self.out_features,
            self.group_size,
            weight_zero_point=self.weight_zero_point,
            perm=self.perm,
            bias=self.bias,
        )


class FP8Linear(PackedLinear):
    """e4m3 weights per tensor, channel or block; activations in 16 bit or e4m3. FP4 values are e4m3's too, and take as
    much memory here.
    """

    def _pack(self, weight: QuantizedTensor) -> None:
        self.weight_block = list(weight.args.block)
        self.register_buffer("packed", ops.pack_fp8(weight.unpacked()), persistent=False)
        self._hold("weight_scale", weight.scale.float())
        self.input_block = None if self.inputs is None else list(self.inputs.block)

    def _multiply(self, x: Tensor) -> Tensor:
        return ops.fp8_gemm(
            x,
            self.packed,
            self.weight_scale,
            self.weight_block,
            self.out_features,
            input_scale=self.input_scale,
            input_block=self.input_block,
            bias=self.bias,
        )


class MicroLinear(FP8Linear):
    """Weights in MX or NVFP4, activations rounded to what such codes hold and multiplied as they then are."""

    def _multiply(self, x: Tensor) -> Tensor:
        assert self.inputs is not None
        return ops.fp8_gemm(
            fake_quantize(x, self.inputs, self.input_scale),
            self.packed,
            self.weight_scale,
            self.weight_block,
            self.out_features,
            bias=self.bias,
        )


def refuse_device(fn: Any) -> None:
    """RuntimeError if `fn`, which a module is to put its tensors through, takes them to a device without kernels."""
    device = fn(torch.empty(0)).device.type
    if device not in DEVICES:
        raise RuntimeError(
            f"QuantLinear: its kernels run on {', '.join(DEVICES)}, not on {device}; leave the model where it is"
        )


def kind_of(scheme: QuantizationScheme) -> type[PackedLinear] | None:
    """The class that runs `scheme`, None if no kernel does."""
    weights, inputs = scheme.weights, scheme.input_activations
    if weights.type == "float":
        if inputs is not None and (inputs.scales != "float" or weights.scales != "float"):
            return MicroLinear
        exact = inputs is None or (inputs.type == "float" and inputs.group_size in (None, 128))
        return FP8Linear if exact else None
    per_row = weights.strategy in ("channel", "tensor")
    if inputs is not None and inputs.outlier_threshold is not None:
        fits = weights.num_bits == 8 and weights.symmetric and weights.strategy == "channel"
        return Int8MixedLinear if fits else None
    if inputs is None:
        return IntLinear if weights.strategy in ("channel", "group", "tensor") else None
    if inputs.type == "int" and inputs.num_bits == 8 and weights.actorder != "group":
        token = inputs.strategy == "token" and inputs.dynamic
        if weights.num_bits == 8 and weights.symmetric and per_row and (token or not inputs.dynamic):
            return Int8Linear
        if weights.num_bits == 4 and weights.strategy in ("channel", "group") and token and inputs.symmetric:
            return Int4Int8Linear
    return IntLinear if weights.strategy in ("channel", "group", "tensor") else None


def quant_linear(parts: Parts) -> PackedLinear:
    """The module for `parts`, packed; RuntimeError for a scheme without a kernel, which `load` refuses before."""
    scheme = QuantizationScheme("", parts.weight.args, parts.inputs)
    kind = kind_of(scheme)
    if kind is None:
        raise RuntimeError(f"no kernel runs {describe_scheme(scheme)}")
    return kind(parts)


def _as_stored(scale: Tensor) -> Tensor:
    """In 16 bit if the checkpoint has it so: of groups of 128, fp32 scales are a twentieth of what one token reads."""
    return scale if scale.dtype in (torch.bfloat16, torch.float16) else scale.float()


def _words(weight: QuantizedTensor) -> Tensor:
    return weight.codes if weight.packed else ops.pack_int32(weight.codes, weight.args.num_bits)


def column_order(weight: QuantizedTensor) -> Tensor | None:
    """int32 [cols]: the columns in the order that makes each group a run of neighbours; None if each is one."""
    if weight.g_idx is None or torch.equal(weight.g_idx.long(), weight.runs()):
        return None
    return torch.argsort(weight.g_idx.long(), stable=True).to(torch.int32)


def stacked(parts: Sequence[Parts]) -> Parts | None:
    """Linears that read one input as a single one, their outputs side by side; None where that is not the same."""
    first = parts[0]
    one = first.weight
    if any(p.weight.cols != one.cols or p.weight.packed != one.packed for p in parts):
        return None
    plain = [replace(p.weight.args, observer=None, observer_kwargs={}) for p in parts]
    inputs = [None if p.inputs is None else replace(p.inputs, observer=None, observer_kwargs={}) for p in parts]
    if any(a != plain[0] for a in plain) or any(i != inputs[0] for i in inputs):
        return None
    for name in ("input_scale", "input_zero_point"):
        values = [getattr(p, name) for p in parts]
        if values[0] is not None and not all(torch.equal(v, values[0]) for v in values):
            return None
    orders = [p.weight.g_idx for p in parts]
    if orders[0] is not None and not all(o is not None and torch.equal(o, orders[0]) for o in orders):
        return None
    args, scales = one.args, [p.weight.scale for p in parts]
    if args.strategy == "tensor":
        args = replace(args, strategy="channel")
        scales = [s.reshape(1, 1).expand(p.weight.rows, 1) for s, p in zip(scales, parts, strict=True)]
    elif args.strategy == "block" and any(p.weight.rows % args.block[0] for p in parts[:-1]):
        return None
    zeros = None if one.zero_point is None else torch.cat([p.weight.zero_point for p in parts])  # type: ignore[misc]
    codes = torch.cat([p.weight.codes for p in parts])
    rows = sum(p.weight.rows for p in parts)
    weight = QuantizedTensor(codes, torch.cat(scales), zeros, args, rows, one.cols, one.packed, one.g_idx)
    bias = None
    if any(p.bias is not None for p in parts):
        like = next(p.bias for p in parts if p.bias is not None)
        bias = torch.cat([like.new_zeros(p.weight.rows) if p.bias is None else p.bias for p in parts])
    return Parts(weight, first.inputs, first.input_scale, first.input_zero_point, bias)


class MergedPart(QuantLinear):
    """One of several Linears that read the same input and are computed together: the first call with an input
    multiplies for all, the others take their part of the result. The first one holds the weight of all as `whole`.
    """

    def __init__(self, parts: Parts, shared: _Shared, index: int) -> None:
        super().__init__(parts.weight, parts.inputs)
        self.index = index
        self.shared = shared
        if index == 0:
            self.whole = shared.whole

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.part(x, self.index)


class _Shared:
    """The weight of Linears that are computed together, and what the last input gave."""

    def __init__(self, whole: PackedLinear, sizes: list[int]) -> None:
        whole.part_of_others = True
        self.whole, self.sizes = whole, sizes
        # The input, each part's output, and which of them were taken already.
        self.last: tuple[Tensor, tuple[Tensor, ...], int] | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        last, bit = self.last, 1 << index
        if last is None or last[0] is not x or last[2] & bit:
            last = (x, self.whole(x).split(self.sizes, -1), 0)
        taken = last[2] | bit
        self.last = None if taken + 1 == 1 << len(self.sizes) else (*last[:2], taken)
        return last[1][index]


def merged(parts: Sequence[Parts]) -> list[MergedPart] | None:
    """Linears that read one input, computed together; None where there is one, or their schemes differ."""
    together = stacked(parts) if len(parts) > 1 else None
    if together is None:
        return None
    shared = _Shared(quant_linear(together), [p.weight.rows for p in parts])
    return [MergedPart(p, shared, i) for i, p in enumerate(parts)]
