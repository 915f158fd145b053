"""Several processes write what one writes, byte for byte, and their end is told by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .ranks import RUN_ALL, differences, ended, files, run_all, start, yaml_of

FEW = ("gptq", "smoothed", "awq", "int8", "experts", "free", "level", "attention", "awq experts", "smoothed experts")
MORE = (
    "gptq fp4",
    "gptq fp8",
    "fp8",
    "histogram",
    "few tokens",
    "in groups",
    "experts fp8",
    "two forwards",
    "on disk",
    "every expert",
    "attention experts",
    "awq, all tokens",
    "parent",
    "inner",
    "awq shared experts",
    "silent experts",
)

# The process RANK stops working in the third layer and says so, or raises.
STUCK = """
import os, sys, time
from quantkit.modifiers.pipeline import Pipeline
usual = Pipeline.finish
def finish(self, layer, statistics):
    if layer.index == 2 and os.environ.get("RANK", "0") == sys.argv[1]:
        if sys.argv[2] == "raise":
            from quantkit.errors import CalibrationError
            raise CalibrationError("model.layers.2: no good")
        print("here", flush=True)
        time.sleep(100)
    return usual(self, layer, statistics)
Pipeline.finish = finish
from quantkit.cli import main
sys.exit(main(sys.argv[3:]))
"""


KILLED_GATHERING = """
import os, sys
from quantkit.calibration.gatherer import Gatherer
usual = Gatherer.observe
def observe(self, layer, ranges, caches):
    if layer.index == 1 and os.environ.get("RANK", "0") == sys.argv[1]:
        os.kill(os.getpid(), 9)
    return usual(self, layer, ranges, caches)
Gatherer.observe = observe
from quantkit.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_any_number_of_ranks_writes_the_same_files(tmp_path: Path) -> None:
    one, two, three = (run_all(FEW, ranks, tmp_path / str(ranks)) for ranks in (1, 2, 3))
    for job, found in one.items():
        assert len(found) > 12, "in several shards"
        assert not differences(found, two[job]) and not differences(found, three[job]), job


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_any_number_of_ranks_writes_the_same_files_of_other_recipes(ranks: int, tmp_path: Path) -> None:
    one, many = (run_all(MORE, n, tmp_path / str(n)) for n in (1, ranks))
    for job, found in one.items():
        assert sum(name.endswith(".safetensors") for name in found) > 1, f"{job}: in several shards"
        assert not differences(found, many[job]), job


@pytest.mark.parametrize(
    ("job", "ranks", "others"), [("experts", 2, 3), pytest.param("every expert", 3, 1, marks=pytest.mark.slow)]
)
def test_any_number_of_ranks_saves_the_same_statistics(job: str, ranks: int, others: int, tmp_path: Path) -> None:
    """Also where the last of them was killed at the second layer, and other ones went on."""
    config = yaml_of(job, tmp_path, tmp_path / "out")
    command = ["calibrate", "-c", str(config), "--set", "calibration.offload=auto", "-o"]
    whole = ended(start(["-m", "quantkit", *command, str(tmp_path / "1")], 1), 60)
    output = str(tmp_path / str(ranks))
    first = ended(start(["-c", KILLED_GATHERING, str(ranks - 1), *command, output], ranks), 60)
    assert [status for status, _, _ in first] == [1] * (ranks - 1) + [-signal.SIGKILL], first
    found = ended(start(["-m", "quantkit", *command, output], others), 60)
    assert all(status == 0 for status, _, _ in (*whole, *found)), found
    assert "resuming at layer 1 of 3" in found[0][2]
    assert "".join(out for _, out, _ in found).count("written to") == 1
    assert not differences(files(tmp_path / "1"), files(tmp_path / str(ranks)))


@pytest.mark.parametrize("job", ["awq experts", pytest.param("few tokens", marks=pytest.mark.slow)])
def test_any_number_of_ranks_makes_the_same_of_statistics(job: str, tmp_path: Path) -> None:
    config = str(yaml_of(job, tmp_path, tmp_path / "out"))
    saved = str(tmp_path / "statistics")
    done = ended(start(["-m", "quantkit", "calibrate", "-c", config, "-o", saved], 1))
    for ranks in (1, 2):
        command = ["run", "-c", config, "--statistics", saved, "--save-path", str(tmp_path / str(ranks))]
        done += ended(start(["-m", "quantkit", *command], ranks))
    assert all(status == 0 for status, _, _ in done), done
    one, two = (files(tmp_path / str(ranks) / job) for ranks in (1, 2))
    assert len(one) > 12 and not differences(one, two)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_named_and_ends_the_run(victim: int, tmp_path: Path) -> None:
    job = yaml_of("gptq", tmp_path, tmp_path / "out")
    processes = start(["-c", STUCK, str(victim), "stay", "run", "-c", str(job)], 3)
    stdout = processes[victim].stdout
    assert stdout is not None and any("here" in line for line in stdout)
    processes[victim].send_signal(signal.SIGKILL)
    found = ended(processes, 60)
    assert found[victim][0] == -signal.SIGKILL
    others = [found[rank] for rank in range(3) if rank != victim]
    assert all(status == 1 for status, _, _ in others)
    told = "".join(error for _, _, error in others)
    assert told.count(f"quantkit: error: rank {victim} (") == 1 and "is gone" in told, "by one of them"


def test_an_error_of_any_rank_is_told_by_the_first(tmp_path: Path) -> None:
    job = yaml_of("gptq", tmp_path, tmp_path / "out")
    found = ended(start(["-c", STUCK, "1", "raise", "run", "-c", str(job)], 2), 60)
    assert found[0][0] == 1 and found[1][0] == 2
    assert "rank 1 (" in found[0][2] and "model.layers.2: no good" in found[0][2]
    assert "no good" not in found[1][2]


def test_ranks_that_were_given_different_jobs_are_refused(tmp_path: Path) -> None:
    code = RUN_ALL.replace("sys.argv[1:]", "[sys.argv[1 + int(__import__('os').environ['RANK'])]]")
    jobs = [str(yaml_of(job, tmp_path, tmp_path / "out")) for job in ("gptq", "int8")]
    found = ended(start(["-c", code, *jobs], 2), 60)
    assert all(status != 0 for status, _, _ in found)
    assert "rank 1 was given another job than rank 0" in found[0][2]


@pytest.mark.slow
def test_torchrun_starts_the_command_line_and_oneshot(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = yaml_of("gptq", tmp_path, tmp_path / "two")
    command = [*launcher, "-m", "quantkit", "run", "-c", str(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("audit PASSED") == 1 and done.stdout.count("written to") == 1
    one = run_all(["gptq"], 1, tmp_path / "one")["gptq"]
    assert not differences(files(tmp_path / "two" / "gptq"), one)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from quantkit import oneshot\n"
        "from quantkit.modifiers import GPTQModifier\n"
        "rows = [[(7 * i + 3 * j) % 500 for j in range(64)] for i in range(40)]\n"
        "recipe = GPTQModifier(scheme='W4A16', ignore=['lm_head'])\n"
        "oneshot(sys.argv[1], recipe=recipe, dataset=rows, output_dir=sys.argv[2])\n"
    )
    model = str(Path(__file__).resolve().parents[2] / "examples" / "models" / "tiny-llama")
    for name, start_ in (("alone", [sys.executable]), ("both", launcher)):
        command = [*start_, str(script), model, str(tmp_path / name / "out")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("quantkit: written to") == 1
    assert not differences(files(tmp_path / "alone" / "out"), files(tmp_path / "both" / "out"))


@pytest.mark.parametrize(("job", "before", "after"), [("gptq", 2, 3), ("experts", 3, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(job: str, before: int, after: int, tmp_path: Path) -> None:
    """The last rank is killed while it works on the second layer; the others end, and the same command goes on."""
    killed = STUCK.replace("layer.index == 2", "layer.index == 1").replace("time.sleep(100)", "os.kill(os.getpid(), 9)")
    command = ["run", "-c", str(yaml_of(job, tmp_path, tmp_path / "out"))]
    first = ended(start(["-c", killed, str(before - 1), "", *command], before), 60)
    assert [status for status, _, _ in first] == [1] * (before - 1) + [-signal.SIGKILL]
    assert not (tmp_path / "out" / job).exists()
    then = ended(start(["-m", "quantkit", *command], after), 60)
    assert all(status == 0 for status, _, _ in then)
    assert "resuming at layer 1 of" in then[0][2]
    assert not differences(files(tmp_path / "out" / job), run_all([job], 1, tmp_path / "whole")[job])
