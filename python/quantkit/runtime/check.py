"""What `load` refuses before it reads a weight: everything that headers and config.json tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CheckpointError, ConfigError
from ..formats.source import WeightSource
from ..formats.stored import check_stored, describe_scheme
from .linear import DEVICES, kind_of

if TYPE_CHECKING:
    import torch

    from ..checkpoint.reader import Checkpoint

SUPPORTED = (
    "weights in int4 or int8 per channel or group, or fp8 per tensor, channel or block, MXFP8, MXFP4 and NVFP4; "
    "activations in 16 bit, int8 or fp8 per token or tensor, or as the weights"
)


def check_device(device: str | torch.device) -> None:
    """ConfigError for a device that no kernel of quantized layers runs on."""
    import torch

    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: {device!r} is not a device of torch: {error}") from None
    if kind not in DEVICES:
        raise ConfigError(
            f"device: quantized layers have kernels for {', '.join(DEVICES)} only, not for {kind} yet; use "
            "device='cpu', or serve the folder with vLLM, SGLang or Transformers, which read it as it is"
        )


def require_quantized(checkpoint: Checkpoint) -> None:
    """CheckpointError for a plain checkpoint: there is nothing here that Transformers would not do as well."""
    if checkpoint.config.get("quantization_config") is None:
        raise CheckpointError(
            f"{checkpoint.folder}: not quantized (config.json has no quantization_config); load it with "
            "Transformers, and for quantized layers without a checkpoint pass the model to quantkit.swap_linears"
        )


def check_tensors(source: WeightSource) -> None:
    """CheckpointError unless every quantized module has a kernel, and the tensors that its scheme says."""
    for module, scheme in source.schemes.items():
        if kind_of(scheme) is None:
            rule = f"no kernel runs {describe_scheme(scheme)}; there are kernels for {SUPPORTED}"
            raise CheckpointError(f"{source.checkpoint.folder}: {module}: {rule}")
    check_stored(source)
