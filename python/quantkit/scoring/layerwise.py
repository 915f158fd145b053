"""Scores with one decoder layer in memory at a time: `backend: dequantized`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.batches import Batch, batches
from ..errors import ConfigError
from ..evaluate import LOGITS_BYTES, head_hook, open_source, run_layers
from ..models.skeleton import Skeleton
from ..report.progress import Progress
from . import Pair, longest

# Hidden states of the texts that go through the layers together.
HIDDEN_BYTES = 2 << 30


class LayerwiseScorer:
    """The checkpoint in `folder`, quantized or not, as `quantkit.evaluate` computes it."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype | None,
        max_length: int | None,
        trust_remote_code: bool,
        progress: bool,
    ) -> None:
        found = dtype or torch.float32
        self.source, self.progress = open_source(folder), progress
        self.skeleton = Skeleton(folder, self.source.names(), dtype=found, trust_remote_code=trust_remote_code)
        positions = getattr(self.skeleton.model.config, "max_position_embeddings", None)
        self.max_length = longest(positions, max_length)
        self.describe = f"quantkit, weights dequantized, {str(found).removeprefix('torch.')}"

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """See `Scorer`."""
        room = max(1, HIDDEN_BYTES // (self.skeleton.hidden_size * self.skeleton.dtype.itemsize))
        results: list[tuple[float, bool]] = []
        parts: list[list[Pair]] = [[]]
        held = 0
        for pair in pairs:
            length = len(pair[0]) + len(pair[1])
            if parts[-1] and held + length > room:
                parts.append([])
                held = 0
            parts[-1].append(pair)
            held += length
        total = len(parts) * self.skeleton.num_layers
        with torch.no_grad(), Progress("score", total=total, unit="layer", enabled=self.progress) as bar:
            for part in parts:
                results += self._score(part, bar) if part else []
        return results

    def _score(self, pairs: Sequence[Pair], bar: Progress) -> list[tuple[float, bool]]:
        grouped = batches([[*context, *rest] for context, rest in pairs])
        hidden = run_layers(self.skeleton, self.source, grouped, bar)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        step = max(1, LOGITS_BYTES // (4 * self.skeleton.vocab_size))
        with ExitStack() as stack:
            stack.enter_context(self.skeleton.outer(self.source, head=True))
            head_hook(stack, self.skeleton, self.source)
            for number, batch in enumerate(grouped):
                inputs, targets, counts = _asked(batch, hidden.view(number), pairs)
                logprobs, greedy = [], []
                for begin in range(0, targets.numel(), step):
                    logits = self.skeleton.head(inputs[begin : begin + step, None])[:, 0]
                    found = of_targets(logits, targets[begin : begin + step])
                    logprobs.append(found[0])
                    greedy.append(found[1])
                for index, sums in zip(batch.index, summed(logprobs, greedy, counts), strict=True):
                    results[index] = sums
        return results

    def generate(self, prompts: Sequence[tuple[Sequence[int], int, Sequence[str]]]) -> list[str]:
        """ConfigError: a layer at a time, each token would cost as much as reading the model."""
        raise ConfigError(
            "backend 'dequantized' computes a layer at a time and generates no text; for tasks that generate use "
            "--backend quantkit, hf or vllm"
        )

    def close(self) -> None:
        """See `Scorer`."""


def _asked(batch: Batch, states: Tensor, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, list[int]]:
    """What enters the head [tokens, hidden size], which token follows, and how many of them each row has."""
    inputs, targets, counts = [], [], []
    for row, index in enumerate(batch.index):
        context, rest = pairs[index]
        first = len(context) - 1
        inputs.append(states[row, first : first + len(rest)])
        targets.append(torch.tensor(list(rest), dtype=torch.int64))
        counts.append(len(rest))
    return torch.cat(inputs), torch.cat(targets), counts


def of_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability of each target (fp64) by logits [tokens, vocabulary], and whether it is the most probable."""
    logs = torch.log_softmax(logits.float(), -1)
    return logs.gather(1, targets[:, None])[:, 0].double(), logs.argmax(-1) == targets


def summed(logprobs: Sequence[Tensor], greedy: Sequence[Tensor], counts: Sequence[int]) -> list[tuple[float, bool]]:
    """Sums over `counts` tokens each."""
    if not logprobs:
        return [(0.0, True) for _ in counts]
    logs, hits = torch.cat(list(logprobs)).split(list(counts)), torch.cat(list(greedy)).split(list(counts))
    return [(float(log.sum()), bool(hit.all())) for log, hit in zip(logs, hits, strict=True)]
