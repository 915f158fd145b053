"""Token probabilities and texts of a model, whoever runs it: what perplexity and tasks are measured with.

A backend is one of `BACKENDS`: "dequantized" (quantkit, weights dequantized a layer at a time, for models larger than
memory), "quantkit" (`quantkit.load`), "hf" (Transformers' own loader) and "vllm" (in this Python or another one).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
BACKENDS = ("dequantized", "quantkit", "hf", "vllm")
# The longest text unless asked otherwise: models of today take more than a CPU cares to compute.
MAX_LENGTH = 4096

# Token ids of a context, which has one at least, and of what follows it.
Pair = tuple[Sequence[int], Sequence[int]]


class Scorer(Protocol):
    """`max_length`: how many tokens a context and what follows may have together. `describe`: who computes, and how."""

    max_length: int
    describe: str

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """The log probability of each pair's second part after the first, and whether it is what greedy decoding
        would have written.
        """
        ...

    def generate(self, prompts: Sequence[tuple[Sequence[int], int, Sequence[str]]]) -> list[str]:
        """Greedy texts after (prompt, at most so many tokens, strings to stop at)."""
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...


def check_backend(backend: str) -> None:
    """ConfigError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend: '{backend}' is not one of {', '.join(BACKENDS)}{nearest(backend, BACKENDS)}")


def open_scorer(
    folder: Path,
    backend: str,
    *,
    dtype: torch.dtype | str | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
    vllm_python: str | Path | None = None,
    progress: bool = True,
) -> Scorer:
    """The model in `folder` run by `backend`.

    `dtype`: of all that is not quantized; fp32 unless given, but in vLLM the model's own. `max_length`: at most the
    model's own number of positions, and `MAX_LENGTH` unless given. `vllm_python`: an interpreter that has vLLM;
    otherwise the one in QUANTKIT_VLLM_PYTHON, or this one.
    """
    check_backend(backend)
    dtype = dtype_of(dtype)
    if backend == "dequantized":
        from .layerwise import LayerwiseScorer

        return LayerwiseScorer(folder, dtype, max_length, trust_remote_code, progress)
    if backend == "vllm":
        from .vllm_client import VllmScorer

        return VllmScorer(folder, dtype, max_length, trust_remote_code, vllm_python)
    from .whole import WholeScorer, load_with_quantkit, load_with_transformers

    load = load_with_quantkit if backend == "quantkit" else load_with_transformers
    return WholeScorer(load(folder, dtype, trust_remote_code), folder, max_length, trust_remote_code)


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name; ConfigError for one that models are not computed in."""
    import torch

    name = str(dtype).removeprefix("torch.")
    if dtype is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"dtype: '{name}' is not one of {', '.join(DTYPES)}{nearest(name, DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def longest(positions: int | None, wanted: int | None) -> int:
    """`max_length` for a model with so many positions."""
    limit = min(positions or MAX_LENGTH, wanted or MAX_LENGTH)
    if limit < 2:
        raise ConfigError(f"max_length: {limit} must be at least 2")
    return limit
