"""The benchmarks of CUDA ops run through on the CPU: time on a device is too dear for a misspelt argument."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# Some of what each must have measured.
MEASURED = {
    "ops_cuda": {"absmax tensor", "pack_w4a8", "rotary_embedding", "gptq_sweep", "percentile_scale tensor"},
    "gemm_cuda": {"bf16 F.linear", "w8a8_gemm", "wna16_gemm 4 bits g128", "fp8_gemm blocks"},
    "attention_cuda": {"SDPA flash", "attention", "kv_attention int8", "kv_append float8_e4m3fn, all tokens"},
}


@pytest.mark.parametrize("name", MEASURED)
def test_dry_run(name: str, tmp_path: Path) -> None:
    saved = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--dry-run", "--json", str(saved)]
    # The package that these tests found; one thread, for the sizes are small.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "dry run on the CPU: no figure means anything" in done.stdout
    results = json.loads(saved.read_text())["results"]
    names = set(results) if isinstance(results, dict) else {r.get("op", r.get("product")) for r in results}
    assert names >= MEASURED[name]


def test_arguments_are_refused() -> None:
    for name, words, arguments in (
        ("gemm_cuda", "--paths must be of", ["--paths", "sm70"]),
        ("attention_cuda", "--heads must be a multiple of --kv-heads", ["--heads", "9"]),
    ):
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--dry-run", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and words in done.stderr


def test_gpu_script_refuses(tmp_path: Path) -> None:
    def run(*steps: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHON": sys.executable, "RESULTS": str(tmp_path)}
        command = ["bash", str(BENCHMARKS.parent / "tools" / "gpu.sh"), *steps]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    usage = run()
    assert usage.returncode == 2 and "bash tools/gpu.sh STEP..." in usage.stdout
    assert run("tset").returncode == 2 and "no step is called tset" in run("tset").stderr
    for wrong in ("test=", "gemm=2m", "gemm=-1"):
        assert run(wrong).returncode == 2 and "after = come whole seconds" in run(wrong).stderr
    if not torch.cuda.is_available():  # tests that all skip do not pass
        done = run("test", "memcheck=9", "layouts")
        assert done.returncode == 3 and done.stdout.count("torch sees no device") == 3
        assert done.stdout.rstrip().endswith("=== failed: test memcheck layouts")
        assert "torch sees no device" in (tmp_path / "memcheck.log").read_text()
