"""compressed-tensors: which tensors a quantized Linear becomes, and the block that config.json gets.

Names, shapes and dtypes are those that vLLM, SGLang and Transformers read (int-quantized, float-quantized,
naive-quantized, pack-quantized, mxfp8-quantized, mxfp4-pack-quantized, nvfp4-pack-quantized). Scales of int8 and FP8
codes are fp32; those of packed integers have the model's dtype, because readers hold them in it. A tensor-wide scale
has shape [1], a per-channel one [rows, 1]. FP4 codes lie two in a byte, the even column in the lower nibble; scales of
MX are exponents + 127 in a byte, those of NVFP4 e4m3, divided by `weight_global_scale` fp32 [1].
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.layout import OutputTensor
from ..config.schemes import ACTORDER_ALIASES, SCALE_DTYPES, QuantizationArgs, QuantizationScheme
from ..errors import CheckpointError, ConfigError, nearest
from .rows import RowTensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config.groups import SchemeGroup
    from ..quantized import QuantizedTensor
    from .cache import CacheShape
    from .folded import Folded

NAME = "compressed-tensors"
# The release of the library whose rules this file follows; readers only report it.
VERSION = "0.18.0"
# Whether config.json has the block, and whether input scales take in the weight and bias.
IN_CONFIG, FOLDS = "quantization_config", False
ZERO_POINT = "input_zero_point"  # the last name of a static input's
# What llm-compressor stores beside the scales of keys and values: zero points that are zeros, and queries' scales.
CACHE = ("k_scale", "v_scale", "k_zero_point", "v_zero_point", "q_scale", "q_zero_point")
PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("input_scale", "input_zero_point", "weight_global_scale", "input_global_scale"),
)
# Keys of the library's args that change nothing here, and the types of all others.
UNUSED = ("scale_dtype", "zp_dtype")
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("num_bits", "group_size"), int),
    **dict.fromkeys(("type", "strategy", "observer"), str),
    **{"symmetric": bool, "dynamic": (bool, str), "actorder": (str, bool), "observer_kwargs": Mapping},
}
# The top-level format where groups have different ones.
MIXED = "mixed-precision"
ON_DISK = (
    *("int-quantized", "float-quantized", "naive-quantized", "pack-quantized"),
    *("mxfp8-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"),
)


def format_of(scheme: QuantizationScheme) -> str:
    """The library's name for how this scheme's tensors lie on disk. A scheme that was read from a checkpoint is called
    by what that checkpoint says: llm-compressor stores int4 weights with int8 activations as int8.
    """
    if scheme.name in ON_DISK:
        return scheme.name
    if scheme.weights.scales == "nvfp4":
        return "nvfp4-pack-quantized"
    if scheme.weights.scales == "e8m0":
        return "mxfp4-pack-quantized" if scheme.weights.fp4 else "mxfp8-quantized"
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
    inputs = scheme.input_activations
    if inputs is not None and inputs.outlier_threshold is not None:
        raise ConfigError(
            f"scheme {scheme.name}: compressed-tensors does not tell which activations stay in 16 bit; use save_name "
            "'bitsandbytes', or W8A8"
        )
    if inputs is not None and inputs.scales != "float" and (inputs.scales, inputs.fp4) != (weights.scales, weights.fp4):
        raise ConfigError(
            f"scheme {scheme.name}: activations in MX or NVFP4 go with weights of the same kind; no server reads others"
        )
    if weights.actorder == "group" and (weights.strategy != "group" or not packs(scheme)):
        raise ConfigError(
            f"scheme {scheme.name}: actorder 'group' goes with packed integers per group; use actorder 'weight'"
        )
    if weights.type == "int" and weights.strategy not in ("channel", "group") and packs(scheme):
        raise ConfigError(
            f"scheme {scheme.name}: weight-only integers need strategy channel or group, not '{weights.strategy}'"
        )


def packs(scheme: QuantizationScheme) -> bool:
    """Whether several codes share a word: integers int32 ones, FP4 bytes."""
    return format_of(scheme).endswith("pack-quantized")


def scale_name(scheme: QuantizationScheme) -> str:
    """The last name of the tensor with a weight's scales."""
    return "weight_scale"


def stem(schemes: Iterable[QuantizationScheme]) -> str:
    """What the weight files are called."""
    return "model"


def scale_dtype(scheme: QuantizationScheme, model_dtype: str) -> str:
    """The dtype of `weight_scale` on disk, as a safetensors name; codes must be made with scales rounded to it."""
    if scheme.weights.scales != "float":
        return {"e8m0": "U8", "nvfp4": "F8_E4M3"}[scheme.weights.scales]
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
    if args.fp4:
        tensors.append(OutputTensor(f"{module}.weight_packed", "U8", (rows, cols // 2)))
        if args.scales == "nvfp4":
            tensors.append(OutputTensor(f"{module}.weight_global_scale", "F32", (1,)))
    elif packs(scheme):
        words = (cols * args.num_bits + 31) // 32
        tensors.append(OutputTensor(f"{module}.weight_packed", "I32", (rows, words)))
        tensors.append(OutputTensor(f"{module}.weight_shape", "I64", (2,)))
        if not args.symmetric:
            zero_rows = (rows * args.num_bits + 31) // 32
            tensors.append(OutputTensor(f"{module}.weight_zero_point", "I32", (zero_rows, *scale[1:])))
        if args.actorder == "group":
            tensors.append(OutputTensor(f"{module}.weight_g_idx", "I32", (cols,)))
    else:
        dtype = "F8_E4M3" if args.type == "float" else "I8"
        tensors.append(OutputTensor(f"{module}.weight", dtype, (rows, cols)))
    tensors.append(OutputTensor(f"{module}.weight_scale", scale_dtype(scheme, model_dtype), scale))
    activations = scheme.input_activations
    if activations is not None and activations.dynamic == "local":
        tensors.append(OutputTensor(f"{module}.input_global_scale", "F32", (1,)))
    elif activations is not None and not activations.dynamic:
        tensors.append(OutputTensor(f"{module}.input_scale", "F32", (1,)))
        if not activations.symmetric:
            tensors.append(OutputTensor(f"{module}.input_zero_point", "I8", (1,)))
    return tensors


def row_tensors(module: str, scheme: QuantizationScheme, rows: int, cols: int) -> RowTensors | None:
    """Of `stored_tensors` those that a weight in 8-bit codes or packed integers becomes, with scales of any value."""
    args, packed = scheme.weights, packs(scheme)
    if args.scales != "float" or args.actorder is not None or not (packed or args.symmetric):
        return None
    return RowTensors(
        f"{module}.weight_packed" if packed else f"{module}.weight",
        f"{module}.weight_scale",
        None if args.symmetric else f"{module}.weight_zero_point",
        {f"{module}.weight_shape": struct.pack("<qq", rows, cols)} if packed else {},
    )


def kv_tensors(attention: str, args: QuantizationArgs, shape: CacheShape) -> list[OutputTensor]:
    """What the scales of the keys and values that the module `attention` caches become on disk. ConfigError for scales
    per channel.
    """
    if args.strategy == "channel":
        raise ConfigError(
            "kv_cache_scheme: scales per channel are read on NPUs only; use save_name 'mindie', or strategy tensor or "
            "attn_head (in YAML per-tensor or per-head)"
        )
    stored = (shape.heads, 1, 1) if args.strategy == "attn_head" else (1,)
    return [OutputTensor(f"{attention}.{part}", "F32", stored) for part in CACHE[:2]]


def kv_scales(attention: str, k_scale: Tensor, v_scale: Tensor, shape: CacheShape) -> dict[str, Tensor]:
    """The named tensors of `kv_tensors`; the scales are fp32 [1], or [heads] per head."""
    scales = {f"{attention}.k_scale": k_scale, f"{attention}.v_scale": v_scale}
    return {name: s.reshape(1) if s.numel() == 1 else s.reshape(-1, 1, 1) for name, s in scales.items()}


def pack_weight(module: str, quantized: QuantizedTensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The named tensors of `stored_tensors` that come from the weight; the scale is exact in `scale_dtype`."""
    import torch

    from .. import ops

    args = quantized.args
    if args.scales != "float":
        return _pack_micro(module, quantized)
    scale = quantized.scale.to(scale_dtype)
    tensors = {f"{module}.weight_scale": scale.reshape(1) if args.strategy == "tensor" else scale}
    if not quantized.packed:
        return {f"{module}.weight": quantized.codes, **tensors}
    tensors[f"{module}.weight_packed"] = quantized.codes
    tensors[f"{module}.weight_shape"] = torch.tensor([quantized.rows, quantized.cols], dtype=torch.int64)
    if args.actorder == "group":
        natural = torch.arange(quantized.cols, dtype=torch.int32) // (args.group_size or 1)
        tensors[f"{module}.weight_g_idx"] = natural if quantized.g_idx is None else quantized.g_idx
    if quantized.zero_point is not None:
        tensors[f"{module}.weight_zero_point"] = ops.pack_zero_points(quantized.zero_point, args.num_bits)
    return tensors


def _pack_micro(module: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """`pack_weight` of MX and NVFP4."""
    from .. import ops

    codes = "weight_packed" if quantized.args.fp4 else "weight"
    if quantized.global_scale is None:
        return {f"{module}.{codes}": quantized.codes, f"{module}.weight_scale": ops.e8m0_encode(quantized.scale)}
    return {
        f"{module}.{codes}": quantized.codes,
        f"{module}.weight_scale": ops.nvfp4_local(quantized.scale, quantized.global_scale),
        f"{module}.weight_global_scale": quantized.global_scale.reshape(1),
    }


def pack_activations(
    module: str,
    scale: Tensor,
    zero_point: Tensor | None,
    folded: Folded | None = None,
    args: QuantizationArgs | None = None,
) -> dict[str, Tensor]:
    """The named tensors of a static input quantization: fp32 scale and int8 zero point, both of shape [1]. Of NVFP4
    (`args`) the scale is the global one.
    """
    if args is not None and args.dynamic == "local":
        return {f"{module}.input_global_scale": scale.reshape(1)}
    tensors = {f"{module}.input_scale": scale.reshape(1)}
    if zero_point is not None:
        tensors[f"{module}.input_zero_point"] = zero_point.reshape(1)
    return tensors


def config_block(
    groups: Sequence[SchemeGroup],
    ignore: Sequence[str],
    user_ignore: Sequence[str],
    kv_cache: QuantizationArgs | None = None,
) -> dict[str, Any]:
    """`quantization_config` for config.json: `groups` have targets as servers match them. `ignore`
    holds the full names of every Linear that is not quantized; `user_ignore` is what the user wrote, kept under
    `ignored_layers` for tools that show it.
    """
    formats = list(dict.fromkeys(format_of(group.scheme) for group in groups))
    return {
        "config_groups": {
            f"group_{i}": {
                "format": format_of(group.scheme),
                "input_activations": entry(group.scheme.input_activations) if group.scheme.input_activations else None,
                "output_activations": None,
                "targets": list(group.targets),
                "weights": entry(group.scheme.weights),
            }
            for i, group in enumerate(groups)
        },
        "format": formats[0] if len(formats) == 1 else (MIXED if formats else "dense"),
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "ignored_layers": list(user_ignore),
        "kv_cache_scheme": None if kv_cache is None else entry(kv_cache),
        "quant_method": NAME,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def entry(args: QuantizationArgs) -> dict[str, Any]:
    """The args object of config.json. scale_dtype only where it tells MX and NVFP4, since older vLLM refuses the key;
    never zp_dtype. Readers clear the observer of dynamic activations.
    """
    told = SCALE_DTYPES[args.scales]
    return {
        "block_structure": list(args.block_structure) if args.block_structure else None,
        "dynamic": args.dynamic,
        "group_size": args.group_size,
        "num_bits": args.num_bits,
        "observer": "memoryless" if args.dynamic is True else args.observer,
        "observer_kwargs": {},
        "strategy": args.strategy,
        "symmetric": args.symmetric,
        "type": args.type,
        **({"actorder": args.actorder} if args.actorder == "group" else {}),
        **({"scale_dtype": told} if told else {}),
    }


def side_files(
    block: Mapping[str, Any], tensors: Iterable[str], schemes: Mapping[str, QuantizationScheme]
) -> dict[str, bytes]:
    """What the format wants beside config.json: nothing."""
    return {}


def read_schemes(block: Mapping[str, Any]) -> Schemes:
    """The scheme of each module, by the `quantization_config` as this file writes it."""
    groups = []
    entries = block.get("config_groups") or {}
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"quantization_config: config_groups is {entries!r}; it maps names to groups")
    for key, group in entries.items():
        if not isinstance(group, Mapping):
            raise CheckpointError(f"quantization_config: config_groups.{key} is {group!r}; it has weights and targets")
        if of_attention(group):
            continue
        weights = _args(f"config_groups.{key}.weights", group.get("weights"))
        if weights is None:
            raise CheckpointError(f"quantization_config: config_groups.{key} has no weights")
        inputs = _args(f"config_groups.{key}.input_activations", group.get("input_activations"))
        name = str(group.get("format") or block.get("format"))
        try:
            scheme = QuantizationScheme(name, weights, inputs)
        except ConfigError as error:
            raise CheckpointError(f"quantization_config: config_groups.{key}: {error}") from None
        groups.append((scheme, names_of(f"config_groups.{key}.targets", group.get("targets"))))
    return Schemes(groups, names_of("ignore", block.get("ignore")), "ignore")


def names_of(key: str, value: Any) -> list[str]:
    """A block's list of names and patterns, which may be None."""
    if not isinstance(value or [], list) or not all(isinstance(name, str) for name in value or []):
        raise CheckpointError(f"quantization_config: {key} is {value!r}; it is a list of names and patterns")
    return list(value or [])


def read_kv_cache(block: Mapping[str, Any]) -> QuantizationArgs | None:
    """How the block says that keys and values are cached, None for 16 bit. A group for attention says it, too."""
    found = _args("kv_cache_scheme", block.get("kv_cache_scheme"))
    return read_attention(block) if found is None else found


def read_attention(block: Mapping[str, Any]) -> QuantizationArgs | None:
    """How queries are quantized before attention, by a group that has no weights; None if they are not."""
    entries = block.get("config_groups")
    groups = {k: g for k, g in entries.items() if of_attention(g)} if isinstance(entries, Mapping) else {}
    found = {key: _args(f"config_groups.{key}.input_activations", g["input_activations"]) for key, g in groups.items()}
    if len(set(found.values())) > 1:
        raise CheckpointError(f"quantization_config: config_groups {', '.join(found)} quantize attention differently")
    return next(iter(found.values()), None)


def of_attention(group: Any) -> bool:
    """Whether a config group is for queries, keys and values: no weights, and classes of attention as targets."""
    if not isinstance(group, Mapping) or group.get("weights") is not None or not group.get("input_activations"):
        return False
    targets = group.get("targets") or ()
    return bool(targets) and all(str(target).endswith("Attention") for target in targets)


def _args(key: str, entry: Mapping[str, Any] | None) -> QuantizationArgs | None:
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"quantization_config: {key} is {entry!r}; it has num_bits, type, strategy and the like")
    fields = QuantizationArgs.__dataclass_fields__
    for name, value in entry.items():
        if name not in fields and name not in UNUSED:
            raise CheckpointError(
                f"quantization_config: {key} has a key '{name}'{nearest(name, fields)}, unknown to readers"
            )
        if value is not None and not isinstance(value, KINDS.get(name, object)):
            raise CheckpointError(f"quantization_config: {key}.{name} is {value!r}, of another type than it has")
    known = {k: v for k, v in entry.items() if k in fields and v is not None}
    if "block_structure" in known:
        known["block_structure"] = _block_structure(key, known["block_structure"])
    if known.get("group_size") == -1 and known.get("strategy") == "channel":
        known.pop("group_size")  # the library's other word for it
    if known.get("dynamic") is True:
        known.pop("observer", None)
    if "actorder" in known:
        known["actorder"] = ACTORDER_ALIASES.get(known["actorder"], known["actorder"])
    try:
        args = QuantizationArgs(**known)
    except ConfigError as error:
        raise CheckpointError(f"quantization_config: {key}: {error}") from None
    has, told = SCALE_DTYPES[args.scales], entry.get("scale_dtype")
    # FP8 in groups of 32 is MX only if it says so; FP4 always was what it is.
    if has is not None and (told != has if args.num_bits == 8 else told not in (None, has)):
        raise CheckpointError(
            f"quantization_config: {key}.scale_dtype is {told!r}; read are groups of {args.group_size} with {has!r}"
        )
    return args


def _block_structure(key: str, value: Any) -> tuple[int, int]:
    """[128, 128], or "128x128" as older releases have it."""
    parts = [int(part) if part.isdecimal() else 0 for part in value.split("x")] if isinstance(value, str) else value
    if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(n, int) and n > 0 for n in parts)):
        raise CheckpointError(f"quantization_config: {key}.block_structure is {value!r}; it is [rows, columns]")
    return (parts[0], parts[1])


class Schemes:
    """The scheme of a module by its name, as servers find it: full names go before patterns, those before the class.
    `ignored`: names and patterns of what is not quantized, by the key `where`.
    """

    def __init__(
        self,
        groups: Sequence[tuple[QuantizationScheme, Sequence[str]]],
        ignored: Sequence[str] = (),
        where: str = "",
    ) -> None:
        self.schemes = tuple(scheme for scheme, _ in groups)
        self.names = {target: scheme for scheme, targets in groups for target in targets}
        self.patterns = [(_pattern(t), scheme) for t, scheme in self.names.items() if t.startswith("re:")]
        self.where, self.ignored = where, frozenset(ignored)
        self.ignored_patterns = [_pattern(t) for t in ignored if t.startswith("re:")]

    def __call__(self, module: str) -> QuantizationScheme:
        """CheckpointError if no group takes `module`, or it is said not to be quantized."""
        if module in self.ignored or any(pattern.match(module) for pattern in self.ignored_patterns):
            raise CheckpointError(
                f"quantization_config: {module} has quantized tensors, and {self.where} names it as not quantized"
            )
        if module in self.names:
            return self.names[module]
        for pattern, scheme in self.patterns:
            if pattern.match(module):
                return scheme
        if "Linear" in self.names:
            return self.names["Linear"]
        raise CheckpointError(
            f"quantization_config: {module} has quantized tensors, and no config group's targets match it"
        )


def _pattern(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise CheckpointError(f"quantization_config: '{target}' is no pattern: {error}") from None


def quantized_modules(tensors: Iterable[str]) -> list[str]:
    """The modules of a checkpoint that carry codes, by their `weight_scale`."""
    suffix = ".weight_scale"
    return [name[: -len(suffix)] for name in tensors if name.endswith(suffix)]


def shape(module: str, scheme: QuantizationScheme, get: Any) -> tuple[int, int]:
    """[rows, cols] of the weight behind `module`'s tensors."""
    if scheme.weights.fp4:
        rows, half = get(f"{module}.weight_packed").shape
        cols = 2 * half
    elif packs(scheme):
        rows, cols = get(f"{module}.weight_shape").tolist()
    else:
        rows, cols = get(f"{module}.weight").shape
    return int(rows), int(cols)


def load_scale(module: str, scheme: QuantizationScheme, get: Any) -> Tensor:
    """The weight's scales, fp32 [grid rows, grid cols]."""
    import torch

    from .. import ops

    args, stored = scheme.weights, get(f"{module}.weight_scale")
    if args.scales == "e8m0":
        return ops.e8m0_decode(stored)
    scale: Tensor = stored.to(torch.float32)
    if args.scales == "nvfp4":
        return scale / get(f"{module}.weight_global_scale").float().reshape(1)
    return scale.reshape(1, 1) if args.strategy == "tensor" else scale


def load_zero_point(module: str, scheme: QuantizationScheme, get: Any, rows: int) -> Tensor | None:
    """The weight's zero points, int8 as its scales; None for symmetric ones."""
    from .. import ops

    if scheme.weights.symmetric:
        return None
    return ops.unpack_zero_points(get(f"{module}.weight_zero_point"), scheme.weights.num_bits, rows)


def load_weight(module: str, scheme: QuantizationScheme, get: Any, rows: int, cols: int) -> QuantizedTensor:
    """The inverse of `pack_weight`: read `module`'s tensors through `get(name)`."""
    from ..quantized import QuantizedTensor

    args = scheme.weights
    packed = packs(scheme)
    codes, scale = get(f"{module}.weight_packed" if packed else f"{module}.weight"), load_scale(module, scheme, get)
    if args.scales != "float":
        divisor = get(f"{module}.weight_global_scale").float().reshape(1) if args.scales == "nvfp4" else None
        return QuantizedTensor(codes, scale, None, args, rows, cols, packed, global_scale=divisor)
    zero_point = load_zero_point(module, scheme, get, rows)
    g_idx = get(f"{module}.weight_g_idx") if packed and args.actorder == "group" else None
    return QuantizedTensor(codes, scale, zero_point, args, rows, cols, packed, g_idx)
