"""What the attention of a model is called, by which compressed-tensors finds it. Transformers alone knows: the model is
built without weights, or is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError

if TYPE_CHECKING:
    from torch import nn

    from .families import Family


def attention_class(
    folder: Path, family: Family, attentions: Sequence[str], *, trust_remote_code: bool, model: Any = None
) -> str:
    """The class of all of `attentions`, by their checkpoint names; of `model`, if it is in memory. PlanError where they
    have several, or their queries cannot be seen.
    """
    from .attention import shows_queries
    from .skeleton import bare_model, base_of

    model = bare_model(folder, trust_remote_code) if model is None else model
    layers = base_of(model).get_submodule(family.layers)
    found: dict[str, str] = {}
    for name in attentions:
        index = family.layer_of(f"{name}.weight")
        assert index is not None
        found.setdefault(type(_within(layers[index], name.partition(f".{index}.")[2], family)).__name__, name)
    if len(found) != 1:
        told = ", ".join(f"{kind} ({name})" for kind, name in found.items())
        raise PlanError(f"config_groups: {folder} has attention of several classes, {told}; one can be quantized")
    if not shows_queries(model):
        raise PlanError(
            f"config_groups: {type(model).__name__} does not call its attention by Transformers' interface, so that "
            "its queries cannot be seen; keys and values are quantized by kv_cache_scheme"
        )
    return next(iter(found))


def _within(layer: nn.Module, name: str, family: Family) -> nn.Module:
    """The module of a layer that its checkpoint calls `name`."""
    for here, there in family.renames:
        name = f".{name}.".replace(there, here).strip(".")
    return layer.get_submodule(name)
