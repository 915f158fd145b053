"""Writing: the layout is a function of its input, the bytes follow the layout, half an output is never seen."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit import _host
from quantkit.checkpoint.dtypes import alignment, name_of
from quantkit.checkpoint.layout import Layout, OutputTensor, plan_layout
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.staging import MARKER
from quantkit.checkpoint.writer import CheckpointWriter, check_free_space, free_bytes
from quantkit.errors import CheckpointError

from .checkpoint_files import single

DTYPES = [torch.bfloat16, torch.float32, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]
CONFIG = b'{"model_type": "llama"}'


def described(tensors: dict[str, torch.Tensor]) -> list[OutputTensor]:
    return [OutputTensor(name, name_of(t.dtype), tuple(t.shape)) for name, t in tensors.items()]


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(50, 8, generator=generator).bfloat16(),
        "codes": torch.randint(-127, 128, (7, 3), generator=generator).to(torch.int8),
        "scale": torch.rand(7, 1, generator=generator),
        "count": torch.tensor(3),
        "empty": torch.empty(0, 4, dtype=torch.float16),
    }


def write_all(tensors: dict[str, torch.Tensor], output: Path, max_shard_bytes: int = 10**9) -> Path:
    with CheckpointWriter(plan_layout(described(tensors), max_shard_bytes), output) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.side_file("config.json", CONFIG)
        return writer.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaNs included."""
    a, b = a.contiguous(), b.contiguous()
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, unique=True))
    tensors = {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        data = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes,), dtype=torch.uint8)
        tensors[name] = data.view(dtype).reshape(shape)
    return tensors


@settings(max_examples=25, deadline=None)
@given(tensors=tensor_sets(), limit=st.integers(1, 300), data=st.data())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], limit: int, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("round")
    first = write_all(tensors, tmp_path / "first", limit)
    shuffled = {name: tensors[name] for name in data.draw(st.permutations(list(tensors)))}
    layout = Layout.from_json(plan_layout(described(tensors), limit).to_json())
    with CheckpointWriter(layout, tmp_path / "second") as writer:
        writer.side_file("config.json", CONFIG)
        for name, tensor in shuffled.items():
            writer.write(name, tensor)
        second = writer.finish()
    assert contents(first) == contents(second)

    read = Checkpoint(first)
    assert read.tensors.keys() == tensors.keys()
    assert all(same(read.tensor(name), tensor) for name, tensor in tensors.items())
    assert all(info.begin % alignment(info.dtype) == 0 for info in read.tensors.values())
    theirs: dict[str, torch.Tensor] = {}
    for file in read.files:
        with safe_open(first / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        theirs |= load_file(first / file)
    assert theirs.keys() == tensors.keys()
    assert all(same(theirs[name], tensor) for name, tensor in tensors.items())


def test_layout_of_one_file() -> None:
    layout = plan_layout(described(example()), 10**9)
    (shard,) = layout.shards
    assert shard.file == "model.safetensors" and layout.index is None
    assert len(shard.header) % 8 == 0
    assert [t.name for t in shard.tensors] == ["count", "scale", "embed", "empty", "codes"]  # by width, else as given
    assert shard.ranges["count"] == (len(shard.header), len(shard.header) + 8)
    assert layout.total_size == 800 + 21 + 28 + 8
    assert layout.file_bytes == shard.size == len(shard.header) + layout.total_size
    assert Layout.from_json(layout.to_json()) == layout


def test_layout_of_shards() -> None:
    sizes = [40, 40, 30, 500, 10, 0, 90, 1]
    layout = plan_layout([OutputTensor(f"t{i}", "U8", (n,)) for i, n in enumerate(sizes)], 100)
    groups = [[t.nbytes for t in shard.tensors] for shard in layout.shards]
    assert groups == [[40, 40], [30], [500], [10, 0, 90], [1]]
    assert [s.file for s in layout.shards] == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert layout.index == {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {t.name: s.file for s in layout.shards for t in s.tensors},
    }
    assert layout.file_bytes == sum(s.size for s in layout.shards) + len(layout.index_bytes or b"")
    assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([], "no tensor"),
        ([OutputTensor("a", "F32", (1,)), OutputTensor("a", "F32", (1,))], "planned twice"),
        ([OutputTensor("a", "F23", (1,))], "unknown dtype"),
        ([OutputTensor("a", "F32", (-1,))], "non-negative"),
        ([OutputTensor("__metadata__", "F32", (1,))], "cannot be used"),
        ([OutputTensor("", "F32", (1,))], "cannot be used"),
        ([OutputTensor("\ud800", "F32", (1,))], "surrogates"),
    ],
)
def test_impossible_layouts(tensors: list[OutputTensor], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        plan_layout(tensors, 100)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 9, "metadata": {}, "shards": []}', '{"version": 1}'])
def test_damaged_saved_layout(text: str) -> None:
    with pytest.raises(CheckpointError, match="saved layout"):
        Layout.from_json(text)


def test_strides_and_views(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {"t": base.T, "slice": base[1:, ::2], "expand": base[:1].expand(4, 6), "conj": (base * 1j).conj()}
    read = Checkpoint(write_all(tensors, tmp_path / "out"))
    assert all(torch.equal(read.tensor(name), tensor) for name, tensor in tensors.items())


def test_copied_tensors_and_side_files(tmp_path: Path) -> None:
    save_file(example(), single(tmp_path / "in") / "model.safetensors")
    (tmp_path / "in" / "tokenizer.json").write_text("tokens")
    source = Checkpoint(tmp_path / "in")
    layout = plan_layout([OutputTensor(i.name, i.dtype, i.shape) for i in source.tensors.values()], 60)
    with CheckpointWriter(layout, tmp_path / "out") as writer:
        for name, info in source.tensors.items():
            writer.copy(name, info, source)
        for path in source.side_files:
            writer.copy_side_file(path)
        writer.side_file("config.json", CONFIG)
        assert writer.missing() == []
        output = writer.finish()
    read = Checkpoint(output)
    assert all(same(read.tensor(name), tensor) for name, tensor in example().items())
    assert read.tensors.keys() == example().keys()  # what the source ties stays tied: nothing is added
    assert (output / "tokenizer.json").read_text() == "tokens"
    assert not (output / MARKER).exists() and not list(tmp_path.glob("*.partial"))


def test_copy_to_another_file_system(tmp_path: Path) -> None:
    """/dev/shm is one, so the kernel cannot copy between the two, or does it in its own way."""
    data = os.urandom(3_000_001)
    (tmp_path / "source").write_bytes(data)
    target = Path("/dev/shm") / f"quantkit-test-{os.getpid()}"
    try:
        file = _host.OutputFile(target, 2_999_990)
        file.copy_from(_host.MappedFile(tmp_path / "source"), 11, 0, 2_999_990)
        file.start_writeback(0, 2_999_990)
        file.sync()
        file.close()
        assert target.read_bytes() == data[11:]
    finally:
        target.unlink(missing_ok=True)


def test_copies_past_the_end_of_a_source(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 10)
    file = _host.OutputFile(tmp_path / "out", 100)
    with pytest.raises(OSError, match="ends at byte 10") as caught:
        file.copy_from(_host.MappedFile(tmp_path / "source"), 0, 0, 20)
    assert caught.value.errno == errno.EIO and caught.value.filename == str(tmp_path / "source")


def test_output_file_refuses(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError) as caught:
        _host.OutputFile(tmp_path / "there", 1)
    assert caught.value.filename == str(tmp_path / "there")
    file = _host.OutputFile(tmp_path / "new", 4)
    for offset, data in ((0, b"12345"), (4, b"1"), (2**64 - 1, b"12")):
        with pytest.raises(IndexError, match="not within the 4 bytes"):
            file.write(data, offset)
    with pytest.raises(ValueError, match="contiguous"):
        file.write(memoryview(b"12345678")[::2], 0)
    file.write(b"1234", 0)
    file.close()
    with pytest.raises(RuntimeError, match="closed"):
        file.write(b"1", 0)
    with pytest.raises(NotADirectoryError):
        _host.fsync_directory(tmp_path / "new")
    mapped = _host.MappedFile(tmp_path / "new")
    for begin, end in ((0, 5), (3, 2), (5, 5)):
        for method in (mapped.populate, mapped.prefetch, mapped.drop):
            with pytest.raises(IndexError, match="not within the 4 bytes"):
                method(begin, end)
    with pytest.raises(FileNotFoundError):
        _host.MappedFile(tmp_path / "absent")
    with pytest.raises(OSError, match="not a regular file"):
        _host.MappedFile(tmp_path)
    (tmp_path / "empty").touch()
    assert bytes(memoryview(_host.MappedFile(tmp_path / "empty"))) == b""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CheckpointWriter]:
    with CheckpointWriter(plan_layout(described(example()), 10**9), tmp_path / "out") as made:
        yield made
    assert list(tmp_path.iterdir()) == []  # whatever the test did, nothing is left


def test_wrong_tensors_are_refused(writer: CheckpointWriter) -> None:
    tensors = example()
    for name, tensor, reason in (
        ("emed", tensors["embed"], r"'emed' is not part of the planned output \(did you mean 'embed'"),
        ("embed", tensors["embed"].float(), "planned as BF16, not F32"),
        ("embed", tensors["embed"].T, r"shape \[50, 8\], not \[8, 50\]"),
        ("embed", tensors["embed"].to("meta"), "no data"),
        ("embed", tensors["embed"].to_sparse(), "no data"),
        ("embed", torch.empty(50, 8, dtype=torch.bits8), "no dtype for torch.bits8"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            writer.write(name, tensor)
    writer.write("embed", tensors["embed"])
    with pytest.raises(CheckpointError, match="'embed' is written twice"):
        writer.write("embed", tensors["embed"])


def test_wrong_copies_are_refused(writer: CheckpointWriter, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = Checkpoint(single(tmp_path_factory.mktemp("source")))
    for name, reason in (("embed", r"planned as BF16 \[50, 8\], not F32 \[2\]"), ("other", "not part of the planned")):
        with pytest.raises(CheckpointError, match=reason):
            writer.copy(name, source.tensors["a"], source)


def test_wrong_side_files_are_refused(writer: CheckpointWriter) -> None:
    for name in ("../x", "/x", "a/b", "", ".hidden", MARKER, "model.safetensors", "model.safetensors.index.json"):
        with pytest.raises(CheckpointError, match="side file"):
            writer.side_file(name, b"")
    for name in ("config.json", "tokenizer.json"):
        writer.side_file(name, b"{}")
        with pytest.raises(CheckpointError, match="written twice"):
            writer.side_file(name, b"{}")


def test_unfinished_output_is_refused_and_removed(tmp_path: Path) -> None:
    layout = plan_layout(described(example()), 10**9)
    writer = CheckpointWriter(layout, tmp_path / "out")
    writer.write("embed", example()["embed"])
    assert writer.missing() == ["count", "scale", "empty", "codes"]
    with pytest.raises(CheckpointError, match="never written: count, scale, empty, codes"):
        writer.finish()
    assert list(tmp_path.iterdir()) == []
    for call in (writer.finish, lambda: writer.write("codes", example()["codes"]), lambda: writer.side_file("x", b"")):
        with pytest.raises(CheckpointError, match="is aborted"):
            call()
    writer = CheckpointWriter(layout, tmp_path / "out")
    for name, tensor in example().items():
        writer.write(name, tensor)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        writer.finish()
    with pytest.raises(ZeroDivisionError), CheckpointWriter(layout, tmp_path / "out") as writer:
        writer.write("embed", example()["embed"])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_config_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    put = CheckpointWriter._put
    monkeypatch.setattr(
        CheckpointWriter, "_put", lambda self, name, data: (written.append(name), put(self, name, data))
    )
    with CheckpointWriter(plan_layout(described(example()), 50), tmp_path / "out") as writer:
        writer.side_file("config.json", CONFIG)
        writer.side_file("tokenizer.json", b"")
        for name, tensor in example().items():
            writer.write(name, tensor)
        assert not (tmp_path / "out.partial" / "config.json").exists()
        writer.finish()
    assert written == ["tokenizer.json", "model.safetensors.index.json", "config.json"]


def test_existing_output(tmp_path: Path) -> None:
    layout = plan_layout(described(example()), 10**9)
    output = write_all(example(), tmp_path / "deep" / "out")
    (output / "old.txt").touch()
    before = contents(output)
    with pytest.raises(CheckpointError, match=r"exists already.*--overwrite"):
        CheckpointWriter(layout, output)
    with CheckpointWriter(layout, output, overwrite=True):
        pass
    assert contents(output) == before  # an aborted replacement replaces nothing
    with CheckpointWriter(layout, output, overwrite=True) as writer:
        for name, tensor in example().items():
            writer.write(name, tensor)
        writer.side_file("config.json", b'{"new": true}')
        assert contents(output) == before
        writer.finish()
    assert contents(output).keys() == {"config.json", "model.safetensors"}
    assert Checkpoint(output).config == {"new": True}
    assert os.listdir(output.parent) == ["out"]

    (tmp_path / "empty").mkdir()
    write_all(example(), tmp_path / "empty")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="is not deleted"):
        CheckpointWriter(layout, precious, overwrite=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(output)
    for name in ("file", "link"):
        with pytest.raises(CheckpointError, match="not a folder"):
            CheckpointWriter(layout, tmp_path / name, overwrite=True)
    with pytest.raises(CheckpointError, match=r"file.*choose another"):
        CheckpointWriter(layout, tmp_path / "file" / "out")


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    folder = single(tmp_path / "parent" / "model")
    (folder / "tokenizer.json").touch()
    (tmp_path / "parent" / "config.json").touch()
    source = Checkpoint(folder)
    layout = plan_layout([OutputTensor(i.name, i.dtype, i.shape) for i in source.tensors.values()], 100)
    for output in (folder, tmp_path / "parent"):
        with CheckpointWriter(layout, output, overwrite=True) as writer:
            with pytest.raises(CheckpointError, match="is or holds the source model"):
                writer.copy("a", source.tensors["a"], source)
            with pytest.raises(CheckpointError, match="is or holds the source model"):
                writer.copy_side_file(folder / "tokenizer.json")
    assert Checkpoint(folder).tensors == source.tensors


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    layout = plan_layout(described(example()), 10**9)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="not made by quantkit"):
        CheckpointWriter(layout, tmp_path / "out")
    (partial / "thesis.txt").unlink()
    partial.rmdir()
    partial.touch()
    with pytest.raises(CheckpointError, match="not made by quantkit"):
        CheckpointWriter(layout, tmp_path / "out")
    partial.unlink()
    (tmp_path / "out.replaced").mkdir()
    with pytest.raises(CheckpointError, match="not made by quantkit"):
        CheckpointWriter(layout, tmp_path / "out")


def test_two_writers_of_one_output(tmp_path: Path) -> None:
    layout = plan_layout(described(example()), 10**9)
    with CheckpointWriter(layout, tmp_path / "out"):
        with pytest.raises(CheckpointError, match="another run is writing it"):
            CheckpointWriter(layout, tmp_path / "out")
        assert (tmp_path / "out.partial" / "model.safetensors").exists()
    with CheckpointWriter(layout, tmp_path / "out") as slow:
        for name, tensor in example().items():
            slow.write(name, tensor)
        slow.side_file("config.json", CONFIG)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("someone was faster")
        with pytest.raises(CheckpointError, match="exists already"):
            slow.finish()
    assert (tmp_path / "out" / "config.json").read_text() == "someone was faster"


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from quantkit.checkpoint import staging
    from quantkit.checkpoint.layout import OutputTensor, plan_layout
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.checkpoint.writer import CheckpointWriter

    source, output, point = Checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    rename, calls = os.rename, []
    def counted(*args):
        calls.append(args)
        if point == f"before rename {len(calls)}": die()
        rename(*args)
        if point == f"after rename {len(calls)}": die()
    staging.os.rename = counted
    a, b = source.tensors.values()
    layout = plan_layout([OutputTensor(i.name, i.dtype, i.shape) for i in (a, b)], 8)
    writer = CheckpointWriter(layout, output, overwrite=True)
    if point == "at the start": die()
    writer.copy("a", a, source)
    writer._jobs.drain()
    if point == "in the middle": die()
    writer.copy("b", b, source)
    writer.side_file("config.json", b'{"new": true}')
    writer.finish()
"""


POINTS = ["at the start", "in the middle", "before rename 1", "after rename 1"]
TWO_RENAMES = ["before rename 2", "after rename 2"]  # with an old output, the first one moves that aside


@pytest.mark.parametrize(("old", "point"), [(False, p) for p in POINTS] + [(True, p) for p in POINTS + TWO_RENAMES])
def test_killed_at_any_point(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, point: str, old: bool, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    if old:
        write_all(example(), output)
    source = single(tmp_path_factory.mktemp("source"))
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), source, output, point], check=False)
    assert killed.returncode == -signal.SIGKILL
    if output.exists():  # the complete new one or the complete old one
        found = Checkpoint(output)
        new = point == ("after rename 2" if old else "after rename 1")
        assert (found.config == {"new": True}) == new
        assert found.tensors.keys() == ({"a", "b"} if new else example().keys())
        assert [path.name for path in found.side_files] == []
    else:
        assert not old or point in ("after rename 1", "before rename 2")
    leftovers = any(tmp_path.glob("*.partial"))
    # The next run clears up, whether it succeeds ...
    with (
        caplog.at_level(logging.WARNING, "quantkit"),
        CheckpointWriter(plan_layout(described(example()), 10**9), output, overwrite=True),
    ):
        assert ("did not finish" in caplog.text) == leftovers
        if old:
            assert Checkpoint(output).tensors.keys() in ({"a", "b"}, example().keys())
    # ... or not.
    assert set(os.listdir(tmp_path)) <= {"out"}
    if output.exists():
        with pytest.raises(CheckpointError, match="exists already"):
            CheckpointWriter(plan_layout(described(example()), 10**9), output)
    else:
        write_all(example(), output)


def test_error_of_the_background_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails after the space was reserved: the next call says so, and nothing is left."""

    original = _host.OutputFile

    class Failing:
        def __init__(self, path: Path, size: int) -> None:
            self.file = original(path, size)
            self.path = path

        def write(self, data: object, offset: int) -> None:
            if offset:
                raise OSError(errno.ENOSPC, "No space left on device while writing", str(self.path))
            self.file.write(data, offset)

    monkeypatch.setattr(_host, "OutputFile", Failing)
    tensors = {f"t{i}": torch.ones(1000) for i in range(50)}
    with CheckpointWriter(plan_layout(described(tensors), 10**9), tmp_path / "out", max_pending_bytes=8000) as writer:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: No space left .* GB are free"):
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        with pytest.raises(CheckpointError, match="No space left"):
            writer.write(writer.missing()[0], torch.ones(1000))
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = plan_layout([OutputTensor("x", "U8", (1 << 59,))], 1 << 62)
    with pytest.raises(CheckpointError, match=r"needs 576460752\.30 GB and the disk has"):
        CheckpointWriter(layout, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("quantkit.checkpoint.writer.free_bytes", lambda folder: 1 << 61)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* while reserving 5764607523034\d+ bytes"):
        CheckpointWriter(layout, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_full_tmpfs(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting needs privileges")
    try:
        layout = plan_layout([OutputTensor(f"t{i}", "U8", (600_000,)) for i in range(2)], 600_000)
        with pytest.raises(CheckpointError, match=r"the output needs 0\.00 GB"):
            CheckpointWriter(layout, mount / "out")
        with pytest.raises(OSError, match="No space left") as caught:
            _host.OutputFile(mount / "file", 2_000_000)
        assert caught.value.errno == errno.ENOSPC
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", mount], check=True)


def test_free_space(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.1)
    check_free_space(tmp_path, 1)
    with pytest.raises(CheckpointError, match="make room"):
        check_free_space(tmp_path / "not" / "there", 1 << 62)


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slow disk, `write` waits instead of piling up tensors; a tensor above the bound waits to be alone."""
    held = peak = 0
    lock, gate = threading.Lock(), threading.Event()

    class Slow(_host.OutputFile):
        def write(self, data: object, offset: int) -> None:
            nonlocal held
            gate.wait(0.01)
            super().write(data, offset)
            if offset:
                with lock:
                    held -= memoryview(data).nbytes  # type: ignore[arg-type]

    monkeypatch.setattr(_host, "OutputFile", Slow)
    tensors = {f"t{i}": torch.ones(250 if i % 5 else 1500) for i in range(20)}
    with CheckpointWriter(plan_layout(described(tensors), 10**9), tmp_path / "out", max_pending_bytes=2500) as writer:
        for name, tensor in tensors.items():
            with lock:
                held += tensor.nbytes
            writer.write(name, tensor)
            with lock:
                peak = max(peak, held)
        writer.side_file("config.json", CONFIG)
        assert Checkpoint(writer.finish()).tensors.keys() == tensors.keys()
    assert 2000 <= peak <= 6000


def test_many_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    tensors = {f"t{i}": torch.full((100 + i,), i) for i in range(200)}
    layout = plan_layout(described(tensors), 20_000)
    with CheckpointWriter(layout, tmp_path / "out", max_pending_bytes=5000) as writer:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda item: writer.write(*item), reversed(tensors.items())))
        writer.side_file("config.json", CONFIG)
        writer.finish()
    assert contents(tmp_path / "out") == contents(write_all(tensors, tmp_path / "one thread", 20_000))
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text()) == layout.index
