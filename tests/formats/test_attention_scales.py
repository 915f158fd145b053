"""Scales of queries, keys and values as llm-compressor stores them: read as compressed-tensors itself computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import quantkit
from quantkit.cli import main
from quantkit.conformance import check_folder
from quantkit.errors import QuantkitError
from quantkit.evaluate import open_source
from quantkit.formats import compressed_tensors as ct
from quantkit.inspection import inspect_folder

from ..e2e.jobs import EXAMPLES, quantize_by

MODEL = EXAMPLES / "models" / "tiny-llama"
TOKENS = torch.randint(3, 2048, (2, 48), generator=torch.Generator().manual_seed(0))
A = "model.layers.1.self_attn"


def query_magnitudes() -> dict[int, torch.Tensor]:
    """The largest magnitude of each head's queries, by layer, for TOKENS."""
    seen: dict[int, torch.Tensor] = {}

    def noting(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[module.layer_idx] = query.abs().amax((0, 2, 3))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("noting", noting)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="noting")
    with torch.inference_mode():
        model(TOKENS)
    return seen


def written(tmp_path: Path, strategy: str) -> Path:
    """A folder with the tensors and the config group of llm-compressor 0.14 (whose own scales of queries are not
    calibrated, so that these are made here).
    """
    scheme = f"{{num_bits: 8, type: float, strategy: {strategy}}}"
    output = quantize_by("tiny-llama", f"{{QuantizationModifier: {{kv_cache_scheme: {scheme}}}}}", tmp_path)
    tensors = load_file(output / "model.safetensors")
    for layer, magnitudes in query_magnitudes().items():
        name = f"model.layers.{layer}.self_attn"
        scale = magnitudes / 448 if strategy == "attn_head" else magnitudes.amax().reshape(1) / 448
        tensors[f"{name}.q_scale"] = scale.reshape(-1, 1, 1) if strategy == "attn_head" else scale
        for part in ("q", "k", "v"):
            tensors[f"{name}.{part}_scale"] = tensors[f"{name}.{part}_scale"].bfloat16()
            zeros = torch.zeros(tensors[f"{name}.{part}_scale"].shape).to(torch.float8_e4m3fn)
            tensors[f"{name}.{part}_zero_point"] = zeros
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    block = config["quantization_config"]
    block["config_groups"] = {
        "group_0": {
            "format": "dense",
            "targets": ["LlamaAttention"],
            "weights": None,
            "output_activations": None,
            "input_activations": block["kv_cache_scheme"],
        }
    }
    (output / "config.json").write_text(json.dumps(config))
    return output


@pytest.mark.parametrize("strategy", ["attn_head", "tensor"])
def test_they_are_read(strategy: str, tmp_path: Path) -> None:
    output = written(tmp_path, strategy)
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    ours = quantkit.load(output, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected, got, full = (model(TOKENS, use_cache=True).logits for model in (theirs, ours, plain))
    rounding = float((expected - full).abs().mean())
    assert float((got - expected).abs().mean()) < 0.05 * rounding
    for module in ours.modules():
        if hasattr(module, "quantize_query"):
            del module.quantize_query
    with torch.inference_mode():
        without = ours(TOKENS, use_cache=True).logits
    assert float((without - expected).abs().mean()) > 0.1 * rounding  # queries count
    assert f"per {strategy}; 4 attention layers" in inspect_folder(output, progress=False).render()
    assert "queries of 4 are rounded, too" in inspect_folder(output, progress=False).render()
    verdict = check_folder(output, "vllm")
    assert verdict.ok and "is left out by vLLM" in verdict.render()
    assert check_folder(output, "transformers").ok, check_folder(output, "transformers").render()
    with pytest.raises(QuantkitError, match="which only the default does"):
        quantkit.load(output, attn_implementation="sdpa")
    text, report = tmp_path / "text.txt", tmp_path / "eval.json"
    text.write_text("The history of the city is a long one. " * 40)
    kl = []
    for change in (False, True):
        if change:
            block = json.loads((output / "config.json").read_text())
            block["quantization_config"]["config_groups"] = {}
            (output / "config.json").write_text(json.dumps(block))
            for read in (quantkit.load, open_source):
                with pytest.raises(QuantkitError, match="no config group is for attention"):
                    read(output)
            tensors = load_file(output / "model.safetensors")
            kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(("q_scale", "q_zero_point"))}
            save_file(kept, output / "model.safetensors", metadata={"format": "pt"})
        arguments = ["--text", str(text), "--windows", "2", "--window-length", "48", "--json", str(report)]
        assert main(["eval", str(output), *arguments, "--baseline", str(MODEL)]) == 0
        kl.append(json.loads(report.read_text())["perplexity"]["kl"])
    assert kl[0] != kl[1] and 0 < kl[0] < 0.1


@pytest.mark.parametrize(("kind", "strategy"), [("float", "attn_head"), ("float", "tensor"), ("int", "attn_head")])
def test_a_client_computes_what_is_written(kind: str, strategy: str, tmp_path: Path) -> None:
    """Transformers with compressed-tensors takes up every scale, and its logits are those of `quantkit.load`."""
    args = f"{{num_bits: 8, type: {kind}, strategy: {strategy}}}"
    attention = f"attention: {{targets: [Attention], input_activations: {args}}}"
    linears = "a: {targets: ['re:.*mlp.*'], weights: {num_bits: 8, strategy: channel}}"
    linears += ", b: {targets: ['re:.*attn.*'], weights: {num_bits: 4, group_size: 32}}"
    output = quantize_by("tiny-llama", f"{{GPTQModifier: {{config_groups: {{{attention}, {linears}}}}}}}", tmp_path)
    tensors = load_file(output / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    held = {
        name: tensor for name, tensor in theirs.state_dict().items() if name.endswith(("q_scale", "k_scale", "v_scale"))
    }
    assert len(held) == 12 and all(torch.equal(tensors[name], tensor) for name, tensor in held.items())
    ours = quantkit.load(output, dtype=torch.float32)
    with torch.inference_mode():
        expected, got = (model(TOKENS, use_cache=True).logits for model in (theirs, ours))
        for module in ours.modules():
            if hasattr(module, "quantize_query"):
                del module.quantize_query
        without = ours(TOKENS, use_cache=True).logits
    queries = float((without - expected).abs().mean())
    off = float((got - expected).abs().mean())
    assert off < 0.05 * queries, f"{off:.2e} of {queries:.2e} that rounding queries changes"
    assert check_folder(output, "transformers").ok and check_folder(output, "vllm").ok is (kind == "float")
    assert "has no weights, which SGLang (0.5.23) reads of every group" in check_folder(output, "sglang").render()
    print(f"{kind}, {strategy}: logits {off:.1e} apart, rounding queries changes them by {queries:.1e}")


def test_bad_ones_are_found(tmp_path: Path) -> None:
    output = written(tmp_path, "attn_head")
    tensors, config = load_file(output / "model.safetensors"), json.loads((output / "config.json").read_text())

    def findings(changed: dict[str, Any], client: str = "vllm", **block: Any) -> str:
        now = {n: t for n, t in (tensors | changed).items() if t is not None}
        save_file(now, output / "model.safetensors", metadata={"format": "pt"})
        found = config | {"quantization_config": config["quantization_config"] | block}
        (output / "config.json").write_text(json.dumps(found))
        verdict = check_folder(output, client)
        assert not verdict.ok
        return verdict.render()

    # What llm-compressor 0.14 stores: memory that nobody wrote.
    for garbage in (0.0, 4.5e-44, 1.2e7, float("nan")):
        uncalibrated = {f"{A}.q_scale": torch.full_like(tensors[f"{A}.q_scale"], garbage)}
        assert "which nobody calibrated" in findings(uncalibrated)
        with pytest.raises(QuantkitError, match="they were not calibrated"):
            quantkit.load(output)
    for part, heads in (("q", 4), ("k", 2)):
        cut = tensors[f"{A}.{part}_scale"][:1].clone()
        assert f"is [1, 1, 1]; kv_cache_scheme needs [{heads}, 1, 1]" in findings({f"{A}.{part}_scale": cut})
        with pytest.raises(QuantkitError, match=f"'{A}.{part}_scale' has 1 scales, strategy attn_head has {heads}"):
            quantkit.load(output)
    assert "a config group quantizes queries" in findings({f"{A}.q_scale": None}, "transformers")
    assert "servers read the cache as symmetric" in findings({f"{A}.k_zero_point": torch.ones(2, 1, 1)})
    assert "needs" in findings({f"{A}.k_scale": tensors[f"{A}.k_scale"].reshape(-1)[:1].clone()})
    groups = config["quantization_config"]["config_groups"]
    assert "reads from kv_cache_scheme alone" in findings({}, kv_cache_scheme=None)
    several = {"group_0": groups["group_0"] | {"targets": ["LlamaAttention", "Qwen3Attention"]}}
    assert "one class alone" in findings({}, config_groups=several)
    with pytest.raises(QuantkitError, match="has no weights"):
        ct.read_schemes({"config_groups": {"g": groups["group_0"] | {"targets": ["Linear"]}}})
