"""The tests of the CPU ops once more on each lower instruction set: QUANTKIT_ISA is read once in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.ops.isa import Isa, current_isa, supported_isas

FAMILIES = (
    "attention",
    "kv_cache",
    "reduce",
    "scale",
    "quantize",
    "pack",
    "rtn",
    "per_token",
    "pointwise",
    "error",
    "gptq",
    "gram",
    "awq",
    "search",
    "histogram",
    "histogram_scale",
    "percentile",
    "w8a8",
    "int8_mixed",
    "w4a8",
    "wna16",
    "fp4",
    "fp8_gemm",
    "moe",
    "bf16_gemm",
)


@pytest.mark.parametrize("isa", [isa.name for isa in Isa])
def test_same_results(isa: str) -> None:
    if Isa[isa] not in supported_isas():
        pytest.skip(f"this machine or this build lacks {isa}: its kernels are not tested here")
    if Isa[isa] is current_isa():
        pytest.skip(f"{isa} is what the tests of this process run on")
    files = [str(Path(__file__).parent / f"test_{family}.py") for family in FAMILIES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not compiles", *files]
    done = subprocess.run(command, env={**os.environ, "QUANTKIT_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
