"""Recipes in every form that users write them in, and what is said about those that are wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit.config.groups import SchemeGroup
from quantkit.config.presets import preset
from quantkit.config.recipe import Mapping, Recipe
from quantkit.config.recipe_file import recipe_of
from quantkit.config.schemes import QuantizationArgs
from quantkit.config.yaml_file import load_run_config
from quantkit.errors import ConfigError, QuantkitError
from quantkit.modifiers import AWQModifier, GPTQModifier, QuantizationModifier, SmoothQuant, SmoothQuantModifier

SMOOTH = SmoothQuantModifier(smoothing_strength=0.8)
GPTQ = GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
SEED = """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 0.8
    GPTQModifier:
      targets: [Linear]
      scheme: W8A8
      ignore: [lm_head]
"""
STAGES = """
first_stage:
  quant_modifiers:
    QuantizationModifier: {scheme: FP8_DYNAMIC, ignore: [lm_head]}
second_stage:
  quant_modifiers:
    GPTQModifier: {scheme: W4A16}
"""


def test_every_form_is_the_same_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(SEED)
    (tmp_path / "recipe.json").write_text(json.dumps(yaml.safe_load(SEED)))
    (tmp_path / "recipe.yml").write_text(SEED)
    expected = Recipe((SMOOTH, GPTQ))
    flat = "SmoothQuantModifier: {smoothing_strength: 0.8}\nGPTQ: {scheme: W8A8, ignore: lm_head}"
    forms: list[Any] = [
        [SMOOTH, GPTQ],
        (SMOOTH, GPTQ),
        [[SMOOTH], [GPTQ]],
        [SMOOTH, {"GPTQModifier": {"scheme": "W8A8", "ignore": ["lm_head"]}}],
        [Recipe((SMOOTH, GPTQ))],
        SEED,
        flat,
        json.dumps(yaml.safe_load(SEED)),
        yaml.safe_load(SEED),
        str(tmp_path / "recipe.yaml"),
        tmp_path / "recipe.yml",
        tmp_path / "recipe.json",
        "- SmoothQuant: {smoothing_strength: 0.8}\n- GPTQModifier: {scheme: W8A8, ignore: [lm_head]}",
    ]
    for form in forms:
        assert recipe_of(form) == expected, form
    assert expected.name == "SmoothQuant + GPTQ W8A8"


@pytest.mark.parametrize("smooth", [SmoothQuantModifier, SmoothQuant, "SmoothQuant", "SmoothQuantModifier"])
def test_classes_and_names_stand_for_modifiers_with_defaults(smooth: Any) -> None:
    assert recipe_of([smooth, GPTQ]) == Recipe((SmoothQuantModifier(), GPTQ))


@pytest.mark.parametrize(
    "modifiers",
    [
        [SMOOTH, GPTQ],
        [GPTQModifier(scheme="W4A16", actorder=None, dampening_frac=0.05)],
        [GPTQModifier(scheme="W4A16", actorder="group")],
        [
            AWQModifier(mappings=[Mapping("a", ("b", "c"))], duo_scaling="both"),
            QuantizationModifier(scheme="W4A16_ASYM"),
        ],
        [QuantizationModifier(scheme=preset("W8A8_STATIC"), kv_cache_scheme="fp8", input_observer="mse")],
        [QuantizationModifier(kv_cache_scheme=QuantizationArgs(8, "float", strategy="attn_head"))],
        [QuantizationModifier(scheme={"FP8_BLOCK": ["re:.*mlp.*"], "W8A8": "Linear"})],
        [QuantizationModifier(config_groups={"a": SchemeGroup(("Linear",), preset("FP8_BLOCK"))})],
        [
            QuantizationModifier(scheme="W8A8", targets="re:.*mlp.*"),
            QuantizationModifier(scheme="W4A16", targets="re:.*attn.*"),
        ],
    ],
)
def test_round_trip(modifiers: list[Any]) -> None:
    recipe = recipe_of(modifiers)
    again = recipe_of(yaml.safe_dump(json.loads(json.dumps(recipe.to_dict())), sort_keys=False))
    assert [type(m) for m in again.modifiers] == [type(m) for m in recipe.modifiers]
    assert (again.groups, again.ignore, again.kv_cache) == (recipe.groups, recipe.ignore, recipe.kv_cache)
    assert again.to_dict() == recipe.to_dict()
    if not any(getattr(m, "config_groups", None) or not isinstance(getattr(m, "scheme", ""), str) for m in modifiers):
        assert again == recipe


def test_stages_are_taken_all_or_one() -> None:
    assert [type(m).__name__ for m in recipe_of(STAGES).modifiers] == ["QuantizationModifier", "GPTQModifier"]
    for stage in ("second", "second_stage"):
        assert recipe_of(STAGES, stage=stage) == Recipe((GPTQModifier(scheme="W4A16"),))
    with pytest.raises(ConfigError, match="did you mean 'second_stage'"):
        recipe_of(STAGES, stage="secnd")
    with pytest.raises(ConfigError, match="it has none"):
        recipe_of([GPTQ], stage="quant")


def test_arguments_fill_placeholders_and_go_over_what_is_written() -> None:
    text = "SmoothQuantModifier: {smoothing_strength: {{ strength }}}\nGPTQModifier:\n  scheme: '{{ scheme }}'\n"
    recipe = recipe_of(text, args={"strength": 0.6, "scheme": "W8A8", "dampening_frac": 0.1, "GPTQ.actorder": None})
    assert recipe.modifiers == (
        SmoothQuantModifier(smoothing_strength=0.6),
        GPTQModifier(scheme="W8A8", dampening_frac=0.1, actorder=None),
    )
    assert recipe_of([SMOOTH, GPTQ], args={"smoothing_strength": 0.1}).modifiers[0] == SmoothQuantModifier(
        smoothing_strength=0.1
    )
    assert recipe_of("GPTQ: {}", args={"scheme": "W4A16"}).groups[0].scheme.name == "W4A16"
    patterns = recipe_of("GPTQ:\n  scheme: W8A8\n  ignore: ['re:.*{{ part }}$']", args={"part": "down_proj"})
    assert patterns.ignore == ("re:.*down_proj$",)
    with pytest.raises(ConfigError, match=r":1: \{\{ strength \}\} has no value \(did you mean 'strenght'"):
        recipe_of(text, args={"strenght": 0.6})
    with pytest.raises(ConfigError, match=r"'dampening' is no placeholder.*did you mean 'dampening_frac'"):
        recipe_of([GPTQ], args={"dampening": 0.6})
    with pytest.raises(ConfigError, match=r"recipe_args.smoothing_strength: 3.0 is not between 0 and 1"):
        recipe_of([SMOOTH, GPTQ], args={"smoothing_strength": 3})


def test_compressed_tensors_own_objects_are_taken() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    presets = pytest.importorskip("compressed_tensors.quantization.quant_scheme").PRESET_SCHEMES
    scheme = quantization.QuantizationScheme
    for name in ("W8A8", "W4A16", "W4A16_ASYM", "FP8", "FP8_BLOCK", "MXFP4", "NVFP4"):
        theirs = QuantizationModifier(
            config_groups={name: scheme(targets=["Linear"], **presets[name])},
            kv_cache_scheme=quantization.QuantizationArgs(num_bits=8, type="float", strategy="attn_head"),
        )
        ours = QuantizationModifier(scheme=name)
        want, got = ours.groups[0].scheme, theirs.groups[0].scheme
        for one, other in ((want.weights, got.weights), (want.input_activations, got.input_activations)):
            # Which observer finds static scales is left to whoever wrote the scheme.
            assert one == (other and replace(other, observer=one.observer if one else None)), name
        cache = theirs.kv_cache
        assert cache is not None and (cache.type, cache.strategy) == ("float", "attn_head")


def test_a_value_of_an_argument_is_only_a_value() -> None:
    recipe = recipe_of("GPTQ: {scheme: W8A8, ignore: ['{{ x }}']}", args={"x": "a'], dampening_frac: 1, b: ['"})
    assert recipe.ignore == ("a'], dampening_frac: 1, b: ['",)
    assert recipe.modifiers[0].dampening_frac == 0.01  # type: ignore[attr-defined]


def test_arguments_without_effect_are_accepted_and_known() -> None:
    recipe = recipe_of(
        [
            SmoothQuantModifier(num_calibration_steps=10, calibration_function=print, index=1, ignore=None),
            "GPTQModifier: {scheme: W8A8, sequential_update: true, block_size: 64, group: null, "
            "bypass_divisibility_checks: true}",
        ]
    )
    assert recipe.idle == (
        "SmoothQuantModifier.num_calibration_steps",
        "SmoothQuantModifier.calibration_function",
        "SmoothQuantModifier.index",
        "GPTQModifier.sequential_update",
        "GPTQModifier.block_size",
        "GPTQModifier.bypass_divisibility_checks",
    )
    assert recipe_of(recipe, args={"dampening_frac": 0.2}).idle == recipe.idle
    assert recipe_of([SMOOTH, GPTQ]).idle == ()


def test_a_recipe_in_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(SEED.replace("scheme:", "block_size: 64\n      scheme:"))
    text = "model: {model_path: x}\ncompression: {recipe: RECIPE}\ndataset: {data_path: job.yaml}\n"
    (tmp_path / "job.yaml").write_text(text.replace("RECIPE", str(tmp_path / "recipe.yaml")))
    config = load_run_config(tmp_path / "job.yaml")
    assert config.recipe == Recipe((SMOOTH, GPTQModifier(scheme="W8A8", ignore=["lm_head"], block_size=64)))
    assert "accepted, without effect: compression.recipe: GPTQModifier.block_size" in config.notes
    (tmp_path / "recipe.yaml").write_text(SEED.replace("smoothing_strength", "strength"))
    with pytest.raises(ConfigError, match=r"recipe\.yaml:5: quant_stage\..*\.strength: unknown"):
        load_run_config(tmp_path / "job.yaml")
    (tmp_path / "job.yaml").write_text("model: {model_path: x}\ncompression:\n  recipe:\n    GPTQ: {scheme: W8A9}\n")
    with pytest.raises(ConfigError, match=r"job\.yaml:4: compression\.recipe\.GPTQ\.scheme: no such scheme"):
        load_run_config(tmp_path / "job.yaml")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "recipe: expected modifiers .*got nothing"),
        (3, "recipe: expected modifiers .*got 3"),
        ([], "recipe: is an empty list"),
        ([GPTQ, []], r"recipe\[1\]: is an empty list"),
        ([GPTQ, 3.5], r"recipe\[1\]: expected modifiers .*got 3.5"),
        ([object()], r"recipe\[0\]: expected modifiers .*got a object"),
        ([str], r"recipe\[0\]: expected modifiers .*got the class str"),
        ("", "neither a modifier nor a YAML file"),
        ("GPTQModifer", "neither a modifier nor a YAML file.*did you mean 'GPTQModifier'"),
        ("nosuch.yaml", "nosuch.yaml: the recipe cannot be read: No such file"),
        (Path("/tmp"), "cannot be read: Is a directory"),
        ("a: [", r"recipe \(YAML text\):1: not valid YAML"),
        ("GPTQModifier: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("GPTQModifier:\n  scheme: W8A8\n  scheme: W4A16", ":3: GPTQModifier.scheme: is already in line 2"),
        ("- 3\n- 4", "expected modifiers"),
        ("quant_stage:\n  quant_modifiers:\n    GPTQModifier:\n      damping: 1", r":4: .*Modifier.damping: unknown"),
        ("quant_stage:\n  quant_modifiers:\n    GPTQModifier:\n      scheme: W8B8", r":4: .*no such scheme.*'W8A8'"),
        ("GPTQModifier:\n  scheme: W8A8\n  dampening_frac: '1'", ":3: GPTQModifier.dampening_frac: expected a number"),
        ("- GPTQ:\n    scheme: W8A8\n    ignore: 3", r":3: \[0\].GPTQ.ignore: expected a string or a list"),
        ("quant_stage:\n  SmothQuant: {}", r":2: quant_stage.SmothQuant: no such modifier.*'SmoothQuant'"),
        ("SpinQuantModifier: {}", "one of llm-compressor's that quantkit does not have"),
        ("quant_stage: 3", "quant_stage: expected modifiers, got 3"),
        ("GPTQModifier: 3", "GPTQModifier: expected the modifier's arguments, got 3"),
        ("GPTQModifier:", "GPTQModifier.scheme: is missing"),
        ([GPTQModifier], r"recipe\[0\].scheme: is missing"),
        ([SmoothQuantModifier], "recipe: has no modifier that quantizes"),
        ([GPTQ, SMOOTH], "SmoothQuantModifier stands after GPTQModifier"),
        ([QuantizationModifier(kv_cache_scheme="fp8"), QuantizationModifier(scheme="W8A8", kv_cache_scheme="int8")],
         "kv_cache_scheme twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPTQModifier("W8A8"), "by name only, e.g. GPTQModifier"),
        (lambda: GPTQModifier(scheme="W8A8", damp=1), "damp: unknown.*GPTQModifier has targets"),
        (lambda: SmoothQuantModifier(smoothing_strenght=1), "did you mean 'smoothing_strength'"),
        (lambda: GPTQModifier(scheme=3), "scheme: expected a string or QuantizationScheme or a mapping or null, got 3"),
        (lambda: GPTQModifier(scheme="W8A8", targets=3), "targets: expected a string or a list"),
        (lambda: GPTQModifier(config_groups="a"), "config_groups: expected a mapping"),
        (lambda: GPTQModifier(scheme="W8A8", actorder=[1]), "actorder: expected 'weight', 'static', 'group' or null"),
        (lambda: AWQModifier(mappings=3), "mappings: expected a list"),
        (lambda: QuantizationModifier(scheme="W8A8", input_observer=len), "input_observer: expected a string or null"),
        (lambda: SmoothQuantModifier(smoothing_strength=float("nan")), "smoothing_strength: expected a number"),
    ],
)
def test_constructors_refuse_with_a_quantkit_error(make: Any, message: str) -> None:
    with pytest.raises(QuantkitError, match=message):
        make()
