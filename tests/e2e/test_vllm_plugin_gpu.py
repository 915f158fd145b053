"""Which kernels vLLM would choose on a GPU with the plugin, asked of vLLM's own functions in a process that takes its
platform for one. Nothing is multiplied there, so the choice is all that this proves.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .test_vllm import ENVIRONMENT, PYTHON, pytestmark  # noqa: F401
from .test_vllm_plugin import plugin

# A process of vLLM's that takes its platform for a GPU, as far as choosing kernels goes.
CHOOSE = """
import os, sys
import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape, kFp8Dynamic128Sym, kFp8DynamicTokenSym, kFp8Static128BlockSym, kFp8StaticChannelSym)
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum
from vllm.scalar_type import scalar_types
import vllm.platforms

capability = int(sys.argv[1])
class Gpu(Platform):  # vLLM's own class for CUDA does not import without its library
    _enum, device_name, device_type = PlatformEnum.CUDA, "cuda", "cuda"
    @classmethod
    def get_device_capability(cls, device_id=0):
        return DeviceCapability(*divmod(capability, 10))
    @classmethod
    def has_device_capability(cls, wanted, device_id=0):
        return capability >= (wanted if isinstance(wanted, int) else wanted[0] * 10 + wanted[1])
    @classmethod
    def is_device_capability(cls, wanted, device_id=0):
        return capability == (wanted if isinstance(wanted, int) else wanted[0] * 10 + wanted[1])
vllm.platforms._current_platform = Gpu()
linear.current_platform = vllm.platforms.current_platform
from quantkit import ops
ops._load._status["cuda"] = ops._load.Library(path="_C_cuda", reason=eval(sys.argv[2]))
from quantkit.integrations.vllm import register
register()
register()
ours = [kernel for kernel in linear._POSSIBLE_KERNELS[linear.PlatformEnum.CUDA] if "Quantkit" in kernel.__name__]
assert len(ours) in (0, 2), ours  # once, however often plugins are loaded
def packed(kind, groups, act=torch.bfloat16):
    config = linear.MPLinearLayerConfig((512, 512), (512, 512), kind, act, groups, kind == scalar_types.uint4)
    return linear.choose_mp_linear_kernel(config).__name__
def fp8(activation, weight, table, name):
    config = linear.FP8ScaledMMLinearLayerConfig(weight, activation, (512, 512), torch.bfloat16, torch.bfloat16)
    return linear.choose_scaled_mm_linear_kernel(config, table, quantization=name).__name__
int8 = linear.Int8ScaledMMLinearLayerConfig(False, True, True)
def chosen(name, how):
    try:
        print("CHOSEN", name, how())
    except Exception as error:  # of vLLM's kernels, which look for their libraries
        print("CHOSEN", name, "none")
        print(type(error).__name__, error, file=sys.stderr)
chosen("int8", lambda: linear.choose_scaled_mm_linear_kernel(
    int8, linear._POSSIBLE_INT8_KERNELS, quantization="int8_w8a8").__name__)
chosen("fp8", lambda: fp8(kFp8DynamicTokenSym, kFp8StaticChannelSym, linear._POSSIBLE_FP8_KERNELS, "fp8_w8a8"))
chosen("block", lambda: fp8(
    kFp8Dynamic128Sym, kFp8Static128BlockSym, linear._POSSIBLE_FP8_BLOCK_KERNELS, "fp8_block_w8a8"))
chosen("int4", lambda: packed(scalar_types.uint4b8, 128))
chosen("asymmetric", lambda: packed(scalar_types.uint4, 128))
chosen("w4a8", lambda: packed(scalar_types.int4, 128))
chosen("odd", lambda: packed(scalar_types.uint4b8, 384))
"""


def choose(folder: Path, asked: str | None, capability: int, reason: str | None = None) -> tuple[dict[str, str], str]:
    """Kernel for each kind of Linear on a GPU of this capability, as vLLM's own functions choose."""
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(folder), "VLLM_PLUGINS": ""}
    environment.pop("QUANTKIT_VLLM_CUDA", None)
    if asked is not None:
        environment["QUANTKIT_VLLM_CUDA"] = asked
    command = [PYTHON, "-c", CHOOSE, str(capability), repr(reason)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("CHOSEN ")]
    return {name: kernel for _, name, kernel in lines}, done.stdout + done.stderr


def test_kernels_for_gpus_are_chosen_where_they_are_asked_for(tmp_path: Path) -> None:
    """vLLM's choice on a GPU, without one: nothing is run there, so that is all this proves."""
    folder = plugin(tmp_path / "plugins")
    chosen, log = choose(folder, "1", 90)
    ours = {
        "int8": "QuantkitInt8LinearKernel",
        **dict.fromkeys(("fp8", "block"), "QuantkitFp8LinearKernel"),
        **dict.fromkeys(("int4", "asymmetric"), "QuantkitWNA16LinearKernel"),
        "w4a8": "QuantkitW4A8LinearKernel",
        "odd": "none",
    }
    assert chosen == ours, log[-3000:]
    for asked, capability, reason in ((None, 90, None), ("0", 90, None), ("1", 75, None), ("1", 90, "not compiled")):
        chosen, log = choose(folder, asked, capability, reason)
        assert len(chosen) == len(ours) and not any("Quantkit" in kernel for kernel in chosen.values()), log[-3000:]
    chosen, log = choose(folder, "yes", 90)
    assert not chosen and "QUANTKIT_VLLM_CUDA must be 0 or 1, got 'yes'" in log
