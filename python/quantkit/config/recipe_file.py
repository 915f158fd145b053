"""From what users write to a Recipe: modifier instances, classes and names, lists of them, stages, YAML text and files.

quant_stage:
  quant_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8}
    GPTQModifier: {scheme: W8A8, targets: [Linear], ignore: [lm_head]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest
from .arguments import idle_arguments
from .document import Document, parse
from .fields import FieldError, describe
from .recipe import ALIASES, MODIFIERS, Modifier, Recipe

_FILES = (".yaml", ".yml", ".json")
_PLACEHOLDER = re.compile(r"""(["']?)\{\{\s*([A-Za-z_]\w*)\s*\}\}\1""")
# What llm-compressor has and quantkit does not: a did-you-mean would send its users to something else.
_OTHERS = re.compile(
    r"(AutoRound|SpinQuant|QuIP|REAPPruning|SparseGPT|Wanda\w*|Magnitude\w*|Constant\w*|LogarithmicEqualization|IMatrix\w*|"
    r"Obcq\w*|Pruning\w*|Distillation\w*)(Modifier)?"
)


def recipe_of(value: Any, *, stage: str | None = None, args: Mapping[str, Any] | None = None) -> Recipe:
    """`value` as a Recipe. It may be a Recipe, a modifier (an instance, its class or its name), a mapping {stage:
    {group: {modifier: arguments}}}, YAML text of such a mapping, the path of a YAML or JSON file, or a list of these.

    `stage` takes one stage out of several (its name, with or without `_stage`). `args` fill `{{ name }}` in YAML; a
    name that no placeholder has is an argument (`smoothing_strength`, or `GPTQModifier.dampening_frac`) of every
    modifier that has it, over what the recipe says. Raises ConfigError with the place: file and line, or `recipe[1]`.
    """
    given = dict(args or {})
    for name in given:
        if not isinstance(name, str):
            raise FieldError("recipe_args", f"{name!r}: names have to be strings")
    reader = _Reader(stage, given)
    modifiers = list(reader.read("recipe", value))
    if stage is not None and not reader.stage_found:
        listed = ", ".join(reader.stages) or "none"
        raise FieldError(
            "stage", f"'{stage}': the recipe has no such stage{nearest(stage, reader.stages)}; it has {listed}"
        )
    modifiers = [reader.override(modifier) for modifier in modifiers]
    unused = [name for name in given if name not in reader.used]
    if unused:
        known = sorted({f.name for m in modifiers for f in fields(m)} | reader.placeholders)
        raise FieldError(
            "recipe_args",
            f"'{unused[0]}' is no placeholder and no argument of a modifier in this recipe{nearest(unused[0], known)}",
        )
    return Recipe(tuple(modifiers))


@dataclass
class _Reader:
    """Reads values of any kind, and keeps what was seen of stages and of `args` on the way."""

    stage: str | None
    args: dict[str, Any]
    used: set[str] = field(default_factory=set)
    placeholders: set[str] = field(default_factory=set)
    stages: list[str] = field(default_factory=list)

    @property
    def stage_found(self) -> bool:
        return any(self._wanted(name) for name in self.stages)

    def _wanted(self, stage: str) -> bool:
        return self.stage is None or stage.removesuffix("_stage") == self.stage.removesuffix("_stage")

    def read(self, at: str, value: Any) -> Iterable[Modifier]:
        if isinstance(value, Recipe):
            return value.modifiers
        if isinstance(value, Modifier):
            return [value]
        if isinstance(value, type) and issubclass(value, Modifier):
            return [_make(at, value.__name__, {}, self)]
        if isinstance(value, Path):
            return self._file(value)
        if isinstance(value, str):
            return self._text(at, value)
        if isinstance(value, Mapping):
            return self._mapping(at, value)
        if isinstance(value, Sequence):
            if not value:
                raise FieldError(at, "is an empty list; give at least one modifier")
            return [m for i, entry in enumerate(value) for m in self.read(f"{at}[{i}]", entry)]
        raise FieldError(
            at,
            f"expected modifiers (instances, classes, names), a mapping, YAML text or a path, got {_what(value)}",
        )

    def _text(self, at: str, text: str) -> Iterable[Modifier]:
        """A path, a modifier's name, or YAML."""
        one_line = text.strip()
        if "\n" not in one_line:
            if one_line.lower().endswith(_FILES) and ":" not in one_line.replace(":\\", ""):
                return self._file(Path(one_line))
            if _class_name(one_line) is not None:
                return [_make(at, one_line, {}, self)]
            if re.fullmatch(r"[\w./~-]*", one_line):
                raise FieldError(at, f"'{one_line}' is neither a modifier nor a YAML file{_hint(one_line)}")
        return self._yaml(text, "recipe (YAML text)")

    def _file(self, path: Path) -> Iterable[Modifier]:
        path = path.expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from None
        except OSError as error:
            raise ConfigError(f"{path}: the recipe cannot be read: {error.strerror}") from None
        return self._yaml(text, str(path))

    def _yaml(self, text: str, label: str) -> Iterable[Modifier]:
        document = parse(self._filled(text, label), label)
        values = document.values
        if not isinstance(values, Mapping | Sequence) or isinstance(values, str) or not values:
            raise ConfigError(
                f"{label}: holds {describe(values)}; a recipe has modifiers, or stages that hold them:\n"
                "  quant_stage:\n    quant_modifiers:\n      GPTQModifier: {scheme: W4A16, ignore: [lm_head]}"
            )
        return _located(document, lambda: list(self.read("", values)))

    def _filled(self, text: str, label: str) -> str:
        """`text` with every `{{ name }}` replaced. Values are written as JSON, which is YAML: nothing in them is read
        as anything but a value.
        """

        def value(match: re.Match[str]) -> str:
            name = match[2]
            self.placeholders.add(name)
            if name not in self.args:
                line = text.count("\n", 0, match.start()) + 1
                raise ConfigError(
                    f"{label}:{line}: {{{{ {name} }}}} has no value{nearest(name, self.args)}; give it in recipe_args"
                )
            self.used.add(name)
            found = self.args[name]
            try:
                written = json.dumps(found)
            except (TypeError, ValueError):
                raise FieldError("recipe_args", f"'{name}': {found!r} cannot stand in a YAML recipe") from None
            inside = match[1] == "" and isinstance(found, str) and _within_string(text, match)
            return found if inside else written

        return _PLACEHOLDER.sub(value, text)

    def _mapping(self, at: str, value: Mapping[Any, Any]) -> Iterable[Modifier]:
        found: list[Modifier] = []
        for key, entry in value.items():
            name, here = str(key), f"{at}.{key}" if at else str(key)
            if _class_name(name) is not None:
                if not isinstance(entry, Mapping | None):
                    raise FieldError(here, f"expected the modifier's arguments, got {_what(entry)}")
                found.append(_make(here, name, entry or {}, self))
            elif name.endswith(("_stage", "_modifiers")) or name in ("stage", "modifiers"):
                if name.endswith("_stage"):
                    self.stages.append(name)
                    if not self._wanted(name):
                        continue
                if not isinstance(entry, Mapping | Sequence) or isinstance(entry, str) or not entry:
                    raise FieldError(here, f"expected modifiers, got {_what(entry)}")
                found += self.read(here, entry)
            else:
                raise FieldError(here, f"no such modifier{_hint(name)}")
        return found

    def override(self, modifier: Modifier) -> Modifier:
        """`modifier` with the arguments in `args` that it has and no placeholder took."""
        changes = self.changes(type(modifier))
        if not changes:
            return modifier
        idle = modifier.idle
        try:
            modifier = replace(modifier, **changes)
        except FieldError as error:
            raise FieldError(f"recipe_args.{error.key}", error.problem) from None
        object.__setattr__(modifier, "idle", idle)
        return modifier

    def changes(self, cls: type[Modifier]) -> dict[str, Any]:
        """What `args` say about arguments of `cls`."""
        found: dict[str, Any] = {}
        names = {f.name for f in fields(cls)}
        for key, value in self.args.items():
            target, _, name = key.rpartition(".")
            if key not in self.placeholders and name in names and _class_name(target or cls.__name__) == cls.__name__:
                found[name] = value
                self.used.add(key)
        return found


def _located(document: Document, read: Callable[[], list[Modifier]]) -> list[Modifier]:
    """`read()`, whose errors get the document's name and line."""
    try:
        return read()
    except FieldError as error:
        raise ConfigError(f"{document.where(error.key)}: {error.problem}") from None


def _make(at: str, name: str, arguments: Mapping[Any, Any], reader: _Reader) -> Modifier:
    cls = MODIFIERS[_class_name(name) or name]
    known = [*(f.name for f in fields(cls)), *idle_arguments(cls)]
    for key in arguments:
        if key not in known:
            listed = ", ".join(f.name for f in fields(cls))
            raise FieldError(f"{at}.{key}", f"unknown{nearest(str(key), known)}; {cls.__name__} has {listed}")
    try:
        return cls(**{**arguments, **reader.changes(cls)})
    except FieldError as error:
        raise FieldError(f"{at}.{error.key}", error.problem) from None
    except ConfigError as error:
        raise FieldError(f"{at}.scheme" if "scheme" in arguments else at, str(error)) from None


def _class_name(name: str) -> str | None:
    """The modifier class that `name` or a short name means."""
    full = ALIASES.get(name, name)
    return full if full in MODIFIERS else None


def _hint(name: str) -> str:
    known = [*MODIFIERS, *ALIASES]
    if _OTHERS.fullmatch(name):
        return f": it is one of llm-compressor's that quantkit does not have; there are {', '.join(MODIFIERS)}"
    return f"{nearest(name, known)}; there are {', '.join(MODIFIERS)}"


def _what(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = value is None or isinstance(value, str | int | float | dict | list)
    return describe(value) if plain else f"a {type(value).__name__}"


def _within_string(text: str, match: re.Match[str]) -> bool:
    """Whether a bare placeholder is a part of a longer scalar, and not one by itself."""
    before = text[: match.start()].rpartition("\n")[2].rstrip()
    after = text[match.end() :].partition("\n")[0].strip()
    return not (before.endswith((":", "-", "[", ",", "{")) and (not after or after[0] in ",]}#"))
