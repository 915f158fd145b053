"""What a model in memory becomes: its weights overwritten by what their codes mean, inputs of Linears quantized at run
time, and `save_pretrained`, which writes the codes that are kept beside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from .checkpoint.folder import CONFIG, INDEX
from .checkpoint.layout import OutputTensor, plan_layout
from .checkpoint.reader import Checkpoint
from .checkpoint.writer import CheckpointWriter
from .config.run_config import RunConfig
from .engine import WrittenOutput, side_files
from .errors import CheckpointError, ConfigError, nearest
from .formats.source import cache_quantizer
from .live_hooks import CacheQuantizer, InputQuantizer
from .models.attention import round_queries
from .models.live import LiveCheckpoint
from .plan import Plan, build_plan
from .quantized import QuantizedTensor

if TYPE_CHECKING:
    from .modifiers.sink import Sink
    from .report.calibration import CalibrationReport

GENERATION = "generation_config.json"
# Arguments of Transformers' and llm-compressor's save_pretrained that change nothing here.
_IDLE = ("is_main_process", "save_original_format", "save_peft_format", "token")


class LiveSink:
    """Holds what modifiers give until all of it is there; see `modifiers.sink.Sink`."""

    def __init__(self) -> None:
        self.weights: dict[str, QuantizedTensor] = {}
        self.inputs: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.caches: dict[str, tuple[Tensor, Tensor]] = {}
        self.queries: dict[str, Tensor] = {}

    def weight(self, module: str, quantized: QuantizedTensor) -> None:
        self.weights[module] = quantized

    def input(self, module: str, scale: Tensor, zero_point: Tensor | None) -> None:
        self.inputs[module] = (scale, zero_point)

    def tensor(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value

    def query(self, attention: str, scale: Tensor) -> None:
        self.queries[attention] = scale

    def cache(self, attention: str, key_scale: Tensor, value_scale: Tensor) -> None:
        self.caches[attention] = (key_scale, value_scale)

    def hand_codes_to(self, other: Sink) -> None:
        """Give `other` all that a model's own parameters do not hold."""
        for module, quantized in self.weights.items():
            other.weight(module, quantized)
        for module, scales in self.inputs.items():
            other.input(module, *scales)
        for attention, cache_scales in self.caches.items():
            other.cache(attention, *cache_scales)
        for attention, scale in self.queries.items():
            other.query(attention, scale)


class LiveOutput:
    """A quantized model and what it is written from. `install` changes the model; until then it is as it was."""

    def __init__(
        self, checkpoint: LiveCheckpoint, config: RunConfig, sink: LiveSink, report: CalibrationReport | None
    ) -> None:
        self.checkpoint, self.config, self.sink, self.report = checkpoint, config, sink, report

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveOutput:
        return self  # a copy of the model is saved as what the model was quantized to

    def install(self, plan: Plan) -> None:
        """Overwrite weights in place, quantize inputs from now on, and take over `save_pretrained`."""
        checkpoint, sink = self.checkpoint, self.sink
        for module, quantized in sink.weights.items():
            name = f"{module}.weight"
            checkpoint.put(name, quantized.dequantize(checkpoint.parameters[name].dtype))
        for name, value in sink.tensors.items():
            checkpoint.put(name, value)
        inputs = {name: m.scheme.input_activations for name, m in plan.modules.items()}
        if any(args is not None for args in inputs.values()):
            checkpoint.unfuse()
            for name, args in inputs.items():
                if args is not None:
                    hook = InputQuantizer(args, *sink.inputs.get(name, (None, None)))
                    checkpoint.module(name).register_forward_pre_hook(hook)
        for attention, (keys, values) in sink.caches.items():
            assert plan.kv_cache is not None
            cache_hook = CacheQuantizer(plan.kv_cache, keys, values)
            checkpoint.module(attention).register_forward_pre_hook(cache_hook, with_kwargs=True)
        for attention, scale in sink.queries.items():
            assert plan.attention is not None
            round_queries(checkpoint.model, checkpoint.module(attention), cache_quantizer(plan.attention.args, scale))
        checkpoint.model._quantkit = self  # tells that it was quantized here
        checkpoint.model.save_pretrained = self.save_pretrained

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        save_compressed: bool = True,
        max_shard_size: int | str | None = None,
        **others: Any,
    ) -> None:
        """Write the model, as it was quantized, to folder `save_directory`: compressed (codes and scales, with
        `quantization_config` in config.json) or dense (`save_compressed=False`: plain weights with the codes' values).

        In a folder that exists, weights and config of an earlier model are replaced; other files stay. Raises
        CheckpointError for the folder that the model came from, or if the disk is full.
        """
        _refuse_others(others)
        if not isinstance(save_directory, str | os.PathLike) or not os.fspath(save_directory):
            raise ConfigError(f"save_pretrained: expected a folder, got {save_directory!r}")
        folder = Path(os.path.abspath(Path(save_directory).expanduser()))
        if folder.is_file():
            raise CheckpointError(f"{folder}: is a file; give a folder")
        if folder.exists() and os.path.realpath(folder) == os.path.realpath(self.checkpoint.folder):
            raise CheckpointError(f"{folder}: is the folder that the model came from; choose another")
        config = _saving(self.config, folder, max_shard_size)
        write = self._compressed if save_compressed else self._dense
        if folder.exists() and any(folder.iterdir()):
            _merge(lambda fresh: write(fresh, config), folder)
        else:
            write(folder, config)

    def _compressed(self, folder: Path, config: RunConfig) -> None:
        plan = build_plan(config, cast(Checkpoint, self.checkpoint))
        with CheckpointWriter(plan.layout, folder) as writer:
            self.sink.hand_codes_to(WrittenOutput(plan, writer))
            for name in writer.missing():
                writer.write(name, self.checkpoint.parameters[name])
            self._generation(writer)
            side_files(plan, writer, self.report)
            writer.finish()

    def _dense(self, folder: Path, config: RunConfig) -> None:
        size = config.global_.max_shard_bytes
        tensors = self.checkpoint.tensors.items()
        layout = plan_layout((OutputTensor(name, info.dtype, info.shape) for name, info in tensors), size)
        with CheckpointWriter(layout, folder) as writer:
            for name, tensor in self.checkpoint.parameters.items():
                writer.write(name, tensor)
            self._generation(writer)
            for path in self.checkpoint.side_files:
                writer.copy_side_file(path)
            writer.side_file(CONFIG, _json(self.checkpoint.config))
            writer.finish()

    def _generation(self, writer: CheckpointWriter) -> None:
        config = getattr(self.checkpoint.model, "generation_config", None)
        if config is not None:
            writer.side_file(GENERATION, config.to_json_string(use_diff=True).encode())


def _saving(config: RunConfig, folder: Path, max_shard_size: int | str | None) -> RunConfig:
    """`config` for an output in `folder`."""
    size = config.global_.max_shard_size if max_shard_size is None else max_shard_size
    section = replace(config.global_, save_path=str(folder.parent), max_shard_size=size)
    return replace(config, global_=section, stem=folder.name)


def _merge(write: Callable[[Path], None], folder: Path) -> None:
    """Write beside the files that `folder` has, then move in: weights first, config.json last, stale weights out."""
    fresh = folder / ".quantkit-new"
    if fresh.exists():  # of a process that was killed
        shutil.rmtree(fresh)
    write(fresh)
    made = sorted(fresh.iterdir(), key=lambda path: (path.name == CONFIG, path.name))
    names = {path.name for path in made}
    with contextlib.suppress(FileNotFoundError):
        (folder / CONFIG).unlink()  # whoever looks meanwhile sees no model, not half of one
    for path in folder.iterdir():
        stale = (path.name.startswith("model") and path.name.endswith(".safetensors")) or path.name == INDEX
        if stale and path.name not in names and path.is_file():
            path.unlink()
    for path in made:
        os.replace(path, folder / path.name)
    fresh.rmdir()


def _refuse_others(others: dict[str, Any]) -> None:
    known = ("save_compressed", "max_shard_size", *_IDLE)
    for name, value in others.items():
        if name in ("push_to_hub", "distributed_checkpoint") and not value:
            continue
        if name == "safe_serialization" and value is not False:
            continue
        if name in ("state_dict", "variant", "quantization_format") and value is None:
            continue
        if name == "quantization_format":
            raise ConfigError(
                f"save_pretrained: quantization_format={value!r}: it follows from the scheme; leave it out"
            )
        if name == "push_to_hub":
            raise ConfigError(
                "save_pretrained: push_to_hub is not supported; save to a folder, then "
                "huggingface_hub.upload_folder(repo_id=..., folder_path=...)"
            )
        if name not in _IDLE:
            shown = f"={value!r}" if isinstance(value, bool | int | str) else ""
            raise ConfigError(f"save_pretrained: {name}{shown} is not supported{nearest(name, known)}")


def _json(config: dict[str, Any]) -> bytes:
    import json

    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
