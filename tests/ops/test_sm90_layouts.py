"""What sm_90's bulk copies and products of warp groups make of bytes and registers, against tables written out here.

The emulation has one function for the swizzle of both, so a wrong idea of it would go unnoticed in the GEMMs. Copies
and products are asked apart here. The tables are those of the PTX ISA: 128-byte swizzle of a K-major tile (8 rows of
128 bytes, chunks of 16), matrix descriptors, and the fragments of wgmma .m64nNk32. On a device nvcc compiles the same
kernels alone: what to run first if results are wrong there.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import emulated_cuda

# Which chunk of a row lies at each of its eight places, for eight rows; the next eight are alike.
PLACES = (
    (0, 1, 2, 3, 4, 5, 6, 7),
    (1, 0, 3, 2, 5, 4, 7, 6),
    (2, 3, 0, 1, 6, 7, 4, 5),
    (3, 2, 1, 0, 7, 6, 5, 4),
    (4, 5, 6, 7, 0, 1, 2, 3),
    (5, 4, 7, 6, 1, 0, 3, 2),
    (6, 7, 4, 5, 2, 3, 0, 1),
    (7, 6, 5, 4, 3, 2, 1, 0),
)
NO_COMPILER = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler: set CXX")


def swizzled(rows: Tensor) -> Tensor:
    """[n, 128] bytes as they lie in shared memory, flat."""
    chunks = rows.view(-1, 8, 16)
    return torch.stack([chunks[r][list(PLACES[r % 8])] for r in range(len(chunks))]).flatten()


class Emulated:
    def tile(self, x: Tensor, at0: int, at1: int) -> Tensor:
        found = []
        for seed in (0, 1):
            torch.ops.quantkit_emulated.set_seed(seed)
            base = torch.ops.quantkit_emulated.guarded(x)
            found.append(torch.ops.quantkit_emulated.copied_tile(base[:, : x.shape[1] - 16], at0, at1).clone())
        assert torch.equal(*found)
        return found[0]

    def product(self, tile: Tensor, left: Tensor, step: int) -> Tensor:
        torch.ops.quantkit_emulated.set_seed(0)
        return torch.ops.quantkit_emulated.product(tile, left, step).clone()


class Device:
    """The kernels, compiled by nvcc for this device alone."""

    def __init__(self, folder: Path) -> None:
        root = emulated_cuda.ROOT
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        library = folder / "layouts.so"
        sources = [root / "tests/cuda_emulation/layouts.cu", root / "csrc/cuda/sm90/tensor_map.cu"]
        command = [nvcc, "-std=c++20", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a"]
        command += ["-shared", "-Xcompiler=-fPIC", f"-I{root / 'csrc'}", *map(str, sources), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.library = ctypes.CDLL(str(library))

    def tile(self, x: Tensor, at0: int, at1: int) -> Tensor:
        base, out = x.cuda(), torch.empty(64 * 128, dtype=torch.uint8, device="cuda")
        rows, stride = x.shape
        extents = [ctypes.c_int64(n) for n in (rows, stride - 16, stride)]
        self.call("quantkit_copied_tile", base, *extents, ctypes.c_int(at0), ctypes.c_int(at1), out)
        return out.cpu()

    def product(self, tile: Tensor, left: Tensor, step: int) -> Tensor:
        out = torch.empty(128, 64, dtype=torch.int32, device="cuda")
        self.call("quantkit_product", tile.cuda(), left.cuda(), ctypes.c_int(step), out)
        return out.cpu()

    def call(self, name: str, *args: Any) -> None:
        placed = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in args]
        torch.cuda.synchronize()
        assert getattr(self.library, name)(*placed, None) == 0
        torch.cuda.synchronize()


MACHINES = [pytest.param("emulated", marks=NO_COMPILER), pytest.param("device", marks=pytest.mark.cuda)]


@pytest.fixture(scope="module", params=MACHINES)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulated | Device:
    if request.param == "emulated":
        request.getfixturevalue("library")
        return Emulated()
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the device is no sm_90")
    return Device(tmp_path_factory.mktemp("layouts"))


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("at0", "at1"), [(0, 0), (128, 3), (256, 40), (0, 96), (384, 0)])
def test_a_tile_that_was_copied(machine: Emulated | Device, at0: int, at1: int) -> None:
    """Of 100 rows of 304 bytes, 320 apart: inside, over either edge, and beyond both."""
    x = random_bytes(100, 320)
    padded = torch.zeros(256, 1024, dtype=torch.uint8)
    padded[:100, :304] = x[:, :304]
    assert torch.equal(machine.tile(x, at0, at1), swizzled(padded[at1 : at1 + 64, at0 : at0 + 128].contiguous()))


@pytest.mark.parametrize("step", range(4))
def test_a_product(machine: Emulated | Device, step: int) -> None:
    a, columns = random_bytes(64, 32).view(torch.int8), random_bytes(128, 128)
    lanes = [(thread // 32 * 16, thread % 32 // 4, thread % 4) for thread in range(128)]
    # Element i of a thread's 16 on the left: four to a register.
    left = torch.stack(
        [
            torch.stack([a[first + row + i // 4 % 2 * 8, pair * 4 + i % 4 + i // 8 * 16] for i in range(16)])
            for first, row, pair in lanes
        ]
    )
    sums = machine.product(swizzled(columns), left.contiguous().view(torch.int32), step)
    wanted = a.int() @ columns.view(torch.int8)[:, 32 * step : 32 * step + 32].int().t()
    for thread, (first, row, pair) in enumerate(lanes):
        for i in range(64):
            assert sums[thread, i] == wanted[first + row + i // 2 % 2 * 8, i // 4 * 8 + pair * 2 + i % 2], (thread, i)


@NO_COMPILER
def test_descriptors(library: Any) -> None:
    """Bits 0-13 the address / 16; 16-29 the leading offset, of which swizzled K-major tiles make nothing (1); 32-45 the
    offset of eight rows / 16; 49-51 the base offset, 0 for tiles at multiples of 1024; 62-63 are 1: 128-byte swizzle.
    """
    for address, bytes_on in ((1024, 0), (0x8400, 32), (0x2C400, 96), (226 << 10, 64)):
        bits = torch.ops.quantkit_emulated.descriptor(address, bytes_on) % 2**64
        assert bits % 2**14 == (address + bytes_on) // 16 and bits >> 14 & 3 == 0
        assert (bits >> 16 & 0x3FFF, bits >> 32 & 0x3FFF, bits >> 49 & 7, bits >> 62) == (1, 1024 // 16, 0, 1)
        assert bits & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62) == 0


@NO_COMPILER
def test_maps_that_no_driver_makes(library: Any) -> None:
    x = random_bytes(100, 320)
    for bad in (x.flatten()[1 : 1 + 99 * 320].view(99, 320), x[:, :300].contiguous(), x.as_strided((8, 320), (16, 1))):
        with pytest.raises(RuntimeError, match="no driver makes this tensor map"):
            torch.ops.quantkit_emulated.copied_tile(bad, 0, 0)
