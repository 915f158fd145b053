"""The plugin that lets vLLM serve quantized Linears with quantkit's kernels (entry point `vllm.general_plugins`).

vLLM calls `register` in each of its processes. It puts quantkit's kernels in front of vLLM's own lists for the CPU, and
for CUDA where the environment variable QUANTKIT_VLLM_CUDA is 1; what they do not take goes to vLLM's. `VLLM_PLUGINS=`
(empty) leaves all plugins out.
"""

from __future__ import annotations

import logging
import os
from typing import Any

logger = logging.getLogger(__name__)

# No kernel of quantkit's was run inside vLLM on a GPU yet, so vLLM's own are replaced there on demand alone.
CUDA = "QUANTKIT_VLLM_CUDA"


def register() -> None:
    """Offer the kernels to vLLM's backend. On other platforms, and where quantkit's library for the platform is not
    loaded, nothing is offered, and the log says so.
    """
    from vllm.platforms import current_platform

    from .. import ops

    device = _device(current_platform)
    if device is None:
        return
    status = ops._load.status()[device]
    if not status.loaded:
        logger.warning("quantkit: its %s kernels are not loaded (%s); vLLM's own serve", device, status.reason)
        return
    from vllm.model_executor.kernels import linear

    from . import vllm_kernels as kernels

    for table, kernel in (
        (linear._POSSIBLE_INT8_KERNELS, kernels.QuantkitInt8LinearKernel),
        (linear._POSSIBLE_FP8_KERNELS, kernels.QuantkitFp8LinearKernel),
        (linear._POSSIBLE_FP8_BLOCK_KERNELS, kernels.QuantkitFp8LinearKernel),
        (linear._POSSIBLE_KERNELS, kernels.QuantkitWNA16LinearKernel),
        (linear._POSSIBLE_KERNELS, kernels.QuantkitW4A8LinearKernel),
    ):
        offered = table.setdefault(current_platform._enum, [])
        if kernel not in offered:  # vLLM may load plugins more than once in a process
            offered.insert(0, kernel)
    logger.info("quantkit: kernels for int8, FP8, W4A8 and weight-only Linears on %s are offered", device)


def _device(platform: Any) -> str | None:
    """The device type whose kernels are wanted on this platform, None for none."""
    if platform.is_cpu():
        return "cpu"
    if platform.is_cuda():
        asked = os.environ.get(CUDA, "0")
        if asked not in ("0", "1"):
            raise ValueError(f"{CUDA} must be 0 or 1, got {asked!r}")
        if asked == "1":
            return "cuda"
        logger.info("quantkit: vLLM's own kernels serve on this GPU; %s=1 puts quantkit's in front", CUDA)
        return None
    logger.info("quantkit: no kernels for this platform; vLLM's own serve")
    return None
