"""What lies between a layer's Linears in 16 bit, in ops that make one pass: SiLU times up, rotary embeddings.

Architectures write both in their own ways. Whether an op computes what a class means is found out by trying, to within
bf16's rounding; where it does not, the class runs as it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .fused_norm import TOLERANCE

ROTARY = "apply_rotary_pos_emb"
# Whether a class's forward, and a module's rotary embedding, are what the ops compute.
_SAME: dict[Any, bool] = {}


def fuse_blocks(root: nn.Module) -> list[nn.Module]:
    """Let the MLPs and attentions below `root` run on the ops where that is the same; gives back which ones do.
    `unfuse` undoes it.
    """
    changed = []
    for module in root.modules():
        forward = _mlp(module) or _attention(module)
        if forward is not None and "forward" not in module.__dict__:
            module.__dict__["forward"] = types.MethodType(forward, module)
            changed.append(module)
    return changed


def unfuse(modules: list[nn.Module]) -> None:
    """Let `modules` run as their classes say."""
    for module in modules:
        module.__dict__.pop("forward", None)


@contextmanager
def fused_blocks(root: nn.Module) -> Iterator[None]:
    """Within the block, MLPs and attentions below `root` run on the ops."""
    changed = fuse_blocks(root)
    try:
        yield
    finally:
        unfuse(changed)


# ---- SiLU times up ----
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """By the op in 16 bit, where it has a kernel."""
    fast = gate.device.type == "cpu" and gate.dtype != torch.float32
    return ops.silu_mul(gate, up) if fast else nn.functional.silu(gate) * up


def _gated(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))
    return out


def _mlp(module: nn.Module) -> Callable[..., Tensor] | None:
    parts = [module._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(part is None for part in parts) or len(module._modules) > 4 or not is_silu(getattr(module, "act_fn", None)):
        return None
    forward = type(module).forward
    return _gated if _once(forward, lambda: _same_mlp(forward, module.act_fn)) else None


def is_silu(function: Any) -> bool:
    """Whether an activation is SiLU."""
    return isinstance(function, nn.SiLU) or type(function).__name__ == "SiLUActivation"


def _same_mlp(forward: Callable[..., Any], act_fn: Any) -> bool:
    """Tried on a stand-in whose projections give fixed numbers."""
    gate, up = _numbers(2, 3, 32), _numbers(2, 3, 32).flip(0)
    stand_in = types.SimpleNamespace(
        gate_proj=lambda x: gate, up_proj=lambda x: up, down_proj=lambda x: x + 0, act_fn=act_fn
    )
    try:
        found = forward(stand_in, gate)
    except Exception:  # it looks at more than these
        return False
    return isinstance(found, Tensor) and _close(ops.silu_mul(gate, up), found)


# ---- rotary embeddings ----
def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rotary_embedding(q, cos, sin), ops.rotary_embedding(k, cos, sin)


def _attention(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of an attention, with the function that it calls for its rotary embedding replaced."""
    forward = type(module).forward
    names = getattr(forward, "__globals__", {})
    original = names.get(ROTARY)
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names or original is None:
        return None
    size = getattr(module, "head_dim", None)
    if not isinstance(size, int) or not _once((original, size), lambda: _same_rotary(original, size)):
        return None
    code, known = forward.__code__, {**names, ROTARY: _guarded(original)}
    copy = types.FunctionType(code, known, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__

    def attend(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A compiler looks names up in the module that the function is said to be from, and fuses by itself.
        return forward(self, *args, **kwargs) if torch.compiler.is_compiling() else copy(self, *args, **kwargs)

    return attend


def _guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    """The op for what it takes, the original for all else."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = q.device.type == "cpu" and q.dtype != torch.float32 and not args and not kwargs
        plain = plain and q.dim() == 4 and cos.dim() == 3
        if plain and q.dtype == k.dtype == cos.dtype and q.shape[3] == k.shape[3] == cos.shape[2]:
            return _rotate(q, k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    return rotate


def _same_rotary(original: Callable[..., Any], size: int) -> bool:
    q, k = _numbers(2, 4, 3, size), _numbers(2, 1, 3, size)
    angle = torch.rand(1, 3, size, generator=torch.Generator().manual_seed(1)) * 6
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    try:
        wanted = original(q, k, cos, sin)
    except Exception:  # whatever this one takes, it is another thing
        return False
    if size % 2 or not isinstance(wanted, tuple) or len(wanted) != 2:
        return False
    return all(_close(a, b) for a, b in zip(_rotate(q, k, cos, sin), wanted, strict=True))


def _once(key: Any, tried: Callable[[], bool]) -> bool:
    if key not in _SAME:
        with torch.no_grad():
            _SAME[key] = tried()
    return _SAME[key]


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def _close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(
        found.float(), wanted.float(), rtol=TOLERANCE, atol=2 * TOLERANCE
    )
