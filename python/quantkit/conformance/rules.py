"""Rules that every client has, whatever the format: names, tied heads, fused layers, sound scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ..checkpoint.header import TensorInfo
from .inventory import SCALES, Inventory, Stored
from .verdict import Verdict

Shape = tuple[int, ...]


def folder(found: Inventory, verdict: Verdict) -> None:
    """What has nothing to do with how weights are stored."""
    tensors = found.checkpoint.tensors
    if verdict.client == "sglang" and verdict.hardware == "cpu":
        verdict.add("limited", "hardware", "SGLang's cpu kernels need AMX")
    if found.family.tied:
        for head in found.family.heads:
            for name in tensors:
                if name.startswith(f"{head}."):
                    verdict.add(
                        "refused" if verdict.client == "sglang" else "wrong",
                        name,
                        "tie_word_embeddings is true: the head is the embedding, and this is left out or unknown",
                        "drop the tensor, or set tie_word_embeddings to false",
                    )
    consolidated = [name for name in found.checkpoint.left_out if name.startswith("consolidated")]
    if consolidated and verdict.client == "vllm":
        verdict.add(
            "wrong",
            consolidated[0],
            "vLLM takes a folder with such a file for Mistral's own format and reads it instead of the shards",
            "remove the file",
        )


def sound_scales(found: Inventory, verdict: Verdict, negative: Callable[[Stored], bool]) -> None:
    """Finite, not zero, and positive unless `negative` says that nothing but a product reads them."""
    import torch

    for stored in found.quantized:
        for part in (*SCALES, "input_scale", "weight_global_scale", "input_global_scale"):
            info = stored.parts.get(part)
            if info is None or info.dtype not in ("F32", "F16", "BF16"):
                continue
            value = found.checkpoint.tensor(info.name).float()
            if not bool(torch.isfinite(value).all()):
                verdict.add("wrong", info.name, "has NaN or infinities", "quantize again")
            elif bool((value == 0).any()):
                verdict.add("wrong", info.name, "has zeros, which turn a row of weights into nothing", "quantize again")
            elif bool((value < 0).any()) and not negative(stored):
                verdict.add("wrong", info.name, "has negative numbers, and the kernel takes scales for positive")
            found.checkpoint.release(info.name)


def sound_bytes(found: Inventory, verdict: Verdict, stored: Stored) -> None:
    """Scales of one byte are numbers: none is NaN, and e4m3 ones are positive."""
    info = stored.parts.get("weight_scale")
    if info is None or info.dtype not in ("U8", "F8_E4M3"):
        return
    import torch

    value = found.checkpoint.tensor(info.name).view(torch.uint8)
    if info.dtype == "U8" and bool((value == 255).any()):
        verdict.add("wrong", info.name, "has the e8m0 code of NaN", "quantize again")
    elif info.dtype == "F8_E4M3":
        if bool(((value & 127) == 127).any()):
            verdict.add("wrong", info.name, "has the e4m3 code of NaN", "quantize again")
        elif bool(((value & 127) == 0).any()):
            verdict.add("limited", info.name, "has zeros, which turn groups of weights into nothing")
        elif bool((value > 127).any()):
            verdict.add("wrong", info.name, "has negative numbers, and the kernel takes scales for positive")
    found.checkpoint.release(info.name)


def expect(
    verdict: Verdict,
    stored: Stored,
    wanted: Mapping[str, tuple[Iterable[str], Shape | None]],
    allowed: Iterable[str] = (),
) -> None:
    """`stored` has exactly the tensors `wanted` (last name -> dtypes, shape or None), and any of bias and `allowed`."""
    for part, (dtypes, shape) in wanted.items():
        info = stored.parts.get(part)
        if info is None:
            loads = "loads it with numbers that nobody wrote" if verdict.client == "vllm" else "misses it"
            verdict.add(
                "wrong", f"{stored.name}.{part}", f"is not there, and {verdict.client} {loads}", "quantize again"
            )
            continue
        if info.dtype not in tuple(dtypes):
            verdict.add("refused", info.name, f"is {info.dtype}; read is {' or '.join(dtypes)}")
        if shape is not None and tuple(info.shape) != shape:
            verdict.add("refused", info.name, f"is {list(info.shape)}; its Linear needs {list(shape)}")
    for part, info in stored.parts.items():
        if part not in wanted and part not in ("bias", *allowed):
            verdict.add(
                "refused",
                info.name,
                "is no part of this scheme, and no parameter takes it",
                "drop it, or mend the config",
            )


def same_in_fused(found: Inventory, verdict: Verdict, parts: Iterable[str], why: str) -> None:
    """Each of `parts` holds the same numbers in all Linears of a fused set."""
    for group in found.fused_sets():
        for part in parts:
            values = {found.value(stored, part) for stored in group if part in stored.parts}
            if len(values) > 1:
                names = ", ".join(stored.name.rpartition(".")[2] for stored in group)
                verdict.add("wrong", f"{group[0].name}.{part}", f"differs among {names}, and {why}")


def fused_alike(found: Inventory, verdict: Verdict, scheme: Callable[[Stored], object]) -> None:
    """All Linears of a fused set have the same scheme, or none of them has one."""
    for group in found.fused_sets():
        schemes = {scheme(stored) for stored in group}
        if len(schemes) > 1:
            names = ", ".join(stored.name.rpartition(".")[2] for stored in group)
            verdict.add(
                "refused",
                group[0].name,
                f"{names} become one layer, and have different schemes or are quantized in part",
                "quantize them alike, or ignore all of them",
            )


def divides(
    verdict: Verdict, stored: Stored, rows: int, cols: int, *, row_unit: int = 1, col_unit: int = 1, what: str = ""
) -> None:
    """A rank's share of `stored` [rows, cols] is whole units of rows and columns."""
    ranks = verdict.tensor_parallel
    share = (rows, cols // ranks) if stored.row_parallel else (rows // ranks, cols)
    split = cols if stored.row_parallel else rows
    if ranks > 1 and split % ranks:
        verdict.add("refused", stored.name, f"{split} does not split over {ranks} ranks", "use fewer ranks")
        return
    for size, unit, side in ((share[0], row_unit, "outputs"), (share[1], col_unit, "inputs")):
        if unit > 1 and size % unit:
            on_rank = " on a rank" if ranks > 1 else ""
            verdict.add("refused", stored.name, f"{size} {side}{on_rank} are no multiple of {unit}{what}")


def whole_blocks(found: Inventory, verdict: Verdict, stored: Stored, shape: Shape, block: Sequence[int]) -> None:
    """Scales per block survive what servers do: only the last of a fused set, and nothing that ranks share, may end
    within a block.
    """
    ranks, (rows, cols) = verdict.tensor_parallel, shape
    last = {group[-1].name for group in found.fused_sets()}
    fused = {member.name for group in found.fused_sets() for member in group} - last
    if ranks > 1:
        own = {"row_unit": 1} if stored.row_parallel else {"col_unit": 1}
        divides(verdict, stored, rows, cols, **({"row_unit": block[0], "col_unit": block[1]} | own), what=" (blocks)")
    elif stored.name in fused:
        divides(verdict, stored, rows, cols, row_unit=block[0], what=" (blocks), and more is fused behind it")


def shape_of(info: TensorInfo | None) -> Shape:
    """() if there is none."""
    return () if info is None else tuple(info.shape)
