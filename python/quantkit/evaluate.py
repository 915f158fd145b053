"""What quantization costs: perplexity, KL divergence to a reference and top-1 agreement, layer by layer.

Works for models larger than memory: one decoder layer is in memory at a time, logits are compared a few tokens at a
time. All arithmetic is fp32 unless asked otherwise. A quantized folder is read dequantized, and its activations and its
KV cache are quantized where its config says so. Perplexity alone also comes from other programs that run the folder:
Transformers and vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from .errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .calibration.batches import Batch
    from .calibration.hidden import HiddenStates
    from .models.skeleton import Skeleton
    from .report.progress import Progress

# Logits of one comparison, both models together.
LOGITS_BYTES = 256 << 20


class Source(Protocol):
    """A checkpoint to evaluate: weights by the names of a plain one, and what quantizes a Linear's input and an
    attention's keys and values, by module.
    """

    @property
    def input_quantizers(self) -> Mapping[str, Callable[[Tensor], Tensor]]: ...
    @property
    def cache_quantizers(self) -> Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]: ...

    def names(self) -> set[str]: ...

    def get(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Evaluation:
    """Perplexity over `tokens` predicted tokens; KL(reference || model) in nats per token, share of tokens whose most
    probable successor agrees, and the reference's perplexity, None without a reference; KL and agreement are None with
    the backends "hf" and "vllm" as well.
    """

    model: str
    text: str
    tokens: int
    perplexity: float
    reference: str | None = None
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None

    def render(self) -> str:
        """A table for the terminal."""
        lines = [f"{self.tokens} tokens of {self.text}", f"  perplexity       {self.perplexity:10.4f}   {self.model}"]
        if self.reference_perplexity is not None:
            change = 100 * (self.perplexity / self.reference_perplexity - 1)
            lines += [
                f"  of the reference {self.reference_perplexity:10.4f}   {self.reference}",
                f"  change           {change:+9.3f}%",
            ]
        if self.kl is not None:
            lines += [f"  KL per token     {self.kl:10.5f}   nats", f"  top-1 agreement  {self.top1:10.4f}"]
        return "\n".join(lines)


def evaluate(
    model: str | Path,
    text_file: str | Path,
    reference: str | Path | None = None,
    *,
    window_length: int = 256,
    windows: int | None = 100,
    backend: str = "dequantized",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    vllm_python: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate the checkpoint in folder `model` on the first `windows` (None: all) pieces of `window_length` tokens of
    `text_file`, each on its own and without special tokens; against the checkpoint in `reference`, if given.

    `backend`: "dequantized" as described above; with "quantkit" the model is what `quantkit.load` makes of its folder,
    all of it in memory and on quantized kernels. The reference is dequantized in both cases. With "hf" and "vllm" these
    run model and reference, and there is no KL divergence: they give the probabilities of the text's own tokens.
    `vllm_python`: an interpreter that has vLLM, see `scoring.open_scorer`.
    """
    from .calibration.dataset import load_tokenizer, text_rows
    from .scoring import check_backend, dtype_of

    check_backend(backend)
    dtype = dtype_of(dtype)
    folder = Path(model)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    rows = text_rows(Path(text_file), tokenizer, window_length, windows)
    folders = [folder] if reference is None else [folder, Path(reference)]
    if backend in ("hf", "vllm"):
        perplexities = [
            _scored(f, rows, backend, dtype, trust_remote_code, vllm_python, window_length, progress) for f in folders
        ]
        return Evaluation(
            model=str(model),
            text=Path(text_file).name,
            tokens=len(rows) * (window_length - 1),
            perplexity=perplexities[0],
            reference=None if reference is None else str(reference),
            reference_perplexity=None if reference is None else perplexities[1],
        )
    sources = [open_source(f) for f in folders]
    loaded = None
    if backend == "quantkit":
        from .runtime.load import load_skeleton

        loaded = load_skeleton(folder, dtype=dtype or "float32", trust_remote_code=trust_remote_code)
        sources[0] = Loaded(sources[0].cache_quantizers)
    figures = compare(
        folders,
        sources,
        rows,
        loaded=loaded,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return Evaluation(
        model=str(model),
        text=Path(text_file).name,
        tokens=len(rows) * (window_length - 1),
        reference=None if reference is None else str(reference),
        **figures,
    )


def _scored(
    folder: Path,
    rows: list[list[int]],
    backend: str,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    vllm_python: str | Path | None,
    window_length: int,
    progress: bool,
) -> float:
    """The perplexity of each row's tokens after its first."""
    from .scoring import open_scorer

    scorer = open_scorer(
        folder,
        backend,
        dtype=dtype,
        max_length=window_length + 1,  # vLLM makes a token more
        trust_remote_code=trust_remote_code,
        vllm_python=vllm_python,
        progress=progress,
    )
    try:
        scores = scorer.score([(row[:1], row[1:]) for row in rows])
    finally:
        scorer.close()
    return math.exp(-sum(logprob for logprob, _ in scores) / sum(len(row) - 1 for row in rows))


def open_source(folder: Path) -> Source:
    """The checkpoint in `folder`, quantized or not, as a source of plain weights. CheckpointError for a quantized one
    that is not what its config says.
    """
    from .checkpoint.reader import Checkpoint
    from .formats.source import WeightSource
    from .formats.stacked_source import split
    from .formats.stored import check_stored

    source = WeightSource(split(Checkpoint(folder)))
    check_stored(source)
    return source


class Loaded:
    """The source of a skeleton that has its weights, and quantizes inputs itself, and caches if there are any."""

    input_quantizers: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, cache_quantizers: Mapping[str, Any]) -> None:
        self.cache_quantizers = cache_quantizers

    def names(self) -> set[str]:
        return set()

    def get(self, name: str) -> Tensor:
        raise KeyError(name)


def compare(
    folders: list[Path],
    sources: list[Source],
    rows: list[list[int]],
    *,
    loaded: Skeleton | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """The figures of `Evaluation` for the first folder, against the second if there are two. `loaded`: the first one's
    model, if it has its weights already.
    """
    import torch

    from .calibration.batches import batches
    from .models.skeleton import Skeleton
    from .report.progress import Progress

    grouped = batches(rows)
    skeletons = [] if loaded is None else [loaded]
    for folder, source in list(zip(folders, sources, strict=True))[len(skeletons) :]:
        skeletons.append(
            Skeleton(folder, source.names(), dtype=dtype or torch.float32, trust_remote_code=trust_remote_code)
        )
    if len({s.vocab_size for s in skeletons}) > 1:
        raise CheckpointError(
            f"{folders[0]} has a vocabulary of {skeletons[0].vocab_size}, {folders[1]} one of "
            f"{skeletons[1].vocab_size}; they cannot be compared token by token"
        )
    layers = sum(skeleton.num_layers for skeleton in skeletons)
    with torch.no_grad(), Progress("evaluate", total=layers, unit="layer", enabled=progress) as bar:
        states = [run_layers(s, source, grouped, bar) for s, source in zip(skeletons, sources, strict=True)]
        figures = _logit_figures(skeletons, sources, states, grouped)
    return figures


def run_layers(skeleton: Skeleton, source: Source, grouped: list[Batch], bar: Progress) -> HiddenStates:
    """What leaves the last decoder layer."""
    from .calibration.forward import embed, forward
    from .calibration.hooks import CacheRounder

    caches = {
        layer: CacheRounder(*quantizers)
        for attention, quantizers in source.cache_quantizers.items()
        if (layer := skeleton.family.layer_of(f"{attention}.weight")) is not None
    }
    hidden, calls = embed(skeleton, source, grouped)
    for index in range(skeleton.num_layers):
        skeleton.materialize(index, source)
        handles = [
            linear.register_forward_pre_hook(_quantizing(source.input_quantizers[name]))
            for name, linear in skeleton.linears(index).items()
            if name in source.input_quantizers
        ]
        queries = _rounding_queries(skeleton, index, getattr(source, "query_quantizers", {}))
        forward(skeleton, index, grouped, calls, hidden, cache=caches.get(index))
        for handle in handles:
            handle.remove()
        for attention in queries:
            del attention.quantize_query
        skeleton.drop(index, source)
        bar.advance(1)
    return hidden


def _rounding_queries(skeleton: Skeleton, index: int, quantizers: Mapping[str, Any]) -> list[Any]:
    """The attention modules of layer `index` that now round their queries."""
    from .models.attention import round_queries

    here = {n: quantizer for n, quantizer in quantizers.items() if n.startswith(f"{skeleton.layer_prefix(index)}.")}
    return [round_queries(skeleton.model, skeleton.module(index, name), quantizer) for name, quantizer in here.items()]


def _quantizing(quantizer: Callable[[Tensor], Tensor]) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, args: (quantizer(args[0]), *args[1:])


def head_hook(stack: ExitStack, skeleton: Skeleton, source: Source) -> None:
    """As long as `stack` is open, the inputs of a quantized head are rounded as its config says."""
    head = skeleton.checkpoint_name(skeleton.head_path)
    if head in source.input_quantizers:
        hook = _quantizing(source.input_quantizers[head])
        stack.callback(skeleton.model.get_submodule(skeleton.head_path).register_forward_pre_hook(hook).remove)


def _logit_figures(
    skeletons: list[Skeleton], sources: list[Source], states: list[HiddenStates], grouped: list[Batch]
) -> dict[str, Any]:
    """Final norm, head and comparison, a few tokens at a time; sums in fp64."""
    import torch

    chunk = max(1, LOGITS_BYTES // (4 * skeletons[0].vocab_size * len(skeletons)))
    loss = [0.0] * len(skeletons)
    divergence, agreed, tokens = 0.0, 0, 0
    with ExitStack() as stack:
        for skeleton, source in zip(skeletons, sources, strict=True):
            stack.enter_context(skeleton.outer(source, head=True))
            head_hook(stack, skeleton, source)
        for number, batch in enumerate(grouped):
            targets = batch.input_ids[:, 1:].reshape(-1)
            inputs = [state.view(number)[:, :-1].flatten(0, 1) for state in states]
            if batch.mask is not None:
                real = batch.mask[:, 1:].reshape(-1).bool()
                targets, inputs = targets[real], [x[real] for x in inputs]
            for begin in range(0, targets.numel(), chunk):
                part = slice(begin, begin + chunk)
                logs = [
                    torch.log_softmax(skeleton.head(x[part, None])[:, 0].float(), -1)
                    for skeleton, x in zip(skeletons, inputs, strict=True)
                ]
                for i, log in enumerate(logs):
                    loss[i] -= float(log.gather(1, targets[part, None]).double().sum())
                if len(logs) == 2:
                    divergence += float((logs[1].exp() * (logs[1] - logs[0])).sum(-1).double().sum())
                    agreed += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
                tokens += logs[0].shape[0]
    figures: dict[str, Any] = {"perplexity": math.exp(loss[0] / tokens)}
    if len(skeletons) == 2:
        figures |= {
            "reference_perplexity": math.exp(loss[1] / tokens),
            "kl": divergence / tokens,
            "top1": agreed / tokens,
        }
    return figures
