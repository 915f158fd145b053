"""The element types of safetensors: sizes, and the torch dtypes that hold them.

Names and sizes: https://github.com/huggingface/safetensors (README, "Format"). The types of less than a byte have
no per-element torch dtype; they can be carried over, and F4 is seen through torch's two-in-a-byte dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import CheckpointError, nearest

if TYPE_CHECKING:
    import torch

BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

_TORCH_NAMES = {
    "F4": "float4_e2m1fn_x2",
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
_NAMES = {torch_name: name for name, torch_name in _TORCH_NAMES.items()}

# Sizes and strides are signed 64-bit numbers in torch, in C++ and in the safetensors library.
_MAX_SIZE = 2**63 - 1


def alignment(dtype: str) -> int:
    """Bytes that an element's address is a multiple of; 1 for types of less than a byte."""
    return max(BITS[dtype] // 8, 1)


def byte_size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; ValueError with the reason if the dtype or the shape is impossible."""
    if dtype not in BITS:
        raise ValueError(f"unknown dtype '{dtype}'{nearest(str(dtype), BITS)}")
    elements, bound = 1, 1
    for extent in shape:
        if type(extent) is not int or extent < 0:  # `type`: True is an int to isinstance
            raise ValueError(f"shape {list(shape)} is not a list of non-negative integers")
        elements *= extent
        bound *= max(extent, 1)  # [0, 2**62, 2**62] has no elements, and strides that overflow
        if bound * 8 > _MAX_SIZE:
            raise ValueError(f"shape {list(shape)} is larger than 64-bit sizes can say")
    bits = elements * BITS[dtype]
    if bits % 8:
        raise ValueError(f"shape {list(shape)} of dtype {dtype} does not fill whole bytes")
    return bits // 8


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype that holds `dtype`; CheckpointError where torch has none."""
    import torch

    name = _TORCH_NAMES.get(dtype)
    if name is None or not hasattr(torch, name):
        raise CheckpointError(f"torch {torch.__version__} has no dtype for safetensors' {dtype}; it can only be copied")
    found: torch.dtype = getattr(torch, name)
    return found


def torch_shape(dtype: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape torch gives a tensor: F4 has two elements in each of torch's."""
    if dtype != "F4":
        return tuple(shape)
    if not shape or shape[-1] % 2:
        raise CheckpointError(f"F4 tensor of shape {list(shape)}: torch needs an even last dimension")
    return (*shape[:-1], shape[-1] // 2)


def name_of(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype; CheckpointError where safetensors has none."""
    name = _NAMES.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise CheckpointError(f"safetensors has no dtype for {dtype}")
    return name
