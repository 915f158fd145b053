from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import quantkit.ops as ops

from . import emulated_cuda


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors, which threads only make slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cuda_kernels() -> None:
    """Without the libraries the references would be compared with themselves."""
    ops._load.require("cpu")
    ops._load.require("cuda")


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Any:
    return emulated_cuda.load(request.config.cache.mkdir("cuda_emulation"))


@pytest.fixture
def emulated(library: Any) -> Any:
    return emulated_cuda.call


@pytest.fixture
def opchecked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every alias that the test calls is asked about once."""
    if "compil" in request.node.name:  # torch.compile does nothing within a mode
        yield
        return
    from .opchecked import OpCheck  # registers the aliases

    with OpCheck():
        yield
