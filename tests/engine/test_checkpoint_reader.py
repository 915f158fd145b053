"""Reading model folders: every dtype, no copies, and every way in which a folder can be wrong or hostile."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantkit.checkpoint.dtypes import BITS
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError

from .checkpoint_files import INDEX, entry, header_of, raw, sharded, single

SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
]  # fmt: skip


def resident(path: Path) -> int:
    """Bytes of this file that are mapped into the process and resident."""
    maps = Path("/proc/self/smaps").read_text().split(str(path) + "\n")[1:]
    return sum(int(text.split("Rss:")[1].split()[0]) * 1024 for text in maps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0,), (4, 0, 2)], ids=str)
def test_reads_what_safetensors_wrote(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    value = torch.arange(1, count + 1).reshape(shape).to(dtype)
    save_file({"x": value, "odd": torch.ones(3, dtype=torch.int8)}, single(tmp_path) / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        read = checkpoint.tensor("x")
        assert read.dtype == dtype and read.shape == value.shape
        assert torch.equal(read.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_unusual_dtypes(tmp_path: Path) -> None:
    header = {
        "f4": entry("F4", [2, 4], 0, 4),
        "f6": entry("F6_E2M3", [4], 4, 7),
        "e8": entry("F8_E8M0", [1], 7, 8),
        "u16": entry("U16", [1], 8, 10),
    }
    checkpoint = Checkpoint(single(tmp_path, raw(header, bytes(range(10)))))
    assert checkpoint.tensor("f4").dtype == torch.float4_e2m1fn_x2 and checkpoint.tensor("f4").shape == (2, 2)
    assert checkpoint.tensor("e8").dtype == torch.float8_e8m0fnu
    assert checkpoint.tensor("u16").item() == 0x0908
    with pytest.raises(CheckpointError, match="no dtype for safetensors' F6_E2M3"):
        checkpoint.tensor("f6")
    assert set(BITS) >= {info.dtype for info in checkpoint.tensors.values()}


def test_misaligned_data_is_copied(tmp_path: Path) -> None:
    header = {"pad": entry("U8", [1], 0, 1), "x": entry("F32", [2], 1, 9)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checkpoint = Checkpoint(single(tmp_path, raw(text, b"\0" + torch.tensor([1.5, -2.0]).numpy().tobytes())))
    assert checkpoint.tensors["x"].begin % 4 == 1
    value = checkpoint.tensor("x")
    assert value.tolist() == [1.5, -2.0] and value.data_ptr() % 4 == 0


def test_tensors_are_views_that_outlive_the_checkpoint(tmp_path: Path) -> None:
    save_file({"x": torch.arange(1000)}, single(tmp_path) / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        first, second = checkpoint.tensor("x"), checkpoint.tensor("x", populate=False)
        assert first.data_ptr() == second.data_ptr()
        checkpoint.prefetch("x")
        checkpoint.release("x")
    assert first.tolist() == list(range(1000))
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("x")


def test_release_empties_the_resident_set(tmp_path: Path) -> None:
    names = [f"t{i:03d}" for i in range(100)]  # 24 MB in tensors whose edges share pages
    path = single(tmp_path) / "model.safetensors"
    save_file({n: torch.ones(240_007, dtype=torch.int8) for n in names}, path)
    with Checkpoint(tmp_path) as checkpoint:
        peak = 0
        for name in names:
            assert checkpoint.tensor(name).numpy().sum() == 240_007
            if name.endswith("50"):
                peak = max(peak, resident(path))
            checkpoint.release(name)
        assert 240_007 <= peak < 4_000_000  # a fault maps up to 2 MB around an edge
        assert resident(path) == 0


def test_shards_and_order(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path, {SHARD_2: ["c"], SHARD_1: ["b", "a"]}))
    assert checkpoint.files == [SHARD_1, SHARD_2]
    assert list(checkpoint.tensors) == ["b", "a", "c"]
    assert checkpoint.total_bytes == 24
    assert checkpoint.tensor("a").view(torch.uint8).tolist() == [2] * 8
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.a'"):
        checkpoint.tensor("model.a")


def test_headers_need_neither_torch_nor_time(tmp_path: Path) -> None:
    """The 90,000 tensors of a large mixture of experts, in a fresh interpreter without torch."""
    files = [f"model-{i:05d}-of-00090.safetensors" for i in range(1, 91)]
    shards = {
        f: [f"model.layers.{i}.mlp.experts.{j}.down_proj.weight" for j in range(1000)] for i, f in enumerate(files)
    }
    sharded(tmp_path, shards)
    code = (
        "import sys, time; from quantkit.checkpoint.reader import Checkpoint; t = time.process_time();"
        "n = len(Checkpoint(sys.argv[1]).tensors); print(n, time.process_time() - t, 'torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout
    count, seconds, has_torch = printed.split()
    assert count == "90000" and has_torch == "False"
    assert float(seconds) < 5  # 0.9 s on a slow machine; only a quadratic reader takes this long


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    for word in words:
        assert word in message, message


GOOD, DATA = header_of(["a", "b"])
TINY = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
BAD_FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty file": (b"", ("truncated", "model.safetensors")),
    "shorter than the length": (b"\x10\0\0", ("truncated",)),
    "header longer than the file": (raw(GOOD, DATA, length=10_000), ("truncated", "10000 bytes")),
    "header over the limit": (raw(GOOD, DATA, length=100_000_001), ("more than the 100000000",)),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", ("more than the 100000000",)),
    "empty header": (raw(b""), ("does not start with '{'",)),
    "not JSON": (raw(b'{"a": nope}'), ("not valid JSON",)),
    "not UTF-8": (raw(b'{"\xff": 1}'), ("not valid JSON",)),
    "not an object": (raw(b"[1, 2]"), ("does not start with '{'",)),
    "leading space": (raw(b" {}"), ("does not start with '{'",)),
    "text after the object": (raw(b"{} {}"), ("not valid JSON",)),
    "nested too deeply": (raw(b'{"a":' + b"[" * 200_000), ("not valid JSON",)),
    "NaN": (raw(b'{"a": NaN}'), ("NaN is not JSON",)),
    "integer of 5000 digits": (raw(b'{"a":' + b"9" * 5000 + b"}"), ("not valid JSON",)),
    "duplicate tensor": (
        raw(b'{"a":' + TINY + b',"a":' + TINY + b"}", b"x"),
        ("'a' occurs twice",),
    ),
    "duplicate key in an entry": (
        raw(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        ("'dtype' occurs twice",),
    ),
    "no tensors": (raw({}), ("no tensor in it",)),
    "metadata not strings": (raw({"__metadata__": {"format": 1}, **GOOD}, DATA), ("__metadata__",)),
    "entry not an object": (raw({"a": 5}), ("'a'", "not an object")),
    "entry without dtype": (raw({"a": {"shape": [], "data_offsets": [0, 0]}}), ("'a'", "dtype, shape")),
    "unknown dtype": (raw({"a": entry("F23", [2], 0, 8)}, DATA), ("'a'", "unknown dtype 'F23' (did you mean 'F32'?)")),
    "dtype a number": (raw({"a": entry(32, [2], 0, 8)}, DATA), ("'a'", "dtype is not a string")),  # type: ignore[arg-type]
    "shape not a list": (raw({"a": entry("F32", "2", 0, 8)}, DATA), ("shape is not a list",)),  # type: ignore[arg-type]
    "negative extent": (raw({"a": entry("F32", [-2], 0, 8)}, DATA), ("non-negative",)),
    "extent true": (raw({"a": entry("U8", [True], 0, 1)}, b"x"), ("non-negative",)),
    "extent a float": (raw({"a": entry("F32", [2.0], 0, 8)}, DATA), ("non-negative",)),
    "shape that overflows to the right size": (
        raw({"a": entry("F32", [2**32, 2**32 + 1], 0, 2**34 % 2**64)}, DATA),
        ("'a'",),
    ),
    "shape that overflows to 0": (raw({"a": entry("U8", [2**33, 2**31], 0, 0)}), ("64-bit",)),
    "empty shape with strides that overflow": (raw({"a": entry("U8", [0, 2**40, 2**40], 0, 0)}), ("64-bit",)),
    "offsets one number": (raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"x"), ("two integers",)),
    "offsets floats": (raw({"a": entry("U8", [1], 0.0, 1.0)}, b"x"), ("two integers",)),
    "negative offset": (raw({"a": entry("F32", [2], -8, 0)}, DATA), ("non-negative",)),
    "begin after end": (raw({"a": entry("F32", [2], 8, 0)}, DATA), ("increasing",)),
    "truncated data": (raw(GOOD, DATA[:-1]), ("'b'", "truncated")),
    "offsets of 2**64": (raw({"a": entry("U8", [2**62], 0, 2**62)}, DATA), ("'a'",)),
    "size does not match shape": (raw({"a": entry("F32", [3], 0, 8)}, DATA[:8]), ("8 bytes", "need 12")),
    "partial byte": (raw({"a": entry("F4", [3], 0, 2)}, b"xx"), ("whole bytes",)),
    "overlap": (raw({"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 4, 12)}, DATA), ("'b'", "overlaps tensor 'a'")),
    "same bytes twice": (raw({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, DATA[:8]), ("overlaps",)),
    "hole": (raw({"a": entry("F32", [2], 0, 8), "b": entry("U8", [4], 12, 16)}, DATA), ("'b'", "4 unused bytes")),
    "hole at the start": (raw({"a": entry("F32", [2], 8, 16)}, DATA), ("unused bytes after the header",)),
    "bytes at the end": (raw(GOOD, DATA + b"x"), ("1 bytes after tensor 'b' belong to no tensor",)),
    "name with half a surrogate": (raw(b'{"\\ud800":' + TINY + b"}", b"x"), ("Unicode",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_weight_file(tmp_path: Path, case: str) -> None:
    content, words = BAD_FILES[case]
    refused(single(tmp_path, content), str(tmp_path / "model.safetensors"), *words)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_headers_never_escape(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any bytes changed anywhere: refused, or still a set of tensors within the file."""
    content = bytearray(raw(GOOD, DATA))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    try:
        tensors, size = read_header(path)
    except CheckpointError as error:
        assert "damaged.safetensors" in str(error)
    else:
        assert all(8 < info.begin <= info.end <= size for info in tensors.values())


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x.safetensors", "sub/x.safetensors", "..", "", "a\\b.safetensors", "a\0.safetensors", 5, None],
)
def test_index_with_a_path(tmp_path: Path, name: Any) -> None:
    refused(sharded(tmp_path, {SHARD_1: ["a"]}, {"a": name}), INDEX, "not a plain file name", "'a'")


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    both = {SHARD_1: ["a"], SHARD_2: ["b"]}
    refused(sharded(tmp_path / "1", both, {"a": SHARD_1, "b": SHARD_2, "c": SHARD_2}), "'c' is not in", SHARD_2)
    more = {SHARD_1: ["a"], SHARD_2: ["b", "c"]}
    refused(sharded(tmp_path / "2", more, {"a": SHARD_1, "b": SHARD_2}), "'c' is missing from", SHARD_2)
    refused(sharded(tmp_path / "3", both, {"a": SHARD_2, "b": SHARD_2}), "model-00001", "not in")
    refused(
        sharded(tmp_path / "4", {**both, "x.safetensors": ["c"]}, {"a": SHARD_2, "b": SHARD_1, "c": "x.safetensors"}),
        "'a'",
    )
    refused(
        sharded(tmp_path / "5", {SHARD_1: ["a"], SHARD_2: ["a", "b"]}, {"a": SHARD_1, "b": SHARD_2}), "'a' is also in"
    )
    refused(sharded(tmp_path / "6", {SHARD_1: ["a"]}, {"a": SHARD_1, "b": SHARD_2}), SHARD_2, "is missing")
    refused(
        sharded(tmp_path / "7", {SHARD_1: ["a"]}, {"a": SHARD_1, "b": "pytorch_model.bin"}), "not a safetensors file"
    )
    refused(
        sharded(tmp_path / "8", {SHARD_1: ["a"], "model.safetensors": ["a"]}, {"a": SHARD_1}),
        "model.safetensors is not in",
    )
    for weight_map in ({}, [], "x"):
        folder = sharded(tmp_path / "9", {SHARD_1: ["a"]})
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        refused(folder, INDEX, "weight_map")
    (folder / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    refused(folder, INDEX, "'a' occurs twice")


def test_folders_without_usable_weights(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "not a folder")
    (tmp_path / "no config").mkdir()
    refused(tmp_path / "no config", "no config.json")
    for config, reason in (
        (b"[]", "not a JSON object but a list"),
        (b"{", "not valid JSON"),
        (b'{"a":1,"a":1}', "twice"),
    ):
        refused(single(tmp_path / "config", config=config), "config.json", reason)

    def only(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / name).write_bytes(b"x")
        return folder

    refused(only("pytorch_model.bin"), "pickle", "safetensors")
    refused(only("consolidated.00.pth"), "pickle")
    refused(only("consolidated.safetensors"), "Mistral")
    refused(only("adapter_model.safetensors"), "neither model.safetensors nor")
    refused(only("tokenizer.json"), "is this the folder of a model?")
    refused(only(SHARD_1), "no model.safetensors.index.json")
    folder = single(tmp_path / "two")
    (folder / SHARD_1).write_bytes(b"x")
    refused(folder, "beside")
    folder = single(tmp_path / "directory")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, "not a regular file")
    os.rmdir(folder / "model.safetensors")
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "not a regular file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", SHARD_1, INDEX])
def test_links_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = sharded(tmp_path / "m", {SHARD_1: ["a"]}) if name in (SHARD_1, INDEX) else single(tmp_path / "m")
    outside = tmp_path / "blobs" / "secret"  # a folder called blobs alone does not make a hub cache
    outside.parent.mkdir()
    (folder / name).touch()
    os.rename(folder / name, outside)
    (folder / name).symlink_to(outside)
    refused(folder, name, "symbolic link", str(outside))
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "nowhere")
    refused(folder, "config.json" if name == "config.json" else name)
    (folder / name).unlink()
    os.rename(outside, folder / "hidden.real")
    (folder / name).symlink_to("hidden.real")  # a link within the folder is as good as the file
    if name != "tokenizer.json":
        Checkpoint(folder)


def test_side_files(tmp_path: Path) -> None:
    carried = [
        *(
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "vocab.json",
            "merges.txt",
            "added_tokens.json",
        ),
        *("generation_config.json", "chat_template.jinja", "preprocessor_config.json", "special_tokens_map.json"),
        *("modeling_custom.py", "LICENSE", "NOTICE", "USE_POLICY.md", "qwen.tiktoken", "sentencepiece.bpe.model"),
    ]
    left = [
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "tf_model.h5", "flax_model.msgpack"),
        *("optimizer.pt", "a.pth", "model.onnx", "params.ckpt", "consolidated.safetensors", "x.safetensors"),
        *("README.md", ".gitattributes", ".hidden", "y.tmp"),
    ]
    folder = single(tmp_path)
    for name in (*carried, *left):
        (folder / name).write_text(name)
    for sub in ("original", ".git", "onnx", "__pycache__"):
        (folder / sub).mkdir()
        (folder / sub / "tokenizer.json").write_text("")
    (folder / "linked").symlink_to("/etc")
    checkpoint = Checkpoint(folder)
    assert [path.name for path in checkpoint.side_files] == sorted(carried)
    assert checkpoint.left_out == ["consolidated.safetensors", "x.safetensors"]


def test_file_that_changes_while_it_is_open(tmp_path: Path) -> None:
    folder = single(tmp_path)
    checkpoint = Checkpoint(folder)
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="changed after"):
        checkpoint.tensor("a")
    save_file({"big": torch.ones(100_000), "last": torch.ones(100_000)}, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    checkpoint.tensor("big")
    os.truncate(folder / "model.safetensors", 300_000)
    with pytest.raises(CheckpointError, match=r"'last'.*shorter"):  # and not a SIGBUS
        checkpoint.tensor("last")


def test_reading_from_several_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    names = [f"t{i}" for i in range(40)]
    save_file({n: torch.full((5000,), i) for i, n in enumerate(names)}, single(tmp_path) / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, ThreadPoolExecutor(4) as pool:

        def work(name: str) -> int:
            value = int(checkpoint.tensor(name).double().mean())
            checkpoint.release(name)
            return value

        order = names * 3
        random.Random(0).shuffle(order)
        assert list(pool.map(work, order)) == [int(name[1:]) for name in order]
