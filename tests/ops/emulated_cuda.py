"""Compiles the CUDA sources for the host emulation and loads them as `torch.ops.quantkit_emulated.*`.

The kernels (csrc/cuda) and their torch boundary (csrc/ops/*_cuda.cpp) are compiled as they are; what stands in for CUDA
is in tests/cuda_emulation. It is done when the tests run, not by CMake: nothing of it belongs in a wheel, an installed
quantkit can be tested as well as a build tree, and a machine without nvcc needs only the C++ compiler.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantkit.ops

from .cuda_cases import relocate, results

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
EMULATION = ROOT / "tests" / "cuda_emulation"
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-U_FORTIFY_SOURCE"),
    "-DQUANTKIT_MAX_GRID=3",  # so that grids are cut short and kernels have to loop
    "-DQUANTKIT_CUDA_SM90=1",
    "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    *(f"-I{path}" for path in (EMULATION / "override", EMULATION, ROOT / "csrc")),
    *("-isystem", str(TORCH / "include")),
]
CACHE = [path] if (path := shutil.which("ccache")) else []
OWN_SCHEMAS = (
    "guarded(Tensor x) -> Tensor",
    "fault(Tensor x, int kind) -> Tensor",
    "async_fault(Tensor x, int kind) -> Tensor",
    "copied_tile(Tensor x, int at0, int at1) -> Tensor",
    "product(Tensor tile, Tensor left, int step) -> Tensor",
    "descriptor(int address, int bytes) -> int",
    "set_seed(int seed) -> ()",
    "largest_block() -> int",
)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path) -> Path:
    """The emulated library for the sources as they are now; compiled in `folder` unless it is there already."""
    sources = sorted([*ROOT.glob("csrc/cuda/*/*.cu"), *ROOT.glob("csrc/ops/*_cuda.cpp")])
    sources += sorted([*EMULATION.glob("*.cpp"), *EMULATION.glob("*.cu")])
    headers = [*ROOT.glob("csrc/cuda/*/*.h"), *ROOT.glob("csrc/ops/*.h"), *EMULATION.glob("**/*.h")]
    headers += [ROOT / "csrc" / "cpu" / name for name in ("types.h", "histogram_scale.h")]
    digest = hashlib.sha256(repr((FLAGS, compiler(), torch.__version__)).encode())
    for path in (*sources, *sorted(headers)):
        digest.update(path.read_bytes())
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library

    def compile_one(source: Path) -> str:
        output = folder / f"{library.stem}-{source.parent.name}-{source.stem}.o"
        run([*CACHE, compiler() or "g++", *FLAGS, "-x", "c++", "-c", str(source), "-o", str(output)])
        return str(output)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = library.with_suffix(f".{os.getpid()}")
    run([compiler() or "g++", "-shared", "-o", str(partial), *objects, str(TORCH / "lib" / "libtorch_cpu.so")])
    partial.rename(library)
    for path in objects:
        os.unlink(path)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load(folder: Path) -> torch.library.Library:
    """Declares the emulated ops with the schemas of the real ones; they live as long as the library given back."""
    library = torch.library.Library("quantkit_emulated", "FRAGMENT")
    for name in quantkit.ops._library.compiled_ops("CUDA"):
        schema = str(getattr(torch.ops.quantkit, name).default._schema)
        library.define(schema.removeprefix("quantkit::"))
    for schema in OWN_SCHEMAS:
        library.define(schema)
    torch.ops.load_library(build(folder))
    return library


def call(op: str, args: tuple[Any, ...]) -> Any:
    """The op with two orders of threads, buffers touching forbidden memory with their end and with their beginning."""
    found = []
    for seed in (0, 1):
        torch.ops.quantkit_emulated.set_seed(seed)
        placed = [relocate(arg, torch.ops.quantkit_emulated.guarded) for arg in args]
        found.append(results(op, getattr(torch.ops.quantkit_emulated, op)(*placed), placed))
    one, two = (r if isinstance(r, (tuple, list)) else (r,) for r in found)
    for first, second in zip(one, two, strict=True):
        assert torch.equal(as_bytes(first), as_bytes(second)), f"{op} depends on the order of its threads"
    return found[0]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
