"""Calibration data of any usual shape -> rows of token ids.

A row is one sample, cut at `max_seq_length`, never padded and never joined with another. What a sample may hold:

| key | meaning |
|---|---|
| `messages` | chat turns `{"role", "content"}` (and `tools`), through the tokenizer's chat template |
| `conversations` | chat turns `{"from": "human" / "gpt", "value"}`, with an optional `system`, the same way |
| `input` and `output` | one turn of each side, the same way |
| `applied_message` | text that a chat template already went over |
| `text` (or `text_column`), `inputs_pretokenized` | plain text |
| `input_ids` (and `attention_mask`) | token ids |

A chat template writes its own special tokens, so none are added to its text. A plain text file is one stream: it is
tokenized without special tokens and cut into rows of exactly `max_seq_length` tokens; what is left at the end makes no
row.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ..errors import CalibrationError, CheckpointError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
KEYS = "'messages', 'conversations', 'input' and 'output', 'applied_message', 'text' or 'inputs_pretokenized'"


class DatasetSettings(Protocol):
    """The part of the run's dataset section that is read here."""

    @property
    def data_path(self) -> Any: ...
    @property
    def max_seq_length(self) -> int: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def shuffle(self) -> bool: ...
    @property
    def text_column(self) -> str: ...


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model folder; CheckpointError if there is none that Transformers can load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {str(error).strip()}") from error


def load_rows(
    settings: DatasetSettings, tokenizer: Any, seed: int = 0, vocab_size: int | None = None
) -> list[list[int]]:
    """The rows that a run's dataset section asks for; see `rows_of`."""
    return rows_of(
        settings.data_path,
        tokenizer,
        num_samples=settings.num_samples,
        max_seq_length=settings.max_seq_length,
        shuffle=settings.shuffle,
        text_column=settings.text_column,
        seed=seed,
        vocab_size=vocab_size,
    )


def rows_of(
    data: Any,
    tokenizer: Any,
    *,
    num_samples: int = 256,
    max_seq_length: int = 2048,
    shuffle: bool = False,
    seed: int = 0,
    text_column: str = "text",
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Rows of token ids from `data`: a path (.jsonl, .json, .parquet, plain text, or a folder of `datasets`), a
    `datasets.Dataset`, a list of texts, samples or id lists, or a tensor of ids [rows, tokens].

    At most `num_samples` rows (all if not positive): the first ones, or with `shuffle` a selection that depends on
    `seed` alone. Samples without a single token are passed over. Raises CalibrationError naming the file, the line and
    what is wrong with it, and for ids outside a vocabulary of `vocab_size`.
    """
    if max_seq_length < 2:
        raise CalibrationError(f"max_seq_length: {max_seq_length} must be at least 2")
    wanted = num_samples if num_samples > 0 else None
    if isinstance(data, (str, Path)) and is_plain_text(Path(data)):
        rows = text_rows(Path(data), tokenizer, max_seq_length, None if shuffle else wanted)
        if shuffle:
            random.Random(seed).shuffle(rows)
        located = [(f"{data}, row {i}", row) for i, row in enumerate(rows)]
    else:
        located = sampled(data, tokenizer, wanted, shuffle, seed, text_column, max_seq_length)
    located = located[:wanted]
    if not located:
        raise CalibrationError(f"{_name(data)}: no sample has any text")
    if wanted is not None and len(located) < wanted:
        tqdm.write(
            f"warning: {_name(data)}: {wanted} samples were asked for, {len(located)} are there", file=sys.stderr
        )
    return checked_rows(located, vocab_size)


def checked_rows(located: Sequence[tuple[str, list[int]]], vocab_size: int | None) -> list[list[int]]:
    """The rows of (where it is, row); CalibrationError for one of a single token, which attends to nothing but itself
    and says little of what the model does in use, and for ids outside a vocabulary of `vocab_size`.
    """
    short = [where for where, row in located if len(row) < 2]
    if short:
        more = f" (and {len(short) - 1} more of {len(located)} rows)" if len(short) > 1 else ""
        raise CalibrationError(f"{short[0]}: has one token only{more}; rows need at least two, leave shorter ones out")
    for where, row in located:
        bad = [] if vocab_size is None else [token for token in row if not 0 <= token < vocab_size]
        if bad:
            raise CalibrationError(
                f"{where}: token id {bad[0]} is not in the model's vocabulary of {vocab_size}; the tokenizer does not "
                "belong to this model"
            )
    return [row for _, row in located]


def text_rows(path: Path, tokenizer: Any, length: int, count: int | None) -> list[list[int]]:
    """The first `count` (None: all) rows of `length` tokens of a text file, tokenized as one stream without special
    tokens. Of a long file only a beginning is tokenized; its tokens are those of the whole.
    """
    text = _read_text(path)
    ids: list[int] = []
    # A tokenizer works word by word, so a beginning that ends at a line break differs at most in its last tokens.
    margin = 64
    needed = None if count is None else count * length + margin
    size = len(text) if needed is None else needed * 8
    while True:
        cut = len(text) if size >= len(text) else text.find("\n", size) + 1 or len(text)
        ids = list(tokenizer(text[:cut], add_special_tokens=False, verbose=False)["input_ids"])
        if cut == len(text) or (needed is not None and len(ids) >= needed):
            break
        size *= 2
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][:count]
    if not rows:
        raise CalibrationError(
            f"{path}: {len(ids)} tokens do not fill one row of {length}; use more text or a lower max_seq_length"
        )
    return rows


def sampled(
    data: Any,
    tokenizer: Any,
    wanted: int | None,
    shuffle: bool,
    seed: int,
    text_column: str,
    max_seq_length: int | None,
) -> list[tuple[str, list[int]]]:
    """(where it is, its first `max_seq_length` tokens) of the first `wanted` samples that have any; see `rows_of`."""
    samples = _samples(data, seed if shuffle else None)
    rows: list[tuple[str, list[int]]] = []
    for where, sample in samples:
        if wanted is not None and len(rows) == wanted:
            break
        row = _row(where, sample, tokenizer, text_column)[:max_seq_length]
        if row:
            rows.append((where, row))
    return rows


# Where samples come from


def _name(data: Any) -> str:
    return str(data) if isinstance(data, (str, Path)) else "calibration data"


def is_plain_text(path: Path) -> bool:
    if not path.exists():
        raise CalibrationError(f"{path}: no such file or folder (dataset.data_path)")
    return path.is_file() and path.suffix.lower() not in (".jsonl", ".json", ".parquet")


def _samples(data: Any, seed: int | None) -> Iterator[tuple[str, Any]]:
    """(where it is, sample) of everything in `data`, in its order or in one that depends on `seed`."""
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.is_dir():
            return _indexed(_library("load_from_disk", path), str(path), seed)
        if path.suffix.lower() == ".parquet":
            return _indexed(_library("parquet", path), str(path), seed)
        if seed is None:
            return _json_samples(path)
        samples = list(_json_samples(path))
        random.Random(seed).shuffle(samples)
        return iter(samples)
    # A DatasetDict, or any other mapping; a Dataset has keys of its own, but columns too.
    if hasattr(data, "keys") and not isinstance(getattr(data, "column_names", None), list):
        raise CalibrationError(
            f"calibration data: a mapping of {', '.join(map(str, list(data)[:5]))} is no list of samples; "
            "pick one split"
        )
    if hasattr(data, "dim") and data.dim() != 2:
        raise CalibrationError(f"calibration data: a tensor of ids has to be [rows, tokens], got {list(data.shape)}")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise CalibrationError(f"calibration data: {type(data).__name__} is not a list, a tensor or a Dataset")
    return _indexed(data, "calibration data", seed)


def _indexed(data: Any, name: str, seed: int | None) -> Iterator[tuple[str, Any]]:
    order = list(range(len(data)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    for i in order:
        yield f"{name}, sample {i}", data[i]


def _library(kind: str, path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(f"{path}: reading it needs the package 'datasets' (pip install datasets)") from error
    try:
        data = (
            datasets.load_from_disk(str(path)) if kind == "load_from_disk" else datasets.Dataset.from_parquet(str(path))
        )
    except Exception as error:  # the library raises its own, pyarrow's and the system's kinds; all say what was wrong
        raise CalibrationError(f"{path}: not readable as a dataset: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        raise CalibrationError(
            f"{path}: holds the splits {', '.join(data)}; give the folder of one of them as data_path"
        )
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from error
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error


def _json_samples(path: Path) -> Iterator[tuple[str, Any]]:
    """The samples of a JSON Lines file, or of a file with one JSON array."""
    text = _read_text(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        for i, sample in enumerate(_parse(text, str(path))):
            yield f"{path}, item {i}", sample
        return
    # splitlines() would also split at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            sample = _parse(line, where)
            if not isinstance(sample, dict):
                raise CalibrationError(f"{where}: expected a JSON object with {KEYS}, got {type(sample).__name__}")
            yield where, sample


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: not valid JSON: {error}") from error


# From a sample to token ids


def _row(where: str, sample: Any, tokenizer: Any, text_column: str) -> list[int]:
    if isinstance(sample, str):
        return _tokenize(sample, tokenizer, plain=True)
    if not isinstance(sample, Mapping):
        return _ids(where, sample)
    if "messages" in sample:
        return _chat(where, _messages(where, "messages", sample["messages"], "role", "content"), sample, tokenizer)
    if "conversations" in sample:
        turns = sample["conversations"]
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
            return _chat(where, _messages(where, "conversations", turns, "role", "content"), sample, tokenizer)
        return _chat(where, _messages(where, "conversations", turns, "from", "value"), sample, tokenizer)
    if "input" in sample and "output" in sample:
        turns = [{"role": "user", "content": sample["input"]}, {"role": "assistant", "content": sample["output"]}]
        return _chat(where, _messages(where, "input/output", turns, "role", "content"), sample, tokenizer)
    for key, plain in (("applied_message", False), (text_column, True), ("inputs_pretokenized", True)):
        if key in sample:
            if not isinstance(sample[key], str):
                raise CalibrationError(f"{where}: '{key}' has to be text, got {type(sample[key]).__name__}")
            return _tokenize(sample[key], tokenizer, plain=plain)
    if "input_ids" in sample:
        ids = _ids(where, sample["input_ids"])
        mask = _ids(where, sample["attention_mask"]) if "attention_mask" in sample else [1] * len(ids)
        if len(mask) != len(ids):
            raise CalibrationError(f"{where}: attention_mask has {len(mask)} entries for {len(ids)} input_ids")
        return [token for token, real in zip(ids, mask, strict=True) if real]
    raise CalibrationError(
        f"{where}: has {', '.join(repr(str(k)) for k in list(sample)[:8]) or 'no keys'}; expected {KEYS} "
        "(dataset.text_column names another column of text)"
    )


def _ids(where: str, values: Any) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise CalibrationError(f"{where}: expected text, a mapping or token ids, got {type(values).__name__}")
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise CalibrationError(f"{where}: token ids have to be a flat list of integers")
    return list(values)


def _messages(where: str, key: str, turns: Any, role_key: str, content_key: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not turns:
        raise CalibrationError(f"{where}: '{key}' has to be a non-empty list of turns")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get(role_key), str) or content_key not in turn:
            raise CalibrationError(f"{where}: turn {i} of '{key}' has to have '{role_key}' (text) and '{content_key}'")
        if not isinstance(turn[content_key], (str, list)) and turn[content_key] is not None:
            raise CalibrationError(f"{where}: '{content_key}' of turn {i} of '{key}' has to be text")
        # A chat's own roles are the template's business; the others are translated.
        role = turn[role_key] if role_key == "role" else ROLES.get(turn[role_key])
        if role is None:
            raise CalibrationError(
                f"{where}: turn {i} of '{key}' is from '{turn[role_key]}'; expected one of {', '.join(ROLES)}"
            )
        messages.append(
            {**turn, "role": role, "content": turn[content_key]}
            if role_key == "role"
            else {"role": role, "content": turn[content_key]}
        )
    return messages


def _chat(where: str, messages: list[dict[str, Any]], sample: Mapping[str, Any], tokenizer: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{where}: a chat, but the model's tokenizer has no chat template; put a chat_template.jinja into the "
            "model folder, or use data with 'text'"
        )
    system = sample.get("system", sample.get("system_prompt"))
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    tools = sample.get("tools")
    # A template runs on data from a file, and says no in many ways: its own TemplateError, a TypeError for a content
    # that it takes for text, ...
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=False)
    except Exception as error:
        raise CalibrationError(f"{where}: the chat template refuses it: {type(error).__name__}: {error}") from error
    return _tokenize(text, tokenizer, plain=False)


def _tokenize(text: str, tokenizer: Any, *, plain: bool) -> list[int]:
    """`plain` text gets the tokenizer's special tokens, unless it starts with the first of them already."""
    if not text:
        return []
    bos = getattr(tokenizer, "bos_token", None)
    special = plain and not (bos and text.startswith(bos))
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
