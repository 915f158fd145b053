"""The plugin that lets vLLM serve quantized Linears with quantkit's kernels (entry point `vllm.general_plugins`).

vLLM calls `register` in each of its processes. It puts quantkit's kernels in front of vLLM's own lists for the CPU, and
for CUDA where the environment variable QUANTKIT_VLLM_CUDA is 1; what they do not take goes to vLLM's. `VLLM_PLUGINS=`
(empty) leaves all plugins out.
"""

from __future__ import annotations

import logging

from .chosen import chosen_device

logger = logging.getLogger(__name__)

# No kernel of quantkit's was run inside vLLM on a GPU yet, so vLLM's own are replaced there on demand alone.
CUDA = "QUANTKIT_VLLM_CUDA"


def register() -> None:
    """Offer the kernels to vLLM's backend. On other platforms, and where quantkit's library for the platform is not
    loaded, nothing is offered, and the log says so.
    """
    from vllm.platforms import current_platform

    cpu, cuda = current_platform.is_cpu(), current_platform.is_cuda()
    device = chosen_device("vLLM", CUDA, logger, cpu=cpu, cuda=cuda)
    if device is None:
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
