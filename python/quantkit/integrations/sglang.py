"""The plugin that lets SGLang serve quantized Linears with quantkit's kernels (entry point `sglang.srt.plugins`).

SGLang calls `register` in each of its processes, and applies the hook that it registers by SGLang's own registry: no
file of SGLang's is changed. The hook gives Linears of compressed-tensors checkpoints quantkit's schemes where it has
kernels for them (`sglang_kernels.scheme_for`); all else goes on to SGLang's. `SGLANG_PLUGINS=none` leaves all plugins
out, and so does any other name that is not `quantkit`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from .chosen import chosen_device

logger = logging.getLogger(__name__)

# No kernel of quantkit's was run inside SGLang on a GPU yet, so SGLang's own are replaced there on demand alone.
CUDA = "QUANTKIT_SGLANG_CUDA"
TARGET = (
    "sglang.srt.layers.quantization.compressed_tensors.compressed_tensors.CompressedTensorsConfig.get_linear_scheme"
)


def register() -> None:
    """Register the hook for SGLang's CPU engine (SGLANG_USE_CPU_ENGINE=1), or for CUDA where QUANTKIT_SGLANG_CUDA is 1.
    On other platforms, and where quantkit's library for the platform is not loaded, nothing is registered, and the log
    says so.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.utils import is_cpu, is_cuda

    device = chosen_device("SGLang", CUDA, logger, cpu=is_cpu(), cuda=is_cuda())
    if device is None:
        return
    HookRegistry.register(TARGET, linear_scheme, HookType.AROUND)
    logger.info("quantkit: kernels for int8, FP8, W4A8 and weight-only Linears on %s are offered", device)


def linear_scheme(
    original: Callable[..., Any],
    config: Any,
    layer: Any,
    layer_name: str | None = None,
    matched_target: str | None = None,
) -> Any:
    """quantkit's scheme for this Linear, or what SGLang's own method (`original`) says. Around
    CompressedTensorsConfig.get_linear_scheme.
    """
    from sglang.srt.layers.linear import LinearBase

    from .sglang_kernels import scheme_for

    if isinstance(layer, LinearBase) and not config.sparsity_scheme_map:
        found = config.get_scheme_dict(layer, layer_name, matched_target)
        if found:
            form = found["format"] or config.quant_format
            scheme = scheme_for(found["weights"], found["input_activations"], form)
            if scheme is not None:
                logger.info("quantkit: %s for %s", type(scheme).__name__, layer_name)
                return scheme
    return original(config, layer, layer_name, matched_target)
