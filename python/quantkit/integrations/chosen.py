"""Which of quantkit's kernels a server is offered, by the platform that it runs on."""

from __future__ import annotations

import logging
import os


def chosen_device(server: str, variable: str, logger: logging.Logger, *, cpu: bool, cuda: bool) -> str | None:
    """ "cpu", "cuda" or None: on the CPU always, on CUDA where the environment variable is 1, and only if quantkit's
    library for it is loaded. The log says why there is none. ValueError if the variable is neither 0 nor 1.
    """
    device = "cpu" if cpu else None
    if cuda and not cpu:
        asked = os.environ.get(variable, "0")
        if asked not in ("0", "1"):
            raise ValueError(f"{variable} must be 0 or 1, got {asked!r}")
        if asked == "0":
            logger.info("quantkit: %s's own kernels serve on this GPU; %s=1 puts quantkit's in front", server, variable)
            return None
        device = "cuda"
    if device is None:
        logger.info("quantkit: no kernels for this platform; %s's own serve", server)
        return None
    from .. import ops

    status = ops._load.status()[device]
    if not status.loaded:
        logger.warning("quantkit: its %s kernels are not loaded (%s); %s's own serve", device, status.reason, server)
        return None
    return device
