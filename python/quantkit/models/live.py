"""A Transformers model in memory, dressed as the checkpoint that it would be: for the plan, the skeleton and the sink.

Tensors go by their checkpoint names and are the model's own memory, never copies. Experts, which Transformers holds as
3-D parameters, show as one 2-D view for each expert and projection; a tied head has no tensor.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.dtypes import name_of
from ..errors import CheckpointError, PlanError
from .experts import Expert, Experts
from .experts_layout import is_fused, layout_of
from .families import Family, family_of


@dataclass(frozen=True)
class LiveTensor:
    """What a plan asks of a tensor; `dtype` as safetensors names it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class LiveCheckpoint:
    """`model` as a checkpoint. Attributes as in `checkpoint.reader.Checkpoint`; `folder` is where the model came from,
    or its class's name, and serves in messages. `parameters` are the tensors themselves, on the model's device.

    Raises PlanError or CheckpointError for a model that is no plain causal language model with its weights in memory.
    """

    def __init__(self, model: Any) -> None:
        require_plain(model)
        self.model = model
        self.folder = Path(str(getattr(model.config, "_name_or_path", "") or type(model).__name__))
        self.config: dict[str, Any] = checkpoint_config(model)
        self.family: Family = family_of(self.config)
        self.dequantized = self.remade = self.gathered = frozenset[str]()
        self.fused: dict[str, nn.Module] = {}
        self._modules: dict[str, nn.Module] | None = None
        # By name, as the safetensors library writes them: an output does not depend on where its model came from.
        self.parameters: dict[str, Tensor] = dict(sorted(self._named()))
        self.tensors: dict[str, LiveTensor] = {
            name: LiveTensor(name_of(t.dtype), tuple(t.shape), t.nbytes) for name, t in self.parameters.items()
        }
        self.parts = self.tensors
        self.total_bytes: int = sum(info.nbytes for info in self.tensors.values())

    @property
    def side_files(self) -> list[Path]:
        """Modelling code that came with the model; all else that belongs to it is made from the model itself."""
        needs_code = bool(self.config.get("auto_map")) and self.folder.is_dir()
        return sorted(self.folder.glob("*.py")) if needs_code else []

    def checkpoint_name(self, name: str) -> str:
        """The checkpoint's name of a parameter or module of the model."""
        for here, there in self.family.renames:
            name = name.replace(here, there)
        return name

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        embedding = getattr(self.model.get_input_embeddings(), "weight", None)
        head = self.model.get_output_embeddings()
        for path, module in self.model.named_modules():
            if is_fused(module) and self._splits(path, module):
                yield from self._split(path, module)
                continue
            own: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
            for key, tensor in own.items():
                if tensor is None or key in module._non_persistent_buffers_set:
                    continue
                if module is head and tensor is embedding and self.family.tied:
                    continue
                yield self.checkpoint_name(f"{path}.{key}" if path else key), tensor.detach()

    def _splits(self, path: str, module: nn.Module) -> bool:
        try:
            return layout_of(module, path).plain
        except CheckpointError:
            return False  # they stay whole, in full precision, and the plan says so

    def _split(self, path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        name = self.checkpoint_name(path)
        gate_up, down = module._parameters["gate_up_proj"], module._parameters["down_proj"]
        assert gate_up is not None and down is not None
        self.fused[path] = module
        parts = self.family.expert_parts
        half = gate_up.shape[1] // 2
        for index in range(down.shape[0]):
            views = (gate_up[index, :half], gate_up[index, half:], down[index])
            for part, view in zip(parts, views, strict=True):
                yield f"{name}.{index}.{part}.weight", view.detach()

    # As a source of weights

    def names(self) -> set[str]:
        """The names that `get` knows."""
        return set(self.parameters)

    def get(self, name: str) -> Tensor:
        """Tensor `name` on the CPU; the model's own memory if it is there already. To be read only."""
        return self.parameters[name].cpu()

    tensor = get

    def release(self, name: str) -> None:
        """Nothing to let go of: the model keeps its weights."""

    # As what is written to

    def put(self, name: str, value: Tensor) -> None:
        """Overwrite tensor `name` in place, in its own dtype."""
        with torch.no_grad():
            self.parameters[name].copy_(value)

    def module(self, name: str) -> nn.Module:
        """The model's Linear whose checkpoint name is `name`; that of an expert only after `unfuse`."""
        if self._modules is None:
            self._modules = {self.checkpoint_name(path): module for path, module in self.model.named_modules()}
        return self._modules[name]

    def unfuse(self) -> None:
        """Put Linears in the place of experts held as 3-D parameters. They are views on the same memory; the model
        computes the same, expert by expert, and its Linears can have hooks.
        """
        for path, module in self.fused.items():
            name = self.checkpoint_name(path)
            experts = Experts(module, self.family.expert_parts, name)
            for index, expert in enumerate(experts):
                assert isinstance(expert, Expert)
                for part in expert.parts:
                    weight = nn.Parameter(self.parameters[f"{name}.{index}.{part}.weight"], requires_grad=False)
                    expert.get_submodule(part).weight = weight
            experts.train(module.training)
            self.model.set_submodule(path, experts)
        self.fused.clear()
        self._modules = None


def checkpoint_config(model: Any) -> dict[str, Any]:
    """What config.json says of `model`, as `save_pretrained` of Transformers writes it."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    # Left out by Transformers where it is what it assumes anyway; other readers assume otherwise.
    found["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))
    return found


def require_plain(model: Any) -> None:
    """Refuse what is no causal language model of Transformers, is quantized, or has its weights elsewhere."""
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if hasattr(model, "merge_and_unload"):
        raise PlanError(f"model: {kind} carries adapters; pass model.merge_and_unload()")
    if not isinstance(model, PreTrainedModel):
        raise PlanError(
            f"model: expected a causal language model of Transformers or the path of one, got {_described(model)}"
        )
    config = model.config
    quantized: Any = getattr(config, "quantization_config", None)
    if quantized or getattr(model, "hf_quantizer", None):
        method = (
            quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", "?")
        )
        raise PlanError(
            f"model: {kind} is already quantized (quant_method '{getattr(method, 'value', method)}'); start from the "
            "full-precision model"
        )
    if config.get_text_config() is not config:
        raise PlanError(
            f"model: {kind} holds more than a language model; give the path of its folder and an output_dir, which "
            "quantizes the text part and carries over the rest"
        )
    if model.get_output_embeddings() is None or not hasattr(config, "vocab_size"):
        raise PlanError(f"model: {kind} has no head over a vocabulary; load it with AutoModelForCausalLM")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise PlanError(
                f"model: {name} is not in memory (offloaded, or never loaded); give the path and an output_dir, which "
                "loads one layer at a time, or load it without offloading"
            )
        if parameter.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise PlanError(
                f"model: {name} has dtype {str(parameter.dtype).removeprefix('torch.')}; quantkit starts from float32, "
                "float16 or bfloat16"
            )


def _described(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}; make an instance with from_pretrained"
    return f"{value!r}" if value is None or isinstance(value, int | float | bool) else f"a {type(value).__name__}"
