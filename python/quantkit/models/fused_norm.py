"""bf16 RMS norms by `ops.rms_norm`, in one pass over their input where the written-out form takes six.

Architectures write the norm in their own ways. Whether the fused op computes what a class means is found out by trying,
to within bf16's rounding; if it does not (Gemma's multiplies by one plus weight), the norm runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import ops

# The written-out form rounds to bf16 twice, the fused one once.
TOLERANCE = 2.0**-6
_SAME: dict[type[nn.Module], bool] = {}


@contextmanager
def fused(layer: nn.Module) -> Iterator[None]:
    """Within the block, the RMS norms below `layer` run fused where that is the same."""
    replaced = []
    try:
        for norm in layer.modules():
            found = _fusable(norm)
            if found is not None:
                norm.__dict__["forward"] = _forward(*found)
                replaced.append(norm)
        yield
    finally:
        for norm in replaced:
            norm.__dict__.pop("forward", None)


class FusedRMSNorm(nn.Module):
    """Stands in for good for a norm that it computes the same as."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:  # as the written-out form rounds
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        return ops.rms_norm(x, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def replace_norms(model: nn.Module) -> None:
    """Put a FusedRMSNorm in the place of every RMS norm in 16 bit of `model` where that is the same."""
    for path, norm in list(model.named_modules()):
        found = _fusable(norm)
        if found is not None:
            model.set_submodule(path, FusedRMSNorm(*found).train(norm.training))


def _fusable(norm: nn.Module) -> tuple[nn.Parameter, float] | None:
    """The weight and epsilon of a norm on the CPU that the fused op computes."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = norm._parameters.get("weight")
    if not type(norm).__name__.endswith("RMSNorm") or not isinstance(eps, float) or weight is None:
        return None
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return None
    if type(norm) not in _SAME:
        _SAME[type(norm)] = _same(norm, weight, eps)
    return (weight, eps) if _SAME[type(norm)] else None


def _forward(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    return lambda x: ops.rms_norm(x, weight, eps)


def _same(norm: nn.Module, weight: Tensor, eps: float) -> bool:
    x = torch.randn(4, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.no_grad():
        found, expected = _forward(weight, eps)(x).float(), norm(x).float()
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=2.0**-20)
