"""Keys of AngelSlim's files that quantkit has no use for: accepted and said, or refused with the reason.

Keys with an effect are the fields of the dataclasses in run_config.py; these tables hold all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Accepted:
    """A key without effect: its type is checked, and a run says that it has none. `why`: what decides instead."""

    hint: Any
    why: str


@dataclass(frozen=True)
class Refused:
    """A key of something that quantkit does not do. The values in `harmless` turn it off, and are accepted."""

    why: str
    harmless: tuple[object, ...] = ()


_LAYERWISE = "layers are loaded one at a time, always"

WITHOUT_EFFECT: dict[str, Accepted] = {
    "global.deploy_backend": Accepted(str, "the output is one that vLLM, SGLang and Transformers all read"),
    "global.hidden_size": Accepted(int, "read from the model's config.json"),
    "global.max_seq_length": Accepted(int, "`dataset.max_seq_length` decides"),
    "global.model_arch_type": Accepted(str | None, "read from the model's config.json"),
    "model.attn_implementation": Accepted(str, "chosen by architecture"),
    "model.device_map": Accepted(str | None, _LAYERWISE),
    "model.enable_expert_parallel": Accepted(bool | None, "the processes of torchrun always share the experts"),
    "model.low_cpu_mem_usage": Accepted(bool, _LAYERWISE),
    "model.name": Accepted(str, "the architecture is read from the model's config.json"),
    "model.use_cache": Accepted(bool, "calibration needs no KV cache"),
    "compression.quantization.cpu_convert": Accepted(bool, "packing is done where quantization is"),
    "compression.quantization.quant_analyse": Accepted(bool, "the audit after each run reports every tensor's error"),
    "compression.quantization.quant_method.num_workers": Accepted(int, "`global.num_threads` decides"),
    "compression.quantization.quant_method.share_gate_up_weight_scale_2": Accepted(
        bool, "Linears that servers fuse always share NVFP4's global scale"
    ),
    "dataset.batch_size": Accepted(int, "rows of like length share a forward, some thousand tokens at a time"),
    "dataset.is_sft_data": Accepted(bool, "ranges do not depend on labels"),
}

# Other spellings of keys: the word as some documents misspell it.
SPELLINGS = {"compression.quantization.low_memroy": "low_memory"}

_DAQ = "DAQ (delta-aware quantization) is not supported"
_OFF = (False, None)

NOT_SUPPORTED: dict[str, Refused] = {
    "transform": Refused("rotations (SpinQuant) are not supported"),
    "model.use_audio_in_video": Refused("only text is calibrated with", _OFF),
    "compression.QAD": Refused("quantization-aware distillation is not supported"),
    "compression.QAT": Refused("quantization-aware training is not supported"),
    "compression.MCoreQAD": Refused("quantization-aware distillation is not supported"),
    "compression.Distill": Refused("distillation is not supported"),
    "compression.cache": Refused("cache compression is not supported"),
    "compression.calibrate": Refused("calibration by vLLM is not supported; quantkit has its own"),
    "compression.sparsity": Refused("sparsity is not supported"),
    "compression.quantization.base_is_fp8": Refused(_DAQ, _OFF),
    "compression.quantization.base_model_path": Refused(_DAQ, (None,)),
    "compression.quantization.gpus": Refused(_DAQ),
    "compression.quantization.metric": Refused(_DAQ),
    "compression.quantization.modules_to_quantize": Refused(
        "every Linear but those of ignore_layers is quantized; use ignore_layers", ([], None)
    ),
    "compression.quantization.num_workers": Refused("global.num_threads says how many threads work"),
    "compression.quantization.quant_talker": Refused("only the text model is quantized", _OFF),
    "compression.quantization.quant_vit": Refused("only the text model is quantized, not the vision tower", _OFF),
    "compression.quantization.quantization_method": Refused(_DAQ),
    "compression.quantization.scale_search": Refused(_DAQ),
    "compression.quantization.quant_method.dequant_to_bf16": Refused("fake-quantized output is not supported", _OFF),
    "dataset.inference_settings": Refused("only text is calibrated with", (None, {})),
}
