"""A run that is stopped on its way goes on with the same command, and its files are those of a run that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from .ranks import differences, environments, files, run_all, yaml_of

STUCK = """
import sys, time
from quantkit.modifiers.pipeline import Pipeline
usual = Pipeline.finish
def finish(self, layer, statistics):
    if layer.index == 2:
        print("here", flush=True)
        time.sleep(100)
    return usual(self, layer, statistics)
Pipeline.finish = finish
from quantkit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    python = [sys.executable, "-m", "quantkit", "run", *command]
    return subprocess.run(python, env=environments(1)[0], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    job = str(yaml_of("gptq", tmp_path, tmp_path / "out"))
    command = [sys.executable, "-c", STUCK, "run", "-c", job]
    process = subprocess.Popen(
        command, env=environments(1)[0], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and any("here" in line for line in process.stdout)
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
        assert "stopped by SIGTERM; 2 of 4 layers are done and kept in" in error and "Traceback" not in error
    changed = run("-c", job, "--set", "dataset.num_samples=39")
    assert changed.returncode == 2 and "holds an unfinished run that was not the same" in changed.stderr
    assert "--restart" in changed.stderr
    again = run("-c", job)
    assert again.returncode == 0 and "resuming at layer" in again.stderr, again.stderr
    expected = run_all(["gptq"], 1, tmp_path / "whole")["gptq"]
    assert not differences(files(tmp_path / "out" / "gptq"), expected)


def test_a_stopped_calibration_goes_on(tmp_path: Path) -> None:
    """SIGTERM in the third layer. Other data, a damaged file and a strange journal are refused."""
    job, output = str(yaml_of("gptq", tmp_path, tmp_path / "out")), tmp_path / "statistics"
    stuck = STUCK.replace("modifiers.pipeline", "calibration.gatherer").replace("Pipeline", "Gatherer")
    stuck = stuck.replace("layer, statistics", "layer, *rest").replace("finish", "observe")
    command = ["calibrate", "-c", job, "-o", str(output)]
    environment = environments(1)[0]
    process = subprocess.Popen(
        [sys.executable, "-c", stuck, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and any("here" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert "stopped by SIGTERM; 2 of 4 layers are done and kept in" in error and "Traceback" not in error

    def again(*more: str) -> subprocess.CompletedProcess[str]:
        python = [sys.executable, "-m", "quantkit", *command, *more]
        return subprocess.run(python, env=environment, capture_output=True, text=True, timeout=120)

    def refused(why: str, *more: str) -> str:
        done = again(*more)
        assert done.returncode == 2 and why in done.stderr and "--restart" in done.stderr, done.stderr
        assert "goes on from there" not in done.stderr
        return done.stderr

    partial = tmp_path / "statistics.partial"
    changed = ["--set", "dataset.num_samples=39", "--set", "calibration.gather=[gram]"]
    told = refused("was not the same: calibration data: ", *changed)
    assert "calibration.gather: gram, histogram, kv_cache, queries -> gram" in told
    part = partial / "statistics-00001.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    refused("is not as an earlier calibration left it")
    part.write_bytes(whole)
    journal = next(path for path in partial.iterdir() if "journal" in path.name)
    lines = journal.read_bytes()
    header, first, *rest = lines.split(b"\n")
    first = first[9:].replace(b"statistics-00001", b"../../stolen-001")
    journal.write_bytes(b"\n".join([header, b"%08x %s" % (zlib.crc32(first), first), *rest]))
    refused("'../../stolen-001.safetensors', which is not planned")
    journal.write_bytes(lines)
    shutil.copytree(partial, tmp_path / "other.partial")
    done = again()
    assert done.returncode == 0 and "resuming at layer 2 of 4" in done.stderr, done.stderr
    command[-1] = str(tmp_path / "other")
    over = again("--restart")
    assert over.returncode == 0 and "starting over" in over.stderr
    assert not differences(files(output), files(tmp_path / "other"))


def test_restart_starts_over(tmp_path: Path) -> None:
    job = str(yaml_of("gptq", tmp_path, tmp_path / "out"))
    command = [sys.executable, "-c", STUCK.replace("time.sleep(100)", "sys.exit(7)"), "run", "-c", job]
    assert subprocess.run(command, env=environments(1)[0], capture_output=True, timeout=120).returncode == 7
    done = run("-c", job, "--set", "dataset.num_samples=39", "--restart")
    assert done.returncode == 0 and "starting over" in done.stderr, done.stderr


# Kills itself at one of the moments between which files change.
KILLED = """
import os, random, signal, sys
left = int(os.environ["KILL_AT"])
def tick():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def around(owner, name):
    usual = getattr(owner, name)
    def wrapped(*args, **kwargs):
        tick()
        result = usual(*args, **kwargs)
        tick()
        return result
    setattr(owner, name, wrapped)
from quantkit import engine, resume
from quantkit.calibration.gatherer import Gatherer
from quantkit.calibration.statistics_writer import StatisticsWriter
from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.modifiers.pipeline import Pipeline
around(Pipeline, "finish")
around(Gatherer, "observe")
around(StatisticsWriter, "add")
around(StatisticsWriter, "finish")
around(StatisticsWriter, "seal")
around(CheckpointWriter, "write")
around(engine.WrittenOutput, "rounded")
around(engine, "round_weight")
around(CheckpointWriter, "copy")
around(CheckpointWriter, "side_file")
around(CheckpointWriter, "finish")
around(Journal, "append")
around(engine, "audit")
for name in ("fsync", "rename", "unlink"):
    around(os, name)
resume.BATCH_SECONDS = 0.0  # of weights that are journaled one by one
from quantkit.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["gptq", "attention", "free", "calibrate"])
def test_killed_again_and_again(kind: str, kills: int, tmp_path: Path) -> None:
    """One job, killed at random moments of every run of it, and each time begun again with the same command."""
    chance = random.Random(kills)
    calibrating = kind == "calibrate"
    job = str(yaml_of("gptq" if calibrating else kind, tmp_path, tmp_path / "out"))
    saved = ["calibrate", "-c", job, "-o"]
    command = [
        sys.executable,
        "-c",
        KILLED,
        *([*saved, str(tmp_path / "out" / kind)] if calibrating else ["run", "-c", job]),
    ]
    killed = 0
    while killed < kills:
        at = {"KILL_AT": str(chance.randrange(1, 30 if calibrating else 60))}
        done = subprocess.run(command, env=environments(1)[0] | at, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        killed += done.returncode != 0
        if done.returncode == 0:  # nothing of a finished output is ever at stake
            shutil.move(tmp_path / "out", tmp_path / f"finished after {killed}")
    done = subprocess.run(command, env=environments(1)[0] | {"KILL_AT": "-1"}, capture_output=True, text=True)
    # Killed behind the rename, there is nothing left to do.
    assert done.returncode == 0 or "exists already" in done.stderr, done.stderr
    if calibrating:
        whole = subprocess.run(
            [sys.executable, "-m", "quantkit", *saved, str(tmp_path / "whole")], env=environments(1)[0]
        )
        assert whole.returncode == 0
    expected = files(tmp_path / "whole") if calibrating else run_all([kind], 1, tmp_path / "whole")[kind]
    for folder in [tmp_path / "out", *tmp_path.glob("finished after *")]:
        assert not differences(files(folder / kind), expected)


def test_damaged_states_and_journals_are_refused(tmp_path: Path) -> None:
    job = str(yaml_of("gptq", tmp_path, tmp_path / "out"))
    command = [sys.executable, "-c", STUCK.replace("time.sleep(100)", "sys.exit(7)"), "run", "-c", job]
    assert subprocess.run(command, env=environments(1)[0], capture_output=True, timeout=120).returncode == 7
    partial = tmp_path / "out" / "gptq.partial"
    journal = next(path for path in partial.rglob("*") if "journal" in path.name)
    whole = journal.read_bytes()
    for damaged in (whole[:40] + b"x" + whole[41:], whole.replace(b"layer", b"later", 1), b"{}\n" + whole):
        journal.write_bytes(damaged)
        refused = run("-c", job)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr and "--restart" in refused.stderr
    journal.write_bytes(whole[:-3])  # the last line was being written
    assert run("-c", job).returncode == 0
    expected = run_all(["gptq"], 1, tmp_path / "whole")["gptq"]
    assert not differences(files(tmp_path / "out" / "gptq"), expected)


def test_a_full_disk_is_said_and_gone_on_from(tmp_path: Path) -> None:
    job = str(yaml_of("gptq", tmp_path, tmp_path / "out"))
    limited = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n" + STUCK.replace("== 2", "== 99")
    full = subprocess.run(
        [sys.executable, "-c", limited, "run", "-c", job], env=environments(1)[0], capture_output=True, text=True
    )
    assert full.returncode == 2 and "Traceback" not in full.stderr and "File too large" in full.stderr, full.stderr
    assert run("-c", job).returncode == 0
    expected = run_all(["gptq"], 1, tmp_path / "whole")["gptq"]
    assert not differences(files(tmp_path / "out" / "gptq"), expected)
