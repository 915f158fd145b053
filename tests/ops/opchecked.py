"""Asks torch's opcheck about every alias that a test calls: at its first call, with that call's arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from quantkit.aliases import ALIASES

from .cuda_cases import relocate

_OVERLOADS = {alias.overload for alias in ALIASES.values()}
# Gives back a number that is another one at every call, as vLLM's does.
_ASKED = {ALIASES["create_onednn_scaled_mm_handler"].overload}
_QUESTIONS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class OpCheck(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = all(type(a) is Tensor for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor))
        if func not in _OVERLOADS or func in _ASKED or not plain:
            return func(*args, **kwargs)
        # Some arguments are written to: copies are asked about, and only if the call is one that works.
        before, again = (tree_map_only(Tensor, lambda t: relocate(t, Tensor.clone), (args, kwargs)) for _ in "12")
        result = func(*args, **kwargs)
        _ASKED.add(func)
        check_writes(func, before, (args, kwargs), result)
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if any(t.dtype.itemsize == 1 and t.dtype.is_floating_point for t in tensors):
            # torch has no closeness of FP8 numbers: its question about writes is answered by check_writes.
            torch.library.opcheck(func, *again, test_utils=_QUESTIONS[1:])
        else:
            torch.library.opcheck(func, *again)
        return result


def check_writes(func: Any, before: Any, after: Any, result: Any) -> None:
    """What the schema does not call written is as it was, and results are memory of their own."""
    schema = func._schema
    names = [a.name for a in schema.arguments]
    named = [dict(zip(names, args, strict=False)) | kwargs for args, kwargs in (before, after)]
    for argument in schema.arguments:
        old, new = (values.get(argument.name) for values in named)
        if not isinstance(new, Tensor) or new.numel() == 0:
            continue
        written = argument.alias_info is not None and argument.alias_info.is_write
        same = torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (old, new)))
        assert written or same, f"{schema.name} writes to {argument.name}"
        for found in tree_leaves(result):
            if isinstance(found, Tensor) and not written:
                assert not torch._C._overlaps(found, new), f"{schema.name} gives back the memory of {argument.name}"
