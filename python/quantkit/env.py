"""What `quantkit env` prints: versions, the instruction set in use, and which library is loaded or why not."""

from __future__ import annotations

import importlib.util
import json
import platform
import warnings
from importlib import metadata
from pathlib import Path

from . import __version__


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _built_with() -> str:
    """Compiler, nvcc and torch that the libraries were built with; the build leaves them in a file beside `_C_cpu`."""
    spec = importlib.util.find_spec("quantkit._C_cpu")
    if spec is None or spec.origin is None:
        return "nothing is built"
    path = Path(spec.origin).with_name("_build.json")
    if not path.is_file():
        return f"unknown, {path} is missing"
    build = json.loads(path.read_text())
    cuda = f"nvcc {build['nvcc']} for {build['cuda_architectures']}" if build["nvcc"] else "without nvcc"
    return f"{build['compiler']}, {cuda}, torch {build['torch']}"


def _isa() -> str:
    from .ops import isa

    try:
        names = ", ".join(i.name for i in isa.supported_isas())
        return f"{isa.current_isa().name} (this machine runs {names})"
    except RuntimeError as error:
        return f"none: {error}"


def _host() -> str:
    try:
        from . import _host
    except ImportError as error:
        return f"not loaded: {error}"
    return f"loaded from {_host.__file__}"


def _gpus() -> str:
    import torch

    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"none that torch (CUDA {torch.version.cuda}) can use"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)" for p in names)


def report() -> str:
    """The report as text. Loads torch and the op libraries, and nothing else that is heavy."""
    import torch

    with warnings.catch_warnings():
        # The report itself says why a library is missing.
        warnings.simplefilter("ignore", RuntimeWarning)
        from .ops import _load

        libraries = _load.status()
    lines = [
        ("quantkit", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        *((package, _version(package)) for package in ("transformers", "compressed-tensors", "safetensors")),
        ("built with", _built_with()),
        ("instruction set", _isa()),
        ("threads", str(torch.get_num_threads())),
    ]
    for name, library in libraries.items():
        loaded = f"loaded from {library.path}" if library.loaded else f"not loaded: {library.reason}"
        lines.append((f"_C_{name}", loaded))
    lines += [("_host", _host()), ("GPU", _gpus())]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)
