"""Smoothing changes no model: every place of every family's table, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.calibration.batches import batches
from quantkit.calibration.forward import embed, forward
from quantkit.calibration.layer import Layer
from quantkit.calibration.statistics import Statistics, Wants
from quantkit.config.recipe import AWQModifier, Mapping, QuantizationModifier, SmoothQuantModifier
from quantkit.errors import CalibrationError, PlanError
from quantkit.models.families import family_of
from quantkit.models.mappings import Smoothing, smoothings
from quantkit.models.skeleton import Skeleton
from quantkit.modifiers import smoothquant
from quantkit.modifiers.smooth_check import require_harmless
from quantkit.modifiers.working import Working, narrowed, widened

from ..engine.tiny import CONFIGS, FileSource, make
from .test_pipeline import calibrated, int4, tokens

MODIFIERS = (SmoothQuantModifier(), AWQModifier())


def layer_of(skeleton: Skeleton, index: int) -> Layer:
    return Layer(index, skeleton.layer_prefix(index), skeleton.linears(index), skeleton.stored(index))


def logits(folder: Path, places: tuple[Smoothing, ...] = (), dtype: torch.dtype | None = None) -> Tensor:
    """Of a few tokens, each place smoothed by its own random vector."""
    source = FileSource(folder)
    skeleton = Skeleton(folder, source.names(), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    data = batches([list(range(1, 33))])
    with torch.no_grad():
        hidden, calls = embed(skeleton, source, data)
        for index in range(skeleton.num_layers):
            skeleton.materialize(index, source)
            probe = partial(skeleton.forward, index, hidden.view(0), calls[0][index])
            layer = replace(layer_of(skeleton, index), probe=probe)
            require_harmless([place for place in places if place.layer == index], layer)
            working = Working(layer, {})
            for place in places:
                if place.layer == index:
                    width = working.weight(place.smooth).shape[0]
                    working.smooth(place, torch.exp(torch.randn(width, generator=generator)))
            working.settle()
            forward(skeleton, index, data, calls, hidden)
            skeleton.drop(index, source)
        with skeleton.outer(source, head=True):
            return skeleton.head(hidden.view(0))


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@pytest.mark.parametrize("modifier", MODIFIERS, ids=["smoothquant", "awq"])
def test_every_place_of_the_tables_leaves_the_model_as_it_is(
    model_type: str, modifier: SmoothQuantModifier | AWQModifier, tmp_path: Path
) -> None:
    make(tmp_path, model_type)
    source = FileSource(tmp_path)
    skeleton = Skeleton(tmp_path, source.names())
    places, _ = smoothings(modifier, skeleton.family, {n: tuple(t.shape) for n, t in source.tensors.items()})
    assert {place.layer for place in places} == {0, 1, 2}
    before, after = logits(tmp_path), logits(tmp_path, places)
    # fp32 throughout: a relative error of some hundred roundings.
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("model_type", "changes", "norm", "mappings"),
    [
        ("gemma2", {}, "post_attention_layernorm", (Mapping("post_attention_layernorm", ("mlp.gate_proj",)),)),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "input_layernorm", None),
    ],
)
def test_a_norm_that_the_residual_reads_is_refused_by_name(
    model_type: str, changes: dict[str, Any], norm: str, mappings: tuple[Mapping, ...] | None, tmp_path: Path
) -> None:
    make(tmp_path, model_type, **changes)
    modifiers = (SmoothQuantModifier(mappings=mappings), QuantizationModifier(scheme=int4()))
    with pytest.raises(CalibrationError, match=rf"0\.{norm}: dividing its output .* changes what the layer computes"):
        calibrated(tmp_path, modifiers, tokens(2))


def test_rounding_of_a_bf16_norm_is_made_good_in_the_weights(tmp_path: Path) -> None:
    """The norm's weight is stored in bf16; s is corrected by what that changed, so s_norm * W stays exact."""
    make(tmp_path, "llama", torch.bfloat16)
    source = FileSource(tmp_path)
    skeleton = Skeleton(tmp_path, source.names())
    skeleton.materialize(0, source)
    layer = layer_of(skeleton, 0)
    place = Smoothing(0, "model.layers.0.input_layernorm", ("model.layers.0.self_attn.q_proj",), "norm")
    norm, weight = (layer.tensor(f"{name}.weight").float() for name in (place.smooth, place.balance[0]))
    working = Working(layer, {})
    working.smooth(place, torch.rand(64) + 0.1)
    stored = working.tensor(f"{place.smooth}.weight")
    assert torch.equal(stored, stored.bfloat16().float())
    torch.testing.assert_close(stored * working.weight(place.balance[0]), norm * weight, rtol=1e-6, atol=0)


def test_a_reader_that_is_left_out_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    source = FileSource(tmp_path)
    skeleton = Skeleton(tmp_path, source.names())
    skeleton.materialize(0, source)
    seen = Statistics.of(torch.randn(8, 64), "x", Wants(gram=True))
    prefix = "model.layers.0.self_attn."
    working = Working(layer_of(skeleton, 0), {f"{prefix}{p}_proj": seen for p in "qkv"})
    place = Smoothing(0, "model.layers.0.input_layernorm", (f"{prefix}q_proj", f"{prefix}k_proj"), "norm")
    with pytest.raises(CalibrationError, match=r"v_proj reads the output of .*input_layernorm and is not among"):
        working.smooth(place, torch.ones(64))


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_smoothquants_scales_are_the_papers(strength: float, tmp_path: Path) -> None:
    make(tmp_path, "llama")
    source = FileSource(tmp_path)
    skeleton = Skeleton(tmp_path, source.names())
    skeleton.materialize(0, source)
    x = torch.randn(32, 64) * torch.logspace(-2, 2, 64)
    names = tuple(f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up"))
    seen = Statistics.of(x, "x")
    working = Working(layer_of(skeleton, 0), dict.fromkeys(names, seen))
    place = Smoothing(0, "model.layers.0.post_attention_layernorm", names, "norm")
    s = smoothquant.scales(SmoothQuantModifier(smoothing_strength=strength), place, working)
    weight = torch.cat([working.weight(n) for n in names]).abs().amax(0).double()
    expected = x.abs().amax(0).double() ** strength / weight ** (1 - strength)
    torch.testing.assert_close(s.double(), expected, rtol=1e-5, atol=0)
    working.smooth(place, s)
    torch.testing.assert_close(seen.absmax, x.abs().amax(0) / s, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (Mapping("input_layernrm", ("q_proj",)), r"'input_layernrm' matches no module.*did you mean 'input_layernorm'"),
        (Mapping("input_layernorm", ("re:.*qproj$",)), r"'re:\.\*qproj\$' matches no module"),
        (Mapping("mlp.down_proj", ("self_attn.o_proj",)), "in no layer do their widths fit"),
    ],
)
def test_mappings_that_find_nothing_are_named(mapping: Mapping, message: str, tmp_path: Path) -> None:
    make(tmp_path, "llama", num_attention_heads=8, num_key_value_heads=8, head_dim=16)
    source = FileSource(tmp_path)
    family = Skeleton(tmp_path, source.names()).family
    shapes = {n: tuple(t.shape) for n, t in source.tensors.items()}
    with pytest.raises(PlanError, match=message):
        smoothings(SmoothQuantModifier(mappings=[mapping]), family, shapes)


def test_values_of_a_group_of_heads_have_one_vector(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    source = FileSource(tmp_path)
    family = Skeleton(tmp_path, source.names()).family
    places, notes = smoothings(AWQModifier(), family, {n: tuple(t.shape) for n, t in source.tensors.items()})
    place = next(place for place in places if place.smooth.endswith("v_proj"))
    assert (place.repeat, place.head_dim, notes) == (2, 16, ())
    s = torch.rand(32)
    assert torch.equal(widened(s, place)[:48], torch.cat((s[:16], s[:16], s[16:32])))
    torch.testing.assert_close(narrowed(widened(s, place), place), s)


def test_widths_that_do_not_go_together_are_passed_over_and_said(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    source = FileSource(tmp_path)
    family = replace(Skeleton(tmp_path, source.names()).family, head_dim=24)
    places, notes = smoothings(AWQModifier(), family, {n: tuple(t.shape) for n, t in source.tensors.items()})
    assert not any(place.smooth.endswith("v_proj") for place in places)
    assert len(notes) == 1 and "v_proj: 32 channels feed o_proj of 64 inputs" in notes[0] and "x3" in notes[0]


def test_an_unknown_architecture_is_smoothed_where_it_looks_like_llama_alone() -> None:
    family = family_of({"model_type": "something_new", "num_hidden_layers": 1, "num_attention_heads": 1})
    layer = "model.layers.0"
    shapes = {f"{layer}.{norm}.weight": (8,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"{layer}.self_attn.{part}_proj.weight": (8, 8) for part in "qkvo"}
    shapes |= {f"{layer}.mlp.{part}_proj.weight": (8, 8) for part in ("up", "down")}
    places, _ = smoothings(AWQModifier(), family, shapes)
    # No gate multiplies what up gives, but an activation: nothing can be divided there.
    assert [place.smooth.removeprefix(f"{layer}.") for place in places] == [
        "input_layernorm",
        "self_attn.v_proj",
        "post_attention_layernorm",
    ]
    odd = {**shapes, f"{layer}.pre_mlp_layernorm.weight": (8,)}
    with pytest.raises(PlanError, match=r"something_new.*'pre_mlp_layernorm', which Llama's have not.*mappings="):
        smoothings(SmoothQuantModifier(), family, odd)
    given = SmoothQuantModifier(mappings=(Mapping("pre_mlp_layernorm", ("mlp.up_proj",)),))
    assert [place.smooth for place in smoothings(given, family, odd)[0]] == [f"{layer}.pre_mlp_layernorm"]
