"""The compiled module `quantkit._host`, or why it is not there."""

from __future__ import annotations

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
