"""The arguments of a modifier, checked by name and type before it is made, and those of llm-compressor's that do
nothing.

A recipe for llm-compressor shall run as it is written, and whoever misspells an argument shall hear of it. So a name is
one that the modifier has, or one of IDLE, which is kept aside and said; all others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import nearest
from .fields import FieldError, check, describe

_SCHEDULE = "belongs to training schedules"
# (modifier's name, "" for all) -> arguments without effect, and what decides instead.
IDLE: dict[str, dict[str, str]] = {
    "": {
        **dict.fromkeys(("index", "group", "start", "end", "update"), _SCHEDULE),
        "bypass_divisibility_checks": "a width that groups do not divide is refused, since no server reads it",
        "disable_quantization_observer_epoch": _SCHEDULE,
        "num_calibration_steps": "every calibration row is used",
        "output_observer": "outputs of Linears are not quantized",
    },
    "GPTQModifier": {
        "block_size": "the sweep chooses its own blocks, which changes no result",
        "offload_hessians": "one layer's Gram matrices are in memory at a time",
        "sequential_update": "layers are always quantized in turn, each on what the quantized ones before it give",
    },
    "SmoothQuantModifier": {"calibration_function": "the forward is the model's own"},
    "AWQModifier": {
        "offload_device": "one layer is in memory at a time",
        "max_chunk_memory": "one layer is in memory at a time",
    },
}
_PLAIN = (int, float, bool, str, type(None))
_WORDS = {"Sequence": "a list", "Mapping": "a mapping", "NoneType": "null", "str": "a string", "bool": "true or false"}


class Checked(type):
    """Metaclass of the modifiers, which are dataclasses: `cls(...)` raises FieldError where Python would raise
    TypeError, and puts the names of arguments without effect into the instance's `idle`.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise FieldError(cls.__name__, f"takes arguments by name only, e.g. {cls.__name__}({_example(cls)}=...)")
        known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
        idle = idle_arguments(cls)
        hints = get_type_hints(cls)
        given: dict[str, Any] = {}
        without: list[str] = []
        for name, value in kwargs.items():
            if name not in known and name not in idle:
                raise FieldError(
                    name, f"unknown{nearest(name, [*known, *idle])}; {cls.__name__} has {', '.join(known)}"
                )
            if name in idle and value is not None and (name not in known or value != known[name].default):
                without.append(name)
            if name in known:
                given[name] = _checked(value, hints[name], name)
        made = super().__call__(**given)
        object.__setattr__(made, "idle", tuple(without))
        return made


def idle_arguments(cls: type[Any]) -> Mapping[str, str]:
    """The arguments that modifier class `cls` takes without effect, and why they have none."""
    return {name: why for base in ("", *(c.__name__ for c in cls.__mro__)) for name, why in IDLE.get(base, {}).items()}


def _checked(value: Any, hint: Any, name: str) -> Any:
    """`value`, which is of a type that `hint` allows, after `_plain`. What is inside lists and mappings, and which
    words a Literal has, the modifier looks at itself.
    """
    value = _plain(value)
    options = get_args(hint) if get_origin(hint) is not Literal and get_args(hint) else (hint,)
    if all(option in _PLAIN for option in options):
        return check(value, hint, name)
    kinds = tuple(_PLAIN if get_origin(o) is Literal else (get_origin(o) or o,) for o in options)
    if not isinstance(value, tuple(kind for group in kinds for kind in group)):
        raise FieldError(name, f"expected {' or '.join(map(_word, options))}, got {describe(value)}")
    return value


def _plain(value: Any) -> Any:
    """`value` with llm-compressor's enums as their values, and compressed-tensors' QuantizationArgs and
    QuantizationScheme (pydantic models) as mappings of their fields, also inside mappings.
    """
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump())
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _word(option: Any) -> str:
    if get_origin(option) is Literal:
        return ", ".join(map(repr, get_args(option)))
    name = str((get_origin(option) or option).__name__)
    return _WORDS.get(name, name)


def _example(cls: type[Any]) -> str:
    names = [f.name for f in fields(cls)]
    return "scheme" if "scheme" in names else (names or ["argument"])[0]
