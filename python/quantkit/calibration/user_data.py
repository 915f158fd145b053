"""Calibration data as users of `oneshot` hold them, on the way to `dataset.rows_of`: splits, loaders, streams.

What comes in may be anything that `rows_of` reads, a `datasets.DatasetDict`, a mapping with `input_ids` [rows, tokens]
(what a tokenizer gives back), a DataLoader or any other iterable of batches or samples.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, ConfigError, nearest
from .dataset import checked_rows, is_plain_text, load_tokenizer, rows_of, sampled

_SLICE = re.compile(r"\s*([\w.-]+)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*")
_BUILT_IN = (
    *("c4", "cnn_dailymail", "custom", "evolcodealpaca", "flickr30k", "gsm8k", "open_platypus", "peoples_speech"),
    *("perfectblend", "ultrachat_200k", "wikitext"),
)


@dataclass(frozen=True)
class RowOptions:
    """How rows are made: see `oneshot`. `num_samples` None: all there are."""

    num_samples: int | None = 512
    max_seq_length: int = 2048
    shuffle: bool = True
    seed: int = 0
    text_column: str = "text"
    splits: Any = None
    concatenate: bool = False
    preprocess: Callable[[Any], Any] | None = None


class LazyTokenizer:
    """A tokenizer that is loaded when it is first needed: data that hold token ids never need it."""

    def __init__(self, given: Any, folder: str | Path | None, trust_remote_code: bool) -> None:
        if given is not None and not isinstance(given, str | Path) and not callable(given):
            raise ConfigError(f"tokenizer: expected one of Transformers or its path, got a {type(given).__name__}")
        self.given, self.folder, self.trust_remote_code = given, folder, trust_remote_code
        self.loaded: Any = None if isinstance(given, str | Path) else given

    def load(self) -> Any:
        """The tokenizer itself; CheckpointError or CalibrationError if there is none."""
        if self.loaded is None:
            folder = self.given or self.folder
            if not folder:
                raise CalibrationError(
                    "calibration data: holds text, and the model does not say where its tokenizer is; give "
                    "tokenizer=, or data of token ids"
                )
            self.loaded = load_tokenizer(Path(folder), trust_remote_code=self.trust_remote_code)
        return self.loaded

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.load(), name)


def gather_rows(data: Any, tokenizer: Any, options: RowOptions, vocab_size: int | None) -> list[list[int]]:
    """The rows of token ids that `data` and `options` mean; CalibrationError for what is wrong with them."""
    data = _samples_of(_pick_split(_opened(data), options.splits), options)
    if options.preprocess is not None:
        data = _preprocessed(data, options.preprocess)
    # A plain text file is one stream anyway.
    if options.concatenate and not (isinstance(data, Path) and is_plain_text(data)):
        return checked_rows(_concatenated(data, tokenizer, options), vocab_size)
    return rows_of(
        data,
        tokenizer,
        num_samples=options.num_samples or -1,
        max_seq_length=options.max_seq_length,
        shuffle=options.shuffle,
        seed=options.seed,
        text_column=options.text_column,
        vocab_size=vocab_size,
    )


def _opened(data: Any) -> Any:
    """A path of what `rows_of` does not open by itself, opened: splits of `datasets`, and CSV."""
    if not isinstance(data, str | Path):
        return data
    path = Path(data).expanduser()
    try:
        there = path.exists()
    except OSError:  # a name that is too long to be one
        there = False
    if not there:
        known = "; it is one that llm-compressor fetches by itself" if str(data) in _BUILT_IN else ""
        raise CalibrationError(
            f"dataset: no such file or folder: {str(data)[:100]}{known}; load it with datasets.load_dataset and pass "
            "the object, or give the path of .jsonl, .json, .parquet, .csv, plain text, or a folder of save_to_disk"
        )
    if path.suffix.lower() == ".csv":
        return _library(path).Dataset.from_csv(str(path))
    if path.is_dir() and (path / "dataset_dict.json").exists():
        return _library(path).load_from_disk(str(path))
    return path


def _library(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(f"{path}: reading it needs the package 'datasets' (pip install datasets)") from error
    return datasets


def _is_split_dict(data: Any) -> bool:
    return isinstance(data, Mapping) and "input_ids" not in data


def _pick_split(data: Any, splits: Any) -> Any:
    """The split that `splits` names, cut as `train[:64]` or `train[10%:20%]` say; the only one if it says nothing."""
    if isinstance(splits, Mapping):
        splits = splits.get("calibration") or next(iter(splits.values()), None)
    if isinstance(splits, Sequence) and not isinstance(splits, str):
        if len(splits) > 1:
            raise CalibrationError(f"splits: {list(splits)} names {len(splits)}; calibration uses one")
        splits = splits[0] if splits else None
    if splits is not None and not isinstance(splits, str):
        raise CalibrationError(f"splits: expected a name such as 'train' or 'train[:64]', got {splits!r}")
    found = None if splits is None else _SLICE.fullmatch(splits)
    if splits is not None and found is None:
        raise CalibrationError(f"splits: '{splits}' is no split; write it as train, train[:64] or train[10%:20%]")
    if _is_split_dict(data):
        names = list(map(str, data))
        if found is None:
            name = "calibration" if "calibration" in names else names[0]
            if len(names) != 1 and name != "calibration":
                raise CalibrationError(
                    f"dataset: has the splits {', '.join(names) or 'none'}; say which, e.g. splits='train'"
                )
        else:
            name = found[1]
            if name not in names:
                raise CalibrationError(f"splits: no split '{name}'{nearest(name, names)}; there are {', '.join(names)}")
        data = data[name]
    if found is None or (found[2] is None and found[3] is None):
        return data
    if not hasattr(data, "__len__"):
        raise CalibrationError(f"splits: '{splits}' cannot be cut out of a stream; use num_calibration_samples")
    begin, end = _bound(found[2], len(data)), _bound(found[3], len(data))
    order = range(len(data))[begin:end]
    return data.select(order) if hasattr(data, "select") else data[begin:end]


def _bound(text: str | None, length: int) -> int | None:
    if text is None:
        return None
    return round(length * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def _samples_of(data: Any, options: RowOptions) -> Any:
    """`data` as something with a length that can be indexed; as little of a stream as will do."""
    if isinstance(data, Mapping) and "input_ids" in data:
        return list(_rows_of_batch(data))
    if isinstance(data, str | Path) or (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return data
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"dataset: expected a Dataset, a list, a tensor, a DataLoader or a path, got a {type(data).__name__}"
        )
    count = options.num_samples
    return list(itertools.islice(_stream(data), None if options.concatenate else count))


def _stream(data: Iterable[Any]) -> Iterator[Any]:
    """Single samples out of batches of token ids, or the samples themselves."""
    for batch in data:
        if isinstance(batch, tuple | list) and len(batch) == 1 and hasattr(batch[0], "dim"):
            batch = batch[0]  # what a DataLoader makes of a TensorDataset
        ids: Any = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if hasattr(ids, "dim") and ids.dim() == 2:
            yield from _rows_of_batch(batch if isinstance(batch, Mapping) else {"input_ids": batch})
        elif isinstance(batch, Mapping) and isinstance(ids, list) and ids and not isinstance(ids[0], int):
            yield from _rows_of_batch(batch)
        else:
            yield batch


def _rows_of_batch(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if isinstance(ids, Sequence) and ids and isinstance(ids[0], int):
        ids, mask = [ids], None if mask is None else [mask]
    for i in range(len(ids)):
        yield {"input_ids": ids[i]} | ({} if mask is None else {"attention_mask": mask[i]})


def _preprocessed(data: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(data, str | Path):
        raise CalibrationError("preprocessing_func: works on data in memory; load the file and pass the object")
    return data.map(function) if hasattr(data, "map") else [function(sample) for sample in data]


def _concatenated(data: Any, tokenizer: Any, options: RowOptions) -> list[tuple[str, list[int]]]:
    """Rows of exactly `max_seq_length` tokens, cut out of all samples one behind the other; what is left over makes no
    row.
    """
    length, wanted = options.max_seq_length, options.num_samples
    count = wanted
    while True:
        found = sampled(data, tokenizer, count, options.shuffle, options.seed, options.text_column, None)
        joined = [token for _, row in found for token in row]
        if wanted is None or count is None or len(found) < count or len(joined) >= wanted * length:
            break
        count *= 2
    rows = [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)][:wanted]
    if not rows:
        raise CalibrationError(
            f"dataset: {len(joined)} tokens in all do not fill one row of {length}; give more data, a lower "
            "max_seq_length, or leave concatenate_data out"
        )
    return [(f"calibration data, row {i}", row) for i, row in enumerate(rows)]
