"""What may be smoothed, asked of the layer itself: mappings are names, and a name may mean something else elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.layer import Layer
from ..errors import CalibrationError
from ..models.mappings import Smoothing
from .working import widened

# Dividing and multiplying by powers of two rounds nothing (but what is next to zero in fp16), so a right place changes
# nothing, and a wrong one next to a residual that is a million times as large is still seen.
CHANGE = 1e-6


def require_harmless(places: Sequence[Smoothing], layer: Layer) -> None:
    """Run `layer` on a few tokens with the output of each place divided by some vector, and what its readers get
    multiplied by it. CalibrationError, naming the place, if the layer's output changes: then something else reads
    that output, or the readers do not read it as it is.
    """
    if not places or layer.probe is None:
        return
    before = layer.probe()
    if not _change(places, layer, before) > CHANGE:  # NaN is told by who counts tokens
        return
    changes = {place: _change([place], layer, before) for place in places}
    place = max(changes, key=lambda p: changes[p])
    readers = ", ".join(place.balance[:4]) + (" ..." if len(place.balance) > 4 else "")
    raise CalibrationError(
        f"{place.smooth}: dividing its output and multiplying the weights of {readers} by the same vector changes what "
        f"the layer computes, by {changes[place]:.1%}: something else reads this output (a residual, another module), "
        "or these read something else. Correct the mappings, or leave this one out"
    )


def _change(places: Iterable[Smoothing], layer: Layer, before: Tensor) -> float:
    """How far the layer's output is from `before`, over its size."""
    assert layer.probe is not None
    with ExitStack() as stack:
        for place in places:
            smooth, _ = layer.stored[f"{place.smooth}.weight"]
            s = 2.0 ** (torch.arange(layer.tensor(f"{place.smooth}.weight").shape[0]) % 3 - 1)
            stack.callback(smooth.register_forward_hook(_divided(s)).remove)
            for reader in place.balance:
                module, _ = layer.stored[f"{reader}.weight"]
                hook = module.register_forward_pre_hook(_multiplied(widened(s, place)), with_kwargs=True)
                stack.callback(hook.remove)
        after = layer.probe()
    size = float(before.double().norm())
    change = float((after.double() - before.double()).norm())
    return change / size if size > 0 else change


def _divided(s: Tensor) -> Callable[..., Tensor]:
    return lambda module, args, out: out / s.to(out)


def _multiplied(s: Tensor) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0] * s.to(args[0]), *args[1:]), kwargs
        first, x = next(iter(kwargs.items()))
        return args, {**kwargs, first: x * s.to(x)}

    return hook
