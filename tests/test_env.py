"""The instruction set and its override, what is said when a library is missing, and the report of `quantkit env`."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import quantkit
from quantkit.env import report
from quantkit.ops import _load
from quantkit.ops._library import compiled_ops
from quantkit.ops.isa import Isa, current_isa, supported_isas


def python(code: str, isa: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter: QUANTKIT_ISA is read once in a process."""
    environment = {key: value for key, value in os.environ.items() if key != "QUANTKIT_ISA"}
    if isa is not None:
        environment["QUANTKIT_ISA"] = isa
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


PRINT_ISA = "from quantkit.ops.isa import current_isa; print(current_isa().name)"


def test_best_isa_is_the_default() -> None:
    done = python(PRINT_ISA)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == supported_isas()[-1].name


@pytest.mark.parametrize("isa", [isa.name for isa in Isa])
def test_forced_isa(isa: str) -> None:
    done = python(PRINT_ISA, isa)
    if Isa[isa] in supported_isas():
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == isa
    else:
        assert done.returncode != 0
        assert f"QUANTKIT_ISA={isa}: this machine or this build of quantkit lacks it" in done.stderr


def test_unknown_isa_is_an_error_that_names_the_valid_ones() -> None:
    done = python(PRINT_ISA, "avx1024")
    assert done.returncode != 0
    assert "RuntimeError: QUANTKIT_ISA=avx1024: no such instruction set; choose one of" in done.stderr
    assert "portable" in done.stderr


def test_unknown_isa_stops_an_op() -> None:
    done = python("import torch, quantkit.ops as ops; ops.symmetric_scale(torch.ones(2), 127.0)", "avx1024")
    assert done.returncode != 0
    assert "QUANTKIT_ISA=avx1024" in done.stderr


def test_portable_is_always_supported() -> None:
    assert supported_isas()[0] is Isa.portable
    assert current_isa() in supported_isas()


def test_isa_out_of_range() -> None:
    with pytest.raises(RuntimeError, match="isa must be 0"):
        torch.ops.quantkit.cpu_isa_supported(3)


def test_every_op_has_a_cpu_kernel() -> None:
    _load.require("cpu")
    assert compiled_ops("CPU")
    for op in compiled_ops("CPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"quantkit::{op}", "CPU"), op


def test_require_gives_the_reason() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA: the library may be loaded")
    with pytest.raises(RuntimeError, match=r"CUDA kernels are needed and not loaded: torch .* is built without CUDA"):
        _load.require("cuda")
    with pytest.raises(ValueError, match="no such op library: 'tpu'"):
        _load.require("tpu")


def test_a_missing_library_is_said_once_and_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "_status", {})
    monkeypatch.setattr(_load.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="CPU kernels are not loaded: this installation has no _C_cpu"):
        _load.load_libraries()
    assert _load.status()["cpu"] == _load.Library(None, "this installation has no _C_cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _load.load_libraries()
    with pytest.raises(RuntimeError, match="this installation has no _C_cpu"):
        _load.require("cpu")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_library_that_cannot_be_opened_keeps_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    broken = os.path.join(tmp_path, "_C_cpu.so")
    with open(broken, "w") as file:
        file.write("not a library")
    spec = type("Spec", (), {"origin": broken})
    monkeypatch.setattr(_load, "_status", {})
    monkeypatch.setattr(_load.importlib.util, "find_spec", lambda name: spec if name == "quantkit._C_cpu" else None)
    library = _load.status()["cpu"]
    assert library.path == broken
    assert library.reason is not None and "cannot be opened" in library.reason and broken in library.reason


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "_status", {})
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert _load.status()["cpu"].reason == "it needs torch >= 2.11, and this is torch 2.9.1+cpu"


def test_report() -> None:
    lines = dict(line.split(maxsplit=1) for line in report().splitlines())
    assert lines["quantkit"] == quantkit.__version__
    assert lines["torch"] == torch.__version__
    assert lines["_C_cpu"].startswith("loaded from ")
    assert lines["_host"].startswith("loaded from ")
    assert current_isa().name in lines["instruction"]
    assert "torch" in lines["built"] and "unknown" not in lines["built"]
    if torch.version.cuda is None:
        assert "not loaded: torch" in lines["_C_cuda"]


def test_report_does_not_import_transformers() -> None:
    done = python("import sys; from quantkit.env import report; report(); assert 'transformers' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_report_shows_a_wrong_isa_instead_of_failing() -> None:
    done = python("from quantkit.env import report; print(report())", "avx1024")
    assert done.returncode == 0, done.stderr
    assert "QUANTKIT_ISA=avx1024: no such instruction set" in done.stdout
