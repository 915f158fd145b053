"""Recipes on whole layers: GPTQ against the textbook in fp64, experts with few tokens, AWQ's choice, reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import engine
from quantkit.calibration.layer import Layer
from quantkit.calibration.statistics import Statistics, Wants
from quantkit.checkpoint.reader import Checkpoint
from quantkit.config.recipe import (
    AWQModifier,
    GPTQModifier,
    Modifier,
    QuantizationModifier,
    Recipe,
    SmoothQuantModifier,
)
from quantkit.config.run_config import CompressionConfig, DatasetConfig, GlobalConfig, ModelConfig, RunConfig
from quantkit.config.schemes import QuantizationArgs, QuantizationScheme
from quantkit.errors import CalibrationError
from quantkit.formats.source import WeightSource
from quantkit.live_output import LiveSink
from quantkit.models.mappings import Smoothing
from quantkit.models.skeleton import Skeleton
from quantkit.modifiers import awq, gptq
from quantkit.modifiers.working import Working
from quantkit.plan import PlannedModule, build_plan
from quantkit.quantized import QuantizedTensor
from quantkit.report.calibration import CalibrationReport

from ..engine.tiny import make


def int4(group_size: int | None = 16, symmetric: bool = True) -> QuantizationScheme:
    strategy: Any = "group" if group_size else "channel"
    return QuantizationScheme("test", QuantizationArgs(4, "int", symmetric, strategy, group_size))


def calibrated(
    folder: Path, modifiers: tuple[Modifier, ...], rows: list[list[int]], forwards: int | str = "auto", **more: Any
) -> tuple[LiveSink, CalibrationReport]:
    config = RunConfig(
        GlobalConfig(save_path=str(folder / "out"), calibration_forwards=forwards),
        ModelConfig(str(folder)),
        CompressionConfig(recipe=Recipe(modifiers)),
        DatasetConfig(data_path="rows"),
        source=folder,
        stem="out",
        **more,
    )
    kept = LiveSink()
    with Checkpoint(folder) as checkpoint:
        plan = build_plan(config, checkpoint)
        skeleton = Skeleton(folder, checkpoint.tensors)
        report = engine.calibrate(plan, skeleton, WeightSource(checkpoint), rows, kept, progress=False)
        # Whatever the plan promises to write comes, and nothing else.
        assert set(kept.weights) == set(plan.modules)
        assert set(kept.tensors) == set(plan.rewritten)
    return kept, report


def tokens(count: int, length: int = 32) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 128, (length,), generator=generator).tolist() for _ in range(count)]


def one_linear(rows: int, cols: int) -> tuple[Working, Statistics, Tensor]:
    generator = torch.Generator().manual_seed(rows + cols)
    linear = torch.nn.Linear(cols, rows, bias=False)
    linear.weight.data = torch.randn(rows, cols, generator=generator)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    x = torch.randn(4 * cols, cols, generator=generator) @ mix
    x = x * torch.logspace(-1, 1, cols)[torch.randperm(cols, generator=generator)]
    seen = Statistics.of(x, "x", Wants(gram=True))
    layer = Layer(0, "l", {"l.m": linear}, {"l.m.weight": (linear, "weight")})
    return Working(layer, {"l.m": seen}), seen, x


class _Alone:
    """NVFP4's global scale is each Linear's own."""

    def of(self, module: str, weight: Any) -> None:
        return None


ALONE: Any = _Alone()


def planned(rows: int, cols: int, scheme: QuantizationScheme, modifier: QuantizationModifier) -> dict[str, Any]:
    return {"l.m": PlannedModule("l.m", rows, cols, "F32", scheme, modifier)}


@pytest.mark.parametrize("actorder", [None, "weight", "group"])
@pytest.mark.parametrize(("group_size", "symmetric"), [(16, True), (16, False), (None, True)])
def test_gptq_beats_rounding_whatever_the_order(actorder: Any, group_size: int | None, symmetric: bool) -> None:
    """The loss it tells is that of the weights it hands on, in fp64, and well below that of rounding to nearest."""
    if actorder == "group" and group_size is None:
        pytest.skip("order by group needs groups")
    working, _, x = one_linear(48, 64)
    modifier = GPTQModifier(scheme=int4(group_size, symmetric), actorder=actorder, dampening_frac=0.0)
    args = modifier.groups[0].scheme
    modules = planned(48, 64, args, modifier)
    outcome = gptq.quantize(modifier, ["l.m"], working, modules, {"l.m": torch.float32}, {"l.m": False}, ALONE)["l.m"]
    assert (outcome.quantized.g_idx is not None) == (actorder == "group")
    weight = working.weight("l.m")

    def loss(quantized: QuantizedTensor) -> float:
        return float((x.double() @ (quantized.dequantize().double() - weight.double()).T).square().mean())

    assert outcome.loss == pytest.approx(loss(outcome.quantized), rel=2e-3)
    energy = float((x.double() @ weight.double().T).square().mean())
    assert outcome.relative == pytest.approx(loss(outcome.quantized) / energy, rel=2e-3)
    plain = QuantizationModifier(scheme=int4(group_size, symmetric)).groups[0].scheme.weights
    nearest = gptq.quantize_weight("l.m", weight, plain, scale_dtype=torch.float32, pack=False)
    assert loss(outcome.quantized) < (0.75 if actorder is None else 0.6) * loss(nearest)


@pytest.mark.parametrize("actorder", [None, "weight"])
@pytest.mark.parametrize("scheme", ["FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP8A16", "MXFP4A16", "NVFP4A16"])
def test_gptq_of_floats_keeps_the_scales_and_beats_rounding(scheme: str, actorder: Any) -> None:
    rows, cols = 150, 160  # a block of 128 x 128 and parts of three
    working, _, x = one_linear(rows, cols)
    weight = working.weight("l.m")

    def by_gptq(**dampening: float) -> gptq.Outcome:
        modifier = GPTQModifier(scheme=scheme, actorder=actorder, **dampening)
        modules = planned(rows, cols, modifier.groups[0].scheme, modifier)
        return gptq.quantize(modifier, ["l.m"], working, modules, {"l.m": torch.float32}, {"l.m": False}, ALONE)["l.m"]

    found, args = by_gptq(), GPTQModifier(scheme=scheme).groups[0].scheme.weights
    nearest = gptq.quantize_weight("l.m", weight, args, scale_dtype=torch.float32, pack=False)
    assert torch.equal(found.quantized.scale, nearest.scale) and found.quantized.packed == args.fp4
    assert (found.quantized.global_scale is None) == (args.scales != "nvfp4")

    def loss(quantized: QuantizedTensor) -> float:
        return float((x.double() @ (quantized.dequantize().double() - weight.double()).T).square().mean())

    assert loss(found.quantized) < (0.75 if actorder is None else 0.5) * loss(nearest)
    undamped = by_gptq(dampening_frac=0.0)  # whose loss is that of the inputs as they are
    assert undamped.loss == pytest.approx(loss(undamped.quantized), rel=2e-3)


def test_experts_in_one_batch_are_what_they_are_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "qwen3_moe")
    recipe = (GPTQModifier(scheme=int4(), ignore=["lm_head"]),)
    together, _ = calibrated(tmp_path, recipe, tokens(8))
    monkeypatch.setattr(gptq, "BATCH_BYTES", 0)
    apart, _ = calibrated(tmp_path, recipe, tokens(8))
    for name, quantized in together.weights.items():
        assert torch.equal(quantized.codes, apart.weights[name].codes), name
        assert torch.equal(quantized.scale, apart.weights[name].scale), name


@pytest.mark.parametrize(("policy", "method"), [("rtn", "rtn (few tokens)"), ("all_tokens", "gptq (few tokens)")])
def test_experts_with_few_tokens_follow_the_policy(policy: Any, method: str, tmp_path: Path) -> None:
    make(tmp_path, "qwen3_moe", mlp_only_layers=[0, 1])
    modifier = GPTQModifier(scheme=int4(), min_tokens_per_module=20, low_data=policy)
    kept, report = calibrated(tmp_path, (modifier,), tokens(1))
    few = {m.name for m in report.modules if ".experts." in m.name and m.tokens < 20}
    assert few and {m.method for m in report.modules if m.name in few} == {method}
    assert any(m.method == "gptq" for m in report.modules if ".experts." in m.name)
    assert all(torch.isfinite(q.dequantize()).all() for q in kept.weights.values())
    assert all(name.split(".experts.")[0] in "\n".join(report.remarks()) for name in few)


def test_too_few_tokens_can_be_an_error(tmp_path: Path) -> None:
    make(tmp_path, "qwen3_moe", mlp_only_layers=[0, 1])
    modifier = GPTQModifier(scheme=int4(), min_tokens_per_module=20, low_data="error")
    with pytest.raises(
        CalibrationError, match=r"experts\.\d\.\w+_proj: only \d+ calibration tokens reached this expert"
    ):
        calibrated(tmp_path, (modifier,), tokens(1))


def test_awq_on_experts_that_saw_no_token(tmp_path: Path) -> None:
    """Each has statistics of its own, although borrowed: smoothing one leaves the other's alone."""
    make(tmp_path, "qwen3_moe", mlp_only_layers=[0, 1])
    kept, report = calibrated(tmp_path, (AWQModifier(scheme=int4(symmetric=False)),), [[1]])
    assert report.silent_experts
    assert all(torch.isfinite(q.dequantize()).all() for q in kept.weights.values())


@pytest.mark.parametrize(
    "modifiers",
    [
        (SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(scheme="W8A8")),
        (AWQModifier(), GPTQModifier(scheme=int4())),
        (AWQModifier(duo_scaling="both"), QuantizationModifier(scheme=int4(symmetric=False))),
        (SmoothQuantModifier(), QuantizationModifier(scheme="W8A8_STATIC_ASYM", kv_cache_scheme="fp8")),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "deepseek_v3"])
def test_recipes_run_on_every_shape_of_model_and_repeat(
    modifiers: tuple[Modifier, ...], model_type: str, tmp_path: Path
) -> None:
    if model_type == "deepseek_v3" and any(getattr(m, "kv_cache_scheme", None) for m in modifiers):
        modifiers = (SmoothQuantModifier(), QuantizationModifier(scheme="W8A8_STATIC_ASYM"))
    make(tmp_path, model_type, moe_intermediate_size=32, q_lora_rank=32, kv_lora_rank=16)
    kept, _ = calibrated(tmp_path, modifiers, tokens(6))
    again, _ = calibrated(tmp_path, modifiers, tokens(6))
    for name, quantized in kept.weights.items():
        assert torch.isfinite(quantized.dequantize()).all(), name
        assert torch.equal(quantized.codes, again.weights[name].codes), name
    for name, value in kept.tensors.items():
        assert torch.equal(value, again.tensors[name]), name


def test_awq_takes_the_candidate_that_is_best_in_fp64() -> None:
    working, seen, x = one_linear(48, 64)
    layer = working.layer
    norm = torch.nn.LayerNorm(64, bias=False)
    stored = {**layer.stored, "l.norm.weight": (norm, "weight")}
    working = Working(Layer(0, "l", layer.linears, stored), {"l.m": seen})
    modifier = AWQModifier(scheme=int4(symmetric=False))
    modules = planned(48, 64, modifier.groups[0].scheme, modifier)
    place = Smoothing(0, "l.norm", ("l.m",), "norm")
    s, loss, before = awq.search(modifier, place, working, modules)
    weight, args = working.weight("l.m"), modules["l.m"].scheme.weights

    def exact(vector: Tensor) -> float:
        scaled = gptq.quantize_weight("l.m", weight * vector, args, scale_dtype=torch.float32, pack=False)
        return float((x.double() @ (scaled.dequantize().double() / vector - weight).T).square().sum())

    assert loss == pytest.approx(exact(s), rel=1e-4) and before == pytest.approx(exact(torch.ones(64)), rel=1e-4)
    assert seen.absum is not None
    share = (weight.abs().view(48, -1, 16) / weight.abs().view(48, -1, 16).amax(-1, keepdim=True)).flatten(1).mean(0)
    candidates = awq.grid(seen.absum / seen.count, share, modifier)
    assert exact(s) <= min(map(exact, candidates)) * (1 + 1e-3)
    assert loss < 0.9 * before, "inputs over two decades leave something to gain"


def test_the_report_tells_the_worst_first(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    _, report = calibrated(tmp_path, (GPTQModifier(scheme=int4()),), tokens(4))
    losses = [m.relative for m in report.modules]
    assert len(losses) == 21 and all(loss is not None and 0 < loss < 0.1 for loss in losses)
    text = report.render()
    worst = max(report.modules, key=lambda m: m.relative or 0)
    assert text.splitlines()[2].startswith(worst.name)
    assert "and 9 more" in text


def test_a_report_says_which_layers_took_two_forwards_and_why(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    _, one = calibrated(tmp_path, (SmoothQuantModifier(), GPTQModifier(scheme="W8A8")), tokens(4))
    assert (one.once, one.twice) == (3, {}) and "forwards" not in "\n".join(one.remarks())
    _, awq_ = calibrated(tmp_path, (AWQModifier(scheme=int4(symmetric=False)),), tokens(4))
    why = "AWQ smooths Linears by the inputs of others behind them"
    assert awq_.twice == {f"model.layers.{i}": why for i in range(3)}
    assert f"two forwards instead of one in model.layers.0 and 2 more: {why}" in awq_.remarks()
    assert f'"model.layers.1": "{why}"' in awq_.to_json()
    by_hand = SmoothQuantModifier(mappings=[(("re:.*down_proj",), "re:.*up_proj")])
    _, other = calibrated(tmp_path, (by_hand, GPTQModifier(scheme="W8A8")), tokens(4))
    assert other.twice["model.layers.2"] == "model.layers.2.mlp.up_proj is smoothed, which is no norm"


def test_one_forward_and_two_smooth_and_measure_the_first_input_alike(tmp_path: Path) -> None:
    """Nothing is quantized before it. Behind it codes are not the same, but about as good."""
    make(tmp_path, "llama", torch.float32)
    recipe = (SmoothQuantModifier(), QuantizationModifier(scheme="W8A8_STATIC", kv_cache_scheme="fp8"))
    (one, _), (two, _) = (calibrated(tmp_path, recipe, tokens(4), forwards=n) for n in (1, 2))
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(one.tensors[norm], two.tensors[norm]) and not torch.equal(one.tensors[norm], torch.ones(64))
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj"
        assert torch.equal(one.weights[name].codes, two.weights[name].codes)
        torch.testing.assert_close(one.inputs[name][0], two.inputs[name][0], rtol=1e-5, atol=0)
    for name, scales in one.caches.items():
        torch.testing.assert_close(scales, two.caches[name], rtol=0.03, atol=0)
    for name, (scale, _) in one.inputs.items():
        torch.testing.assert_close(scale, two.inputs[name][0], rtol=0.1, atol=0)


@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "W8A8_STATIC_ASYM"])
def test_every_observer_of_inputs_gives_usable_scales(scheme: str, tmp_path: Path) -> None:
    """None is wider than the range but admm's, whose scale may exceed it; all readers of one input agree."""
    make(tmp_path, "llama")
    found = {}
    for name in ("minmax", "moving_average", "percentile", "mse", "kl", "eq", "admm"):
        modifier = QuantizationModifier(scheme=scheme, input_observer=name)
        found[name] = calibrated(tmp_path, (modifier,), tokens(4))[0].inputs
    for name, inputs in found.items():
        for module, (scale, zero_point) in inputs.items():
            widest = found["minmax"][module][0]
            assert 0.01 * widest < scale <= widest * (1.2 if name == "admm" else 1.001), (name, module)
            assert (zero_point is None) == (scheme == "W8A8_STATIC")
        q, k = (inputs[f"model.layers.1.self_attn.{p}_proj"][0] for p in "qk")
        assert torch.equal(q, k)
    assert len({float(i["model.layers.1.mlp.down_proj"][0]) for i in found.values()}) > 4, "they differ"


def test_scales_of_the_cache_are_the_largest_keys_and_values(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    whole = QuantizationModifier(scheme="W8A8", kv_cache_scheme="int8")
    heads = QuantizationModifier(
        scheme="W8A8", kv_cache_scheme={"num_bits": 8, "type": "int", "strategy": "attn_head", "symmetric": True}
    )
    (one, _), (per_head, _) = (calibrated(tmp_path, (m,), tokens(4)) for m in (whole, heads))
    assert set(one.caches) == {f"model.layers.{i}.self_attn" for i in range(3)}
    for name, (key, value) in one.caches.items():
        assert key.shape == value.shape == (1,)
        assert per_head.caches[name][0].shape == (2,)
        assert torch.equal(per_head.caches[name][0].amax().reshape(1), key)
