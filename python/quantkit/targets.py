"""Which Linear gets which scheme: the targets and ignores of a recipe's quantizers, matched to a model's names.

A target is `Linear` (every Linear of a decoder layer), a full name, or `re:` and a pattern that matches from the start
of the full name. Where several take a Linear, a full name goes before a pattern and a pattern before the class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .config.groups import SchemeGroup
from .config.recipe import QuantizationModifier, Recipe
from .config.schemes import QuantizationScheme
from .errors import PlanError, nearest

CLASS = "Linear"


@dataclass(frozen=True)
class Assigned:
    """What a Linear gets: the group that took it, and the modifier that the group belongs to."""

    group: SchemeGroup
    modifier: QuantizationModifier


def assign(
    recipe: Recipe, linears: Sequence[str], heads: Sequence[str], ignored: Mapping[str, Iterable[str]]
) -> dict[str, Assigned]:
    """For each of `linears` that a group takes, what it gets. `heads`: Linears that are never quantized; `ignored`:
    what each ignore pattern takes out (see `match_ignore`). PlanError for a target that matches nothing.
    """
    best: dict[str, tuple[int, str, Assigned]] = {}
    for modifier in recipe.quantizers:
        out = {name for pattern in modifier.ignore for name in ignored[pattern]}
        taken: dict[str, tuple[int, str, Assigned]] = {}
        for group in modifier.groups:
            for target in group.targets:
                rank, found = _match(target, linears, heads)
                for name in found:
                    # Within a modifier the first of equals wins, as it does in servers.
                    if name not in out and (name not in taken or rank < taken[name][0]):
                        taken[name] = (rank, target, Assigned(group, modifier))
        for name, entry in taken.items():
            if name in best and best[name][0] == entry[0]:
                one, other = (type(e[2].modifier).__name__ for e in (best[name], entry))
                raise PlanError(
                    f"{name}: {one} (target '{best[name][1]}') and {other} (target '{entry[1]}') both take it; "
                    "give one of them an ignore, or narrower targets"
                )
            if name not in best or entry[0] < best[name][0]:
                best[name] = entry
    return {name: best[name][2] for name in linears if name in best}


def _match(target: str, linears: Sequence[str], heads: Sequence[str]) -> tuple[int, Sequence[str]]:
    """How strongly `target` binds (0 is strongest), and what it takes."""
    if target == CLASS:
        return 2, linears
    if target in heads:
        raise PlanError(
            f"targets: {target} is the head, which stays in full precision: servers do not read it quantized unless "
            "told in ways that differ; take it out of targets"
        )
    if target.startswith("re:"):
        regex = pattern_of("targets", target)
        rank, found = 1, [name for name in linears if regex.match(name)]
    else:
        rank, found = 0, [name for name in linears if name == target]
    if not found:
        last = sorted({name.rpartition(".")[2] for name in linears})
        hint = nearest(target, [CLASS, *linears])
        if target in last:
            hint = f"; did you mean 're:.*{target}$'?"
        raise PlanError(
            f"targets: '{target}' matches no Linear of this model{hint or nearest(target.lstrip('re:.*'), last)}; use "
            f"{CLASS}, a full name, or re: and a pattern that matches from the start of the full name"
        )
    return rank, found


def match_ignore(key: str, patterns: Iterable[str], modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each pattern of the option `key` the modules it takes out; PlanError for one that matches nothing.

    `re:` patterns match from the start of the full name, as vLLM does; others match the full name or a run of
    its dotted parts (`lm_head`, `down_proj`, `mlp.gate`, `layers.0`).
    """
    result: dict[str, tuple[str, ...]] = {}
    for pattern in patterns:
        if pattern.startswith("re:"):
            regex = pattern_of(key, pattern)
            found = tuple(name for name in modules if regex.match(name))
        else:
            found = tuple(name for name in modules if f".{pattern}." in f".{name}.")
        if not found:
            parts = {part for name in modules for part in (name, name.rpartition(".")[2])}
            raise PlanError(
                f"{key}: '{pattern}' matches nothing in this model{nearest(pattern, sorted(parts))}; "
                "give a full name, dotted parts of one, or a regular expression with 're:' in front"
            )
        result[pattern] = found
    return result


def pattern_of(key: str, pattern: str) -> re.Pattern[str]:
    """`re:...` compiled; PlanError if it is none."""
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise PlanError(f"{key}: '{pattern}' is not a regular expression: {error}") from None


def served_targets(schemes: Mapping[str, QuantizationScheme]) -> list[SchemeGroup]:
    """Each distinct scheme of `schemes` (module -> scheme) with the targets by which servers find its modules.

    One scheme is `Linear`: whatever lacks it is in config.json's ignore. Several are never that, since vLLM looks for
    the class of a fused layer before the names of its parts: a pattern for a kind of layer where all modules of that
    kind agree, else one for its layer's experts, else the full name. What config.json's ignore names may match, too.
    """
    distinct = list(dict.fromkeys(served(scheme) for scheme in schemes.values()))
    if len(distinct) == 1:
        return [SchemeGroup((CLASS,), next(iter(schemes.values())))]
    kinds: dict[str, set[QuantizationScheme]] = {}
    for name, scheme in schemes.items():
        kinds.setdefault(_pattern(name), set()).add(served(scheme))
    result: dict[QuantizationScheme, tuple[QuantizationScheme, dict[str, None]]] = {}
    for name, scheme in schemes.items():
        target = name
        if len(kinds[_pattern(name)]) == 1:
            target = _pattern(name)
        elif ".experts." in name:
            target = _pattern(name, one_layer=True)
        result.setdefault(served(scheme), (scheme, {}))[1][target] = None
    return [SchemeGroup(tuple(targets), scheme) for scheme, targets in result.values()]


def served(scheme: QuantizationScheme) -> QuantizationScheme:
    """The scheme without its name, for comparing: presets of two names may mean the same."""
    return QuantizationScheme("", scheme.weights, scheme.input_activations)


def _pattern(name: str, one_layer: bool = False) -> str:
    """A pattern for `name` in every layer (or its own) and for every expert, without what stands before the layers,
    which servers rename: `model.layers.3.mlp.up_proj` -> `re:.*layers\\.\\d+\\.mlp\\.up_proj$`.
    """
    parts = name.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
    words = [
        r"\d+" if part.isdigit() and not (one_layer and i == layer) else re.escape(part) for i, part in enumerate(parts)
    ]
    return "re:.*" + r"\.".join(words[max(layer - 1, 0) :]) + "$"
