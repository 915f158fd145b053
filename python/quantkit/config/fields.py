"""Checking values that come from YAML against the annotations of the configuration dataclasses.

Nothing is converted but lists, which become tuples, and integers where a number is asked for: `bits: "8"` is an error,
not 8, because a file that means something else than it says is worse than one that is refused.
"""

from __future__ import annotations

import math
import types
from typing import Any, Union, get_args, get_origin

from ..errors import ConfigError

_NAMES: dict[object, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "a section",
    type(None): "null",
}


class FieldError(ConfigError):
    """A value that a dataclass refuses. `key` is the dotted path below that dataclass, for finding the line."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


def require(ok: bool, key: str, problem: str) -> None:
    """FieldError unless `ok`."""
    if not ok:
        raise FieldError(key, problem)


def check(value: object, hint: Any, key: str) -> Any:
    """`value` as the annotation `hint` has it, or FieldError with what was expected and what is there.

    Hints: str, int, float, bool, dict, None, unions of these, tuple[X, ...] and tuple[X, X] (YAML lists).
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is tuple and isinstance(value, list):
            return _list(value, option, key)
        if _is(value, option):
            return float(value) if option is float else value  # type: ignore[arg-type]
    raise FieldError(key, f"expected {type_name(hint)}, got {describe(value)}{_advice(value, options)}")


def _is(value: object, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return get_origin(kind) is None and isinstance(value, kind)


def _list(value: list[object], hint: Any, key: str) -> tuple[Any, ...]:
    item, *rest = get_args(hint)
    if rest != [Ellipsis] and len(value) != len(rest) + 1:
        raise FieldError(key, f"expected {type_name(hint)}, got {len(value)} items")
    return tuple(check(entry, item, f"{key}[{i}]") for i, entry in enumerate(value))


def _advice(value: object, options: tuple[Any, ...]) -> str:
    if isinstance(value, str) and str not in options:
        if any(get_origin(option) is tuple for option in options):
            return f"; write it as a list: [{value!r}]"
        return "; without quotes, if they are there" if value.strip() else ""
    if str in options and isinstance(value, int | float):
        return "; put it in quotes"
    return ""


def type_name(hint: Any) -> str:
    """An annotation in words: `an integer or null`, `a list of strings`."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        item, *rest = get_args(hint)
        count = "a list of" if rest == [Ellipsis] else f"a list of {len(rest) + 1}"
        return f"{count} {_NAMES[item].partition(' ')[2]}s"
    return _NAMES.get(hint, "a section")


def describe(value: object) -> str:
    """A value from YAML for an error message, with its kind."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the string {value[:60]!r}" + ("..." if len(value) > 60 else "")
    return f"{value!r}" if isinstance(value, int | float) else f"{value!s} ({type(value).__name__})"
