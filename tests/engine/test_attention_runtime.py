"""quantkit's attention and 8-bit cache in Transformers models, against eager attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask

from quantkit.config.schemes import QuantizationArgs
from quantkit.errors import ConfigError
from quantkit.live_hooks import CacheQuantizer
from quantkit.runtime.attention import NAME, register_attention, sage_attention_forward, sage_mask
from quantkit.runtime.cache import QuantizedCache

from ..conftest import ROOT

PAD = 2
FOLDER = ROOT / "examples" / "models" / "tiny-llama"


@pytest.fixture(scope="module")
def models() -> Any:
    """The embedded model in fp32, with eager attention and with quantkit's."""
    register_attention()
    return [
        AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation=name).eval()
        for name in ("eager", NAME)
    ]


def tokens(batch: int, n: int) -> Tensor:
    """[batch, n] of the text that the model knows."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer((ROOT / "examples" / "data" / "evaluation.txt").read_text()[: 40 * batch * n]).input_ids
    return torch.tensor(ids[5 : 5 + batch * n]).reshape(batch, n)


def divergence(logits: Tensor, expected: Tensor) -> float:
    """Mean KL divergence, in nats."""
    p, q = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def test_prefill_and_decoding(models: Any) -> None:
    eager, sage = models
    ids = tokens(2, 130)
    expected = eager(ids).logits
    assert divergence(sage(ids).logits, expected) < 2e-4
    # In two prefills and single steps, on a cache of numbers: those steps are exact.
    cache = DynamicCache(config=sage.config)
    parts = [sage(part, past_key_values=cache).logits for part in ids.split([60, 65, 1, 1, 3], 1)]
    assert divergence(torch.cat(parts, 1), expected) < 2e-4
    short = tokens(2, 6)
    torch.testing.assert_close(sage(short).logits, eager(short).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ("left", "right"))
def test_padding(models: Any, side: str) -> None:
    eager, sage = models
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.int64)
    hidden = slice(0, 11) if side == "left" else slice(29, 40)
    mask[1, hidden], ids[1, hidden] = 0, PAD
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected = eager(ids, attention_mask=mask, position_ids=places).logits
    result = sage(ids, attention_mask=mask, position_ids=places).logits
    assert divergence(result[mask.bool()], expected[mask.bool()]) < 2e-4
    assert result.isfinite().all()


@torch.no_grad()
def test_generates_what_eager_does(models: Any) -> None:
    eager, sage = models
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.int64)
    mask[0, :7], ids[0, :7] = 0, PAD
    how = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    expected = eager.generate(ids, **how)
    assert (sage.generate(ids, **how) == expected).float().mean() > 0.95
    static = StaticCache(config=sage.config, max_cache_len=60)
    assert (sage.generate(ids, past_key_values=static, disable_compile=True, **how) == expected).float().mean() > 0.95
    beams = dict(how, num_beams=3, max_new_tokens=8)
    cache = QuantizedCache(sage.config, capacity=16)
    found = sage.generate(ids, past_key_values=cache, **beams)
    assert (found == eager.generate(ids, **beams)).float().mean() > 0.9


@torch.no_grad()
@pytest.mark.parametrize("dtype", ("int8", "fp8"))
def test_quantized_cache(models: Any, dtype: str) -> None:
    eager = models[0]
    ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.int64)
    mask[1, :13] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected = eager(ids, attention_mask=mask, position_ids=places).logits
    limit = 1e-3 if dtype == "int8" else 1e-2
    for model in models:
        cache = QuantizedCache(model.config, dtype, capacity=20)
        logits, at = [], 0
        for n in (40, 30, 1, 1, 5, 1, 12):
            part = slice(at, at + n)
            out = model(
                ids[:, part], attention_mask=mask[:, : at + n], position_ids=places[:, part], past_key_values=cache
            )
            logits.append(out.logits)
            at += n
        assert cache.get_seq_length() == 90
        assert divergence(torch.cat(logits, 1)[mask.bool()], expected[mask.bool()]) < limit
        assert cache.nbytes < 0.6 * 2 * sum(x.keys.numel() * 2 for x in cache.layers)
        # Forgotten tokens are as if they had never been.
        cache.crop(-12)
        again = model(ids[:, 78:], attention_mask=mask, position_ids=places[:, 78:], past_key_values=cache).logits
        assert again.equal(logits[-1])
        cache.reset()
        assert cache.get_seq_length() == 0


@torch.no_grad()
@pytest.mark.parametrize("strategy", ("tensor", "attn_head"))
def test_calibrated_scales(strategy: str) -> None:
    """Static scales: codes hold exactly what the hooks of a calibrated model round to."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16, attn_implementation="eager").eval()
    with pytest.raises(ConfigError, match="has no scales of a KV cache"):
        QuantizedCache.of(model)
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy)
    for layer in model.model.layers:
        scales = [0.02 + 0.02 * torch.rand(2 if strategy == "attn_head" else 1) for _ in range(2)]
        layer.self_attn.register_forward_pre_hook(CacheQuantizer(args, *scales), with_kwargs=True)
    ids = tokens(1, 30)
    plain, codes = DynamicCache(config=model.config), QuantizedCache.of(model)
    expected = [model(part, past_key_values=plain).logits for part in ids.split([20, 1, 9], 1)]
    result = [model(part, past_key_values=codes).logits for part in ids.split([20, 1, 9], 1)]
    assert torch.cat(result, 1).equal(torch.cat(expected, 1))
    assert codes.layers[0].keys.dtype == torch.float8_e4m3fn


@torch.no_grad()
def test_sliding_window() -> None:
    config = MistralConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=12,
        max_position_embeddings=128,
    )
    model = MistralForCausalLM(config).eval()
    ids = torch.randint(3, 100, (2, 50))
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[0, :9] = 0
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(NAME)
    result = model(ids, attention_mask=mask).logits
    assert (result - expected)[mask.bool()].abs().max() < 0.02 * expected.abs().max()
    for cache in (DynamicCache(config=config), QuantizedCache(config)):
        parts = []
        for begin, end in ((0, 20), (20, 37), (37, 38), (38, 50)):
            parts.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        difference = (torch.cat(parts, 1) - expected)[mask.bool()].abs().max()
        assert difference < 0.03 * expected.abs().max()


def test_refuses(models: Any) -> None:
    sage = models[1]
    ids = tokens(1, 20)
    with pytest.raises(ConfigError, match="there are no gradients"):
        sage(ids)
    with torch.no_grad():
        with pytest.raises(ConfigError, match="a mask of its own"):
            sage(ids, attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool))
        hole = torch.ones(1, 20, dtype=torch.int64)
        hole[0, 5] = 0
        with pytest.raises(ConfigError, match="padding between tokens"):
            sage(ids, attention_mask=hole)
        packed = torch.cat([torch.arange(12), torch.arange(8)])[None]
        with pytest.raises(ConfigError, match="packed"):
            sage(ids, position_ids=packed, use_cache=False)
        x = torch.zeros(1, 2, 20, 16)
        module: Any = SimpleNamespace(is_causal=True)
        for match, arguments in (
            ("dropout", {"dropout": 0.1}),
            ("'softcap' is not computed", {"softcap": 30.0}),
            ("'s_aux' is not computed", {"s_aux": x}),
            ("no attention weights", {"output_attentions": True}),
        ):
            with pytest.raises(ConfigError, match=match):
                sage_attention_forward(module, x, x, x, None, **arguments)
    with pytest.raises(ConfigError, match="int8, fp8"):
        QuantizedCache(sage.config, "int4")
    with pytest.raises(ConfigError, match="of 4; name each"):
        QuantizedCache(sage.config, scales={0: (torch.ones(1), torch.ones(1))})


def test_masks_of_transformers(models: Any) -> None:
    """The numbers say what Transformers' own dense mask does."""
    config = models[1].config
    embeds = torch.zeros(2, 7, 256)
    padding = torch.ones(2, 30, dtype=torch.int64)
    padding[1, :5] = 0
    cache = DynamicCache(config=config)
    cache.update(torch.zeros(2, 2, 23, 64), torch.zeros(2, 2, 23, 64), 0)
    seen = create_causal_mask(config, embeds, padding, cache)
    dense = create_causal_mask(models[0].config, embeds, padding, cache)
    assert seen.dense(2, 7, 30, "cpu").equal(dense == 0)
    assert sage_mask(1, 5, 5).starts is None
