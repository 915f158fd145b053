"""Several processes write what one writes, byte for byte, and their end is told by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from .ranks import differences, run_all

DENSE = ("gptq", "smoothed", "awq", "fp8", "int8", "histogram", "free")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_writes_the_same_files(ranks: int, tmp_path: Path) -> None:
    one, many = (run_all(DENSE, n, tmp_path / str(n)) for n in (1, ranks))
    for job, files in one.items():
        assert len(files) > 15 and not differences(files, many[job]), job
