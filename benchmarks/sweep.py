"""Time of the calibration sweep: a random Llama (hidden 1024, MLP 2816, 8 layers, GQA 16/4, vocabulary 2048, bf16) over
32 rows of 512 tokens, with FP8 weights put in place before each layer's forward, as `fp8_static` does.

    python benchmarks/sweep.py [--layers 8] [--rows 32] [--tokens 512] [--threads 2]

The peer's figure for the same model and data (llm-compressor 0.14, FP8 static): 10.4 s.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from quantkit.calibration.batches import batches
from quantkit.calibration.layer import Layer
from quantkit.calibration.statistics import Statistics
from quantkit.calibration.sweep import sweep
from quantkit.config.schemes import QuantizationArgs
from quantkit.models.skeleton import Skeleton
from quantkit.modifiers.rtn import quantize_weight

PEER_SECONDS = 10.4
FP8 = QuantizationArgs(8, "float", strategy="tensor")


class Source:
    """Tensors of a safetensors file by name."""

    def __init__(self, file: Path) -> None:
        self.file = safe_open(file, "pt")
        self.names = list(self.file.keys())

    def get(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name)


class Phases:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - begin


class Fp8Static:
    """What `fp8_static` does to a layer: FP8 weights before the forward, input scales after it."""

    second_forward = False

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        self.scales: dict[str, float] = {}

    def prepare(self, layer: Layer) -> None:
        with self.phases.time("quantize weights"):
            for name, linear in layer.linears.items():
                weight = linear.weight
                codes = quantize_weight(name, weight, FP8, scale_dtype=torch.float32, pack=False)
                linear.weight = nn.Parameter(codes.dequantize(weight.dtype), requires_grad=False)

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        self.scales.update({name: float(s.tensor_absmax) / 448.0 for name, s in statistics.items()})


def make_model(folder: Path, layers: int) -> None:
    """Write the random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=2048,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("--layers", 8),
        ("--rows", 32),
        ("--tokens", 512),
        ("--threads", 2),
        ("--batch-tokens", 4096),
    ):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    phases = Phases()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, args.layers)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, 2048, (args.rows, args.tokens), generator=generator).tolist()
        original = Statistics.of

        def timed_of(x: torch.Tensor, where: str) -> Statistics:
            with phases.time("statistics"):
                return original(x, where)

        Statistics.of = timed_of  # type: ignore[method-assign, assignment]
        begin = time.perf_counter()
        with phases.time("skeleton"):
            source = Source(folder / "model.safetensors")
            skeleton = Skeleton(folder, source.names)
        shapes = {n: source.file.get_slice(n).get_shape() for n in source.names}
        modules = [w.module for w in skeleton.family.linear_weights(shapes) if not w.head]
        visitor = Fp8Static(phases)
        grouped = batches(rows, args.batch_tokens)
        sweep(skeleton, source, grouped, visitor, modules, progress=False)
        total = time.perf_counter() - begin
    phases.seconds["forward and the rest"] = total - sum(phases.seconds.values())
    for phase, seconds in phases.seconds.items():
        print(f"{phase:24} {seconds:6.2f} s")
    print(f"{'total':24} {total:6.2f} s   {args.rows * args.tokens / total:.0f} tokens/s")
    if (args.layers, args.rows, args.tokens) == (8, 32, 512):
        print(f"{'llm-compressor':24} {PEER_SECONDS:6.2f} s   {PEER_SECONDS / total:.2f}x")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak RSS {peak:.0f} MB, {len(visitor.scales)} input scales", file=sys.stdout)


if __name__ == "__main__":
    main()
