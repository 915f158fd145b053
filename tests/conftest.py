"""What all tests share: which of them can run on this machine, and where larger data lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def _no_cuda() -> str | None:
    """Why tests marked `cuda` cannot run here."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _no_cuda()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Models and texts that are too large to ship: QUANTKIT_SHARED_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("QUANTKIT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} is not a folder, and QUANTKIT_SHARED_DATA names no other")
    return folder
