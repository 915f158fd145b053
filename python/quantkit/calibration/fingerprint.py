"""What tells statistics of one model and one data set from those of others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..checkpoint.reader import Checkpoint
    from ..models.families import Family

# Headers are alike for all fine-tunings of a model, so some bytes of so many weights are looked at, too.
SAMPLES, SAMPLE_BYTES = 1024, 4096
# Keys of config.json that say nothing about what the model computes.
IDLE_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache", "auto_map"}
)


@dataclass(frozen=True)
class Fingerprint:
    """`model`: of the decoder's and the embedding's tensors (names, dtypes, shapes, some bytes); `config`: of
    config.json; `dtype` of the forward; `all_experts`: whether experts saw all tokens.
    """

    model: str
    config: str
    dtype: str
    all_experts: bool


@dataclass(frozen=True)
class Data:
    """What ran through it: a hash of each row's ids in their order, all their tokens, and how they were chosen."""

    rows: tuple[str, ...]
    tokens: int
    seed: int
    max_seq_length: int


def model_hash(checkpoint: Checkpoint, family: Family) -> str:
    """Of `checkpoint`: names, dtypes and shapes of what calibration runs through, and some of its bytes."""
    embedding = f"{family.embedding}.weight"
    names = sorted(n for n in checkpoint.parts if family.layer_of(n) is not None or n.endswith(embedding))
    found = hashlib.sha256()
    for name in names:
        info = checkpoint.parts[name]
        found.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
    live: Mapping[str, torch.Tensor] | None = getattr(checkpoint, "parameters", None)
    # What is dequantized as it is read would cost a whole tensor each.
    plain = [name for name in names if name not in getattr(checkpoint, "dequantized", ())]
    step = max(1, -(-len(plain) // SAMPLES))
    for name in plain[::step]:
        tensor = checkpoint.tensor(name, populate=False) if live is None else live[name]
        first = tensor.reshape(-1)[: SAMPLE_BYTES // tensor.element_size()].cpu().contiguous()
        found.update(first.view(torch.uint8).numpy().tobytes())
        if live is None:
            checkpoint.release(name)
    return found.hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """Of config.json, but for what changes nothing."""
    told = {key: value for key, value in config.items() if key not in IDLE_KEYS}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def data_of(rows: Sequence[Sequence[int]], seed: int) -> Data:
    """What `rows` of token ids are told by."""
    hashes = tuple(hashlib.sha256(json.dumps(list(row)).encode()).hexdigest()[:16] for row in rows)
    return Data(hashes, sum(map(len, rows)), seed, max(map(len, rows)))
