"""Ascend MindIE's W8A8: the stored numbers by the format's formulas, and whole models by an emulation of the NPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import engine
from quantkit.config.schemes import QuantizationArgs
from quantkit.config.yaml_file import load_run_config
from quantkit.conformance import check_folder
from quantkit.errors import ConfigError, QuantkitError
from quantkit.formats import mindie
from quantkit.formats.folded import Folded
from quantkit.modifiers.rtn import quantize_weight

from ..e2e.jobs import EXAMPLES, quantize_by
from ..engine.tiny import make

WEIGHTS = "quant_model_weight_w8a8.safetensors"
STATIC = "{QuantizationModifier: {scheme: W8A8_STATIC_ASYM}}"
ARGS = QuantizationArgs(8, "int", strategy="channel")


def cast(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """To the model's dtype and back to fp32, without quantkit."""
    return torch.from_numpy(np.asarray(x, np.float32)).to(dtype).float().numpy()


def npu(x: torch.Tensor, t: dict[str, torch.Tensor]) -> np.ndarray:
    """npu_quantize and npu_quant_matmul as their documentation has them, in numpy with int64 sums."""
    dtype = x.dtype
    s = cast(t["input_scale"].float().numpy(), dtype)
    r = cast(np.float32(1) / s, dtype)
    q = np.rint(x.float().numpy() * r + cast(t["input_offset"].float().numpy(), dtype)).clip(-128, 127).astype(np.int64)
    total = q @ t["weight"].numpy().T.astype(np.int64) + t["quant_bias"].numpy().astype(np.int64)
    assert np.abs(total).max() < 2**31
    if dtype == torch.float16:
        assert t["deq_scale"].dtype == torch.int64
        scale = (t["deq_scale"].numpy().astype(np.uint64).astype(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        assert t["deq_scale"].dtype == torch.float32
        scale = t["deq_scale"].numpy()
    return cast(total.astype(np.float32) * scale, dtype)


def linear(dtype: torch.dtype, rows: int = 48, cols: int = 160) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(rows, cols, generator=generator) * 0.04).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    x = (torch.randn(64, cols, generator=generator) * 0.8 + 0.5).to(dtype)
    return weight, bias, x


def stored(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a Linear whose input's range is that of x."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = torch.tensor([[(high - low) / 255]])
    zero = torch.tensor([[round(-low / float(scale)) - 128]], dtype=torch.int8)
    quantized = quantize_weight("m", weight, ARGS, scale_dtype=torch.float32, pack=False)
    folded = Folded.of(quantized, weight.dtype)
    folded.bias = bias
    tensors = mindie.pack_weight("m", quantized, torch.float32) | mindie.pack_activations("m", scale, zero, folded)
    return {name.removeprefix("m."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_npu_computes_the_layer(dtype: torch.dtype, with_bias: bool) -> None:
    weight, bias, x = linear(dtype)
    t = stored(weight, bias if with_bias else None, x)
    got = npu(x, t)
    names = ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
    assert np.array_equal(mindie.emulate(x, *(t[name] for name in names)).float().numpy(), got)
    exact = x.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    # Half a code of each input and weight, and the output's rounding: a few thousandths of the spread at 160 inputs.
    error = float((torch.from_numpy(got).double() - exact).abs().mean() / exact.std())
    assert error < 0.01, error
    # Without the gain's correction bf16 alone would miss by up to 0.4 %.
    gain = float((torch.from_numpy(got).double() * exact).sum() / exact.square().sum())
    assert abs(gain - 1) < 0.0015, gain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_formulas(dtype: torch.dtype) -> None:
    weight, bias, x = linear(dtype)
    t = stored(weight, bias, x)
    assert {n: (v.dtype, tuple(v.shape)) for n, v in t.items()} == {
        "weight": (torch.int8, (48, 160)),
        "weight_scale": (torch.float32, (48, 1)),
        "weight_offset": (torch.float32, (48, 1)),
        "input_scale": (dtype, (1,)),
        "input_offset": (dtype, (1,)),
        "quant_bias": (torch.int32, (48,)),
        "deq_scale": (torch.float32 if dtype == torch.bfloat16 else torch.int64, (48,)),
    }
    s_x, s_w = t["input_scale"].float(), weight.float().abs().amax(1) / 127
    assert torch.allclose(t["weight_scale"].flatten(), s_w, rtol=1e-6)
    deq = (s_x * t["weight_scale"].flatten()).double()
    row_sums = t["weight"].long().sum(1)
    expected = torch.round(bias.double() / deq - float(t["input_offset"]) * row_sums.double())
    assert torch.equal(t["quant_bias"].double(), expected)
    if dtype == torch.float16:
        bits = t["deq_scale"]
        assert bool((bits & 0x1FFF == 0).all()) and bool((bits >> 32 == 0).all())
        value = torch.from_numpy(bits.numpy().astype(np.uint32).view(np.float32).copy()).double()
        assert float((value / deq - 1).abs().max()) <= 2.0**-11
    else:
        assert torch.equal(t["deq_scale"].double(), (s_x * t["weight_scale"].flatten()).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_input_scale_has_a_good_inverse(dtype: torch.dtype) -> None:
    scales = torch.logspace(-4, 0, 500)
    worst, plain = 0.0, 0.0
    for scale in scales:
        s = mindie.snapped(scale.reshape(1), dtype).float()
        assert scale <= s <= scale * (1 + 5 * torch.finfo(dtype).eps)
        worst = max(worst, abs(float((1 / s).to(dtype).float() * s) - 1))
        nearest = scale.to(dtype).float()
        plain = max(plain, abs(float((1 / nearest).to(dtype).float() * nearest) - 1))
    assert worst < 0.7 * plain


class Emulated(torch.nn.Module):
    """A Linear of the NPU's arithmetic."""

    def __init__(self, tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> None:
        super().__init__()
        names = ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
        self.parts = [tensors[f"{name}.{part}"] for part in names]
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(self.dtype)
        return mindie.emulate(flat, *self.parts).to(x.dtype).reshape(*x.shape[:-1], -1)


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens).logits.float()


def test_a_model_on_the_npu(tmp_path: Path) -> None:
    """Seed's layout; perplexity's cousin, KL, through the emulation beside that through quantkit's own reading."""
    output = quantize_by("tiny-llama", STATIC, tmp_path, "compression.save_name=mindie")
    assert sorted(p.name for p in output.glob("*.safetensors")) == [WEIGHTS]
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config and config["quantize"] == "w8a8"
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    tensors = load_file(output / WEIGHTS)
    described = json.loads((output / mindie.DESCRIPTION).read_text())
    assert described["model_quant_type"] == "W8A8" and described["version"] == "1.0.0"
    assert set(tensors) < set(described)
    kinds = {name: described[name] for name in tensors}
    assert kinds["model.embed_tokens.weight"] == kinds["model.layers.0.input_layernorm.weight"] == "FLOAT"
    parts = ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
    assert {kinds[f"model.layers.0.self_attn.q_proj.{part}"] for part in parts} == {"W8A8"}
    for layer in range(4):
        for group in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            for part in ("input_scale", "input_offset"):
                values = {float(tensors[f"model.layers.{layer}.{name}.{part}"]) for name in group}
                assert len(values) == 1
    source = EXAMPLES / "models" / "tiny-llama"
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.randint(3, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    plain = logits(model, tokens).log_softmax(-1)
    for name in [n.removesuffix(".quant_bias") for n in tensors if n.endswith(".quant_bias")]:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Emulated(tensors, name, torch.bfloat16))
    found = logits(model, tokens).log_softmax(-1)
    loaded = logits(quantkit.load(output, dtype=torch.float32), tokens).log_softmax(-1)
    # The kernels divide by the scale where the NPU multiplies with its rounded inverse.
    assert float((found.exp() * (found - loaded)).sum(-1).mean()) < 0.01
    divergence = float((plain.exp() * (plain - found)).sum(-1).mean())
    assert 0 < divergence < 0.02, divergence
    assert check_folder(output, "mindie").ok, check_folder(output, "mindie").render()


def run(model: Path, folder: Path, what: str) -> Path:
    yaml = folder / "job.yaml"
    yaml.write_text(
        f"global: {{save_path: {folder}, max_shard_size: 60kB}}\nmodel: {{model_path: {model}}}\n"
        f"compression: {{{what}}}\ndataset: {{data_path: {yaml}, max_seq_length: 32, num_samples: 4}}\n"
    )
    rows = [torch.randint(3, 128, (24,)).tolist() for _ in range(4)]
    result = engine.run(load_run_config(yaml, overwrite=True), rows=rows, progress=False)
    assert result.audit.ok, result.audit.render()
    return result.output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_shards_and_smoothing(dtype: torch.dtype, tmp_path: Path) -> None:
    """qwen2 has biases on q, k and v; smoothing comes before; several files have an index of their own name."""
    model = tmp_path / "model"
    make(model, "qwen2", dtype, tie_word_embeddings=False)
    recipe = "recipe: {SmoothQuantModifier: {}, QuantizationModifier: {scheme: W8A8_STATIC_ASYM}}, save_name: mindie"
    output = run(model, tmp_path, recipe)
    index = json.loads((output / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    assert all(file.startswith("quant_model_weight_w8a8-") for file in index.values()) and len(set(index.values())) > 1
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(index.values())):
        tensors |= load_file(output / file)
    q = "model.layers.1.self_attn.q_proj"
    scale = mindie.dequantizing_scale(tensors[f"{q}.deq_scale"]).double()
    if dtype == torch.float16:
        scale = (tensors[f"{q}.input_scale"].float() * tensors[f"{q}.weight_scale"].flatten()).double()
    correction = float(tensors[f"{q}.input_offset"]) * tensors[f"{q}.weight"].long().sum(1).double()
    assert torch.equal(
        tensors[f"{q}.quant_bias"].double(), torch.round(tensors[f"{q}.bias"].double() / scale - correction)
    )
    assert check_folder(output, "mindie").ok, check_folder(output, "mindie").render()


def test_experts_are_dynamic(tmp_path: Path) -> None:
    schemes = "{W8A8: ['re:.*experts.*'], W8A8_STATIC_ASYM: ['re:.*attn.*']}"
    output = quantize_by(
        "tiny-moe", f"{{QuantizationModifier: {{scheme: {schemes}}}}}", tmp_path, "compression.save_name=mindie"
    )
    described = json.loads((output / mindie.DESCRIPTION).read_text())
    assert described["model.layers.0.mlp.experts.3.up_proj.weight_scale"] == "W8A8_DYNAMIC"
    assert described["model.layers.0.self_attn.q_proj.deq_scale"] == "W8A8"
    assert check_folder(output, "mindie").ok
    with pytest.raises(ConfigError, match="experts with static inputs"):
        quantize_by("tiny-moe", STATIC, tmp_path, "compression.save_name=mindie")


def test_by_angelslims_words(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make(model, "llama", torch.bfloat16)
    output = run(
        model, tmp_path, "quantization: {name: int8_static, save_name: mindie, ignore_layers: [lm_head, down_proj]}"
    )
    described = json.loads((output / mindie.DESCRIPTION).read_text())
    assert described["model.layers.0.mlp.down_proj.weight"] == described["lm_head.weight"] == "FLOAT"
    offsets = [
        t for file in output.glob("*.safetensors") for n, t in load_file(file).items() if n.endswith("input_offset")
    ]
    assert len(offsets) == 18 and any(float(offset) for offset in offsets)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "recipe: {QuantizationModifier: {scheme: W4A16}}, save_name: mindie",
            "save_name 'mindie' holds symmetric int8",
        ),
        ("recipe: {QuantizationModifier: {scheme: FP8}}, save_name: mindie", "save_name 'mindie' holds symmetric int8"),
        ("recipe: {QuantizationModifier: {scheme: W8A8, kv_cache_scheme: fp8}}, save_name: mindie", "KV cache"),
    ],
)
def test_what_it_does_not_hold_is_refused(what: str, words: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    make(model, "llama", torch.bfloat16)
    with pytest.raises(QuantkitError, match=words):
        run(model, tmp_path, what)


def test_a_model_in_fp32_and_a_bias_out_of_range_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make(model, "llama", torch.float32)
    with pytest.raises(ConfigError, match="is F32; save_name 'mindie' is for models in bfloat16 and float16"):
        run(model, tmp_path, "recipe: {QuantizationModifier: {scheme: W8A8_STATIC}}, save_name: mindie")
    weight, bias, x = linear(torch.bfloat16)
    weight[5] = 0
    weight[5, 0] = 1e-9
    with pytest.raises(QuantkitError, match="the bias of row 5 is"):
        stored(weight, bias * 100, x)


def test_the_check_finds_what_loaders_trip_over(tmp_path: Path) -> None:
    output = quantize_by("tiny-llama", STATIC, tmp_path, "compression.save_name=mindie")
    path = output / mindie.DESCRIPTION
    described = json.loads(path.read_text())
    q = "model.layers.0.self_attn.q_proj"

    def findings(**entries: Any) -> str:
        path.write_text(json.dumps({k: v for k, v in (described | entries).items() if v is not None}))
        verdict = check_folder(output, "mindie")
        assert not verdict.ok
        return verdict.render()

    assert "lm_head.weight" in findings(**{"lm_head.weight": None})
    assert "is not in quant_model_description.json" in findings(**{f"{q}.deq_scale": None})
    assert "become one layer" in findings(**{f"{q}.weight": "W8A8_DYNAMIC"})
    path.write_text(json.dumps(described))
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"quantize": "w8a16"}))
    assert "is 'w8a16' in config.json" in check_folder(output, "mindie").render()
    (output / "config.json").write_text(json.dumps(config))
    tensors = load_file(output / WEIGHTS)
    save_file(tensors | {f"{q}.input_scale": tensors[f"{q}.input_scale"] * 2}, output / WEIGHTS)
    assert "input_scale  differs" in check_folder(output, "mindie").render().replace(" |", "")
    save_file(tensors | {f"{q}.deq_scale": tensors[f"{q}.deq_scale"].long()}, output / WEIGHTS)
    assert "is I64; read is F32" in check_folder(output, "mindie").render()
    assert not check_folder(output, "vllm").ok
