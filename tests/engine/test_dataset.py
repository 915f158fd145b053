"""Calibration data: every shape it may have becomes the right rows, and bad data are refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibration.dataset import load_rows, load_tokenizer, rows_of, text_rows
from quantkit.errors import CalibrationError, CheckpointError

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "tiny-llama"
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def plain() -> Any:
    """A tokenizer without a chat template."""
    return load_tokenizer(MODEL)


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def with_bos() -> Any:
    """A tokenizer that puts <s> before every text, as Llama's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def lines(path: Path, *samples: Any) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return path


def text_of(tokenizer: Any, row: list[int]) -> str:
    text: str = tokenizer.decode(row)
    return text


CHAT = "<s>user: Hello there</s><s>assistant: Good day</s>"
TURNS = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day"}]


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"text": "Hello there"}, "Hello there"),
        ({"inputs_pretokenized": "Hello there", "id": 0}, "Hello there"),
        ({"applied_message": CHAT}, CHAT),
        (
            {"messages": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day"}]},
            CHAT,
        ),
        (
            {"conversations": [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Good day"}]},
            CHAT,
        ),
        (
            {
                "conversations": [
                    {"role": "user", "content": "Hello there"},
                    {"role": "assistant", "content": "Good day"},
                ]
            },
            CHAT,
        ),
        ({"input": "Hello there", "output": "Good day"}, CHAT),
        (
            {"system": "Be kind", "conversations": [{"from": "human", "value": "Hello there"}]},
            "<s>system: Be kind</s><s>user: Hello there</s>",
        ),
    ],
)
def test_every_shape_of_a_sample(sample: dict[str, Any], expected: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = rows_of(lines(tmp_path / "data.jsonl", sample), tokenizer)
    assert [text_of(tokenizer, row) for row in rows] == [expected]
    assert rows == rows_of([sample], tokenizer)


def test_text_gets_special_tokens_and_templated_text_no_second_ones(with_bos: Any) -> None:
    bos = with_bos.bos_token_id
    text, chat, already, applied = rows_of(
        [
            {"text": "Hello"},
            {"messages": [{"role": "user", "content": "Hello"}]},
            {"text": "<s>Hello"},
            {"applied_message": "<s>Hello"},
        ],
        with_bos,
    )
    assert text == already == applied and text[0] == bos
    assert chat[0] == bos and chat.count(bos) == 1


def test_another_text_column(tokenizer: Any) -> None:
    rows = rows_of([{"body": "Hello"}], tokenizer, text_column="body")
    assert text_of(tokenizer, rows[0]) == "Hello"


def test_rows_are_cut_counted_and_never_padded(tokenizer: Any) -> None:
    data = [{"text": "word " * n} for n in (100, 3, 50)]
    rows = rows_of(data, tokenizer, max_seq_length=20)
    assert len(rows[0]) == len(rows[2]) == 20 and len(rows[1]) < 20
    assert rows_of(data, tokenizer, num_samples=2, max_seq_length=20) == rows[:2]
    assert rows_of(data, tokenizer, num_samples=-1, max_seq_length=20) == rows


def test_empty_samples_are_passed_over_and_do_not_count(tokenizer: Any) -> None:
    rows = rows_of([{"text": ""}, {"text": "Hello"}, ""], tokenizer, num_samples=1)
    assert [text_of(tokenizer, row) for row in rows] == ["Hello"]
    with pytest.raises(CalibrationError, match="no sample has any text"):
        rows_of([{"text": ""}], tokenizer)


def test_shuffling_depends_on_the_seed_alone(tokenizer: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", *({"text": f"number {i}"} for i in range(50)))
    first = rows_of(path, tokenizer, num_samples=8, shuffle=True, seed=1)
    assert first == rows_of(path, tokenizer, num_samples=8, shuffle=True, seed=1)
    assert first != rows_of(path, tokenizer, num_samples=8, shuffle=True, seed=2)
    assert first != rows_of(path, tokenizer, num_samples=8)
    assert all(row in rows_of(path, tokenizer) for row in first)


def test_plain_text_is_one_stream_in_full_rows(plain: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"Line {i} of a text that goes on." for i in range(3000)), encoding="utf-8")
    ids = plain(path.read_text(), add_special_tokens=False)["input_ids"]
    everything = rows_of(path, plain, num_samples=-1, max_seq_length=32)
    assert everything == [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    # Only a beginning is tokenized for these, with the same result.
    assert text_rows(path, plain, 32, 5) == everything[:5]
    assert rows_of(path, plain, num_samples=5, max_seq_length=32) == everything[:5]
    shuffled = rows_of(path, plain, num_samples=5, max_seq_length=32, shuffle=True, seed=3)
    assert shuffled != everything[:5] and all(row in everything for row in shuffled)


def test_too_little_text_is_refused(plain: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("short")
    with pytest.raises(CalibrationError, match="do not fill one row of 32"):
        rows_of(path, plain, max_seq_length=32)


def test_ids_and_their_mask(tokenizer: Any) -> None:
    expected = [[5, 6], [7, 8]]
    assert rows_of(torch.tensor([[5, 6], [7, 8]]), tokenizer, max_seq_length=2) == [[5, 6], [7, 8]]
    assert rows_of([[5, 6], [7, 8]], tokenizer) == expected
    assert rows_of([torch.tensor([5, 6]), torch.tensor([7, 8])], tokenizer) == expected
    padded = [{"input_ids": [5, 6], "attention_mask": [1, 1]}, {"input_ids": [2, 7, 8], "attention_mask": [0, 1, 1]}]
    assert rows_of(padded, tokenizer) == expected


def test_a_dataset_object_its_folder_and_parquet(tokenizer: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([{"text": "Hello"}, {"text": "there"}])
    expected = rows_of([{"text": "Hello"}, {"text": "there"}], tokenizer)
    dataset.save_to_disk(tmp_path / "folder")
    dataset.to_parquet(tmp_path / "data.parquet")
    assert rows_of(dataset, tokenizer) == expected
    assert rows_of(tmp_path / "folder", tokenizer) == expected
    assert rows_of(tmp_path / "data.parquet", tokenizer) == expected
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    with pytest.raises(CalibrationError, match="train"):
        rows_of(tmp_path / "splits", tokenizer)
    with pytest.raises(CalibrationError, match="train"):
        rows_of(datasets.DatasetDict({"train": dataset}), tokenizer)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(CalibrationError, match=r"bad\.parquet: not readable"):
        rows_of(tmp_path / "bad.parquet", tokenizer)


def test_the_dataset_section_of_a_run(tokenizer: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", {"body": "one two three"}, {"body": "four"})
    section = SimpleNamespace(data_path=str(path), max_seq_length=2, num_samples=1, shuffle=False, text_column="body")
    assert load_rows(section, tokenizer) == rows_of([{"text": "one two three"}], tokenizer, max_seq_length=2)


def test_the_ascend_sample_file(plain: Any, shared_data: Path) -> None:
    rows = rows_of(shared_data / "boolq.jsonl", plain)
    assert len(rows) == 50
    assert text_of(plain, rows[0]).startswith("Ghost in the Shell -- Animation studio Production I.G")


# What is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('"text"', "expected a JSON object"),
        ("null", "expected a JSON object"),
        ("{}", "has no keys; expected 'messages'"),
        ('{"txt": "Hello"}', "has 'txt'; expected 'messages'"),
        ('{"text": 3}', "'text' has to be text, got int"),
        ('{"text": null}', "'text' has to be text, got NoneType"),
        ('{"inputs_pretokenized": ["a"]}', "'inputs_pretokenized' has to be text, got list"),
        ('{"messages": []}', "'messages' has to be a non-empty list"),
        ('{"messages": "Hello"}', "'messages' has to be a non-empty list"),
        ('{"messages": ["Hello"]}', "turn 0 of 'messages' has to have 'role'"),
        ('{"messages": [{"role": "user"}]}', "turn 0 of 'messages' has to have 'role' \\(text\\) and 'content'"),
        ('{"messages": [{"role": 1, "content": "a"}]}', "turn 0 of 'messages' has to have 'role'"),
        ('{"messages": [{"role": "user", "content": 1}]}', "'content' of turn 0 of 'messages' has to be text"),
        ('{"conversations": [{"from": "robot", "value": "a"}]}', "turn 0 of 'conversations' is from 'robot'"),
        ('{"conversations": {"from": "human"}}', "'conversations' has to be a non-empty list"),
        ('{"input": 1, "output": "a"}', "'content' of turn 0 of 'input/output' has to be text"),
        ('{"input_ids": "abc"}', "expected text, a mapping or token ids, got str"),
        ('{"input_ids": [1, 2.5]}', "flat list of integers"),
        ('{"input_ids": [[1, 2]]}', "flat list of integers"),
        ('{"input_ids": [1, 2], "attention_mask": [1]}', "attention_mask has 1 entries for 2 input_ids"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=rf"data\.jsonl:3: .*{message}"):
        rows_of(path, tokenizer)


def test_a_chat_without_a_template_says_what_to_do(plain: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", {"messages": [{"role": "user", "content": "Hello"}]})
    with pytest.raises(CalibrationError, match=r"data\.jsonl:1: a chat, but .*chat_template\.jinja"):
        rows_of(path, plain)


def test_what_a_template_says_no_to_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"sample 0: the chat template refuses it: .*roles must alternate"):
        rows_of([{"messages": [{"role": "user", "content": "Hello"}]}], tokenizer)


def test_ids_outside_the_vocabulary_are_named(tokenizer: Any) -> None:
    for ids in ([1, 2048], [1, -1]):
        with pytest.raises(CalibrationError, match=f"sample 1: token id {ids[1]} .*vocabulary of 2048"):
            rows_of([[1, 2], ids], tokenizer, vocab_size=2048)


def test_files_that_cannot_be_read(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such file"):
        rows_of(tmp_path / "absent.jsonl", tokenizer)
    for name in ("latin1.jsonl", "latin1.txt"):
        (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}')
        with pytest.raises(CalibrationError, match=rf"{name}: not UTF-8 text \(byte 13"):
            rows_of(tmp_path / name, tokenizer)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CalibrationError, match="folder: not readable as a dataset"):
        rows_of(tmp_path / "folder", tokenizer)


def test_things_that_are_no_data(tokenizer: Any) -> None:
    for data in ({"train": [1]}, 7, iter([1]), torch.zeros(3)):
        with pytest.raises(CalibrationError, match="calibration data"):
            rows_of(data, tokenizer)
    with pytest.raises(CalibrationError, match="max_seq_length"):
        rows_of(["Hello"], tokenizer, max_seq_length=0)


def test_a_json_array_and_line_separators_inside_strings(tokenizer: Any, tmp_path: Path) -> None:
    samples = [{"text": "Hello\u2028there"}, {"text": "Good\u0085day"}]
    (tmp_path / "data.json").write_text(json.dumps(samples), encoding="utf-8")
    (tmp_path / "data.jsonl").write_text(
        "\r\n".join(json.dumps(s, ensure_ascii=False) for s in samples), encoding="utf-8"
    )
    expected = rows_of(samples, tokenizer)
    assert len(expected) == 2
    assert rows_of(tmp_path / "data.json", tokenizer) == expected
    assert rows_of(tmp_path / "data.jsonl", tokenizer) == expected


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["text", "messages", "conversations", "role", "content", "from", "value", "input_ids", "input"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(sample=JSON)
def test_any_json_gives_rows_or_a_calibration_error(sample: Any, plain: Any) -> None:
    try:
        rows = rows_of([sample], plain, vocab_size=2048)
    except CalibrationError as error:
        assert "sample 0" in str(error) or "no sample has any text" in str(error)
    else:
        assert rows and all(0 <= token < 2048 for row in rows for token in row)
