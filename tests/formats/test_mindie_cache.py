"""C8, MindIE's KV cache in int8: stored numbers decoded from raw bytes in numpy, and models with a cache of numpy's."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import quantkit
from quantkit import oneshot
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import main
from quantkit.config.recipe import QuantizationModifier
from quantkit.config.schemes import QuantizationArgs
from quantkit.conformance import check_folder
from quantkit.convert import convert
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats import mindie, mindie_cache
from quantkit.formats.cache import CacheShape
from quantkit.formats.source import WeightSource, cache_quantizer
from quantkit.inspection import inspect_folder

from ..e2e.jobs import EXAMPLES, quantize_by
from ..engine.tiny import make
from .test_mindie import run

WEIGHTS = "quant_model_weight_w8a8.safetensors"
DATA = EXAMPLES / "data" / "calibration.jsonl"
CHANNELS = "{num_bits: 8, type: int, strategy: channel}"
RECIPE = f"{{QuantizationModifier: {{scheme: W8A8_STATIC_ASYM, kv_cache_scheme: {CHANNELS}}}}}"
K, V, K_OFFSET, V_OFFSET = mindie_cache.CACHE


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 rounded to bf16, half to even, as fp32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def raw(file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """A safetensors file by its specification."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    return {
        name: (info["dtype"], info["shape"], body[slice(*info["data_offsets"])])
        for name, info in header.items()
        if name != "__metadata__"
    }


def numpy_cached(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What vLLM-Ascend writes to its cache and reads from it: bf16 arithmetic, by scales alone. x [.., heads, T, D]."""
    s = scale.reshape(x.shape[1], 1, x.shape[3])
    codes = np.rint(to_bf16(to_bf16(x) * to_bf16(np.float32(1) / s))).clip(-128, 127)
    return to_bf16(codes * s)


class NumpyCache(DynamicCache):
    """Rounds what is put into it, with the scales of each layer."""

    def __init__(self, scales: list[tuple[np.ndarray, np.ndarray]]) -> None:
        super().__init__()
        self.scales = scales
        self.seen: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((key_states, value_states))
        k, v = (
            torch.from_numpy(numpy_cached(x.numpy(), s))
            for x, s in zip((key_states, value_states), self.scales[layer_idx], strict=True)
        )
        return super().update(k, v, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("numel", [1, 4, 128])
def test_the_numbers(numel: int) -> None:
    scale = torch.logspace(-4, -1, numel)
    stored = mindie_cache.kv_scales("a", scale, scale.flip(0), CacheShape(4, 128, 128, "BF16"))
    planned = mindie_cache.kv_tensors("a", QuantizationArgs(8, "int"), CacheShape(4, 128, 128, "BF16"))
    assert [(t.name, t.dtype, t.shape) for t in planned] == [
        (f"a.{part}", "BF16", (128,)) for part in mindie_cache.CACHE
    ]
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()} == {
        t.name: (torch.bfloat16, t.shape) for t in planned
    }
    assert not stored[f"a.{K_OFFSET}"].any() and not stored[f"a.{V_OFFSET}"].any()
    wide = scale.repeat_interleave(128 // numel)
    ratio = stored[f"a.{K}"].float() / wide
    assert bool((ratio >= 1).all()) and float(ratio.max()) <= 1 + 5 * torch.finfo(torch.bfloat16).eps
    assert torch.equal(stored[f"a.{V}"].reshape(numel, -1), stored[f"a.{K}"].reshape(numel, -1).flip(0))


def test_the_arithmetic() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 9, 32, generator=generator)
    scale = torch.rand(128, generator=generator).bfloat16() * 0.02 + 0.005
    offset = torch.zeros(128, dtype=torch.bfloat16)
    got = mindie_cache.emulate(x, scale, offset)
    assert np.array_equal(got.numpy(), numpy_cached(x.numpy(), scale.float().numpy()))
    # Without the rounding of bf16 the codes are at most one off: that of live models and other formats.
    plain = cache_quantizer(QuantizationArgs(8, "int", strategy="channel"), scale.float())(x)
    step = scale.float().reshape(4, 1, 32)
    assert float(((got - plain).abs() / step).max()) < 1.6
    inside = x.abs() < 126 * step
    assert float(((plain - x).abs() / step)[inside].max()) < 0.5001
    shifted = mindie_cache.emulate(x, scale, torch.full((128,), 3.0))
    codes = np.rint(to_bf16(to_bf16(to_bf16(x.numpy()) * to_bf16(1 / scale.float().numpy().reshape(4, 1, 32))) + 3))
    expected = to_bf16(to_bf16(codes.clip(-128, 127) - 3) * scale.float().numpy().reshape(4, 1, 32))
    assert np.array_equal(shifted.numpy(), expected)


def test_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files, what the checker and inspect say of them, and its logits beside a cache of numpy's."""
    output = quantize_by("tiny-llama", RECIPE, tmp_path, "compression.save_name=mindie")
    described = json.loads((output / mindie.DESCRIPTION).read_text())
    assert described["kv_quant_type"] == described["kv_cache_type"] == "C8" and described["model_quant_type"] == "W8A8"
    found = raw(output / WEIGHTS)
    scales: list[tuple[np.ndarray, np.ndarray]] = []
    for layer in range(4):
        made = []
        for part in (K, V, K_OFFSET, V_OFFSET):
            name = f"model.layers.{layer}.self_attn.{part}"
            dtype, shape, data = found[name]
            assert (dtype, shape, described[name]) == ("BF16", [128], "C8")
            made.append((np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32))
        assert not made[2].any() and not made[3].any()
        scales.append((made[0], made[1]))
    verdict = check_folder(output, "mindie")
    assert verdict.ok and verdict.schemes["KV cache C8"] == 4
    assert "MindIE documents its int8 KV cache for float16 only" in verdict.render()
    low, high = min(float(k.min()) for k, _ in scales), max(float(k.max()) for k, _ in scales)
    assert f"KV cache int8 per channel, symmetric; 4 attention layers, scales of keys {low:.2e} to {high:.2e}" in (
        inspect_folder(output, progress=False).render()
    )

    # The same folder without its cache, which gets one of numpy's.
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in output.iterdir():
        if file.name not in (WEIGHTS, mindie.DESCRIPTION):
            (plain / file.name).write_bytes(file.read_bytes())
    tensors = load_file(output / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if "kv_cache" not in n}, plain / WEIGHTS)
    rest = {n: kind for n, kind in described.items() if kind != "C8"}
    (plain / mindie.DESCRIPTION).write_text(json.dumps(rest))
    tokens = torch.randint(3, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    without, cached = quantkit.load(plain, dtype=torch.float32), quantkit.load(output, dtype=torch.float32)
    reference = NumpyCache(scales)
    with torch.inference_mode():
        expected = without(tokens, past_key_values=reference).logits
        float_cache = without(tokens, past_key_values=DynamicCache()).logits
        got = cached(tokens, past_key_values=DynamicCache()).logits
        assert torch.equal(got, expected) and not torch.equal(got, float_cache)
        again = cached.generate(tokens[:1, :8], attention_mask=torch.ones(1, 8), max_new_tokens=4, do_sample=False)
    assert again.shape == (1, 12)
    with pytest.raises(ConfigError, match="scales per channel, which no kernel reads"):
        quantkit.QuantizedCache.of(cached)
    # The ranges are those of the calibration: random tokens reach about as far.
    for (k, v), (key, value) in zip(scales, reference.seen, strict=True):
        for scale, x in ((k, key), (v, value)):
            reach = x.abs().amax((0, 2)).flatten().numpy() / 127
            assert 0.3 < np.median(reach / scale) < 1.5
    with Checkpoint(output) as checkpoint:
        quantizers = WeightSource(checkpoint).cache_quantizers
        x = torch.randn(1, 4, 5, 32)
        k, v = quantizers["model.layers.2.self_attn"]
        assert np.array_equal(k(x).numpy(), numpy_cached(x.numpy(), scales[2][0]))
        assert np.array_equal(v(x).numpy(), numpy_cached(x.numpy(), scales[2][1]))
    with pytest.raises(ConfigError, match="no place for KV-cache scales as the source has them"):
        convert(output, tmp_path / "no", "compressed-tensors")
    text, report = tmp_path / "text.txt", tmp_path / "eval.json"
    text.write_text("".join(json.loads(line)["text"] for line in (DATA).read_text().splitlines()[:8]))
    figures = {}
    for folder in (output, plain):
        arguments = ["--windows", "8", "--window-length", "64", "--json", str(report)]
        baseline = ["--baseline", str(EXAMPLES / "models" / "tiny-llama")]
        assert main(["eval", str(folder), "--text", str(text), *arguments, *baseline]) == 0
        figures[folder] = json.loads(report.read_text())
    assert figures[output] != figures[plain]
    print(figures)


def test_by_angelslims_words_and_by_oneshot(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make(model, "llama", torch.float16)
    words = "quantization: {name: int8_static, save_name: mindie, quant_method: {kv_cache: per-tensor}}"
    output = run(model, tmp_path, words)
    k = {n: t for f in output.glob("*.safetensors") for n, t in load_file(f).items() if n.endswith(K)}
    assert len(k) == 3 and all(t.dtype == torch.float16 and len(t.unique()) == 1 for t in k.values())
    recipe = QuantizationModifier(scheme="W8A8_STATIC_ASYM", kv_cache_scheme="int8", ignore=["lm_head"])
    rows = [torch.randint(3, 128, (24,)).tolist() for _ in range(4)]
    streamed = oneshot(
        str(model), recipe=recipe, dataset=rows, save_name="mindie", output_dir=tmp_path / "streamed", progress=False
    )
    live = oneshot(
        AutoModelForCausalLM.from_pretrained(model), recipe=recipe, dataset=rows, save_name="mindie", progress=False
    )
    live.save_pretrained(tmp_path / "live")
    one, two = (load_file(f / WEIGHTS) for f in (streamed, tmp_path / "live"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    for folder in (streamed, tmp_path / "live"):
        assert check_folder(folder, "mindie").ok
    with pytest.raises(CheckpointError, match="C9 is not read"):
        mindie.read_kv_cache({"kv_cache_type": "C9"})


@pytest.mark.parametrize(
    ("model_type", "dtype", "cache", "words"),
    [
        ("llama", torch.bfloat16, "fp8", "a KV cache is in int8 there, not FP8"),
        ("phi3", torch.bfloat16, "int8", "has no k_proj and v_proj"),
    ],
)
def test_what_it_does_not_hold_is_refused(
    model_type: str, dtype: torch.dtype, cache: str, words: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    make(model, model_type, dtype)
    with pytest.raises(ConfigError, match=words):
        run(
            model,
            tmp_path,
            f"recipe: {{QuantizationModifier: {{scheme: W8A8, kv_cache_scheme: {cache}}}}}, save_name: mindie",
        )


def test_others_do_not_hold_channels(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make(model, "llama", torch.bfloat16)
    recipe = f"recipe: {{QuantizationModifier: {{scheme: W8A8, kv_cache_scheme: {CHANNELS}}}}}"
    with pytest.raises(ConfigError, match="scales per channel are read on NPUs only"):
        run(model, tmp_path, recipe)
    alone = f"recipe: {{QuantizationModifier: {{kv_cache_scheme: {CHANNELS}}}}}, save_name: mindie"
    with pytest.raises(ConfigError, match="goes with quantized Linears"):
        run(model, tmp_path, alone)


def test_the_check_finds_what_loaders_trip_over(tmp_path: Path) -> None:
    output = quantize_by("tiny-llama", RECIPE, tmp_path, "compression.save_name=mindie")
    tensors, path = load_file(output / WEIGHTS), output / mindie.DESCRIPTION
    described = json.loads(path.read_text())
    k = f"model.layers.0.self_attn.{K}"

    def findings(changed: dict[str, Any], **entries: Any) -> str:
        now = {n: t for n, t in (tensors | changed).items() if t is not None}
        save_file(now, output / WEIGHTS)
        path.write_text(json.dumps({n: v for n, v in (described | entries).items() if v is not None}))
        verdict = check_folder(output, "mindie")
        assert not verdict.ok
        return verdict.render()

    assert "the cache is scaled by 1" in findings({k: None})
    assert "not finite and positive" in findings({k: tensors[k] * 0})
    assert "by the scales alone" in findings({k.replace("scale", "offset"): tensors[k] * 0 + 1})
    assert "makes 128 channels" in findings({k: tensors[k][:1].clone()})
    assert "it is not looked at" in findings({}, kv_quant_type=None, kv_cache_type=None)
    assert "served is C8" in findings({}, kv_quant_type="KV4", kv_cache_type="KV4")
