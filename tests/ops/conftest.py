from __future__ import annotations

from typing import Any

import pytest

from . import emulated_cuda


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Any:
    return emulated_cuda.load(request.config.cache.mkdir("cuda_emulation"))


@pytest.fixture
def emulated(library: Any) -> Any:
    return emulated_cuda.call
