"""From what users write to a Recipe: modifier classes and instances, names, stages, YAML text and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..errors import nearest
from .fields import FieldError
from .recipe import ALIASES, MODIFIERS, Modifier, Recipe


def recipe_of(value: Any) -> Recipe:
    """`value` as a Recipe: one, a modifier or a list of them, or stages {stage: {group: {modifier: arguments}}}."""
    if isinstance(value, Recipe):
        return value
    if isinstance(value, Modifier):
        return Recipe((value,))
    if isinstance(value, Mapping):
        return Recipe(tuple(_from_mapping("recipe", value)))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Recipe(tuple(modifier for entry in value for modifier in recipe_of(entry).modifiers))
    raise FieldError("recipe", f"expected modifiers, got {type(value).__name__}")


def _from_mapping(key: str, value: Mapping[str, Any]) -> list[Modifier]:
    found: list[Modifier] = []
    for name, entry in value.items():
        at = f"{key}.{name}"
        if not isinstance(entry, Mapping):
            raise FieldError(at, "expected arguments or modifiers below it")
        if ALIASES.get(name, name) in MODIFIERS:
            found.append(_modifier(at, name, entry))
        elif str(name).endswith(("stage", "modifiers")):
            found += _from_mapping(at, entry)
        else:
            raise FieldError(at, f"no such modifier{nearest(str(name), MODIFIERS)}; there are {', '.join(MODIFIERS)}")
    return found


def _modifier(at: str, name: str, arguments: Mapping[str, Any]) -> Modifier:
    cls = MODIFIERS[ALIASES.get(name, name)]
    known = [f.name for f in fields(cls)]
    for key in arguments:
        if key not in known:
            raise FieldError(f"{at}.{key}", f"unknown{nearest(key, known)}; {cls.__name__} takes {', '.join(known)}")
    try:
        return cls(**arguments)
    except FieldError as error:
        raise FieldError(f"{at}.{error.key}", error.problem) from None
