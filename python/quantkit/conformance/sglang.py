"""What SGLang (0.5.23) makes of compressed-tensors' config groups where that is not what vLLM does: Linears and experts
have classes of their own, and some groups have none.
"""

from __future__ import annotations

from collections.abc import Collection

from .config_groups import Group, strategy_of
from .experts import in_sglang
from .inventory import Inventory, Stored
from .verdict import Verdict

PLUGIN = "quantkit's plugin serves it (docs/integrations/sglang.md)"
# Its int4 with 8-bit inputs, and MX, are experts' alone.
NO_LINEAR = ("WNA8Int", "W4A8Int", "W4A8 FP8", "MXFP4", "MXFP8")


def linear(stored: Stored, group: Group, scheme: str, packed: bool, verdict: Verdict) -> None:
    """What `group`, which is `scheme` to vLLM, is to SGLang; `packed`: the whole checkpoint is pack-quantized."""
    where, w, i = f"config_groups.{group.key}", group.weights, group.inputs
    if stored.expert:
        in_sglang(stored, group, scheme, packed, verdict)
    elif scheme in NO_LINEAR:
        action = PLUGIN if scheme == "WNA8Int" and w.get("num_bits") == 4 else "serve it with vLLM"
        verdict.add("refused", stored.name, f"{scheme} is no scheme of SGLang's Linears", action)
    elif scheme == "FP8 W8A16" and strategy_of(w) == "block":
        verdict.add("refused", stored.name, "FP8 per block without quantized inputs is no scheme of SGLang's")
    elif scheme == "int8 W8A8, static":
        verdict.add("limited", stored.name, "inputs are quantized per token at run time; input_scale is not used")
    elif scheme == "int8 W8A8, dynamic" and not (i or {}).get("symmetric", True):
        verdict.add("limited", where, "inputs are quantized symmetrically at run time")
    elif scheme == "NVFP4" and i is not None:
        verdict.add("limited", where, "NVFP4 multiplies FP4 by FP4 from SM100 on; older GPUs keep inputs in 16 bit")
    if scheme == "WNA16" and w.get("num_bits") not in (4, 8):
        verdict.add("refused", stored.name, f"packed weights have 4 or 8 bits, not {w.get('num_bits')}")


def static_in_fused(found: Inventory, static: Collection[str], verdict: Verdict) -> None:
    """A fused int8 Linear has room for one static scale, and the loader writes that of the second part behind it."""
    for group in found.fused_sets():
        for stored in group[1:]:
            if stored.name in static and "input_scale" in stored.parts and not stored.expert:
                verdict.add(
                    "refused",
                    f"{stored.name}.input_scale",
                    "its fused Linear has room for one, and the loader stops at the second (IndexError), equal or not",
                    "use a scheme with dynamic inputs; quantkit's plugin serves equal ones (docs/integrations)",
                )
