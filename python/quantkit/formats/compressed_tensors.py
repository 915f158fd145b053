"""compressed-tensors: which tensors a quantized Linear becomes, and the block that config.json gets.

Names, shapes and dtypes are those that vLLM, SGLang and Transformers read (int-quantized, float-quantized,
naive-quantized, pack-quantized). Scales of int8 and FP8 codes are fp32; those of packed integers have the model's
dtype, because readers hold them in it. A tensor-wide scale has shape [1], a per-channel one [rows, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.layout import OutputTensor
from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..quantized import QuantizedTensor

NAME = "compressed-tensors"
# The release of the library whose rules this file follows; readers only report it.
VERSION = "0.18.0"


def format_of(scheme: QuantizationScheme) -> str:
    """The library's name for how this scheme's tensors lie on disk."""
    if scheme.weights.type == "float":
        return "float-quantized" if scheme.input_activations else "naive-quantized"
    if scheme.input_activations is None or scheme.weights.num_bits == 4:
        return "pack-quantized"
    return "int-quantized"


def check(scheme: QuantizationScheme) -> None:
    """ConfigError if the format, or every server that reads it, cannot hold the scheme."""
    weights = scheme.weights
    if weights.type == "int" and not weights.symmetric and scheme.input_activations is not None:
        raise ConfigError(
            f"scheme {scheme.name}: asymmetric integer weights together with quantized activations are read by no "
            "server; make the weights symmetric, or keep the activations in 16 bit"
        )
    if weights.type == "int" and weights.strategy not in ("channel", "group") and packs(scheme):
        raise ConfigError(
            f"scheme {scheme.name}: weight-only integers need strategy channel or group, not '{weights.strategy}'"
        )


def packs(scheme: QuantizationScheme) -> bool:
    """Whether integer codes go into int32 words."""
    return format_of(scheme) == "pack-quantized"


def scale_dtype(scheme: QuantizationScheme, model_dtype: str) -> str:
    """The dtype of `weight_scale` on disk, as a safetensors name; codes must be made with scales rounded to it."""
    return model_dtype if packs(scheme) else "F32"


def _scale_shape(args: QuantizationArgs, rows: int, cols: int) -> tuple[int, ...]:
    if args.strategy == "tensor":
        return (1,)
    block_rows, block_cols = args.block
    return (-(-rows // block_rows), 1 if block_cols == -1 else -(-cols // block_cols))


def stored_tensors(
    module: str, scheme: QuantizationScheme, rows: int, cols: int, model_dtype: str
) -> list[OutputTensor]:
    """What `module`'s weight becomes on disk, bias aside. `model_dtype` is the source weight's safetensors dtype."""
    args, tensors = scheme.weights, []
    scale = _scale_shape(args, rows, cols)
    if packs(scheme):
        words = (cols * args.num_bits + 31) // 32
        tensors.append(OutputTensor(f"{module}.weight_packed", "I32", (rows, words)))
        tensors.append(OutputTensor(f"{module}.weight_shape", "I64", (2,)))
        if not args.symmetric:
            zero_rows = (rows * args.num_bits + 31) // 32
            tensors.append(OutputTensor(f"{module}.weight_zero_point", "I32", (zero_rows, *scale[1:])))
    else:
        dtype = "F8_E4M3" if args.type == "float" else "I8"
        tensors.append(OutputTensor(f"{module}.weight", dtype, (rows, cols)))
    tensors.append(OutputTensor(f"{module}.weight_scale", scale_dtype(scheme, model_dtype), scale))
    activations = scheme.input_activations
    if activations is not None and not activations.dynamic:
        tensors.append(OutputTensor(f"{module}.input_scale", "F32", (1,)))
        if not activations.symmetric:
            tensors.append(OutputTensor(f"{module}.input_zero_point", "I8", (1,)))
    return tensors


def pack_weight(module: str, quantized: QuantizedTensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The named tensors of `stored_tensors` that come from the weight; the scale is exact in `scale_dtype`."""
    import torch

    from .. import ops

    args = quantized.args
    scale = quantized.scale.to(scale_dtype)
    tensors = {f"{module}.weight_scale": scale.reshape(1) if args.strategy == "tensor" else scale}
    if not quantized.packed:
        return {f"{module}.weight": quantized.codes, **tensors}
    tensors[f"{module}.weight_packed"] = quantized.codes
    tensors[f"{module}.weight_shape"] = torch.tensor([quantized.rows, quantized.cols], dtype=torch.int64)
    if quantized.zero_point is not None:
        tensors[f"{module}.weight_zero_point"] = ops.pack_zero_points(quantized.zero_point, args.num_bits)
    return tensors


def pack_activations(module: str, scale: Tensor, zero_point: Tensor | None) -> dict[str, Tensor]:
    """The named tensors of a static input quantization: fp32 scale and int8 zero point, both of shape [1]."""
    tensors = {f"{module}.input_scale": scale.reshape(1)}
    if zero_point is not None:
        tensors[f"{module}.input_zero_point"] = zero_point.reshape(1)
    return tensors


def config_block(scheme: QuantizationScheme, ignore: Sequence[str], user_ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` for config.json. `ignore` holds the full names of every Linear that is not quantized;
    `user_ignore` is what the user wrote, kept under `ignored_layers` for tools that show it.
    """
    name = format_of(scheme)
    activations = scheme.input_activations
    return {
        "config_groups": {
            "group_0": {
                "format": name,
                "input_activations": _entry(activations) if activations else None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": _entry(scheme.weights),
            }
        },
        "format": name,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "ignored_layers": list(user_ignore),
        "kv_cache_scheme": None,
        "quant_method": NAME,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _entry(args: QuantizationArgs) -> dict[str, Any]:
    """The args object of config.json. Never scale_dtype or zp_dtype, which older vLLM refuses. Readers clear the
    observer of dynamic activations.
    """
    return {
        "block_structure": list(args.block_structure) if args.block_structure else None,
        "dynamic": args.dynamic,
        "group_size": args.group_size,
        "num_bits": args.num_bits,
        "observer": "memoryless" if args.dynamic else args.observer,
        "observer_kwargs": {},
        "strategy": args.strategy,
        "symmetric": args.symmetric,
        "type": args.type,
        **({"actorder": args.actorder} if args.actorder == "group" else {}),
    }


def read_scheme(block: Mapping[str, Any]) -> QuantizationScheme:
    """The scheme in a `quantization_config` with one group, as this file writes it."""
    groups = block.get("config_groups") or {}
    if len(groups) != 1:
        raise CheckpointError(f"quantization_config: {len(groups)} config_groups; quantkit reads checkpoints with one")
    group = next(iter(groups.values()))
    fields = QuantizationArgs.__dataclass_fields__

    def args(entry: Mapping[str, Any] | None) -> QuantizationArgs | None:
        if entry is None:
            return None
        known = {k: v for k, v in entry.items() if k in fields and v is not None}
        if "block_structure" in known:
            known["block_structure"] = tuple(known["block_structure"])
        if known.get("dynamic"):
            known.pop("observer", None)
        return QuantizationArgs(**known)

    weights = args(group.get("weights"))
    if weights is None:
        raise CheckpointError("quantization_config: the config group has no weights")
    return QuantizationScheme(str(block.get("format")), weights, args(group.get("input_activations")))


def quantized_modules(tensors: Iterable[str]) -> list[str]:
    """The modules of a checkpoint that carry codes, by their `weight_scale`."""
    suffix = ".weight_scale"
    return [name[: -len(suffix)] for name in tensors if name.endswith(suffix)]


def load_weight(module: str, scheme: QuantizationScheme, get: Any, rows: int, cols: int) -> QuantizedTensor:
    """The inverse of `pack_weight`: read `module`'s tensors through `get(name)`."""
    import torch

    from .. import ops
    from ..quantized import QuantizedTensor

    args = scheme.weights
    packed = packs(scheme)
    codes = get(f"{module}.weight_packed" if packed else f"{module}.weight")
    scale = get(f"{module}.weight_scale").to(torch.float32)
    scale = scale.reshape(1, 1) if args.strategy == "tensor" else scale
    zero_point = None
    if not args.symmetric:
        zero_point = ops.unpack_zero_points(get(f"{module}.weight_zero_point"), args.num_bits, rows)
    return QuantizedTensor(codes, scale, zero_point, args, rows, cols, packed)
