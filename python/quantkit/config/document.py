"""A YAML text as plain values that remember their lines. Stricter than YAML: no key twice, no keys but strings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import ConfigError


@dataclass
class Document:
    """The `values` of a text, and the line of each key by its dotted path. `label` names the text in messages."""

    label: str
    values: Any
    lines: dict[str, int] = field(default_factory=dict)

    def where(self, path: str) -> str:
        """`label:line: path`, with the line of the nearest enclosing key for a path that the text does not have."""
        at = path
        while at and at not in self.lines:
            at = at[: max(at.rfind("."), at.rfind("["), 0)]
        place = f"{self.label}:{self.lines[at]}" if at else self.label
        return f"{place}: {path}"


def parse(text: str | bytes, label: str) -> Document:
    """Read one YAML document; ConfigError with label and line for whatever is not one.

    Only the plain types of YAML are made (safe_load's), so a file cannot run code.
    """
    # The constructor checks the encoding already, so it belongs under the same handler.
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            document = Document(label, None)
            if node is not None:
                _walk(node, "", document, set())
                document.values = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        context = f" {error.context}" if error.context and error.context != error.problem else ""
        raise ConfigError(f"{label}{line}: not valid YAML:{context} {error.problem or ''}".rstrip()) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: a date like 2024-13-45; RecursionError: lists nested a thousand deep.
        raise ConfigError(f"{label}: not valid YAML: {str(error).splitlines()[0]}") from None
    return document


def _walk(node: yaml.Node, path: str, document: Document, seen: set[int]) -> None:
    """Note the line of every key, and refuse one that stands twice: YAML would take the last and say nothing."""
    if id(node) in seen:  # an alias, which may even contain itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, entry in enumerate(node.value):
            _walk(entry, f"{path}[{i}]", document, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        place = f"{document.label}:{line}"
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            shown = key.value if isinstance(key, yaml.ScalarNode) else "..."
            raise ConfigError(f"{place}: {path or 'top level'}: the key {shown} is not a string; put it in quotes")
        name = f"{path}.{key.value}" if path else key.value
        if key.value in first:
            raise ConfigError(f"{place}: {name}: is already in line {first[key.value]}; keep one of the two")
        first[key.value] = document.lines[name] = line
        _walk(value, name, document, seen)
