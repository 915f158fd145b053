"""Opens the compiled op libraries and remembers why one could not be opened.

Without `_C_cpu` every op is served by its reference in plain torch: same results, far slower. That is said
once, with the reason, as a RuntimeWarning; `require` makes an error of it for whoever depends on the speed.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import torch

from ._library import NAMESPACE, compiled_ops

MINIMUM_TORCH = (2, 11)  # what the stable ABI that the libraries are compiled for asks of torch


@dataclass(frozen=True)
class Library:
    """One compiled library: where it lies (None: nowhere) and why it is not loaded (None: it is)."""

    path: str | None
    reason: str | None

    @property
    def loaded(self) -> bool:
        return self.reason is None


_status: dict[str, Library] = {}


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def _open(name: str) -> Library:
    # Not looked for beside this file: an editable install keeps its libraries apart from the sources.
    spec = importlib.util.find_spec(f"quantkit._C_{name}")
    if spec is None or spec.origin is None:
        return Library(None, f"this installation has no _C_{name}")
    if _torch_version() < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        return Library(spec.origin, f"it needs torch >= {wanted}, and this is torch {torch.__version__}")
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return Library(spec.origin, f"it cannot be opened: {error}")
    key = name.upper()
    missing = [
        op for op in compiled_ops(key) if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)
    ]
    if missing:
        return Library(spec.origin, f"{spec.origin} is older than these sources: it has no {', '.join(missing)}")
    return Library(spec.origin, None)


def load_libraries() -> None:
    """Open `_C_cpu`, and `_C_cuda` if this torch is built with CUDA. Called once, when the ops are imported."""
    if _status:
        return
    _status["cpu"] = _open("cpu")
    if torch.version.cuda is None:
        spec = importlib.util.find_spec("quantkit._C_cuda")
        reason = f"torch {torch.__version__} is built without CUDA"
        _status["cuda"] = Library(spec.origin if spec else None, reason)
    else:
        _status["cuda"] = _open("cuda")

    for name, library in _status.items():
        # Where there is no GPU, nobody misses the CUDA kernels.
        needed = name == "cpu" or (torch.version.cuda is not None and torch.cuda.is_available())
        if needed and not library.loaded:
            warnings.warn(
                f"quantkit's {name.upper()} kernels are not loaded: {library.reason}. The slow reference in plain "
                "torch serves in their place; reinstall quantkit in this environment with a C++20 compiler"
                + (" and nvcc." if name == "cuda" else "."),
                RuntimeWarning,
                stacklevel=2,
            )


def status() -> dict[str, Library]:
    """What became of each op library, by "cpu" and "cuda"."""
    load_libraries()
    return dict(_status)


def require(name: str) -> None:
    """RuntimeError with the reason unless the kernels for "cpu" or "cuda" are loaded."""
    libraries = status()
    if name not in libraries:
        raise ValueError(f"no such op library: {name!r}; there are {', '.join(map(repr, libraries))}")
    reason = libraries[name].reason
    if reason is not None:
        raise RuntimeError(f"quantkit's {name.upper()} kernels are needed and not loaded: {reason}")
