"""A quantized checkpoint read as if it were a plain one: weights dequantized, activations and the KV cache quantized at
run time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..checkpoint.dtypes import torch_dtype
from ..checkpoint.reader import Checkpoint
from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import CheckpointError
from . import format_of_checkpoint
from .compressed_tensors import read_attention

if TYPE_CHECKING:
    from torch import Tensor

    from ..quantized import QuantizedTensor

Quantizer = Callable[["Tensor"], "Tensor"]


class WeightSource:
    """`get(name)` gives a tensor of the checkpoint by the name it has in a plain one; a quantized weight comes
    dequantized in fp32. `input_quantizers` maps a module to the function its inputs go through first, and
    `cache_quantizers` an attention module to those of its keys and values [rows, heads, tokens, head size], and
    `query_quantizers` to that of its queries.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.format = format_of_checkpoint(checkpoint.config)
        self.modules: set[str] = set()
        self.schemes: dict[str, QuantizationScheme] = {}
        self.input_quantizers: dict[str, Quantizer] = {}
        self.cache_quantizers: dict[str, tuple[Quantizer, Quantizer]] = {}
        self.query_quantizers: dict[str, Quantizer] = {}
        self.kv_cache: QuantizationArgs | None = None
        self.queries: QuantizationArgs | None = None
        if self.format is None:
            return
        self.kv_cache = self.format.read_kv_cache(checkpoint.config["quantization_config"])
        if self.kv_cache is not None and self.format.CACHE:
            keys, values = (f".{part}" for part in self.format.CACHE[:2])
            for name in checkpoint.tensors:
                attention = name.removesuffix(keys)
                if attention != name and f"{attention}{values}" in checkpoint.tensors:
                    self.cache_quantizers[attention] = self._cache_quantizers(attention, self.kv_cache)
        self.queries = read_attention(checkpoint.config["quantization_config"])
        if self.queries is not None:
            for attention in self.cache_quantizers:
                self.query_quantizers[attention] = cache_quantizer(self.queries, self.query_scale(attention))
        schemes = self.format.read_schemes(checkpoint.config["quantization_config"])
        self.schemes = {module: schemes(module) for module in self.format.quantized_modules(checkpoint.tensors)}
        self.modules = set(self.schemes)
        for module, scheme in self.schemes.items():
            if scheme.input_activations is not None:
                self.input_quantizers[module] = self._input_quantizer(module, scheme.input_activations)

    def module_of(self, name: str) -> str | None:
        """The quantized module whose weight `name` is in a plain checkpoint; None for whatever is not quantized."""
        module = name.removesuffix(".weight")
        return module if module != name and module in self.modules else None

    def names(self) -> set[str]:
        """The names that `get` knows: those of the plain checkpoint."""
        stored = {name for module in self.modules for name in self.stored(module)}
        stored |= {name for attention in self.cache_quantizers for name in self.cache_names(attention)}
        return (set(self.checkpoint.tensors) - stored) | {f"{module}.weight" for module in self.modules}

    def stored(self, module: str) -> list[str]:
        """Which tensors of the checkpoint are the quantized form of `module`'s weight and input."""
        parts = self.format.PARTS if self.format is not None else ()
        return [n for n in (f"{module}.{part}" for part in parts) if n in self.checkpoint.tensors]

    def cache_names(self, attention: str) -> list[str]:
        """The scales of the keys and of the values that `attention` caches, and what else of them there is."""
        parts = self.format.CACHE if self.format is not None else ()
        names = [f"{attention}.{part}" for part in parts]
        return names[:2] + [name for name in names[2:] if name in self.checkpoint.tensors]

    def cache_scales(self, attention: str) -> tuple[Tensor, Tensor]:
        """Of its keys and values: fp32 [1], [heads, 1, 1], or [channels of all heads]."""
        keys, values = (self.checkpoint.tensor(name).float().clone() for name in self.cache_names(attention)[:2])
        return keys, values

    def query_scale(self, attention: str) -> Tensor:
        """Of its queries: fp32 [1] or [heads, 1, 1]."""
        return self.checkpoint.tensor(f"{attention}.q_scale").float().clone()

    def prefetch(self, name: str) -> None:
        """Start reading from disk what `get(name)` needs; returns at once. Names that are not there are left to it."""
        module = self.module_of(name)
        for stored in [name] if module is None else self.stored(module):
            if stored in self.checkpoint.tensors:
                self.checkpoint.prefetch(stored)

    def release(self, name: str) -> None:
        """Let go of the pages behind `get(name)`."""
        module = self.module_of(name)
        for stored in [name] if module is None else self.stored(module):
            self.checkpoint.release(stored)

    def get(self, name: str) -> Tensor:
        module = self.module_of(name)
        return self.checkpoint.tensor(name) if module is None else self.sound(module).dequantize()

    def quantized(self, module: str, populate: bool = True) -> QuantizedTensor:
        """The codes and scales of `module`'s weight; `populate` as in `Checkpoint.tensor`."""
        if self.format is None:
            raise CheckpointError(f"{module}: {self.checkpoint.folder} is not quantized")
        get = partial(self.checkpoint.tensor, populate=populate)
        return self.format.load_weight(module, self.schemes[module], get, *self.shape(module, populate))

    def sound(self, module: str) -> QuantizedTensor:
        """`quantized`, its scales finite and its groups as they have to be; CheckpointError if they are not."""
        import torch

        weight = self.quantized(module)
        if not bool(weight.scale.isfinite().all()):
            raise CheckpointError(f"{self.checkpoint.folder}: tensor '{self.scale_name(module)}' has NaN or Inf in it")
        if weight.g_idx is not None and not torch.equal(weight.g_idx.long().sort().values, weight.runs()):
            raise CheckpointError(
                f"{self.checkpoint.folder}: {module}: its g_idx does not put {weight.args.group_size} of the "
                f"{weight.cols} columns into each group (into the last one what is left)"
            )
        return weight

    def scale(self, module: str) -> Tensor:
        """The scales of `module`'s weight, fp32 [grid rows, grid cols], without its codes."""
        if self.format is None:
            raise CheckpointError(f"{module}: {self.checkpoint.folder} is not quantized")
        return self.format.load_scale(module, self.schemes[module], self.checkpoint.tensor)

    def weight_zero_point(self, module: str) -> Tensor | None:
        """The zero points of `module`'s weight, int8 as its scales, without its codes; None for symmetric ones."""
        if self.format is None:
            raise CheckpointError(f"{module}: {self.checkpoint.folder} is not quantized")
        rows, _ = self.shape(module, populate=False)
        return self.format.load_zero_point(module, self.schemes[module], self.checkpoint.tensor, rows)

    def shape(self, module: str, populate: bool = True) -> tuple[int, int]:
        """[rows, cols] of `module`'s weight."""
        if self.format is None:
            raise CheckpointError(f"{module}: {self.checkpoint.folder} is not quantized")
        return self.format.shape(module, self.schemes[module], partial(self.checkpoint.tensor, populate=populate))

    def scale_dtype(self, module: str) -> str:
        """What `module`'s weight scale is stored in, as safetensors names it."""
        return self.checkpoint.info(self.scale_name(module)).dtype

    def scale_name(self, module: str) -> str:
        """The tensor with `module`'s weight scales."""
        if self.format is None:
            raise CheckpointError(f"{module}: {self.checkpoint.folder} is not quantized")
        return f"{module}.{self.format.scale_name(self.schemes[module])}"

    def _cache_quantizers(self, attention: str, args: QuantizationArgs) -> tuple[Quantizer, Quantizer]:
        scales = self.cache_scales(attention)
        if args.strategy != "channel":
            return cache_quantizer(args, scales[0]), cache_quantizer(args, scales[1])
        import torch

        from .mindie_cache import emulate

        # Read from MindIE's format, whose arithmetic is in the model's dtype.
        dtype = torch_dtype(self.checkpoint.model_dtype or "F32")
        offsets = [self.checkpoint.tensor(name).clone() for name in self.cache_names(attention)[2:]]
        offsets = offsets if len(offsets) == 2 else [torch.zeros(1), torch.zeros(1)]
        found = [
            partial(emulate, scale=scale.to(dtype), offset=offset)
            for scale, offset in zip(scales, offsets, strict=True)
        ]
        return found[0], found[1]

    def zero_point(self, module: str) -> Tensor:
        """That of `module`'s static asymmetric input: int8 [1, 1]."""
        if self.format is None:
            raise CheckpointError(f"{module}: {self.checkpoint.folder} is not quantized")
        import torch

        return self.checkpoint.tensor(f"{module}.{self.format.ZERO_POINT}").reshape(1, 1).to(torch.int8, copy=True)

    def _input_quantizer(self, module: str, args: QuantizationArgs) -> Quantizer:
        if args.dynamic is True:
            return lambda x: fake_quantize(x, args)
        if args.dynamic == "local":
            divisor = self.checkpoint.tensor(f"{module}.input_global_scale").float().reshape(1).clone()
            return lambda x: fake_quantize(x, args, divisor)
        scale = self.checkpoint.tensor(f"{module}.input_scale").float().reshape(1, 1).clone()
        zero_point = None
        if not args.symmetric:
            zero_point = self.zero_point(module)
        return lambda x: fake_quantize(x, args, scale, zero_point)


def cache_quantizer(args: QuantizationArgs, scale: Tensor) -> Quantizer:
    """What rounds keys or values [rows, heads, tokens, head size] to what an 8-bit cache holds. `scale`: fp32, one
    number, or one for each head with strategy "attn_head", or for each channel of all heads with "channel".
    """
    # A row of codes for each head or channel; scales of their own are what rows have in strategy "channel".
    rounded = replace(args, strategy="tensor" if args.strategy == "tensor" else "channel")
    scale = scale.reshape(-1, 1)
    order = (1, 3, 0, 2) if args.strategy == "channel" else (1, 0, 2, 3)
    back = sorted(range(4), key=order.__getitem__)

    def quantize(x: Tensor) -> Tensor:
        by_row = x.permute(order)
        rows = x.shape[1] * x.shape[3] if args.strategy == "channel" else x.shape[1]
        flat = by_row.reshape(rows, -1)
        return fake_quantize(flat, rounded, scale.to(x.device)).reshape(by_row.shape).permute(back)

    return quantize


def fake_quantize(
    x: Tensor, args: QuantizationArgs, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """x [..., channels] rounded to what its codes can hold, in x's dtype; scales from x itself unless given. Of NVFP4,
    `scale` is the global one. With an `outlier_threshold` the columns that reach it in any row stay as they are.
    """
    import torch

    from .. import ops
    from ..microscale import rounded

    rows = x.reshape(-1, x.shape[-1])
    if args.outlier_threshold is not None:
        kept = (rows.abs() >= args.outlier_threshold).any(0)
        inside = fake_quantize(rows.masked_fill(kept, 0), replace(args, outlier_threshold=None))
        return torch.where(kept, rows, inside).reshape(x.shape)
    if args.scales != "float":
        return rounded(rows, args, scale).reshape(x.shape)
    block = args.block
    if args.type == "float":
        fp8 = torch.float8_e4m3fn
        codes, scale = (
            ops.rtn_fp8(rows, block, fp8) if scale is None else (ops.quantize_fp8(rows, scale, block, fp8), scale)
        )
    else:
        q_min, q_max = args.q_range
        if scale is None:
            codes, scale, zero_point = ops.rtn_int(
                rows, block, q_min=q_min, q_max=q_max, symmetric=args.symmetric, divisor=args.divisor
            )
            zero_point = None if args.symmetric else zero_point
        else:
            codes = ops.quantize_int(rows, scale, zero_point, block, q_min, q_max)
    return ops.dequantize(codes, scale, zero_point, block, x.dtype).reshape(x.shape)
