"""GPTQ's format (quant_method "gptq"), as GPTQModel, vLLM, SGLang and llama.cpp read it: `save_name: gptq`.

Of a Linear [N, K] in b bits: `qweight` int32 [K*b/32, N], `qzeros` int32 [G, N*b/32], `scales` fp16 [G, N], `g_idx`
int32 [K]; codes are unsigned, element i of a word at bit i*b, weight = (q - z) * scale[g_idx[k]]. Version 1 (`gptq`)
stores z - 1, version 2 (`gptq_v2`) z. What is written is version 1, which every reader takes; asymmetric weights,
whose z may be 0 and does not fit it, are version 2. Source: GPTQModel's packing, and the loaders of vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoint.layout import OutputTensor
from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import CheckpointError, ConfigError
from . import compressed_tensors as ct
from .rows import no_rows
from .single import fp16, fp16_scales, no_cache, one_group, require_key, weight_only, with_qweight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config.groups import SchemeGroup
    from ..quantized import QuantizedTensor

NAME = "gptq"
VERSION = ""
# Whether config.json has the block, and whether input scales take in the weight and bias.
IN_CONFIG, FOLDS = "quantization_config", False
ZERO_POINT = "input_zero_point"  # the last name of a static input's
CACHE = ()
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def check(scheme: QuantizationScheme) -> None:
    """ConfigError unless the scheme is weight-only integers per group or channel."""
    weights = scheme.weights
    if weights.type != "int" or scheme.input_activations is not None or weights.strategy not in ("group", "channel"):
        raise ConfigError(
            f"save_name '{NAME}' holds weight-only integers per group or channel, not scheme {scheme.name}; "
            "use save_name 'compressed-tensors'"
        )


def packs(scheme: QuantizationScheme) -> bool:
    """Whether integer codes go into int32 words along the inputs."""
    return True


def _groups(args: QuantizationArgs, cols: int) -> int:
    return -(-cols // (args.group_size or cols))


def stored_tensors(
    module: str, scheme: QuantizationScheme, rows: int, cols: int, model_dtype: str
) -> list[OutputTensor]:
    """What `module`'s weight becomes on disk, bias aside. ConfigError if its sizes are no whole words."""
    args = scheme.weights
    each = 32 // args.num_bits
    if rows % each or cols % each:
        raise ConfigError(
            f"{module}: {rows} x {cols}; save_name '{NAME}' packs {each} codes a word along inputs and outputs; "
            "use save_name 'compressed-tensors', or ignore this layer"
        )
    groups = _groups(args, cols)
    return [
        OutputTensor(f"{module}.qweight", "I32", (cols // each, rows)),
        OutputTensor(f"{module}.qzeros", "I32", (groups, rows // each)),
        OutputTensor(f"{module}.scales", "F16", (groups, rows)),
        OutputTensor(f"{module}.g_idx", "I32", (cols,)),
    ]


def pack_weight(module: str, quantized: QuantizedTensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `stored_tensors`. The words of a row of codes are those of compressed-tensors, transposed."""
    import torch

    from .. import ops

    args = quantized.args
    words = quantized.codes if quantized.packed else ops.pack_int32(quantized.codes, args.num_bits)
    zeros = quantized.zero_point
    if zeros is None:  # version 1: one less than the middle
        zeros = torch.full(quantized.scale.shape, -1, dtype=torch.int8)
    g_idx = quantized.g_idx
    if g_idx is None:
        g_idx = torch.arange(quantized.cols, dtype=torch.int32) // (args.group_size or quantized.cols)
    return {
        f"{module}.qweight": words.t().contiguous(),
        f"{module}.qzeros": ops.pack_int32(zeros.t().contiguous(), args.num_bits),
        f"{module}.scales": quantized.scale.t().to(scale_dtype).contiguous(),
        f"{module}.g_idx": g_idx,
    }


pack_activations, kv_tensors, kv_scales = weight_only(NAME)
read_kv_cache = no_cache
row_tensors = no_rows  # they are its columns
scale_name, scale_dtype, quantized_modules = fp16_scales, fp16, with_qweight
stem = ct.stem


def config_block(
    groups: Sequence[SchemeGroup],
    ignore: Sequence[str],
    user_ignore: Sequence[str],
    kv_cache: QuantizationArgs | None = None,
) -> dict[str, Any]:
    """`quantization_config`: Linears of decoder layers that are not quantized are patterns under `dynamic`."""
    weights = one_group(NAME, groups, kv_cache).weights
    label = "gptq" if weights.symmetric else "gptq_v2"
    kept = [name for name in ignore if "." in name]
    return {
        "bits": weights.num_bits,
        "checkpoint_format": label,
        "desc_act": weights.actorder == "group",
        **({"dynamic": {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in kept}} if kept else {}),
        "format": label,
        "group_size": weights.group_size or -1,
        "lm_head": False,
        "meta": {"quantizer": [f"quantkit:{__version__}"]},
        "pack_dtype": "int32",
        "quant_method": NAME,
        "sym": weights.symmetric,
    }


def side_files(
    block: Mapping[str, Any], tensors: Iterable[str], schemes: Mapping[str, QuantizationScheme]
) -> dict[str, bytes]:
    """The same settings once more, where older readers look for them."""
    return {"quantize_config.json": (json.dumps(block, indent=2) + "\n").encode()}


def read_schemes(block: Mapping[str, Any]) -> ct.Schemes:
    """The schemes behind a `quantization_config` of this method: one, and those of the layers that `dynamic` has other
    settings for ("+:" or nothing before a pattern; "-:" means not quantized). CheckpointError for what is not read.
    """
    if label_of(block) not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"quantization_config: checkpoint_format '{label_of(block)}'; read are gptq and gptq_v2")
    if block.get("format") and label_of(block) != block["format"]:
        raise CheckpointError(
            f"quantization_config: format is {block['format']}, checkpoint_format {label_of(block)}: they are one"
        )
    dynamic = block.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"quantization_config: dynamic is {dynamic!r}; it maps patterns to settings")
    groups, kept = [], []
    for key, settings in dynamic.items():
        where = f"quantization_config: dynamic '{key}'"
        if key.startswith("-:"):
            kept.append(f"re:{key.removeprefix('-:')}")
            continue
        if not isinstance(settings, Mapping):
            raise CheckpointError(f"{where} is {settings!r}; it has settings for the layers that it matches")
        try:
            re.compile(pattern := key.removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(f"{where} is no pattern: {error}") from None
        groups.append((_scheme({**block, **settings}, f"dynamic '{key}': "), [f"re:{pattern}"]))
    return ct.Schemes([*groups, (_scheme(block, ""), ["Linear"])], kept, "dynamic")


def _scheme(block: Mapping[str, Any], where: str) -> QuantizationScheme:
    bits, size = require_key(block, "bits"), require_key(block, "group_size")
    if bits not in (4, 8) or not isinstance(size, int) or size == 0:
        raise CheckpointError(
            f"quantization_config: {where}gptq with bits {bits} and group_size {size}; read are 4 and 8 bits"
        )
    weights = QuantizationArgs(
        bits,
        "int",
        bool(block.get("sym", True)),
        "group" if size > 0 else "channel",
        size if size > 0 else None,
        actorder="group" if block.get("desc_act") and size > 0 else None,
    )
    return QuantizationScheme(f"GPTQ_{label_of(block)}", weights)


def label_of(block: Mapping[str, Any]) -> str:
    """Which version the zero points are of."""
    return str(block.get("checkpoint_format") or block.get("format") or "gptq")


def shape(module: str, scheme: QuantizationScheme, get: Any) -> tuple[int, int]:
    """[rows, cols] of the weight behind `module`'s tensors."""
    words = get(f"{module}.qweight")
    return int(words.shape[1]), int(words.shape[0]) * (32 // scheme.weights.num_bits)


def load_scale(module: str, scheme: QuantizationScheme, get: Any) -> Tensor:
    """The weight's scales, fp32 [rows, groups]."""
    found: Tensor = get(f"{module}.scales").t().float().contiguous()
    return found


def load_zero_point(module: str, scheme: QuantizationScheme, get: Any, rows: int) -> Tensor | None:
    """The weight's zero points, int8 [rows, groups]; None for symmetric ones. CheckpointError if those are others than
    the middle code, as a checkpoint of one version labelled as the other has.
    """
    import torch

    from .. import ops

    args = scheme.weights
    half = 1 << (args.num_bits - 1)
    zeros = ops.unpack_int32(get(f"{module}.qzeros").contiguous(), args.num_bits, rows).t()
    if not scheme.name.endswith("gptq_v2"):
        zeros = (zeros.short() + 1 + half).remainder(2 * half).sub(half).to(torch.int8)
    if args.symmetric and bool((zeros != 0).any()):
        raise CheckpointError(
            f"{module}.qzeros: sym is true and checkpoint_format {scheme.name.removeprefix('GPTQ_')}, and the zero "
            "points are not the middle code; the label may be that of the other version"
        )
    return None if args.symmetric else zeros.contiguous()


def load_weight(module: str, scheme: QuantizationScheme, get: Any, rows: int, cols: int) -> QuantizedTensor:
    """The inverse of `pack_weight`; CheckpointError as of `load_zero_point`."""
    import torch

    from ..quantized import QuantizedTensor

    args, scale = scheme.weights, load_scale(module, scheme, get)
    zero_point = load_zero_point(module, scheme, get, rows)
    g_idx = get(f"{module}.g_idx")
    natural = torch.arange(cols, dtype=torch.int32) // (args.group_size or cols)
    order = None if torch.equal(g_idx, natural) else g_idx.clone()
    return QuantizedTensor(get(f"{module}.qweight").t().contiguous(), scale, zero_point, args, rows, cols, True, order)
