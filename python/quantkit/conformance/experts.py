"""Experts of compressed-tensors checkpoints, for which vLLM (0.32) and SGLang (0.5.23) have classes of their own, and
which Transformers (5.22) puts into parameters for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..models.stacked_experts import STACKINGS, UNREAD
from .config_groups import Group, strategy_of, told
from .inventory import Inventory, Stored
from .verdict import Verdict

# What SGLang has a class for on NPUs alone, or on nothing.
NOT_IN_SGLANG = ("int8 W8A8, dynamic", "int8 W8A8, static", "W4A8Int", "MXFP8", "FP8 W8A16")
W4A8_UNIT = 256  # of vLLM's kernel for int4 by FP8


def in_vllm(stored: Stored, shape: tuple[int, int], group: Group, scheme: str, verdict: Verdict) -> None:
    strategy, inputs, cpu = strategy_of(group.weights), group.inputs or {}, verdict.hardware == "cpu"
    if scheme in ("WNA8Int", "W4A8Int"):
        verdict.add("refused", stored.name, "int4 experts with int8 inputs run on Arm CPUs alone, from a code a byte")
    elif cpu and not (scheme == "WNA16" or scheme.startswith("int8")):
        verdict.add("refused", stored.name, f"{scheme} experts have no kernel on cpu")
    elif cpu and scheme == "WNA16" and strategy == "channel":
        verdict.add("refused", stored.name, "weight-only experts on cpu need groups")
    elif scheme in ("FP8 W8A16", "int8 W8A8, static") or (scheme == "int8 W8A8, dynamic" and strategy != "channel"):
        _no_scheme(stored, group, verdict)
    elif scheme == "int8 W8A8, dynamic" and not inputs.get("symmetric", True):
        verdict.add("limited", f"config_groups.{group.key}", "experts quantize their inputs symmetrically")
    elif scheme == "FP8 W8A8":
        _fp8(stored, group, verdict)
    elif scheme == "W4A8 FP8":
        if group.weights.get("group_size") != 128:
            verdict.add("refused", stored.name, "int4 experts with FP8 inputs need groups of 128")
        rows, cols = shape
        split = (
            (rows, cols // verdict.tensor_parallel) if stored.row_parallel else (rows // verdict.tensor_parallel, cols)
        )
        if any(size % W4A8_UNIT for size in split):
            rule = f"int4 experts with FP8 inputs need multiples of {W4A8_UNIT}, and are {list(split)} on a rank"
            verdict.add("refused", stored.name, rule)


def in_sglang(stored: Stored, group: Group, scheme: str, packed: bool, verdict: Verdict) -> None:
    """`packed`: the whole checkpoint is pack-quantized."""
    if scheme in NOT_IN_SGLANG:
        verdict.add("refused", stored.name, f"{scheme} is no scheme of SGLang's experts on a GPU")
    elif scheme == "MXFP4":
        rule = "MXFP4 experts have no weight_packed in SGLang, and keep numbers that nobody wrote"
        verdict.add("wrong", stored.name, rule)
    elif scheme == "FP8 W8A8":
        _fp8(stored, group, verdict)
    elif scheme in ("WNA16", "WNA8Int", "W4A8 FP8") and not packed:
        verdict.add("refused", stored.name, "packed experts need pack-quantized as the format of the whole checkpoint")
    elif scheme in ("WNA8Int", "W4A8 FP8"):
        if strategy_of(group.weights) != "group":
            verdict.add("refused", stored.name, f"{scheme} experts need groups")
        verdict.add("limited", f"config_groups.{group.key}", "experts multiply by inputs in FP8, on SM90 alone")


def in_transformers(block: Mapping[str, Any], found: Inventory, verdict: Verdict) -> None:
    """All experts are read in one way, that of one group: the first with a pattern for experts, else the first with a
    class as a target, else the first. Where it has FP8 weights, tensors called `weight` are read, else `weight_packed`;
    if these are not there, experts are made anew, of random numbers.
    """
    entries = {key: entry for key, entry in block["config_groups"].items() if isinstance(entry.get("targets"), list)}
    experts = [stored for stored in found.linears.values() if stored.expert]
    if not entries or not experts or apart(found):
        return
    targets = {key: list(map(str, entry["targets"])) for key, entry in entries.items()}
    patterns = [key for key, names in targets.items() if any(n.startswith("re:") and "experts" in n for n in names)]
    classes = [key for key, names in targets.items() if any(not n.startswith("re:") for n in names)]
    key = [*patterns, *classes, *entries][0]
    weights = entries[key].get("weights") or {}
    part = "weight" if (weights.get("type"), weights.get("num_bits")) == ("float", 8) else "weight_packed"
    lacking = [stored.name for stored in experts if part not in stored.parts]
    # Those of int8 have been refused.
    if lacking and not any(finding.kind == "refused" for finding in verdict.findings):
        verdict.add(
            "wrong",
            lacking[0],
            f"has no {part}, which Transformers reads of all experts because of config_groups.{key}, and makes anew",
            "serve it with vLLM, or give experts a scheme",
        )


def apart(found: Inventory) -> bool:
    """Whether Transformers has a Linear for each part of each expert once anything is quantized, as Llama 4's."""
    stacking = STACKINGS.get(found.family.model_type)
    return stacking is not None and stacking.apart


def of_family(found: Inventory, verdict: Verdict) -> None:
    """What a client does with the experts of a family, however they are stored."""
    kind, experts = found.family.model_type, [stored.name for stored in found.quantized if stored.expert]
    if verdict.client in UNREAD.get(kind, ()) and experts:
        rule = f"is left out: {verdict.client} has room for experts of {kind} as they are published, and for no others"
        verdict.add("wrong", experts[0], rule, "quantize again with 're:.*experts.*' in ignore, or use quantkit.load")


def _fp8(stored: Stored, group: Group, verdict: Verdict) -> None:
    """One class has scales per tensor on both sides, per channel and token, or blocks."""
    weights, inputs = strategy_of(group.weights), strategy_of(group.inputs or {})
    if weights != "block" and (weights, inputs) not in (("tensor", "tensor"), ("channel", "token")):
        _no_scheme(stored, group, verdict)


def _no_scheme(stored: Stored, group: Group, verdict: Verdict) -> None:
    rule = f"{told(group.weights)} weights with {told(group.inputs)} inputs are no scheme of {verdict.client}'s experts"
    verdict.add("refused", stored.name, rule)
