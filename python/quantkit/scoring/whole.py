"""Scores and texts of a Transformers model in memory: `backend: quantkit` and `backend: hf`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..calibration.batches import batches
from ..calibration.dataset import load_tokenizer
from ..errors import CheckpointError
from ..evaluate import LOGITS_BYTES
from . import Pair, longest
from .layerwise import of_targets, summed


def load_with_quantkit(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    """What `quantkit.load` makes."""
    from ..runtime.load import load

    model = load(folder, dtype=dtype or "float32", trust_remote_code=trust_remote_code)
    model.describe = f"quantkit.load, {str(model.dtype).removeprefix('torch.')}"
    return model


def load_with_transformers(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    """What Transformers makes of the folder by itself, quantized or not; on a GPU if there is one."""
    import transformers

    found = dtype or torch.float32
    options: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=found, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{folder}: Transformers {transformers.__version__} does not load it: {str(error).strip()[:2000]}\n"
            f"'quantkit check {folder} --for transformers' says which rule it breaks"
        ) from error
    model.describe = f"Transformers {transformers.__version__}, {str(model.dtype).removeprefix('torch.')}"
    return model.eval()


class WholeScorer:
    """A causal language model of Transformers' kind, all of it in memory."""

    def __init__(self, model: Any, folder: Path, max_length: int | None, trust_remote_code: bool) -> None:
        self.model, self.folder, self.trust = model, folder, trust_remote_code
        config = model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        self.max_length = longest(getattr(config, "max_position_embeddings", None), max_length)
        self.describe: str = model.describe

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """See `Scorer`."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        if not pairs:
            return results
        grouped = batches(
            [[*context, *rest] for context, rest in pairs],
            max_tokens=max(1, min(1024, LOGITS_BYTES // (4 * self.vocab_size))),
        )
        device = self.model.get_input_embeddings().weight.device
        with torch.no_grad():
            for batch in grouped:
                mask = None if batch.mask is None else batch.mask.to(device)
                # With a cache, since that is what a checkpoint with a `kv_cache_scheme` rounds.
                logits = self.model(batch.input_ids.to(device), attention_mask=mask, use_cache=True).logits.cpu()
                logprobs, greedy, counts = [], [], []
                for row, index in enumerate(batch.index):
                    context, rest = pairs[index]
                    first = len(context) - 1
                    target = torch.tensor(list(rest), dtype=torch.int64)
                    found = of_targets(logits[row, first : first + len(rest)], target)
                    logprobs.append(found[0])
                    greedy.append(found[1])
                    counts.append(len(rest))
                for index, sums in zip(batch.index, summed(logprobs, greedy, counts), strict=True):
                    results[index] = sums
        return results

    def generate(self, prompts: Sequence[tuple[Sequence[int], int, Sequence[str]]]) -> list[str]:
        """See `Scorer`."""
        tokenizer = load_tokenizer(self.folder, trust_remote_code=self.trust)
        device = self.model.get_input_embeddings().weight.device
        texts = []
        for prompt, limit, stops in prompts:
            ids = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
            with torch.no_grad():
                out = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=limit,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                    **({"stop_strings": list(stops), "tokenizer": tokenizer} if stops else {}),
                )
            texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        return texts

    def close(self) -> None:
        """See `Scorer`."""
        del self.model
