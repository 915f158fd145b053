"""What stands between a layer's products, attention and the 8-bit cache on a device: the tests of the emulation with
the real kernels, on any stream, in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quantkit.ops as ops

from . import test_attention_emulation as attention
from . import test_kv_cache_emulation as kv_cache
from . import test_pointwise_emulation as pointwise
from .cuda_cases import Case
from .device import check_current_stream, check_graph, check_other_device, from_device

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda_kernels")]

OPS = {"rms_norm", "rms_norm_quant", "silu_mul", "silu_mul_quant", "rotary_embedding"}
OPS |= {"sage_attention", "attention", "kv_append", "kv_read", "kv_attention"}


@pytest.fixture
def emulated() -> Any:
    """In the place of the emulation."""
    return from_device


test_attention_rounds_weights_alone = attention.test_rounding_of_weights_alone
test_attention_like_reference = attention.test_like_reference
test_attention_what_is_not_finite = attention.test_what_is_not_finite
test_attention_empty_and_refused = attention.test_empty_and_refused
test_append_and_read = kv_cache.test_append_and_read
test_attention_on_a_cache = kv_cache.test_attention
test_beyond_lengths_anything_may_be = kv_cache.test_beyond_lengths_anything_may_be
test_cache_empty_and_refused = kv_cache.test_empty_and_refused
test_norm_and_gate = pointwise.test_norm_and_gate
test_halves_of_one_tensor_nan_and_nothing = pointwise.test_halves_of_one_tensor_nan_and_nothing
test_rotary = pointwise.test_rotary
test_pointwise_refusals = pointwise.test_refusals


def all_ops() -> list[Case]:
    x, weight = torch.randn(6, 264).bfloat16(), torch.randn(264).bfloat16()
    q, k, v = (torch.randn(2, heads, tokens, 64).bfloat16() for heads, tokens in ((4, 40), (2, 70), (2, 70)))
    angle = torch.randn(1, 40, 64)
    codes, scale = torch.randint(-127, 128, (2, 2, 70, 64)).to(torch.int8), torch.rand(2, 2, 70)
    positions = torch.arange(70).expand(2, -1).contiguous()
    how = (True, 0.125, None, torch.tensor([70, 60]), 0)
    found: list[Case] = [
        ("rms_norm", (x, x.flip(0), weight, 1e-5)),
        ("rms_norm_quant", (x, None, weight, 1e-5, torch.int8)),
        ("silu_mul", (x, x.flip(0))),
        ("silu_mul_quant", (x, x.flip(0), torch.float8_e4m3fn)),
        ("rotary_embedding", (q, angle.cos().bfloat16(), angle.sin().bfloat16())),
        ("sage_attention", (q, k, v, *how, True, True, 0)),
        ("attention", (q, k, v, *how)),
        ("kv_append", (k, v, codes, codes.clone(), scale, scale.clone(), positions)),
        ("kv_read", (codes, scale, 3, 50, torch.bfloat16)),
        ("kv_attention", (q[:, :, :2], codes, codes, scale, scale, *how)),
    ]
    assert {op for op, _ in found} == OPS <= set(ops._library.compiled_ops("CUDA"))
    return found


def test_runs_on_the_current_stream() -> None:
    check_current_stream(all_ops(), from_device)


def test_cuda_graph() -> None:
    check_graph(all_ops(), from_device)


def test_other_device() -> None:
    check_other_device(all_ops())
