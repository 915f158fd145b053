"""pack_int32 and unpack_int32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quantkit.ops as ops

from .cpu_cases import call, check, check_compiles, check_refused

COLS = (1, 3, 7, 8, 9, 31, 63, 64, 65, 127, 128, 200, 1000)


def codes_of(rows: int, cols: int, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(cols)
    return torch.randint(-half, half, (rows, cols), dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cols", COLS)
def test_like_the_reference(cols: int, bits: int) -> None:
    any_code = codes_of(5, cols + 3, 8)
    for codes in (any_code[:, :cols].contiguous(), any_code[:, 1 : 1 + cols]):  # 4 bits: beyond the range, they wrap
        check("pack_int32", codes, bits)
    packed = torch.randint(-(2**31), 2**31 - 1, (5, (cols * bits + 31) // 32 + 1), dtype=torch.int64).to(torch.int32)
    check("unpack_int32", packed[:, 1:], bits, cols)
    check("unpack_int32", packed[:, :-1].contiguous(), bits, cols)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cols", COLS)
def test_like_compressed_tensors(cols: int, bits: int) -> None:
    codes = codes_of(6, cols, bits)
    theirs = pack_to_int32(codes, bits)
    assert torch.equal(ops.pack_int32(codes, bits), theirs)
    assert torch.equal(ops.unpack_int32(theirs, bits, cols), codes)
    assert torch.equal(unpack_from_int32(theirs, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_like_compressed_tensors(bits: int) -> None:
    zero_points = codes_of(37, 5, bits)
    theirs = pack_to_int32(zero_points, bits, packed_dim=0)
    assert torch.equal(ops.pack_zero_points(zero_points, bits), theirs)
    assert torch.equal(ops.unpack_zero_points(theirs, bits, 37), zero_points)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), bits=st.sampled_from([4, 8]), rows=st.integers(1, 4), cols=st.integers(1, 150))
def test_round_trip_and_layout(data: st.DataObject, bits: int, rows: int, cols: int) -> None:
    half = 1 << (bits - 1)
    numbers = data.draw(st.lists(st.integers(-half, half - 1), min_size=rows * cols, max_size=rows * cols))
    codes = torch.tensor(numbers, dtype=torch.int8).reshape(rows, cols)
    packed = ops.pack_int32(codes, bits)
    assert torch.equal(ops.unpack_int32(packed, bits, cols), codes)
    # The layout as ops/pack.py describes it, word for word.
    words, per_word = packed.numpy().view(np.uint32), 32 // bits
    for row in range(rows):
        for i in range(words.shape[1] * per_word):
            stored = int(words[row, i // per_word]) >> (i % per_word * bits) & (2 * half - 1)
            assert stored == (numbers[row * cols + i] + half if i < cols else 0)


@pytest.mark.parametrize("shape", [(0, 9), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    for bits in (4, 8):
        check("pack_int32", torch.zeros(shape, dtype=torch.int8), bits)
        packed = torch.zeros((shape[0], (shape[1] * bits + 31) // 32), dtype=torch.int32)
        check("unpack_int32", packed, bits, shape[1])


def test_refuses() -> None:
    codes, packed = torch.zeros(4, 9, dtype=torch.int8), torch.zeros(4, 2, dtype=torch.int32)
    check_refused("pack_int32", "num_bits must be 4 or 8, got 3", codes, 3)
    check_refused("pack_int32", "expected a 2-D torch.int8 tensor, got 2-D torch.int32", packed, 4)
    check_refused("unpack_int32", "expected a 2-D torch.int32 tensor, got 1-D torch.int32", packed[0], 4, 9)
    check_refused("unpack_int32", "17 columns of 4 bits take 3 words a row, packed has 2", packed, 4, 17)
    with pytest.raises(RuntimeError, match="codes must have its last dimension contiguous"):
        call("pack_int32", codes.t(), 4)


def test_compiles() -> None:
    check_compiles("pack_int32", codes_of(3, 13, 4), 4)
    check_compiles("unpack_int32", torch.zeros(3, 2, dtype=torch.int32), 4, 13)
