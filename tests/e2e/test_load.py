"""`quantkit.load` computes what the codes say: every scheme that the project writes, against Transformers' own model
with
dequantized weights, whose inputs and cache are rounded by `formats.source`, and against what Transformers itself loads.
"""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit import ops
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import main
from quantkit.errors import CheckpointError, ConfigError, PlanError
from quantkit.evaluate import evaluate
from quantkit.formats.source import WeightSource
from quantkit.live_hooks import CacheQuantizer
from quantkit.models.live import LiveCheckpoint
from quantkit.runtime.experts import ExpertLinears
from quantkit.runtime.generate import encode
from quantkit.runtime.growing import GrowingLayer, growing
from quantkit.runtime.linear import QuantLinear

from .jobs import EXAMPLES, RECIPES, SCHEMES, quantize, quantize_by

transformers = pytest.importorskip("transformers")

# In the whole model the rounding of sums moves an activation over a tie here and there, to the next code, which is as
# far away as a code is wide: 2^-7 of the range in int8, 2^-3 of the number itself in fp8.
WEIGHT_ONLY, INT8, FP8 = 1e-6, 5e-3, 2e-2


# name -> (save_name, modifiers)
FORMATS = {
    "gptq": ("gptq", "{GPTQModifier: {scheme: W4A16, actorder: group}}"),
    "gptq asymmetric": ("gptq", "{QuantizationModifier: {scheme: W4A16_ASYM}}"),
    "gptq int8": ("gptq", "{QuantizationModifier: {scheme: W8A16}}"),
    "awq": ("awq", "{QuantizationModifier: {scheme: W4A16_ASYM}}"),
    "fp8 per tensor": ("fp8", "{QuantizationModifier: {scheme: FP8}}"),
    "fp8 per block": ("fp8", "{QuantizationModifier: {scheme: FP8_BLOCK}}"),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, scheme or recipe) -> its quantized folder, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(model: str, scheme: str) -> Path:
        if (model, scheme) not in made:
            folder = tmp_path_factory.mktemp("out")
            if scheme in FORMATS:
                name, modifiers = FORMATS[scheme]
                made[model, scheme] = quantize_by(model, modifiers, folder, f"compression.save_name={name}")
            elif scheme in RECIPES:
                made[model, scheme] = quantize_by(model, RECIPES[scheme], folder)
            else:
                made[model, scheme] = quantize(model, scheme, folder)
        return made[model, scheme]

    return get


def reference(source: Path, output: Path, dtype: torch.dtype) -> Any:
    """The model that `output`'s codes stand for, in full precision."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    live = LiveCheckpoint(model)
    with Checkpoint(output) as checkpoint:
        weights = WeightSource(checkpoint)
        for name in weights.names():
            live.put(name, weights.get(name))
        if weights.input_quantizers:
            live.unfuse()
        for name, rounded in weights.input_quantizers.items():
            live.module(name).register_forward_pre_hook(lambda _, args, f=rounded: (f(args[0]),))
        for name in weights.cache_quantizers:
            scales = weights.cache_scales(name)
            hook = CacheQuantizer(weights.kv_cache, *scales)  # type: ignore[arg-type]
            live.module(name).register_forward_pre_hook(hook, with_kwargs=True)
    return model


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Real text: four rows of 64 tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(EXAMPLES / "models" / "tiny-llama")
    text = (EXAMPLES / "data" / "evaluation.txt").read_text()
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:256]).reshape(4, 64)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def error(got: Tensor, expected: Tensor) -> float:
    """Mean |difference| over the spread of the expected."""
    return float((got - expected).abs().mean() / expected.std())


def perplexity(found: Tensor, ids: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp())


def divergence(got: Tensor, expected: Tensor) -> float:
    """KL(expected || got) in nats per token."""
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def tolerance(model: Any) -> float:
    """By what is rounded at run time."""
    quantized = [m for m in model.modules() if isinstance(m, QuantLinear | ExpertLinears)]
    args = [m.inputs for m in quantized if m.inputs is not None]
    hooks = [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]
    args += [hook.args for hook in hooks if isinstance(hook, CacheQuantizer)]
    return max([WEIGHT_ONLY, *(FP8 if a.type == "float" else INT8 for a in args)])


def check_linears(model: Any, expected: Any, ids: Tensor) -> int:
    """Every QuantLinear, given what enters that Linear of the expected model: within the rounding of fp32 sums."""
    live = LiveCheckpoint(expected)
    live.unfuse()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = {
        live.checkpoint_name(path): m
        for path, m in model.named_modules()
        if isinstance(m, QuantLinear) and not path.endswith(".whole")
    }
    for name in modules:
        # Placed before hooks that round the input.
        live.module(name).register_forward_pre_hook(
            lambda _, args, n=name: seen.update({n: (args[0], args[0])}), prepend=True
        )
        live.module(name).register_forward_hook(
            lambda _, args, out, n=name: seen.update({n: (seen[n][0], args[0], out)})
        )
    logits(expected, ids)
    for name, module in modules.items():
        if name not in seen:
            continue  # an expert that got no token
        x, rounded, out = seen[name]
        weight = live.module(name).weight
        slack = 2 * (weight.shape[1] + 8) * 2.0**-24 * (rounded.abs() @ weight.abs().T)
        assert bool(((module(x) - out).abs() <= slack).all()), name
    return len(seen)


def check_model(model: Any, expected: Any, ids: Tensor) -> str:
    """Logits, divergence, perplexity and greedy tokens of the whole model."""
    limit = tolerance(model)
    got, want = logits(model, ids), logits(expected, ids)
    found, kl = error(got, want), divergence(got, want)
    change = perplexity(got, ids) / perplexity(want, ids) - 1
    assert found < limit, f"{found:.2e} of the logits' spread"
    # Divergence goes with the squares of what `found` is the mean magnitude of: large ones count most.
    assert kl < limit**2 * 12, f"KL {kl:.2e}"
    assert abs(change) < limit, f"perplexity {change:+.2e}"
    with torch.inference_mode():
        tokens = model.generate(ids[:, :16], max_new_tokens=24, do_sample=False)
    # What the expected model says after each of them: none is less likely than its best by more than the logits differ.
    after = logits(expected, tokens)[:, 15:-1]
    chosen = after.gather(-1, tokens[:, 16:, None])[..., 0]
    worst = float((after.amax(-1) - chosen).max())
    assert worst <= 4 * float((got - want).abs().max()), f"a token that is {worst:.2e} below the best"
    return f"{found:.1e} of the spread, KL {kl:.1e}, perplexity {change:+.1e}, tokens {worst:.1e}"


@pytest.mark.parametrize("scheme", [*SCHEMES, *RECIPES, *FORMATS])
def test_loaded_model_is_what_the_codes_say(scheme: str, outputs: Any, ids: Tensor) -> None:
    source, output = EXAMPLES / "models" / "tiny-llama", outputs("tiny-llama", scheme)
    model = quantkit.load(output, dtype=torch.float32)
    expected = reference(source, output, torch.float32)
    print(f"{scheme}: {check_model(model, expected, ids)}")
    linears = check_linears(model, expected, ids)
    assert linears == (0 if scheme == "FP8 cache" else 28)


# What Transformers cannot load is among them: int8 and asymmetric int4 experts.
@pytest.mark.parametrize(
    "scheme",
    ["W8A8", "W4A16", "W4A16_ASYM", "W8A16", "W4A8", "FP8", "FP8_DYNAMIC", "int8_static", "NVFP4A16"],
)
def test_experts(scheme: str, outputs: Any, ids: Tensor) -> None:
    source, output = EXAMPLES / "models" / "tiny-moe", outputs("tiny-moe", scheme)
    model = quantkit.load(output, dtype=torch.float32)
    expected = reference(source, output, torch.float32)
    print(f"{scheme}: {check_model(model, expected, ids)}")
    assert check_linears(model, expected, ids) == 3 * 4
    # All experts of a layer at once, given what enters them.
    seen = {}
    for path, module in expected.named_modules():
        if path.endswith("mlp.experts"):
            module.register_forward_hook(lambda _, args, out, p=path: seen.update({p: (args, out)}))
    logits(expected, ids)
    assert len(seen) == 3
    for path, (args, out) in seen.items():
        experts = model.get_submodule(path)
        assert type(experts).__name__ == "QuantExperts"
        assert error(experts(*args), out) < tolerance(model) / 2, path
    apart = quantkit.load(output, dtype=torch.float32, merge=False)
    assert error(logits(model, ids), logits(apart, ids)) < tolerance(model)
    assert check_linears(apart, expected, ids) > 3 * (4 + 8 * 3) // 2


def test_experts_in_full_precision(ids: Tensor, tmp_path: Path) -> None:
    source = EXAMPLES / "models" / "tiny-moe"
    output = quantize_by("tiny-moe", "{QuantizationModifier: {scheme: W8A8, targets: ['re:.*attn.*']}}", tmp_path)
    model = quantkit.load(output, dtype=torch.float32)
    assert check_linears(model, reference(source, output, torch.float32), ids) == 3 * 4
    check_model(model, reference(source, output, torch.float32), ids)


def test_state_dict_of_experts(outputs: Any, tmp_path: Path) -> None:
    output = outputs("tiny-moe", "W4A16")
    model = quantkit.load(output)
    state = model.state_dict()
    with Checkpoint(output) as checkpoint:
        assert set(state) == set(checkpoint.tensors)
        assert all(torch.equal(state[name], checkpoint.tensor(name)) for name in state)
    model.save_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC", "W4A8"])
def test_bf16_is_as_near_to_fp32_as_transformers(scheme: str, outputs: Any, ids: Tensor) -> None:
    output = outputs("tiny-llama", scheme)
    exact = logits(reference(EXAMPLES / "models" / "tiny-llama", output, torch.float32), ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    ours = quantkit.load(output)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    found, peer = error(logits(ours, ids), exact), error(logits(theirs, ids), exact)
    assert found < 1.25 * peer, f"{found:.2e}, Transformers {peer:.2e}"
    print(f"{scheme}: {found:.2e}, Transformers {peer:.2e}")


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_BLOCK", "FP8", "W4A16_ASYM", "negative scales"])
def test_logits_are_those_of_transformers(scheme: str, outputs: Any, ids: Tensor) -> None:
    output = outputs("tiny-llama", scheme)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    print(f"{scheme}: {check_model(quantkit.load(output, dtype=torch.float32), theirs, ids)}")


def test_merged_linears_are_the_linears(outputs: Any, ids: Tensor) -> None:
    output = outputs("tiny-llama", "W8A8")
    merged, apart = (quantkit.load(output, merge=merge) for merge in (True, False))
    attention = merged.model.layers[0].self_attn
    assert attention.q_proj.whole.out_features == 512
    assert torch.equal(logits(merged, ids), logits(apart, ids))
    x, y = torch.randn(2, 3, 256).bfloat16(), torch.randn(2, 3, 256).bfloat16()
    alone = apart.model.layers[0].self_attn
    # Any order, any input, and the same tensor again after it was changed.
    for name, given in (("v_proj", x), ("q_proj", y), ("k_proj", x), ("k_proj", x), ("q_proj", x)):
        assert torch.equal(getattr(attention, name)(given), getattr(alone, name)(given))
    x.zero_()
    assert torch.equal(attention.q_proj(x), alone.q_proj(x))
    with torch.inference_mode():
        merged(input_ids=ids)
    assert attention.q_proj.shared.last is None


def test_state_dict_and_save_give_back_the_checkpoint(outputs: Any, tmp_path: Path) -> None:
    output = outputs("tiny-llama", "W4A16_ASYM")
    model = quantkit.load(output)
    state = model.state_dict()
    with Checkpoint(output) as checkpoint:
        for name in checkpoint.tensors:
            assert torch.equal(state[name], checkpoint.tensor(name)), name
        assert set(state) - set(checkpoint.tensors) == {"lm_head.weight"}
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert {p.name for p in (tmp_path / "copy").iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "generation_config.json",
    }
    quantkit.load(tmp_path / "copy")
    with pytest.raises(CheckpointError, match="is there already"):
        model.save_pretrained(tmp_path / "copy")
    with pytest.raises(ConfigError, match="max_shard_size: a loaded model is saved as a copy"):
        model.save_pretrained(tmp_path / "other", max_shard_size="1GB")
    with pytest.raises(RuntimeError, match=r"load_state_dict: .*q_proj is packed"):
        model.load_state_dict(state)
    with pytest.raises(PlanError, match="already quantized"):
        quantkit.oneshot(model=model, recipe="{QuantizationModifier: {scheme: W8A8}}")
    model.model.norm.weight.data[0] += 1
    with pytest.raises(CheckpointError, match=r"model.norm.weight is not what was loaded"):
        model.save_pretrained(tmp_path / "other")


def test_model_moves_keep_scales(outputs: Any, ids: Tensor) -> None:
    model = quantkit.load(outputs("tiny-llama", "W8A8"))
    wide = logits(quantkit.load(outputs("tiny-llama", "W8A8"), dtype=torch.float32), ids)
    assert torch.equal(logits(model.float(), ids), wide)
    with pytest.raises(RuntimeError, match="kernels run on cpu, not on meta"):
        model.to("meta")


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "W4A8", "FP8_DYNAMIC", "FP8_BLOCK", "W4A16_CHANNEL_ASYM"])
def test_swapped_linears_are_those_of_a_checkpoint(scheme: str, outputs: Any, ids: Tensor, tmp_path: Path) -> None:
    source = EXAMPLES / "models" / "tiny-llama"
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    assert quantkit.swap_linears(model, scheme.lower()) is model
    assert type(model.lm_head) is torch.nn.Linear
    loaded = quantkit.load(outputs("tiny-llama", scheme))
    theirs = dict(loaded.named_buffers())
    made = {name: buffer for name, buffer in model.named_buffers() if "_proj" in name}
    assert len(made) >= 2 * 4 * 4
    for name, buffer in made.items():
        assert torch.equal(buffer, theirs[name]), name
    # Norms and attention are other ones.
    assert error(logits(model, ids), logits(loaded, ids)) < 2.0**-4
    with pytest.raises(RuntimeError, match="q_proj was quantized in memory"):
        model.state_dict()


def test_swap_takes_targets_and_biases(ids: Tensor) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32, bias=False))
    plain = copy.deepcopy(model)
    quantkit.swap_linears(model, "W8A16_CHANNEL", targets="re:0$")
    assert isinstance(model[0], QuantLinear) and type(model[2]) is torch.nn.Linear
    x = torch.randn(2, 5, 128)
    assert model(x).shape == (2, 5, 32)
    assert error(model(x), plain(x)) < 0.01
    assert model(x[:, :0]).shape == (2, 0, 32)


@pytest.mark.parametrize(
    ("source", "scheme", "backend"),
    [
        ("tiny-llama", "W8A8", "aot_eager"),
        ("tiny-llama", "W4A16", "inductor"),
        ("tiny-llama", "FP8_DYNAMIC", "aot_eager"),
        ("tiny-llama", "W4A8", "aot_eager"),
        ("tiny-moe", "W8A8", "aot_eager"),
    ],
)
def test_compile(source: str, scheme: str, backend: str, outputs: Any, ids: Tensor) -> None:
    model = quantkit.load(outputs(source, scheme), dtype=torch.float32)
    expected = logits(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.inference_mode():
        got = compiled(input_ids=ids, use_cache=False).logits.float()
    assert error(got, expected) < tolerance(model)


def test_evaluate_runs_the_loaded_model(outputs: Any) -> None:
    text = EXAMPLES / "data" / "evaluation.txt"
    source = EXAMPLES / "models" / "tiny-llama"
    for scheme in ("W4A16", "int8 cache"):
        output = outputs("tiny-llama", scheme)
        expected, found = (
            evaluate(output, text, source, windows=4, window_length=64, backend=backend, progress=False)
            for backend in ("dequantized", "quantkit")
        )
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6 if scheme == "W4A16" else 5e-3)
        assert found.kl == pytest.approx(expected.kl, rel=1e-4 if scheme == "W4A16" else 5e-2)
    with pytest.raises(ConfigError, match=r"backend: 'x' is not one of dequantized, quantkit"):
        evaluate(output, text, backend="x")


def test_generate_command(outputs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(outputs("tiny-llama", "W8A8"))
    model, tokenizer = quantkit.load(output), transformers.AutoTokenizer.from_pretrained(output)
    ids = torch.tensor([tokenizer("He was born in")["input_ids"]])
    new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert main(["generate", output, "-p", "He was born in", "--max-new-tokens", "12"]) == 0
    shown = capsys.readouterr()
    assert shown.out == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    assert re.fullmatch(
        rf"prefill: {ids.shape[1]} tokens, [\d.]+ tokens/s; decode: 12 tokens, [\d.]+ tokens/s\n", shown.err
    )
    sampled = []
    for seed in ("1", "1", "2"):
        assert main(["generate", output, "-p", "The", "--temperature", "1.5", "--seed", seed]) == 0
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]
    for arguments, message in (
        (["-p", "x", "--chat"], "has no chat template"),
        (["-p", ""], "has no tokens"),
        (["-p", "x", "--max-new-tokens", "0"], "must be at least 1"),
        (["-p", "x", "--temperature", "-1"], "temperature: -1.0 must be"),
    ):
        assert main(["generate", output, *arguments]) == 2
        assert message in capsys.readouterr().err
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    assert encode(tokenizer, "Hi", True).tolist()[0] == tokenizer("<Hi>", add_special_tokens=False)["input_ids"]


def test_rows_of_different_lengths(outputs: Any, ids: Tensor) -> None:
    """Padding on the left changes nothing: masks reach the attention of one query, too."""
    model = quantkit.load(outputs("tiny-llama", "W4A16"), dtype=torch.float32)
    alone = model.generate(ids[:1, :9], max_new_tokens=8, do_sample=False)[0, 9:]
    batch = torch.cat((torch.full((1, 7), 2), ids[:1, :9]), 1)
    both = torch.cat((ids[1:2, :16], batch))
    mask = (both != 2).long()
    mask[0] = 1
    padded = model.generate(both, attention_mask=mask, max_new_tokens=8, do_sample=False)[1, 16:]
    assert torch.equal(padded, alone)


def test_attention_implementations_agree(outputs: Any, ids: Tensor) -> None:
    output = outputs("tiny-llama", "W4A16")
    usual, sdpa = quantkit.load(output), quantkit.load(output, attn_implementation="sdpa")
    assert usual.config._attn_implementation == "quantkit_causal"
    assert error(logits(usual, ids), logits(sdpa, ids)) < 2.0**-6
    assert type(usual.model.norm).__name__ == "FusedRMSNorm"


@pytest.mark.parametrize("scheme", ["FP8 cache", "FP8 cache per head", "int8 cache"])
def test_generate_caches_codes(scheme: str, outputs: Any, ids: Tensor) -> None:
    model = quantkit.load(outputs("tiny-llama", scheme), dtype=torch.float32)
    done = model.generate(ids[:, :16], max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = done.past_key_values
    assert type(cache).__name__ == "QuantizedCache" and cache.get_seq_length() == 23
    assert cache.layers[0].keys.dtype == (torch.int8 if scheme == "int8 cache" else torch.float8_e4m3fn)
    rounded = model.generate(
        ids[:, :16], max_new_tokens=8, do_sample=False, past_key_values=transformers.DynamicCache(config=model.config)
    )
    assert torch.equal(done.sequences, rounded)
    static = model.generate(ids[:, :16], max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(static, rounded[:, :20])
    sage = quantkit.load(outputs("tiny-llama", scheme), attn_implementation="quantkit_sage")
    assert sage.generate(ids[:, :16], max_new_tokens=8, do_sample=False).shape == (4, 24)


def test_growing_cache_is_the_dynamic_one(outputs: Any, ids: Tensor) -> None:
    model = quantkit.load(outputs("tiny-llama", "W4A16"), dtype=torch.float32)
    usual, ours = (
        transformers.DynamicCache(config=model.config),
        growing(transformers.DynamicCache(config=model.config)),
    )
    assert all(type(layer) is GrowingLayer for layer in ours.layers)
    order = torch.tensor([3, 1, 1, 0])
    with torch.inference_mode():
        for step, part in enumerate((ids[:, :20], ids[:, 20:21], ids[:, 21:22], ids[:, 22:50], ids.repeat(1, 5))):
            got, expected = (model(input_ids=part, past_key_values=c, use_cache=True).logits for c in (ours, usual))
            assert error(got, expected) < WEIGHT_ONLY
            room = ours.layers[0]._room[0].data_ptr()
            assert ours.layers[0].keys.data_ptr() == room
            for cache in (ours, usual):
                if step == 1:
                    cache.reorder_cache(order)
                elif step == 2:
                    cache.crop(-2)
            assert ours.get_seq_length() == usual.get_seq_length()
            for a, b in zip(ours.layers, usual.layers, strict=True):
                torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-4)
    ours.reset()
    assert ours.get_seq_length() == 0
    beams = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    found = model.generate(ids[:, :8], **beams, return_dict_in_generate=True)
    assert type(found.past_key_values.layers[0]) is GrowingLayer
    plain = model.generate(ids[:, :8], **beams, past_key_values=transformers.DynamicCache(config=model.config))
    assert torch.equal(found.sequences, plain)


def test_head_in_bf16_is_the_linear(outputs: Any, ids: Tensor) -> None:
    model = quantkit.load(outputs("tiny-llama", "W4A16"))
    head = model.lm_head
    embedding = model.model.embed_tokens
    with Checkpoint(outputs("tiny-llama", "W4A16")) as checkpoint:
        stored = checkpoint.tensor("model.embed_tokens.weight")
        assert torch.equal(head.weight, stored) and torch.equal(embedding(ids), stored[ids])
    assert head.packed is embedding.packed and not list(head.parameters()) + list(embedding.parameters())
    x = torch.randn(2, 3, 256).bfloat16()
    exact = x.double() @ head.weight.double().T
    assert ((head(x) - exact).abs() <= exact.abs() * 2.0**-8 + 1e-4).all()
    assert torch.equal(head(x)[:, -1:], head(x[:, -1:]))


def test_int4_with_int8_activations_as_llm_compressor_stores_it(outputs: Any, ids: Tensor, tmp_path: Path) -> None:
    """int-quantized: a code in each int8 of `weight`, scales in the model's dtype."""
    output = outputs("tiny-llama", "W4A8")
    copied = tmp_path / "copy"
    shutil.copytree(output, copied)
    tensors = load_file(output / "model.safetensors")
    for name in [n for n in tensors if n.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        cols = int(tensors.pop(f"{module}.weight_shape")[1])
        tensors[f"{module}.weight"] = ops.unpack_int32(tensors.pop(name), 4, cols)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    text = (copied / "config.json").read_text()
    (copied / "config.json").write_text(text.replace("pack-quantized", "int-quantized"))
    assert torch.equal(logits(quantkit.load(copied), ids), logits(quantkit.load(output), ids))
