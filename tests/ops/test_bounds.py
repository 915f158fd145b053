"""No kernel reads beyond its inputs: they end where memory that may not be touched begins, on each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quantkit.ops.isa import Isa, supported_isas

# In a process of its own: a stray read ends it.
PROGRAM = """
import ctypes, mmap
import torch
from quantkit import ops

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
mappings = []

def at_the_end(tensor):
    size = -(-tensor.nbytes // PAGE) * PAGE
    mapping = mmap.mmap(-1, size + PAGE)
    mappings.append(mapping)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(PAGE), 0) == 0
    copy = torch.frombuffer(mapping, dtype=torch.uint8, count=tensor.nbytes, offset=size - tensor.nbytes)
    return copy.view(tensor.dtype).reshape(tensor.shape).copy_(tensor)

for cols in (1, 3, 15, 16, 17, 31, 33, 63, 65, 130):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = at_the_end(torch.randn(3, cols).to(dtype))
        ops.int8_quant_per_token(x, symmetric=False)
        ops.fp8_quant_per_token(x)
        ops.histogram_accumulate(x, torch.zeros(8192, dtype=torch.int64), torch.zeros(1))
        for block in ([1, -1], [1, 1], [1, 7], [1, 32], [-1, 1], [2, 5], [-1, -1]):
            low, high = (at_the_end(t) for t in ops.minmax(x, block))
            ops.symmetric_scale(at_the_end(ops.absmax(x, block)), 127.0)
            scale, zero_point = (at_the_end(t) for t in ops.asymmetric_scale(low, high, -8, 7))
            codes = at_the_end(ops.quantize_int(x, scale, zero_point, block, -8, 7))
            small = at_the_end(ops.quantize_fp8(x, scale, block))
            for q in (codes, small):
                ops.dequantize(q, scale, zero_point, block, dtype)
                ops.quantization_error(x, q, scale, zero_point, block)
            for bits in (4, 8):
                ops.unpack_int32(at_the_end(ops.pack_int32(codes, bits)), bits, cols)
            ops.rtn_int(x, block, q_min=-8, q_max=7, symmetric=False, pack_bits=4)
            ops.rtn_fp8(x, block)
            weights = at_the_end(torch.rand(cols))
            for norm in (2.0, 2.4):
                ops.mse_scale(x, block, q_min=-8, q_max=7, divisor=7.5, importance=weights, norm=norm, search_steps=2)
            ops.percentile_scale(x, block, percentile=90.0, q_min=-8, q_max=7, symmetric=False)
        for features in (1, 17, 64, 70):
            weight = at_the_end(torch.randint(-128, 128, (features, cols), dtype=torch.int8))
            packed, scale = (at_the_end(t) for t in (ops.pack_w8a8(weight), torch.rand(features)))
            bias = at_the_end(torch.rand(features).to(dtype))
            ops.int8_gemm(at_the_end(x.to(torch.int8)), packed, features)
            ops.w8a8_gemm(x, packed, scale, features, symmetric=False, bias=bias)
            ops.int8_mixed_gemm(x, packed, scale, features, threshold=0.5, bias=bias)
print("within bounds", len(mappings))
"""


@pytest.mark.parametrize("isa", [isa.name for isa in Isa])
def test_reads_within_bounds(isa: str) -> None:
    if Isa[isa] not in supported_isas():
        pytest.skip(f"this machine or this build lacks {isa}: its kernels are not tested here")
    environment = {**os.environ, "QUANTKIT_ISA": isa}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.startswith("within bounds")
