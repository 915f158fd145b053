"""The pipeline: config -> plan -> checkpoint -> sweep -> modifiers -> formats -> checkpoint -> audit."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .audit import AuditResult, audit
from .checkpoint.dtypes import torch_dtype
from .checkpoint.hub import resolve_model
from .checkpoint.native import host
from .checkpoint.reader import Checkpoint
from .checkpoint.writer import CheckpointWriter
from .config.run_config import RunConfig
from .plan import Plan, build_plan, config_bytes
from .report.model_card import model_card
from .report.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .modifiers.rtn import RoundToNearest
    from .quantized import QuantizedTensor

RECORD = "quantkit_config.json"


@dataclass(frozen=True)
class RunResult:
    """Where the output lies, what the audit found, and how long each stage took in seconds."""

    output: Path
    audit: AuditResult
    seconds: dict[str, float]


@contextmanager
def open_plan(config: RunConfig) -> Iterator[Plan]:
    """Resolve the model, open its checkpoint and make the plan; the checkpoint is closed at the end."""
    folder = resolve_model(config.model.model_path, cache_dir=config.model.cache_dir)
    with Checkpoint(folder) as checkpoint:
        yield build_plan(config, checkpoint)


def run(config: RunConfig, *, show: Callable[[Plan], None] | None = None) -> RunResult:
    """Quantize as `config` says: plan, write, audit. `show` is called with the plan before work starts.

    Raises a QuantkitError when something does not fit, before anything is written; the output folder appears
    only when it is complete.
    """
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[stage] = now - started
        started = now

    if config.global_.num_threads is not None:
        import torch

        torch.set_num_threads(config.global_.num_threads)
    with open_plan(config) as plan:
        if show is not None:
            show(plan)
        plan.require_room()
        writer = CheckpointWriter(plan.layout, config.output_dir, overwrite=config.global_.overwrite)
        lap("plan")
        with writer:
            if plan.recipe.needs_data:
                _calibrated(plan, writer)
            else:
                _data_free(plan, writer)
            lap("quantize")
            _side_files(plan, writer)
            output = writer.finish()
            lap("write")
        result = audit(output, plan.checkpoint)
        lap("audit")
    return RunResult(output, result, seconds)


class _Output:
    """Where modifiers put their results: packed as the format wants it, handed to the writer."""

    def __init__(self, plan: Plan, writer: CheckpointWriter) -> None:
        self.plan, self.writer = plan, writer

    def scale_dtype(self, module: str) -> torch.dtype:
        planned = self.plan.modules[module]
        return torch_dtype(self.plan.format.scale_dtype(planned.scheme, planned.dtype))

    def weight(self, module: str, quantized: QuantizedTensor) -> None:
        for name, tensor in self.plan.format.pack_weight(module, quantized, self.scale_dtype(module)).items():
            self.writer.write(name, tensor)

    def input(self, module: str, scale: Tensor, zero_point: Tensor | None) -> None:
        for name, tensor in self.plan.format.pack_activations(module, scale, zero_point).items():
            self.writer.write(name, tensor)


def _modifier(plan: Plan, writer: CheckpointWriter) -> RoundToNearest:
    from .modifiers.rtn import RoundToNearest

    output = _Output(plan, writer)
    return RoundToNearest(plan.modules, output, scale_dtype=output.scale_dtype, packs=plan.format.packs)


def _data_free(plan: Plan, writer: CheckpointWriter) -> None:
    """Every weight by itself, in the order it lies in the source: read once, quantized, written behind."""
    checkpoint, modifier = plan.checkpoint, _modifier(plan, writer)
    with Progress("quantize", total=checkpoint.total_bytes, unit="B") as progress:
        for name, info in checkpoint.tensors.items():
            module = name.removesuffix(".weight")
            if module != name and module in plan.modules:
                modifier.weight(module, checkpoint.tensor(name))
                checkpoint.release(name)
                host().release_free_memory()
            else:
                writer.copy(name, info, checkpoint)
            progress.advance(info.nbytes)


def _calibrated(plan: Plan, writer: CheckpointWriter) -> None:
    """Layer by layer with data: one sweep gives every statistic that the scheme needs."""
    import torch

    from .calibration.batches import batches
    from .calibration.dataset import load_rows, load_tokenizer
    from .calibration.sweep import sweep
    from .formats.source import WeightSource
    from .models.skeleton import Skeleton

    config, checkpoint = plan.config, plan.checkpoint
    assert config.dataset is not None
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=config.model.trust_remote_code)
    dtype = None if config.model.torch_dtype == "auto" else getattr(torch, config.model.torch_dtype)
    remote = config.model.trust_remote_code
    skeleton = Skeleton(checkpoint.folder, checkpoint.tensors, dtype=dtype, trust_remote_code=remote)
    rows = load_rows(config.dataset, tokenizer, seed=config.global_.seed, vocab_size=skeleton.vocab_size)
    for name in plan.carried:
        writer.copy(name, checkpoint.tensors[name], checkpoint)
    sweep(skeleton, WeightSource(checkpoint), batches(rows), _modifier(plan, writer), plan.modules)


def _side_files(plan: Plan, writer: CheckpointWriter) -> None:
    for path in plan.checkpoint.side_files:
        if path.name != RECORD:  # of an earlier job on this model; this one writes its own
            writer.copy_side_file(path)
    writer.side_file("README.md", model_card(plan).encode())
    writer.side_file(RECORD, (json.dumps(_record(plan), indent=2) + "\n").encode())
    writer.side_file("config.json", config_bytes(plan))


def _record(plan: Plan) -> dict[str, Any]:
    """What made this output: every resolved option and the versions that took part. Paths of this machine are cut to
    their last part, since outputs are published.
    """
    import torch

    options = plan.config.to_dict()
    del options["global"]["save_path"]
    for section, key in (("model", "model_path"), ("model", "cache_dir"), ("dataset", "data_path")):
        value = options.get(section, {}).get(key)
        if value is not None and Path(value).exists():
            options[section][key] = Path(value).name
    return {
        "quantkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": sys.platform,
        "scheme": plan.recipe.name,
        "config": options,
        **plan.record(),
    }
