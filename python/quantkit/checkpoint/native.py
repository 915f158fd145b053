"""The compiled module `quantkit._host`, or why it is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ..errors import CheckpointError


def host() -> ModuleType:
    """`quantkit._host`. Imported on first use: headers and plans are read without it."""
    try:
        from .. import _host
    except ImportError as error:
        raise CheckpointError(
            f"the compiled module quantkit._host cannot be loaded ({error}); install quantkit again with a C++ compiler"
        ) from error
    return _host


@contextmanager
def kept_memory(keep: bool = True) -> Iterator[None]:
    """Within the block, memory that is freed stays with the process for what is needed next: pages that come anew from
    the system have to be cleared first, a tenth of a calibration's time. At the end it goes back. Without `keep` it
    goes back at once, which takes less of it.
    """
    if keep:
        host().keep_free_memory(True)
    else:
        host().return_free_memory()
        # oneDNN keeps a thousand compiled products, and experts bring new shapes with every batch. Read at first use.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    try:
        yield
    finally:
        host().keep_free_memory(False)
        host().release_free_memory()
