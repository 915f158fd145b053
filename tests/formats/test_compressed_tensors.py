"""compressed-tensors on disk: bytes decoded by an independent numpy decoder, and read by the library itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantkit import ops
from quantkit.config.groups import SchemeGroup
from quantkit.config.presets import PRESETS
from quantkit.config.schemes import QuantizationArgs, QuantizationScheme
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats import FORMATS, format_by_name
from quantkit.formats import compressed_tensors as ct
from quantkit.modifiers.rtn import quantize_weight

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def every(preset: str) -> SchemeGroup:
    return SchemeGroup(("Linear",), PRESETS[preset])


def decode(tensors: dict[str, torch.Tensor], args: QuantizationArgs, rows: int, cols: int) -> np.ndarray:
    """The weight that the stored tensors of module `m` mean, by the format's description alone."""
    bits = args.num_bits
    if args.scales == "e8m0":
        scale = 2.0 ** (tensors["m.weight_scale"].numpy().astype(np.float64) - 127)
    elif args.scales == "nvfp4":
        local = np.vectorize(e4m3)(tensors["m.weight_scale"].view(torch.uint8).numpy()).astype(np.float32)
        scale = (local / tensors["m.weight_global_scale"].numpy()).astype(np.float64)
    else:
        scale = tensors["m.weight_scale"].float().numpy().astype(np.float64)
    if args.fp4:
        pairs = tensors["m.weight_packed"].numpy()
        codes = np.array([[E2M1[int(pairs[r, c // 2]) >> c % 2 * 4 & 15] for c in range(cols)] for r in range(rows)])
    elif "m.weight_packed" in tensors:
        words = tensors["m.weight_packed"].numpy().view(np.uint32)
        codes = np.array(
            [[(int(words[r, c * bits // 32]) >> (c * bits % 32)) % 2**bits for c in range(cols)] for r in range(rows)]
        ) - 2 ** (bits - 1)
        assert tensors["m.weight_shape"].tolist() == [rows, cols]
    elif args.type == "int":
        codes = tensors["m.weight"].numpy().astype(np.int64)
    else:
        codes = np.vectorize(e4m3)(tensors["m.weight"].view(torch.uint8).numpy())
    zero = np.zeros_like(scale)
    if "m.weight_zero_point" in tensors:
        words = tensors["m.weight_zero_point"].numpy().view(np.uint32)
        zero = np.array(
            [
                [
                    (int(words[r * bits // 32, g]) >> (r * bits % 32)) % 2**bits - 2 ** (bits - 1)
                    for g in range(words.shape[1])
                ]
                for r in range(rows)
            ]
        )
    result = np.empty((rows, cols))
    for r in range(rows):
        for c in range(cols):
            if args.strategy == "tensor":
                at: tuple[int, ...] = (0,)
            elif args.strategy == "channel":
                at = (r, 0)
            elif "m.weight_g_idx" in tensors:
                at = (r, int(tensors["m.weight_g_idx"][c]))
            elif args.strategy in ("group", "tensor_group"):
                at = (r, c // (args.group_size or 1))
            else:
                at = (r // args.block_structure[0], c // args.block_structure[1])  # type: ignore[index]
            result[r, c] = (codes[r, c] - zero[at]) * scale[at]
    return result


E2M1 = [sign * value for sign in (1, -1) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    assert (exponent, mantissa) != (15, 7), "NaN code"
    value = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_stored_bytes_mean_the_quantized_weight(preset: str, dtype: str) -> None:
    scheme, rows, cols = PRESETS[preset], 11, 256
    weight = (torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)) * 0.05).to(TORCH[dtype])
    weight[3] = 0
    stored = {t.name: t for t in ct.stored_tensors("m", scheme, rows, cols, dtype)}
    scale_dtype = TORCH.get(ct.scale_dtype(scheme, dtype), torch.float32)
    quantized = quantize_weight("m", weight, scheme.weights, scale_dtype=scale_dtype, pack=ct.packs(scheme))
    tensors = ct.pack_weight("m", quantized, scale_dtype)
    assert set(tensors) == {name for name in stored if "input" not in name}
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == tuple(stored[name].shape), name
        assert tensor.nbytes == stored[name].nbytes, name
    meaning = decode(tensors, scheme.weights, rows, cols)
    again = ct.load_weight("m", scheme, tensors.__getitem__, rows, cols).dequantize()
    assert np.array_equal(meaning.astype(np.float32), again.numpy())
    limit = 0.5 if scheme.weights.type == "int" else 1 if scheme.weights.fp4 else 16
    # A scale that its dtype rounds down leaves the extremes of 8 bit asymmetric codes that much further away.
    limit += 2**scheme.weights.num_bits * torch.finfo(scale_dtype).eps / 4
    assert np.abs(meaning - weight.double().numpy()).max() <= limit * float(quantized.scale.max())


@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM"])
def test_groups_of_columns_in_any_order(preset: str) -> None:
    scheme = PRESETS[preset]
    args = replace(scheme.weights, group_size=32, actorder="group")
    scheme = replace(scheme, weights=args)
    rows, cols = 24, 128
    order = torch.randperm(cols, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(3))
    # Groups are runs of neighbours in the order; codes are stored as columns lie in the weight.
    ordered = quantize_weight("m", weight[:, order], args, scale_dtype=torch.bfloat16, pack=False)
    codes = torch.empty_like(ordered.codes).index_copy_(1, order, ordered.codes)
    g_idx = torch.empty(cols, dtype=torch.int32).index_copy_(0, order, torch.arange(cols, dtype=torch.int32) // 32)
    quantized = replace(ordered, codes=ops.pack_int32(codes, 4), packed=True, g_idx=g_idx)
    tensors = ct.pack_weight("m", quantized, torch.bfloat16)
    stored = {t.name: (t.dtype, t.shape) for t in ct.stored_tensors("m", scheme, rows, cols, "BF16")}
    assert set(stored) == set(tensors) and stored["m.weight_g_idx"] == ("I32", (cols,))
    meaning = decode(tensors, args, rows, cols)
    assert np.array_equal(meaning.astype(np.float32)[:, order], ordered.dequantize().numpy())
    again = ct.load_weight("m", scheme, tensors.__getitem__, rows, cols)
    assert np.array_equal(meaning.astype(np.float32), again.dequantize().numpy())
    block = ct.config_block([SchemeGroup(("Linear",), scheme)], [], [])
    assert block["config_groups"]["group_0"]["weights"]["actorder"] == "group"
    assert ct.read_schemes(block)("m").weights == args


def test_packing_is_the_librarys() -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-8, 8, (24, 40), dtype=torch.int8)
    assert torch.equal(ops.pack_int32(codes, 4), library.pack_to_int32(codes, 4))
    zero = torch.randint(-8, 8, (24, 5), dtype=torch.int8)
    assert torch.equal(ops.pack_zero_points(zero, 4), library.pack_to_int32(zero, 4, packed_dim=0))


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"LLM_INT8"}))  # which it cannot tell, and the plan refuses
def test_config_block_is_the_librarys(preset: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    block = ct.config_block([every(preset)], ["lm_head"], ["lm_head"])
    parsed = quantization.QuantizationConfig.model_validate(block)
    group = parsed.config_groups["group_0"]
    assert group.weights.num_bits == PRESETS[preset].weights.num_bits
    assert str(group.weights.strategy) == PRESETS[preset].weights.strategy
    assert parsed.ignore == ["lm_head"]
    kind = {"float": None, "e8m0": torch.uint8, "nvfp4": torch.float8_e4m3fn}[PRESETS[preset].weights.scales]
    assert group.weights.scale_dtype == kind and ("scale_dtype" in str(block)) == (kind is not None)
    assert "zp_dtype" not in str(block)
    again = ct.read_schemes(block)("model.layers.0.mlp.up_proj")
    assert again.weights == PRESETS[preset].weights
    assert again.input_activations == PRESETS[preset].input_activations


MIXED = [
    SchemeGroup(("re:.*layers\\.\\d+\\.mlp\\.up_proj$", "model.layers.1.self_attn.o_proj"), PRESETS["W4A16"]),
    SchemeGroup(("re:.*layers\\.\\d+\\.self_attn\\.o_proj$",), PRESETS["FP8_DYNAMIC"]),
]


def test_several_schemes_and_a_cache_are_the_librarys() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    block = ct.config_block(MIXED, ["lm_head"], [], QuantizationArgs(8, "float", strategy="attn_head"))
    assert block["format"] == "mixed-precision"
    assert [g["format"] for g in block["config_groups"].values()] == ["pack-quantized", "float-quantized"]
    parsed = quantization.QuantizationConfig.model_validate(block)
    assert [str(g.weights.type) for g in parsed.config_groups.values()] == ["int", "float"]
    assert str(parsed.kv_cache_scheme.strategy) == "attn_head" and not parsed.kv_cache_scheme.dynamic
    one = ct.config_block([MIXED[1]], [], [], QuantizationArgs(8, "float"))
    assert one["format"] == "float-quantized" and ct.read_kv_cache(one) == QuantizationArgs(8, "float")
    assert ct.read_kv_cache(ct.config_block(MIXED, [], [])) is None


def test_schemes_are_found_as_servers_find_them() -> None:
    schemes = ct.read_schemes(ct.config_block(MIXED, [], []))
    assert schemes("model.layers.7.mlp.up_proj").weights == PRESETS["W4A16"].weights
    assert schemes("model.layers.7.self_attn.o_proj").weights == PRESETS["FP8_DYNAMIC"].weights
    assert schemes("model.layers.1.self_attn.o_proj").weights == PRESETS["W4A16"].weights, "a full name goes first"
    with pytest.raises(CheckpointError, match=r"mlp.down_proj has quantized tensors, and no config"):
        schemes("model.layers.0.mlp.down_proj")


def test_schemes_no_server_reads_are_refused() -> None:
    asymmetric = QuantizationScheme(
        "mine", QuantizationArgs(symmetric=False, strategy="channel"), QuantizationArgs(strategy="token", dynamic=True)
    )
    with pytest.raises(ConfigError, match="asymmetric integer weights"):
        ct.check(asymmetric)
    with pytest.raises(ConfigError, match="did you mean 'compressed-tensors'"):
        format_by_name("compressed_tensors")
    with pytest.raises(ConfigError, match="FP8 weights and activations"):
        FORMATS["fp8"].check(PRESETS["W8A8"])


def test_int8_dynamic_block_has_every_key_of_angelslims_documentation() -> None:
    group = ct.config_block([every("W8A8")], ["lm_head"], ["lm_head", "model.embed_tokens"])
    assert group["ignored_layers"] == ["lm_head", "model.embed_tokens"]
    assert (group["format"], group["quant_method"], group["kv_cache_scheme"]) == ("int-quantized", ct.NAME, None)
    common = {"block_structure": None, "group_size": None, "num_bits": 8, "observer_kwargs": {}, "type": "int"}
    assert group["config_groups"]["group_0"]["input_activations"] == common | {
        "dynamic": True,
        "observer": "memoryless",
        "strategy": "token",
        "symmetric": True,
    }
    assert group["config_groups"]["group_0"]["weights"] == common | {
        "dynamic": False,
        "observer": "minmax",
        "strategy": "channel",
        "symmetric": True,
    }


def test_fp8_block_is_angelslims() -> None:
    fp8 = FORMATS["fp8"]
    expected = {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"}
    assert fp8.config_block([every("FP8")], ["lm_head"], ["lm_head"]) == expected
    dynamic = fp8.config_block([every("FP8_PER_TENSOR_DYNAMIC")], ["lm_head"], [])
    assert dynamic == expected | {"activation_scheme": "dynamic"}
    with pytest.raises(ConfigError, match=r"holds one scheme, not 2 \(FP8, FP8_DYNAMIC\)"):
        fp8.config_block([every("FP8"), every("FP8_DYNAMIC")], [], [])


def test_llm_compressors_word_for_act_order_is_read() -> None:
    """It writes "static" where columns were taken by their inputs and groups stay in place."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "actorder": "static"}
    block = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}}}
    assert ct.read_schemes(block)("model.layers.0.mlp.up_proj").weights.actorder == "weight"
