"""The plugin that lets vLLM serve quantized Linears with quantkit's kernels (entry point `vllm.general_plugins`).

vLLM calls `register` in each of its processes. It puts quantkit's kernels in front of vLLM's own lists for the CPU;
what they do not take goes to vLLM's. `VLLM_PLUGINS=` (empty) leaves all plugins out.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Offer the kernels to vLLM's CPU backend. On other platforms, and where quantkit's CPU library is not loaded,
    nothing is offered, and the log says so.
    """
    from vllm.platforms import current_platform

    from .. import ops

    if not current_platform.is_cpu():
        logger.info("quantkit: no kernels for this platform yet; vLLM's own serve")
        return
    status = ops._load.status()["cpu"]
    if not status.loaded:
        logger.warning("quantkit: its CPU kernels are not loaded (%s); vLLM's own serve", status.reason)
        return
    from vllm.model_executor.kernels import linear
    from vllm.platforms.interface import PlatformEnum

    from . import vllm_kernels as kernels

    for table, kernel in (
        (linear._POSSIBLE_INT8_KERNELS, kernels.QuantkitInt8LinearKernel),
        (linear._POSSIBLE_FP8_KERNELS, kernels.QuantkitFp8LinearKernel),
        (linear._POSSIBLE_FP8_BLOCK_KERNELS, kernels.QuantkitFp8LinearKernel),
        (linear._POSSIBLE_KERNELS, kernels.QuantkitWNA16LinearKernel),
    ):
        offered = table.setdefault(PlatformEnum.CPU, [])
        if kernel not in offered:  # vLLM may load plugins more than once in a process
            offered.insert(0, kernel)
    logger.info("quantkit: kernels for int8, FP8 and weight-only Linears on the CPU are offered")
