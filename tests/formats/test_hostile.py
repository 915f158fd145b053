"""Checkpoints that contradict themselves, in each format: `quantkit.load`, `eval`, `inspect` and `convert` refuse them,
and `quantkit check` finds them for a client, all naming tensor or key, and rule.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit.checkpoint.folder import DESCRIPTION
from quantkit.conformance import check_folder
from quantkit.convert import convert
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.evaluate import open_source
from quantkit.inspection import inspect_folder

from ..e2e.jobs import quantize_by
from .test_conformance import told

Q = "model.layers.1.self_attn.q_proj"
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
RTN = "{{QuantizationModifier: {{scheme: {}}}}}".format
JOBS = {
    "int8": ("W8A8", "compressed-tensors"),
    "packed": ("W4A16_ASYM", "compressed-tensors"),
    "static": ("FP8", "compressed-tensors"),
    "gptq": ("W4A16", "gptq"),
    "awq": ("W4A16_ASYM", "awq"),
    "fp8": ("FP8_BLOCK", "fp8"),
    "fp8 tensor": ("FP8", "fp8"),
    "mindie": ("W8A8_STATIC_ASYM", "mindie"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The output of a job, made once."""
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in done:
            scheme, save_name = JOBS[name]
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            done[name] = quantize_by("tiny-llama", RTN(scheme), folder, f"compression.save_name={save_name}")
        return done[name]

    return get


def changed(folder: Path, to: Path, change: Change) -> Path:
    """A copy with `change(tensors, quantization_config or MindIE's description)` made."""
    shutil.copytree(folder, to)
    weights = next(to.glob("*.safetensors"))
    described = to / DESCRIPTION
    path = described if described.exists() else to / "config.json"
    tensors, config = load_file(weights), json.loads(path.read_text())
    change(tensors, config if path == described else config["quantization_config"])
    save_file(tensors, weights, metadata={"format": "pt"})
    path.write_text(json.dumps(config))
    return to


def weights(block: dict[str, Any]) -> dict[str, Any]:
    return block["config_groups"]["group_0"]["weights"]


def without(part: str) -> Change:
    return lambda tensors, _: tensors.pop(f"{Q}.{part}")


def settings(**values: Any) -> Change:
    return lambda _, block: block.update(values)


def args(**values: Any) -> Change:
    return lambda _, block: weights(block).update(values)


def cut(part: str) -> Change:
    """A tensor with one row less."""
    return lambda tensors, _: tensors.update({f"{Q}.{part}": tensors[f"{Q}.{part}"][1:].clone()})


def spoilt(part: str) -> Change:
    return lambda tensors, _: tensors[f"{Q}.{part}"].fill_(float("nan"))


# The job, the change, what load says, the client and its finding.
CASES: dict[str, tuple[str, Change, str, str, str]] = {
    # compressed-tensors; more of it is in test_load_refused.py and test_conformance.py
    "an unknown key": ("int8", args(scal_dtype="x"), r"group_0.weights has a key 'scal_dtype'", "vllm", "scal_dtype"),
    "a group without sizes": ("packed", args(group_size=None), "group_size: None does not go", "vllm", "group_size"),
    "packed in another factor": ("packed", args(num_bits=8), r"proj.weight_packed' has shape", "vllm", "weight_packed"),
    "groups of another size": ("packed", args(group_size=64), r"proj.weight_.* has shape", "vllm", f"{Q}.weight_scale"),
    "words cut off": ("packed", cut("weight_packed"), rf"{Q}.weight_packed' has shape", "vllm", f"{Q}.weight_packed"),
    "symmetric with zero points": (
        "packed",
        args(symmetric=True),
        "weight_zero_point' does not belong",
        "vllm",
        "zero",
    ),
    "no input scale": ("static", without("input_scale"), rf"no tensor '{Q}.input_scale'", "vllm", f"{Q}.input_scale"),
    "NaN in an input scale": ("static", spoilt("input_scale"), rf"{Q}.input_scale' has NaN", "vllm", "NaN"),
    "a block with a channel's scales": (
        "static",
        args(strategy="block", block_structure=[128, 128]),
        r"weight_scale' has shape",
        "transformers",
        "weight_scale",
    ),
    "a block of three": ("static", args(block_structure=[1, 2, 3]), "block_structure is", "vllm", "block_structure"),
    "bits in a word": ("int8", args(num_bits="eight"), "num_bits is 'eight'", "vllm", "num_bits 'eight'"),
    "a group that is none": (
        "int8",
        settings(config_groups={"a": 1}),
        "config_groups.a is 1",
        "vllm",
        "config_groups.a",
    ),
    "groups in a list": ("int8", settings(config_groups=[1]), r"config_groups is \[1\]", "vllm", "config_groups"),
    "targets that are a word": (
        "int8",
        lambda t, c: c["config_groups"]["group_0"].update(targets="Linear"),
        "targets is 'Linear'",
        "vllm",
        "targets",
    ),
    "a pattern that is none": (
        "int8",
        lambda t, c: c["config_groups"]["group_0"].update(targets=["re:("]),
        r"'re:\(' is no pattern",
        "vllm",
        "quantized no group's targets",
    ),
    "quantized and ignored": ("int8", settings(ignore=["re:.*q_proj"]), f"{Q[:6]}.*ignore names it", "vllm", "ignore"),
    # GPTQ
    "gptq without scales": ("gptq", without("scales"), rf"{Q}.scales' is missing", "vllm", f"{Q}.scales"),
    "gptq without zero points": ("gptq", without("qzeros"), rf"{Q}.qzeros' is missing", "gptqmodel", f"{Q}.qzeros"),
    "gptq without codes": ("gptq", without("qweight"), rf"{Q}.qweight' is missing", "vllm", f"{Q}.qweight"),
    "gptq of 8 bits": ("gptq", settings(bits=8), r"proj.\w+' has shape", "gptqmodel", "qzeros"),
    "gptq of 3 bits": ("gptq", settings(bits=3), "bits 3", "gptqmodel", "bits is 3"),
    "gptq in other groups": ("gptq", settings(group_size=64), r"(qzeros|scales)' has shape", "gptqmodel", "scales"),
    "gptq with a word for a size": ("gptq", settings(group_size="128"), "group_size 128", "vllm", "group_size '128'"),
    "gptq codes cut off": ("gptq", cut("qweight"), rf"{Q}.* has shape", "vllm", f"{Q}"),
    "gptq of the other version": (
        "gptq",
        settings(checkpoint_format="gptq_v2", format="gptq_v2"),
        "qzeros: sym is true",
        "vllm",
        "qzeros",
    ),
    "gptq of two formats": (
        "gptq",
        settings(checkpoint_format="gptq_v2"),
        "checkpoint_format gptq_v2: they are one",
        "vllm",
        "format",
    ),
    "gptq of an unknown format": (
        "gptq",
        settings(checkpoint_format="marlin", format="marlin"),
        "'marlin'",
        "vllm",
        "marlin",
    ),
    "gptq with a word for dynamic": ("gptq", settings(dynamic="all"), "dynamic is 'all'", "vllm", "dynamic"),
    "gptq, left out and quantized": (
        "gptq",
        settings(dynamic={"-:.*q_proj": {}}),
        "dynamic names it",
        "vllm",
        "dynamic",
    ),
    "gptq, unknown columns": (
        "gptq",
        lambda t, c: t[f"{Q}.g_idx"].fill_(7),
        rf"{Q}.*g_idx",
        "vllm",
        f"{Q}.g_idx",
    ),
    "gptq with NaN": ("gptq", spoilt("scales"), rf"{Q}.scales' has NaN", "vllm", f"{Q}.scales NaN"),
    # AWQ
    "awq without scales": ("awq", without("scales"), rf"{Q}.scales' is missing", "vllm", f"{Q}.scales"),
    "awq without zero points": ("awq", without("qzeros"), rf"{Q}.qzeros' is missing", "vllm", f"{Q}.qzeros"),
    "awq of 8 bits": ("awq", settings(bits=8), "bits 8", "vllm", "bits is 8"),
    "awq in other groups": ("awq", settings(group_size=64), r"(qzeros|scales)' has shape", "vllm", "scales"),
    "awq of another layout": ("awq", settings(version="gemv"), "gemv", "vllm", "version gemv"),
    "awq, left out and quantized": (
        "awq",
        settings(modules_to_not_convert=[Q]),
        "modules_to_not_convert names it",
        "vllm",
        "modules_to_not_convert",
    ),
    "awq with NaN": ("awq", spoilt("scales"), rf"{Q}.scales' has NaN", "vllm", f"{Q}.scales NaN"),
    "awq packed along the inputs": (
        "awq",
        lambda t, c: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].reshape(32, 256)}),
        rf"{Q}.* has shape",
        "vllm",
        f"{Q}",
    ),
    # quant_method fp8
    "fp8 without scales": ("fp8", without("weight_scale_inv"), rf"{Q}.weight' holds codes \(F8_E4M3\)", "vllm", f"{Q}"),
    "fp8 in other blocks": (
        "fp8",
        settings(weight_block_size=[64, 64]),
        "no kernel runs weights fp8 per block of .64, 64.",
        "vllm",
        "weight_scale_inv",
    ),
    "fp8 in blocks of three": (
        "fp8",
        settings(weight_block_size=[1, 2, 3]),
        r"\[1, 2, 3\]",
        "vllm",
        r"weight_block_size",
    ),
    "fp8 without blocks": (
        "fp8",
        settings(weight_block_size=None),
        "weight_scale' is missing",
        "vllm",
        "weight_scale_inv no part",
    ),
    "fp8, static blocks": (
        "fp8",
        settings(activation_scheme="static"),
        "does not go with weight_block_size",
        "vllm",
        "blocks",
    ),
    "fp8 of unknown activations": (
        "fp8",
        settings(activation_scheme="token"),
        "activation_scheme is 'token'",
        "vllm",
        "token",
    ),
    "fp8 in e5m2": ("fp8", settings(fmt="e5m2"), "fmt is 'e5m2'", "vllm", "fmt"),
    "fp8, left out and quantized": (
        "fp8",
        settings(modules_to_not_convert=[Q]),
        "modules_to_not_convert names it",
        "vllm",
        f"{Q}",
    ),
    "fp8 with NaN": ("fp8", spoilt("weight_scale_inv"), rf"{Q}.weight_scale_inv' has NaN", "vllm", "NaN"),
    "fp8 whose scales divide": ("fp8", settings(weight_scale_semantics="inverse"), "divides", "vllm", "inverse"),
    "fp8 without an input scale": (
        "fp8 tensor",
        without("input_scale"),
        rf"no tensor '{Q}.input_scale'",
        "vllm",
        f"{Q}.input_scale",
    ),
    # Ascend MindIE
    "mindie without weight scales": (
        "mindie",
        lambda t, c: [t.pop(f"{Q}.{p}") for p in ("weight_scale", "deq_scale")],
        rf"{Q}",
        "mindie",
        f"{Q}",
    ),
    "mindie without input scales": (
        "mindie",
        without("input_scale"),
        rf"no tensor '{Q}.input_scale'",
        "mindie",
        f"{Q}.input_scale",
    ),
    "mindie without a bias": (
        "mindie",
        without("quant_bias"),
        rf"{Q}.quant_bias' is missing",
        "mindie",
        f"{Q}.quant_bias",
    ),
    "mindie of an unknown kind": (
        "mindie",
        settings(**{f"{Q}.weight": "W3A8"}),
        f"{Q}.weight is 'W3A8'",
        "mindie",
        "W3A8",
    ),
    "mindie, static and described as dynamic": (
        "mindie",
        lambda t, c: c.update({f"{Q}.{p}": "W8A8_DYNAMIC" for p in ("weight", "weight_scale", "weight_offset")}),
        rf"{Q}.input_scale is 'W8A8', and {Q}.weight 'W8A8_DYNAMIC'",
        "mindie",
        f"{Q}",
    ),
    "mindie with a scale of another kind": (
        "mindie",
        settings(**{f"{Q}.weight_scale": "W8A16", f"{Q}.weight_offset": "W8A16"}),
        f"{Q}.weight_scale is 'W8A16', and {Q}.weight 'W8A8'",
        "mindie",
        f"{Q}.weight_scale W8A16 W8A8",
    ),
    "mindie with NaN": (
        "mindie",
        spoilt("weight_scale"),
        rf"{Q}.weight_scale' has NaN",
        "mindie",
        f"{Q}.weight_scale NaN",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_and_found(case: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    job, change, message, client, words = CASES[case]
    folder = changed(made(job), tmp_path / "changed", change)
    with pytest.raises(CheckpointError, match=message):
        quantkit.load(folder)
    verdict = check_folder(folder, client)
    assert not verdict.ok
    assert any(told(verdict, kind, words) for kind in ("refused", "wrong")), verdict.render()
    other, scheme = ("bitsandbytes", None) if job == "int8" else ("compressed-tensors", None)
    if job in ("packed", "static"):
        other = {"packed": "gptq", "static": "fp8"}[job]
    if job == "mindie":
        scheme = "W8A8"
    for read in (
        lambda: inspect_folder(folder, progress=False),
        lambda: open_source(folder).get(f"{Q}.weight"),
        lambda: convert(folder, tmp_path / "converted", other, scheme=scheme, progress=False),
    ):
        with pytest.raises(CheckpointError):
            read()
    assert not (tmp_path / "converted").exists()


def sites(settings: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in config.json's block."""
    items = (
        settings.items() if isinstance(settings, dict) else enumerate(settings) if isinstance(settings, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from sites(value, (*path, key))


@pytest.mark.parametrize("job", JOBS)
def test_no_value_of_any_type_is_an_accident(job: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """Readers and the checker take it or refuse it in words, whatever stands for a setting."""
    folder = changed(made(job), tmp_path / "changed", lambda tensors, block: None)
    path = folder / DESCRIPTION if job == "mindie" else folder / "config.json"
    config = json.loads(path.read_text())
    block = config if job == "mindie" else config["quantization_config"]
    clients = ("mindie",) if job == "mindie" else ("vllm", "sglang", "transformers", "gptqmodel")
    refused = 0
    places = list(sites(block))
    for site in places[:: len(places) // 60 + 1]:
        for value in (None, "x", -1, 0, [], [1, "a"], {"a": 1}):
            where = changing = json.loads(json.dumps(config))
            for key in site[:-1] if job == "mindie" else ("quantization_config", *site[:-1]):
                where = where[key]
            where[site[-1]] = value
            path.write_text(json.dumps(changing))
            try:
                open_source(folder)
            except QuantkitError:
                refused += 1
            for client in clients:
                check_folder(folder, client).render()
    assert refused > 20


# Linears that servers make one of (q, k and v), quantized in part; each is computed on its own by `load`.
@pytest.mark.parametrize("job", JOBS)
def test_a_fused_set_in_part_is_found(job: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    def plain(tensors: dict[str, Tensor], block: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(f"{Q}.")]:
            tensors.pop(name)
            if job == "mindie":
                block.pop(name)
        tensors[f"{Q}.weight"] = torch.zeros(256, 256, dtype=torch.bfloat16)
        key = {"gptq": "dynamic", "awq": "modules_to_not_convert", "fp8": "modules_to_not_convert"}.get(job, "ignore")
        if job == "mindie":
            block[f"{Q}.weight"] = "FLOAT"
        elif job == "gptq":
            block["dynamic"] = {"-:.*layers.1.self_attn.q_proj": {}}
        else:
            key = "ignored_layers" if job == "fp8 tensor" else key
            block[key] = [*block.get(key, ()), Q]

    folder = changed(made(job), tmp_path / "changed", plain)
    assert quantkit.load(folder).get_submodule(Q).weight.dtype == torch.bfloat16
    client = "mindie" if job == "mindie" else "vllm"
    verdict = check_folder(folder, client)
    assert told(verdict, "refused", "q_proj k_proj v_proj become one layer"), verdict.render()
