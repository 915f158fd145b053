"""The instruction set that the CPU kernels run on: the best that the machine has, or what QUANTKIT_ISA says.

Every path gives the same results bit for bit; QUANTKIT_ISA (portable, avx2, avx512) exists to test and to measure
each. It is read once, when the first op asks for it; a value that names none, or one that this machine
lacks, is a RuntimeError.
"""

from __future__ import annotations

from enum import IntEnum

import torch

from ._library import _LIB
from ._load import require

# No tensor argument, nothing to compile or trace: the kernels are in _C_cpu alone.
_LIB.define("cpu_isa() -> int")
_LIB.define("cpu_isa_supported(int isa) -> bool")


class Isa(IntEnum):
    """In rising order: a machine that has one has all below it. The values are those of csrc/cpu/dispatch.h."""

    portable = 0
    avx2 = 1
    avx512 = 2


def current_isa() -> Isa:
    """The one in use. RuntimeError if `_C_cpu` is not loaded or QUANTKIT_ISA asks for what is not there."""
    require("cpu")
    return Isa(torch.ops.quantkit.cpu_isa())


def supported_isas() -> tuple[Isa, ...]:
    """Those that this build and this machine can run, in rising order: the values QUANTKIT_ISA may take."""
    require("cpu")
    return tuple(isa for isa in Isa if torch.ops.quantkit.cpu_isa_supported(int(isa)))
