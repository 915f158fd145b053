"""Ops of vLLM and sgl-kernel in their own words, served by quantkit: for forks that call `torch.ops._C.X` or
`torch.ops.sgl_kernel.X` and would rather call `torch.ops.quantkit.X`.

Importing this module registers them, on every device that quantkit's ops run on: same name, same arguments in the same
order, same results up to rounding. `ALIASES` lists them; docs/integrations/ops.md says which are not offered, and why.
"""

from . import cache, cpu, fused, gemm, quantize, weight_only
from ._define import ALIASES, Alias
from .frozen import freeze, thaw

__all__ = ["ALIASES", "Alias", "cache", "cpu", "freeze", "fused", "gemm", "quantize", "thaw", "weight_only"]
