"""`quantkit.swap_linears`: a model in memory, its Linears quantized in place by rounding to nearest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..config.presets import preset
from ..config.schemes import QuantizationScheme
from ..errors import ConfigError, PlanError
from ..formats.stored import describe_scheme
from ..modifiers.rtn import quantize_weight
from ..targets import match_ignore, pattern_of
from .check import SUPPORTED, check_device
from .head import Head, PlainHead
from .linear import Parts, QuantLinear, kind_of, merged, quant_linear

CLASS = "Linear"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def swap_linears(
    model: Any,
    scheme: str | QuantizationScheme = "W8A8",
    *,
    ignore: Sequence[str] = ("lm_head",),
    targets: str | Iterable[str] = CLASS,
    merge: bool = True,
) -> Any:
    """Replace Linears of `model` (any torch module, on the CPU) by QuantLinears, in place; returns it.

    `scheme`: a preset's name, or a QuantizationScheme; one that needs calibration data is refused. `targets`: "Linear"
    for all, full module names, or `re:` and a pattern that matches from the start of the full name; `ignore` in the
    same way, and also dotted parts of names. Weights are rounded to nearest. `merge`: Linears that read one input (q,
    k and v; gate and up) are computed together.

    Raises ConfigError for a scheme, PlanError for a model or names that do not fit; the model is then unchanged.
    """
    scheme = _data_free(scheme)
    linears = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, Head, PlainHead)}
    chosen = _chosen(model, linears, [targets] if isinstance(targets, str) else list(targets), ignore)
    for name in chosen:
        _check(name, linears[name], scheme)
    for names in _sets(chosen, merge):
        common = _common_scale([linears[name].weight for name in names], scheme)
        parts = [_quantized(name, linears[name], scheme, common) for name in names]
        modules: Sequence[QuantLinear] = merged(parts) or [quant_linear(p) for p in parts]
        for name, module in zip(names, modules, strict=True):
            model.set_submodule(name, module.train(linears.pop(name).training))
    return model


def _data_free(scheme: str | QuantizationScheme) -> QuantizationScheme:
    if isinstance(scheme, str):
        scheme = preset(scheme)
    if not isinstance(scheme, QuantizationScheme):
        raise ConfigError(f"scheme: expected the name of a preset or a QuantizationScheme, got {scheme!r}")
    if scheme.needs_calibration:
        raise ConfigError(
            f"scheme {scheme.name}: static activations need calibration data; use a scheme that computes their "
            "scales at run time (W8A8, FP8_DYNAMIC), or quantkit.oneshot with a dataset and quantkit.load"
        )
    if scheme.weights.actorder == "group":
        raise ConfigError(f"scheme {scheme.name}: actorder 'group' needs calibration data; leave it out")
    if kind_of(scheme) is None:
        raise ConfigError(
            f"scheme {scheme.name}: no kernel runs {describe_scheme(scheme)}; there are kernels for {SUPPORTED}"
        )
    return scheme


def _chosen(model: Any, linears: dict[str, nn.Linear], targets: list[str], ignore: Sequence[str]) -> list[str]:
    """The names of the Linears to replace, in the model's order."""
    if not isinstance(model, nn.Module) or not linears:
        hint = "they are QuantLinears already" if _quantized_already(model) else "there is nothing to quantize"
        raise PlanError(f"model: {type(model).__name__} has no torch.nn.Linear: {hint}")
    wanted: set[str] = set()
    for target in targets:
        if target == CLASS:
            found = set(linears)
        elif target.startswith("re:"):
            regex = pattern_of("targets", target)
            found = {name for name in linears if regex.match(name)}
        else:
            found = {target} & linears.keys()
        if not found:
            raise PlanError(f"targets: '{target}' matches no Linear of this model; use 'Linear', a full name, or 're:'")
        wanted |= found
    # A pattern of the default may match nothing: models without a head have none to leave out.
    patterns = [p for p in ignore if p != "lm_head" or any(f".{p}." in f".{n}." for n in linears)]
    for names in match_ignore("ignore", patterns, list(linears)).values():
        wanted -= set(names)
    if not wanted:
        raise PlanError("ignore: nothing is left to quantize")
    return [name for name in linears if name in wanted]


def _quantized_already(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(isinstance(m, QuantLinear) for m in model.modules())


def _check(name: str, linear: nn.Linear, scheme: QuantizationScheme) -> None:
    weight, args = linear.weight, scheme.weights
    if weight.is_meta:
        raise PlanError(f"{name}: its weight is not in memory (meta device); load the model first")
    check_device(weight.device)
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise PlanError(f"{name}: its weight has dtype {weight.dtype}; float32, float16 and bfloat16 are quantized")
    size = args.group_size
    if size is not None and linear.in_features % size:
        raise PlanError(
            f"{name}: {linear.in_features} input features do not divide by the group size {size} of scheme "
            f"{scheme.name}; name it in ignore, or use a scheme per channel"
        )


def _sets(names: Sequence[str], merge: bool) -> list[tuple[str, ...]]:
    """`names` in sets of those that read one input."""
    by_parent: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, part = name.rpartition(".")
        group = next((i for i, parts in enumerate(FUSED) if part in parts), None) if merge else None
        by_parent.setdefault((name, -1) if group is None else (parent, group), []).append(name)
    return [tuple(members) for members in by_parent.values()]


def _common_scale(weights: Sequence[torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor | None:
    """NVFP4's global scale, one for Linears that servers fuse."""
    if scheme.weights.scales != "nvfp4":
        return None
    largest = [ops.absmax(weight.detach(), [-1, -1]).amax() for weight in weights]
    return ops.nvfp4_global_scale(torch.stack(largest).amax())


def _quantized(name: str, linear: nn.Linear, scheme: QuantizationScheme, global_scale: torch.Tensor | None) -> Parts:
    args = scheme.weights
    # Scales are rounded to what a checkpoint would store, so that both compute the same.
    packs = args.type == "int" and (scheme.input_activations is None or args.num_bits == 4)
    scale_dtype = linear.weight.dtype if packs else torch.float32
    weight = quantize_weight(
        name, linear.weight.detach(), args, scale_dtype=scale_dtype, pack=packs, global_scale=global_scale
    )
    bias = None if linear.bias is None else linear.bias.detach()
    return Parts(weight, scheme.input_activations, bias=bias)
