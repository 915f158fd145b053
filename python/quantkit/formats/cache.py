"""What a format needs to know of the keys and values that an attention module caches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheShape:
    """`heads`: of keys and values. `keys`, `values`: channels of all heads, as the modules k_proj and v_proj make them;
    0 without such a module. `dtype`: the model's, as safetensors names it; None if it has none.
    """

    heads: int
    keys: int = 0
    values: int = 0
    dtype: str | None = None
