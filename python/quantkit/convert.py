"""From one format to another that holds the same codes, without loss: `quantkit convert SOURCE TARGET --format NAME`.

Weights are unpacked and packed anew, Linear by Linear; nothing is rounded. What the target cannot hold exactly (a scale
that its dtype rounds, activations, a KV cache) is refused, before anything is written where headers and scales tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .checkpoint.dtypes import torch_dtype
from .checkpoint.layout import OutputTensor, plan_layout
from .checkpoint.reader import Checkpoint
from .checkpoint.writer import CheckpointWriter
from .config.presets import preset
from .config.schemes import QuantizationArgs, QuantizationScheme
from .errors import CheckpointError, ConfigError
from .formats import Format, format_by_name, written_config
from .formats.attention import with_attention
from .formats.compressed_tensors import of_attention
from .formats.stacked_source import split
from .models.families import family_of
from .plan import kept_linears
from .quantized import QuantizedTensor
from .report.plan_view import describe
from .report.progress import Progress
from .targets import served_targets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .formats.source import WeightSource

# Side files of the source that tell of its format; the target has its own.
OF_THE_FORMAT = ("README.md", "quantize_config.json")


def convert(
    source: str | Path,
    target: str | Path,
    format_name: str,
    *,
    scheme: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the quantized checkpoint in `source` to `target` in the format `format_name` ("compressed-tensors", "gptq",
    "awq", "fp8", "bitsandbytes", "mindie"); gives back the target. Dequantized weights are the same to the bit.
    `scheme`: a name of PRESETS with the same weights, whose activations (dynamic or in 16 bit) the target gets instead
    of the source's.

    ConfigError for a format that cannot hold the source's schemes, CheckpointError naming the Linear whose scales it
    would round; the target appears only when it is complete.
    """
    from .formats.source import WeightSource
    from .formats.stored import check_stored

    fmt = format_by_name(format_name)
    with Checkpoint(source) as checkpoint:
        read = WeightSource(checkpoint)
        if read.format is None:
            raise CheckpointError(f"{source}: not quantized; `quantkit run` quantizes, in any of the formats")
        check_stored(read)
        schemes = _schemes(read, fmt, scheme)
        dtype = checkpoint.model_dtype
        if dtype is None:
            raise CheckpointError(f"{source}/config.json: no dtype; readers of packed weights hold scales in it")
        outputs, carried = _outputs(read, fmt, schemes, dtype)
        config = _config(read, fmt, schemes)
        layout = plan_layout(outputs, max_shard_bytes, stem=fmt.stem(schemes.values()))
        with CheckpointWriter(layout, target, overwrite=overwrite) as writer:
            with Progress("convert", total=len(schemes), unit="Linear", enabled=progress) as bar:
                for module, wanted in schemes.items():
                    quantized = _for_target(module, read.sound(module), wanted, fmt)
                    scale = torch_dtype(fmt.scale_dtype(wanted, dtype))
                    for name, tensor in fmt.pack_weight(module, quantized, scale).items():
                        writer.write(name, tensor)
                    for name, tensor in _activations(read, fmt, module, wanted).items():
                        writer.write(name, tensor)
                    read.release(f"{module}.weight")
                    bar.advance(1)
            for name in carried:
                writer.copy(name, checkpoint.tensors[name], checkpoint)
            for path in checkpoint.side_files:
                if path.name not in OF_THE_FORMAT:
                    writer.copy_side_file(path)
            writer.side_file("README.md", _card(checkpoint, read, fmt, schemes).encode())
            block = config["quantization_config"]
            for name, data in fmt.side_files(block, layout.tensors, schemes).items():
                writer.side_file(name, data)
            written = json.dumps(written_config(fmt, config), indent=2, ensure_ascii=False)
            writer.side_file("config.json", f"{written}\n".encode())
            return writer.finish()


def _schemes(read: WeightSource, fmt: Format, name: str | None) -> dict[str, QuantizationScheme]:
    """Each quantized Linear's scheme as the target says it. ConfigError for what it cannot hold."""
    found = {}
    for module in sorted(read.modules):
        scheme = read.schemes[module]
        weights = scheme.weights
        if not weights.symmetric and _middle(read, module):
            scheme = replace(scheme, weights=replace(weights, symmetric=True))
        found[module] = scheme
    # What servers fuse has one scheme: where one Linear needs its zero points, all that had some keep them.
    needed = {scheme for module, scheme in found.items() if scheme == read.schemes[module]}
    found = {m: read.schemes[m] if read.schemes[m] in needed else scheme for m, scheme in found.items()}
    if name is not None:
        found = {module: _with_activations(module, scheme, preset(name)) for module, scheme in found.items()}
    for scheme in dict.fromkeys(found.values()):
        fmt.check(scheme)
    if read.kv_cache is not None and (read.format is None or fmt.CACHE != read.format.CACHE):
        raise ConfigError(f"format '{fmt.NAME}' has no place for KV-cache scales as the source has them")
    if any(scheme.needs_calibration for scheme in found.values()) and (
        fmt.FOLDS or (read.format is not None and read.format.FOLDS)
    ):
        raise ConfigError(
            "static inputs: mindie rounds their scales and folds them into the weights' and the bias: it does not "
            "hold the same numbers; quantize the full-precision model into it, or give a scheme with dynamic inputs"
        )
    return found


def _with_activations(module: str, scheme: QuantizationScheme, wanted: QuantizationScheme) -> QuantizationScheme:
    """`scheme` with the activations of `wanted`; ConfigError for other weights, and for static activations."""

    def kind(args: QuantizationArgs) -> QuantizationArgs:
        return replace(args, observer=None, observer_kwargs={}, actorder=None)

    if kind(scheme.weights) != kind(wanted.weights):
        raise ConfigError(
            f"scheme {wanted.name}: its weights are {describe(wanted.weights)}, those of {module} "
            f"{describe(scheme.weights)}; converting does not quantize anew"
        )
    if wanted.needs_calibration:
        raise ConfigError(f"scheme {wanted.name}: its activations need data, which converting does not look at")
    return QuantizationScheme(wanted.name, scheme.weights, wanted.input_activations)


def _middle(read: WeightSource, module: str) -> bool:
    """Whether every zero point is the middle code, so that the weight is symmetric in all but name."""
    zero_point = read.weight_zero_point(module)
    return zero_point is None or not bool(zero_point.any())


def _for_target(module: str, quantized: QuantizedTensor, scheme: QuantizationScheme, fmt: Format) -> QuantizedTensor:
    """`quantized` as `fmt` packs it."""
    from . import ops

    if quantized.g_idx is not None and scheme.weights.actorder != "group":
        raise CheckpointError(
            f"{module}: groups of columns in an order of their own, though desc_act is false; {fmt.NAME} would lose it"
        )
    codes, pack = quantized.codes, fmt.packs(scheme)
    if quantized.packed and not pack:
        codes = quantized.unpacked()
    elif pack and not quantized.packed:
        codes = ops.pack_int32(codes, scheme.weights.num_bits)
    zero_point = None if scheme.weights.symmetric else quantized.zero_point
    return replace(quantized, codes=codes, packed=pack, zero_point=zero_point, args=scheme.weights)


def _outputs(
    read: WeightSource, fmt: Format, schemes: Mapping[str, QuantizationScheme], dtype: str
) -> tuple[list[OutputTensor], list[str]]:
    """What is to be written, and what of it is copied. CheckpointError for scales that the target would round."""
    outputs: list[OutputTensor] = []
    for module, scheme in schemes.items():
        name = fmt.scale_dtype(scheme, dtype)
        if scheme.weights.scales == "float" and not _holds(fmt, read.scale(module), torch_dtype(name)):
            raise CheckpointError(
                f"{read.scale_name(module)}: has values that {name} does not hold, in which {fmt.NAME} keeps scales of "
                "this model; converting would change the weights. Quantize the full-precision model into this format"
            )
        rows, cols = read.shape(module, populate=False)
        outputs += fmt.stored_tensors(module, scheme, rows, cols, dtype)
    stored = {name for module in schemes for name in read.stored(module)}
    carried = [name for name in read.checkpoint.tensors if name not in stored]
    outputs += [OutputTensor(n, read.checkpoint.tensors[n].dtype, read.checkpoint.tensors[n].shape) for n in carried]
    return outputs, carried


def _holds(fmt: Format, scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether `fmt`, which keeps scales in `dtype`, gives back fp32 `scale` to the bit."""
    import torch

    from .formats import bitsandbytes

    if fmt.NAME == bitsandbytes.NAME:
        return torch.equal(bitsandbytes.magnitudes(scale) / bitsandbytes.LARGEST, scale)
    return torch.equal(scale.to(dtype).float(), scale)


def _activations(read: WeightSource, fmt: Format, module: str, scheme: QuantizationScheme) -> dict[str, Any]:
    args = read.schemes[module].input_activations
    if args != scheme.input_activations:
        return {}
    part = "input_global_scale" if args is not None and args.dynamic == "local" else "input_scale"
    tensors, name = read.checkpoint.tensors, f"{module}.{part}"
    if name not in tensors:
        return {}
    zero = f"{module}.input_zero_point"
    zero_point = read.checkpoint.tensor(zero).clone() if zero in tensors else None
    return fmt.pack_activations(module, read.checkpoint.tensor(name).float().clone(), zero_point, args=args)


def _config(read: WeightSource, fmt: Format, schemes: Mapping[str, QuantizationScheme]) -> dict[str, Any]:
    config = dict(read.checkpoint.config)
    if read.format is not None and read.format.IN_CONFIG != "quantization_config":
        config.pop(read.format.IN_CONFIG, None)
    shapes = {name: info.shape for name, info in split(read.checkpoint).tensors.items()}
    shapes = {name: shape for name, shape in shapes.items() if read.module_of(name) is None}
    ignore = kept_linears(family_of(config), shapes, schemes)
    user = config["quantization_config"].get("ignored_layers") or ["lm_head"]
    block = fmt.config_block(served_targets(schemes), ignore, user, read.kv_cache)
    if read.queries is not None:
        groups = config["quantization_config"]["config_groups"].values()
        targets = next(group["targets"] for group in groups if of_attention(group))
        block = with_attention(block, targets, read.queries)
    config["quantization_config"] = block
    return config


def _card(checkpoint: Checkpoint, read: WeightSource, fmt: Format, schemes: Mapping[str, QuantizationScheme]) -> str:
    assert read.format is not None
    name = checkpoint.folder.resolve().name
    return (
        f"---\ntags: [{fmt.NAME}, quantkit]\n---\n\n# {name}\n\n`{name}`, {len(schemes)} quantized Linears, converted "
        f"from {read.format.NAME} to {fmt.NAME} by quantkit {__version__}. Codes and scales are the same.\n"
    )
