"""Whatever goes wrong with the files under a run is said in one message. Once it is mended the same command goes on,
and its output is that of a run that nothing happened to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .ranks import differences, environments, files, yaml_of

# The test's own lines run when a layer, or a weight of a run without data, has been worked on; `layer`: which one.
HOOKED = """
import os, sys
from pathlib import Path
source = Path(os.environ["SOURCE"])
def after(index, weights):
    {fault}
from quantkit import data_free, resume
from quantkit.modifiers.pipeline import Pipeline
usual = Pipeline.finish
def finish(self, layer, statistics):
    if layer.index == 2:
        after(layer.index, [linear.weight for linear in layer.linears.values()])
    return usual(self, layer, statistics)
Pipeline.finish = finish
resume.BATCH_SECONDS = 0.0
from quantkit.cli import main
sys.exit(main(sys.argv[1:]))
"""
STOP = "sys.exit(7)"


class Job:
    """A job on a copy of the embedded model, which faults may damage."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.yaml = yaml_of(kind, folder, folder / "out")
        job = self.yaml.read_text()
        embedded = Path(job.partition("model_path: ")[2].partition("}")[0])
        shutil.copytree(embedded, folder / embedded.name)
        self.yaml.write_text(job.replace(str(embedded), str(folder / embedded.name)))
        self.weights = folder / embedded.name / "model.safetensors"
        self.output, self.partial = folder / "out" / kind, folder / "out" / f"{kind}.partial"

    def run(self, fault: str | None = None, *more: str) -> subprocess.CompletedProcess[str]:
        """`quantkit run`; with `fault` as the lines above say."""
        script = ["-m", "quantkit"] if fault is None else ["-c", HOOKED.format(fault=fault)]
        return subprocess.run(
            [sys.executable, *script, "run", "-c", str(self.yaml), *more],
            env=environments(1)[0] | {"SOURCE": str(self.weights)},
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Every file of the jobs that these tests run, when nothing happens."""
    found = {}
    for kind in ("gptq", "on disk", "free"):
        job = Job(kind, tmp_path_factory.mktemp(kind.replace(" ", "-")))
        done = job.run()
        assert done.returncode == 0, done.stderr
        found[kind] = files(job.output)
    return found


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a run that ended by a user's error."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def goes_on(job: Job, expected: dict[str, bytes]) -> None:
    again = job.run()
    assert again.returncode == 0 and "resuming" in again.stderr, again.stderr
    assert not differences(files(job.output), expected)


@pytest.mark.parametrize(
    ("size", "fault", "message"),
    [
        ("4096", "os.truncate(source, 4096)", "became shorter|truncated"),  # the next layer was read ahead, or not
        # The weights of the layer were checked before: nothing but the access itself tells.
        (
            "0",
            "os.truncate(source, 0); print(sum(float(w.sum()) for w in weights))",
            "was truncated, or its disk failed",
        ),
    ],
)
def test_a_source_that_is_truncated_under_a_run(
    size: str, fault: str, message: str, tmp_path: Path, untouched: dict[str, dict[str, bytes]]
) -> None:
    job = Job("gptq", tmp_path)
    whole, status = job.weights.read_bytes(), job.weights.stat()
    error = said(job.run(fault))
    assert re.search(message, error) and "the same command goes on" in error, error
    assert job.weights.stat().st_size == int(size)
    refused = said(job.run())
    assert "model.safetensors" in refused  # the header is checked before anything else
    job.weights.write_bytes(whole)
    os.utime(job.weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    goes_on(job, untouched["gptq"])


def test_a_source_that_was_changed_is_refused(tmp_path: Path) -> None:
    job = Job("gptq", tmp_path)
    assert job.run(STOP).returncode == 7
    data = bytearray(job.weights.read_bytes())
    data[-1] ^= 1
    job.weights.write_bytes(data)
    error = said(job.run())
    assert "holds an unfinished run that was not the same" in error and "model.safetensors" in error
    assert "--restart" in error


@pytest.mark.parametrize("kind", ["gptq", "free"])
def test_a_disk_that_cannot_be_read(kind: str, tmp_path: Path, untouched: dict[str, dict[str, bytes]]) -> None:
    """Reads fail from some point on, by either of the two ways in which weights are read."""
    job = Job(kind, tmp_path)
    failing = f"""
import errno, os
left = {30 if kind == "gptq" else 10}
def failing(*args, usual=None):
    global left
    left -= 1
    if left < 0:
        raise OSError(errno.EIO, os.strerror(errno.EIO), {str(job.weights)!r})
    return usual(*args)
from functools import partial
from quantkit import _host, resume
_host.round_weight = partial(failing, usual=_host.round_weight)
class MappedFile(_host.MappedFile):
    def populate(self, begin, end):
        failing(begin, end, usual=super().populate)
_host.MappedFile = MappedFile
resume.BATCH_SECONDS = 0.0
"""
    script = failing + "import sys\nfrom quantkit.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "run", "-c", str(job.yaml)],
        env=environments(1)[0],
        capture_output=True,
        text=True,
        timeout=120,
    )
    error = said(done)
    assert "model.safetensors: tensor '" in error and "Input/output error" in error
    assert "are done and kept in" in error
    goes_on(job, untouched[kind])


def test_a_source_that_is_truncated_under_a_run_without_data(
    tmp_path: Path, untouched: dict[str, dict[str, bytes]]
) -> None:
    job = Job("free", tmp_path)
    whole, status = job.weights.read_bytes(), job.weights.stat()
    script = f"""
import os, sys
from quantkit import _host, resume
usual, left = _host.round_weight, 10
def truncating(*args):
    global left
    left -= 1
    if left == 0:
        os.truncate({str(job.weights)!r}, 4096)
    return usual(*args)
_host.round_weight = truncating
resume.BATCH_SECONDS = 0.0
from quantkit.cli import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", script, "run", "-c", str(job.yaml)]
    error = said(subprocess.run(command, env=environments(1)[0], capture_output=True, text=True, timeout=120))
    assert "model.safetensors: tensor '" in error and "the file became shorter after it was opened" in error
    assert "are done and kept in" in error
    job.weights.write_bytes(whole)
    os.utime(job.weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    goes_on(job, untouched["free"])


def test_ctrl_c(tmp_path: Path, untouched: dict[str, dict[str, bytes]]) -> None:
    job = Job("gptq", tmp_path)
    done = job.run("os.kill(os.getpid(), 2)")
    assert done.returncode == 128 + signal.SIGINT and "Traceback" not in done.stderr, done.stderr
    assert "stopped by SIGINT; 2 of 4 layers are done and kept in" in done.stderr
    goes_on(job, untouched["gptq"])


@pytest.mark.parametrize("damage", ["truncated", "gone", "a bit"])
@pytest.mark.parametrize("kind", ["gptq", "on disk"])
def test_damaged_hidden_states_are_not_gone_on_from(
    kind: str, damage: str, tmp_path: Path, untouched: dict[str, dict[str, bytes]]
) -> None:
    job = Job(kind, tmp_path)
    assert job.run(STOP).returncode == 7
    path = job.partial / f"hidden-states-{records(job)[-1]['hidden']['file']}"
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "gone":
        path.unlink()
    else:
        with open(path, "r+b") as file:
            file.seek(1000)
            byte = file.read(1)[0]
            file.seek(1000)
            file.write(bytes([byte ^ 1]))
    error = said(job.run())
    assert path.name in error and "--restart" in error
    again = job.run(None, "--restart")
    assert again.returncode == 0 and "starting over" in again.stderr, again.stderr
    assert not differences(files(job.output), untouched[kind])


@pytest.mark.parametrize("kind", ["gptq", "free"])
def test_what_the_journal_does_not_name_is_written_anew(
    kind: str, tmp_path: Path, untouched: dict[str, dict[str, bytes]]
) -> None:
    """Half-written tensors: all that is no finished layer's, or no finished weight's, is overwritten with garbage."""
    job = Job(kind, tmp_path)
    if kind == "gptq":
        assert job.run(STOP).returncode == 7
    else:
        killed = "import os\nfrom quantkit import data_free, resume\nresume.BATCH_SECONDS = 0.0\n"
        killed += "from quantkit.checkpoint.journal import Journal\nusual = Journal.append\n"
        killed += "def append(*args):\n    usual(*args)\n    os._exit(7)\nJournal.append = append\n"
        killed += "import sys\nfrom quantkit.cli import main\nsys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", killed, "run", "-c", str(job.yaml)]
        assert subprocess.run(command, env=environments(1)[0], capture_output=True, timeout=120).returncode == 7
    finished = {name for record in records(job) for name in record["tensors"]}
    damaged = 0
    for path in job.partial.glob("*.safetensors"):
        with open(path, "r+b") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__" and name not in finished:
                    begin, end = entry["data_offsets"]
                    file.seek(8 + length + begin)
                    file.write(b"\xa5" * (end - begin))
                    damaged += 1
    assert finished and damaged > len(finished) // 4
    goes_on(job, untouched[kind])


def test_a_full_disk(tmp_path: Path, untouched: dict[str, dict[str, bytes]]) -> None:
    """A file system of its own: the plan sees that there is room, which is taken up meanwhile, and later free again."""
    job = Job("gptq", tmp_path)
    (tmp_path / "out").mkdir()
    full = HOOKED.format(
        fault=f"""
    with open({str(tmp_path / "out" / "other")!r}, "wb", buffering=0) as file:
        try:  # statvfs tells too little of what is left
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass"""
    )
    (tmp_path / "full.py").write_text(full)
    script = f"""
mount -t tmpfs -o size=128m tmpfs {tmp_path}/out || exit 99
{sys.executable} {tmp_path}/full.py run -c '{job.yaml}'
echo "status $?" >&2
rm {tmp_path}/out/other
{sys.executable} -m quantkit run -c '{job.yaml}'
echo "status $?" >&2
cp -r {job.output} {tmp_path}/kept
"""
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        env=environments(1)[0] | {"SOURCE": str(job.weights)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"this system mounts nothing: {done.stderr.strip()}")
    first, _, second = done.stderr.partition("status 2\n")
    assert "No space left on device" in first and "Traceback" not in first, done.stderr
    assert re.search(r"[234] of 4 layers are done and kept in", first), first
    assert "resuming" in second and second.endswith("status 0\n"), done.stderr
    assert not differences(files(tmp_path / "kept"), untouched["gptq"])


def records(job: Job) -> list[dict[str, Any]]:
    """What the journal of an unfinished run says: a line is a checksum and an object; the first is the fingerprint."""
    journal = next(path for path in job.partial.rglob("*") if "journal" in path.name)
    return [json.loads(line.partition(" ")[2]) for line in journal.read_text().splitlines()][1:]
