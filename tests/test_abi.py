"""The compiled op libraries use LibTorch's stable ABI and nothing else of torch, nor anything newer than promised."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from .elf import dynamic_symbols, needed_libraries

TARGET = (2, 11)  # TORCH_TARGET_VERSION in cmake/Torch.cmake, MINIMUM_TORCH in quantkit.ops._load
TORCH = Path(torch.__file__).parent
INCLUDE = TORCH / "include" / "torch" / "csrc"
# Where the C functions of the stable ABI are declared, each under the version that brought it.
SHIM_HEADERS = (
    "stable/c/shim.h",
    "inductor/aoti_torch/c/shim.h",
    "inductor/aoti_torch/generated/c_shim_aten.h",
)
NEEDED = {"libtorch_cpu.so", "libtorch_cuda.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}
SYSTEM = re.compile(r"libcudart\.so\.\d+|ld-linux[-\w]*\.so\.\d|libpthread\.so\.0|libdl\.so\.2|librt\.so\.1")

# A name qualified by one of torch's namespaces, inside an Itanium-mangled symbol: N, qualifiers, length and name.
QUALIFIED = re.compile(r"N[rVK]*[RO]?(?:2at|3c10|6caffe2|5torch(?P<length>\d+)(?P<rest>\w*))")
STABLE_NAMESPACES = ("stable", "headeronly")


def shim_versions() -> dict[str, tuple[int, int]]:
    """C function of the stable ABI -> the torch release that brought it; (0, 0) is from before they were versioned."""
    versions = {}
    for header in SHIM_HEADERS:
        guards: list[tuple[int, int]] = []
        for line in (INCLUDE / header).read_text().splitlines():
            if re.match(r"\s*#\s*if", line):
                guard = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)", line)
                guards.append((int(guard[1]), int(guard[2])) if guard else (0, 0))
            elif re.match(r"\s*#\s*endif", line):
                guards.pop()
            else:
                for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", line):
                    versions[name] = max(guards, default=(0, 0))
    return versions


def violations(symbols: Iterable[str], versions: dict[str, tuple[int, int]]) -> list[str]:
    """What is wrong with each symbol that is outside the stable ABI as of TARGET."""
    found = []
    for symbol in symbols:
        if symbol.startswith("_Z"):
            for match in QUALIFIED.finditer(symbol):
                inner = match["rest"][: int(match["length"])] if match["length"] else None
                if inner not in STABLE_NAMESPACES:
                    found.append(f"{symbol}: a C++ symbol of torch")
                    break
        elif re.match(r"(aoti_)?torch_", symbol):
            if symbol not in versions:
                found.append(f"{symbol}: not declared by the stable headers")
            elif versions[symbol] > TARGET:
                found.append(f"{symbol}: came with torch {'.'.join(map(str, versions[symbol]))}")
    return found


def library(name: str) -> Path:
    spec = importlib.util.find_spec(f"quantkit.{name}")
    if spec is None or spec.origin is None:
        if name == "_C_cuda":
            pytest.skip("this installation has no _C_cuda: it was built without nvcc")
        pytest.fail(f"this installation has no {name}: build and install quantkit before its tests")
    return Path(spec.origin)


@pytest.mark.parametrize("name", ["_C_cpu", "_C_cuda"])
def test_only_stable_symbols(name: str) -> None:
    symbols = dynamic_symbols(library(name))
    assert "torch_library_impl" in symbols, f"{name} registers no op: the symbols were not read"
    assert violations(symbols, shim_versions()) == []


@pytest.mark.parametrize("name", ["_C_cpu", "_C_cuda"])
def test_needs_only_torch_and_the_system(name: str) -> None:
    needed = needed_libraries(library(name))
    assert "libtorch_cpu.so" in needed
    assert [n for n in needed if n not in NEEDED and not SYSTEM.fullmatch(n)] == []


def test_versions_are_read_from_the_headers() -> None:
    versions = shim_versions()
    assert versions["aoti_torch_delete_tensor_object"] == (0, 0)
    assert versions["torch_library_impl"] == (2, 10)
    assert versions["torch_from_blob"] == (2, 11)
    if "torch_library_def_with_tags" in versions:
        assert versions["torch_library_def_with_tags"] == (2, 12)


@pytest.mark.parametrize(
    "symbol",
    [
        "_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
        "_ZNK2at10TensorBase8data_ptrIfEEPT_v",
        "_ZN5torch8autograd12VariableHookE",
        "_ZN5torch7LibraryD1Ev",
        "_ZTIN3c1013TensorOptionsE",
        "_ZNSt6vectorIN2at6TensorESaIS1_EE9push_backEOS1_",
        "torch_library_set_python_module",
        "aoti_torch_invented",
    ],
)
def test_the_checker_sees(symbol: str) -> None:
    versions = shim_versions() | {"torch_library_set_python_module": (2, 13)}
    assert len(violations([symbol], versions)) == 1


@pytest.mark.parametrize(
    "symbol",
    [
        "_ZN5torch6stable6detail4fromIlEEmT_",
        "_ZN5torch10headeronly6detail19stdTorchCheckMsgImplEPKc",
        "_ZNSt13runtime_errorC1EPKc",
        "_ZN2qk11current_isaEv",
        "aoti_torch_get_sizes",
        "torch_parallel_for",
        "memcpy",
    ],
)
def test_the_checker_lets_pass(symbol: str) -> None:
    assert violations([symbol], shim_versions()) == []


def test_the_checker_flags_a_library_that_is_not_stable() -> None:
    # torch's own Python bindings live on C++ symbols: reading them proves that the ELF reader finds such.
    found = violations(dynamic_symbols(TORCH / "lib" / "libtorch_python.so"), shim_versions())
    assert len(found) > 100
