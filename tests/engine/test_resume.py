"""A run that is stopped on its way goes on with the same command, and its files are those of a run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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


def test_restart_starts_over(tmp_path: Path) -> None:
    job = str(yaml_of("gptq", tmp_path, tmp_path / "out"))
    command = [sys.executable, "-c", STUCK.replace("time.sleep(100)", "sys.exit(7)"), "run", "-c", job]
    assert subprocess.run(command, env=environments(1)[0], capture_output=True, timeout=120).returncode == 7
    done = run("-c", job, "--set", "dataset.num_samples=39", "--restart")
    assert done.returncode == 0 and "starting over" in done.stderr, done.stderr
