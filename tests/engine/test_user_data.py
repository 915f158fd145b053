"""Calibration data as users of `oneshot` hold them: every form gives the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.calibration.dataset import load_tokenizer
from quantkit.calibration.user_data import LazyTokenizer, RowOptions, gather_rows
from quantkit.errors import CalibrationError

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "tiny-llama"
TEXTS = ["The history of the city.", "In the year of the king.", "A film about the war.", "One more of them."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


def rows(data: Any, tokenizer: Any = None, **options: Any) -> list[list[int]]:
    return gather_rows(data, tokenizer, RowOptions(**{"shuffle": False, "num_samples": None, **options}), 2048)


IDS = torch.arange(24).reshape(4, 6)


def forms(tmp_path: Path) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([{"input_ids": row} for row in IDS.tolist()])
    tensors = torch.utils.data.TensorDataset(IDS)
    samples = [{"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long)} for row in IDS]
    dataset.save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    return {
        "lists": IDS.tolist(),
        "tensor": IDS,
        "numpy": IDS.numpy(),
        "tensors": list(IDS),
        "samples": samples,
        "batch": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        "lists in a batch": {"input_ids": IDS.tolist()},
        "dataset": dataset,
        "torch format": dataset.with_format("torch"),
        "stream": dataset.to_iterable_dataset(),
        "splits": datasets.DatasetDict({"train": dataset}),
        "loader of tensors": torch.utils.data.DataLoader(tensors, batch_size=3),
        "loader of samples": torch.utils.data.DataLoader(samples, batch_size=3),
        "loader of ids": torch.utils.data.DataLoader(IDS, batch_size=2),
        "generator": (row for row in IDS.tolist()),
        "folder": tmp_path / "folder",
        "folder of splits": str(tmp_path / "splits"),
    }


def test_every_form_of_ids_is_the_same_rows(tmp_path: Path) -> None:
    for name, data in forms(tmp_path).items():
        assert rows(data) == IDS.tolist(), name
    for name, data in forms(tmp_path).items():
        assert rows(data, num_samples=2) == IDS[:2].tolist(), name


def test_every_form_of_text_is_the_same_rows(tmp_path: Path, tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.to_csv(tmp_path / "data.csv")
    dataset.to_json(tmp_path / "data.jsonl")
    dataset.to_parquet(tmp_path / "data.parquet")
    for data in (TEXTS, [{"text": t} for t in TEXTS], dataset, *(tmp_path / f"data.{e}" for e in ("csv", "jsonl"))):
        assert rows(data, tokenizer) == expected
    assert rows(str(tmp_path / "data.parquet"), tokenizer) == expected
    renamed = dataset.rename_column("text", "words")
    assert rows(renamed, tokenizer, text_column="words") == expected
    upper = rows(dataset, tokenizer, preprocess=lambda sample: {"text": sample["text"].upper()})
    assert upper == [tokenizer(text.upper())["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ("train", range(10)),
        ("train[:4]", range(4)),
        ("train[2:4]", range(2, 4)),
        ("train[20%:50%]", range(2, 5)),
        ("train[-3:]", range(7, 10)),
        ({"calibration": "train[:1]"}, range(1)),
        (["train[8:]"], range(8, 10)),
    ],
)
def test_splits(splits: Any, expected: range) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list([{"input_ids": [i, i]} for i in range(10)])
    data = datasets.DatasetDict({"train": train, "test": train.select([0])})
    assert rows(data, splits=splits) == [[i, i] for i in expected]
    assert rows({"train": list(train), "test": []}, splits=splits) == [[i, i] for i in expected]
    if "[" in str(splits).strip("["):
        assert rows(train, splits=splits) == [[i, i] for i in expected]


def test_shuffling_depends_on_the_seed_alone() -> None:
    data = [[i, i] for i in range(50)]
    first = rows(data, shuffle=True, num_samples=8)
    assert first == rows(data, shuffle=True, num_samples=8) != data[:8]
    assert first != rows(data, shuffle=True, num_samples=8, seed=1)
    assert first == rows(data, shuffle=True)[:8]


def test_concatenation_fills_every_row(tokenizer: Any) -> None:
    joined = [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    got = rows(TEXTS, tokenizer, concatenate=True, max_seq_length=8)
    assert got == [joined[i : i + 8] for i in range(0, len(joined) - 7, 8)]
    assert rows(TEXTS, tokenizer, concatenate=True, max_seq_length=8, num_samples=2) == got[:2]
    assert rows([[1], [2], [3], [4]], concatenate=True, max_seq_length=2) == [[1, 2], [3, 4]]
    with pytest.raises(CalibrationError, match="do not fill one row of 2048"):
        rows(TEXTS, tokenizer, concatenate=True)


def test_padding_is_taken_off() -> None:
    batch = {"input_ids": [[2, 5, 6], [7, 8, 2]], "attention_mask": [[0, 1, 1], [1, 1, 0]]}
    assert rows(batch) == [[5, 6], [7, 8]]
    assert rows(torch.utils.data.DataLoader([{k: torch.tensor(v[0]) for k, v in batch.items()}])) == [[5, 6]]


def test_a_tokenizer_is_loaded_when_text_needs_it(tokenizer: Any) -> None:
    lazy = LazyTokenizer(None, MODEL, False)
    assert rows(IDS, lazy) == IDS.tolist()
    assert lazy.loaded is None
    assert rows(TEXTS, lazy) == rows(TEXTS, tokenizer)
    assert rows(TEXTS, LazyTokenizer(str(MODEL), None, False)) == rows(TEXTS, tokenizer)


def test_a_stream_that_is_cut_is_refused() -> None:
    with pytest.raises(CalibrationError, match="cannot be cut out of a stream"):
        rows((row for row in IDS.tolist()), splits="train[:2]")
