"""Whether a server takes a quantized folder: its loader's own rules, applied to headers, config.json and scales.

Servers check little: a scale that is missing, or a Linear that config.json takes for quantized and that is not, loads
as numbers that nobody wrote. This says it before anything is served.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError, ConfigError, nearest
from ..formats.compressed_tensors import of_attention
from . import compressed_tensors, mindie, others, rules
from .experts import of_family
from .inventory import Inventory
from .verdict import Finding, Verdict

__all__ = ["CLIENTS", "HARDWARE", "Finding", "Verdict", "check_folder"]

Check = Callable[[Inventory, Verdict], None]
METHODS: dict[str, Check] = {
    "compressed-tensors": compressed_tensors.check,
    "gptq": others.gptq,
    "awq": others.awq,
    "fp8": others.fp8,
    "mindie": mindie.check,
    "bitsandbytes": others.bitsandbytes,
}
# Which of them a client reads.
CLIENTS: dict[str, tuple[str, ...]] = {
    "vllm": ("compressed-tensors", "gptq", "awq", "fp8"),
    "sglang": ("compressed-tensors", "gptq", "awq", "fp8"),
    "transformers": ("compressed-tensors", "gptq", "awq", "fp8", "bitsandbytes"),
    "gptqmodel": ("gptq", "awq"),
    "mindie": ("mindie",),
}
NUMBERS, SWITCHES = ("bits", "w_bit", "group_size", "q_group_size"), ("desc_act", "sym", "zero_point")
LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "llm_int8_skip_modules")
HARDWARE = ("cuda", "cpu", "npu")


def check_folder(folder: str | Path, client: str, *, hardware: str = "cuda", tensor_parallel: int = 1) -> Verdict:
    """Whether `client` (a key of CLIENTS) loads the checkpoint in `folder` and computes what was meant, on `hardware`
    ("cuda", "cpu", or "npu", which is what MindIE runs on), split over `tensor_parallel` ranks. ConfigError for an
    unknown client; a damaged folder is a finding, not an error.
    """
    if client not in CLIENTS:
        raise ConfigError(f"--for: unknown client '{client}'{nearest(client, CLIENTS)}; known: {', '.join(CLIENTS)}")
    if hardware not in HARDWARE:
        raise ConfigError(
            f"--on: unknown hardware '{hardware}'{nearest(hardware, HARDWARE)}; known: {', '.join(HARDWARE)}"
        )
    hardware = "npu" if client == "mindie" else hardware
    if tensor_parallel < 1:
        raise ConfigError(f"--tensor-parallel: {tensor_parallel}; at least 1 rank")
    verdict = Verdict(str(folder), client, hardware, tensor_parallel)
    try:
        with Checkpoint(folder) as checkpoint:
            _check(Inventory(checkpoint), verdict)
    except CheckpointError as error:
        verdict.add("refused", "checkpoint", str(error))
    return verdict


def _check(found: Inventory, verdict: Verdict) -> None:
    rules.folder(found, verdict)
    if found.block is None:
        if found.quantized:
            verdict.add(
                "refused", found.quantized[0].name, "is stored quantized, and config.json has no quantization_config"
            )
        return
    verdict.method = str(found.block.get("quant_method"))
    if verdict.method not in CLIENTS[verdict.client]:
        known = ", ".join(CLIENTS[verdict.client])
        verdict.add("refused", "quant_method", f"is '{verdict.method}'; {verdict.client} is checked for {known}")
        return
    if verdict.method != "mindie" and not _typed(found.block, verdict):
        return
    groups = found.block.get("config_groups")
    attention = isinstance(groups, Mapping) and any(of_attention(group) for group in groups.values())
    if not found.quantized and not found.block.get("kv_cache_scheme") and not attention:
        verdict.add("refused", "quantization_config", "is there, and no Linear is stored quantized")
        return
    METHODS[verdict.method](found, verdict)
    of_family(found, verdict)


def _typed(block: Mapping[str, Any], verdict: Verdict) -> bool:
    """Whether settings that rules compute with are what they have to be; what they are not is a finding."""
    told = {
        **dict.fromkeys(NUMBERS, "a whole number other than 0"),
        **dict.fromkeys(SWITCHES, "true or false"),
        **dict.fromkeys(LISTS, "a list of names"),
        "weight_block_size": "[rows, columns]",
    }
    wrong = [key for key in told if block.get(key) is not None and not _fits(key, block[key])]
    for key in wrong:
        verdict.add("refused", f"quantization_config.{key}", f"is {block[key]!r}; it is {told[key]}")
    return not wrong


def _fits(key: str, value: Any) -> bool:
    if key in NUMBERS:
        return isinstance(value, int) and value != 0
    if key in SWITCHES:
        return isinstance(value, bool)
    if key in LISTS:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    return isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)
