"""What a check found, and how it is told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from ..plan import collapse
from ..report.table import table

# refused: the client stops with an error. wrong: it loads, and computes something else, or reads what nobody wrote.
# limited: it works, with the restriction that is named.
Kind = Literal["refused", "wrong", "limited"]
SHOWN = 48  # lines of findings


@dataclass(frozen=True)
class Finding:
    """`where`: tensor, module or key of config.json. `rule`: what is there, and what is asked. `action`: what to do."""

    kind: Kind
    where: str
    rule: str
    action: str = ""


@dataclass
class Verdict:
    """`ok` unless something is refused or wrong. `method`: how the weights are stored; `schemes`: how many Linears have
    which scheme, in the client's words.
    """

    folder: str
    client: str
    hardware: str
    tensor_parallel: int
    method: str = ""
    schemes: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.kind == "limited" for finding in self.findings)

    def count(self, scheme: str) -> None:
        """One more Linear has `scheme`."""
        self.schemes[scheme] = self.schemes.get(scheme, 0) + 1

    def add(self, kind: Kind, where: str, rule: str, action: str = "") -> None:
        self.findings.append(Finding(kind, where, rule, action))

    def to_json(self) -> str:
        """Everything, for programs."""
        return json.dumps({"ok": self.ok} | asdict(self), indent=2)

    def render(self) -> str:
        """For people: findings of one rule are one line."""
        ranks = f", {self.tensor_parallel} ranks" if self.tensor_parallel > 1 else ""
        lines = [f"{self.folder}: {self.method or 'not quantized'}, for {self.client} on {self.hardware}{ranks}"]
        if self.schemes:
            lines.append("  " + ", ".join(f"{scheme} x{count}" for scheme, count in self.schemes.items()))
        groups: dict[tuple[Kind, str, str], list[str]] = {}
        for f in self.findings:
            groups.setdefault((f.kind, f.rule, f.action), []).append(f.where)
        rows = [
            [kind, _places(w), rule + (f"; {action}" if action else "")] for (kind, rule, action), w in groups.items()
        ]
        rows.sort(key=lambda row: ("refused", "wrong", "limited").index(row[0]))
        if rows:
            lines.append(table(["", "where", "why"], rows[:SHOWN]))
            if len(rows) > SHOWN:
                lines.append(f"... and {len(rows) - SHOWN} more")
        restrictions = sum(key[0] == "limited" for key in groups)
        limited = sum(f.kind == "limited" for f in self.findings)
        if self.ok:
            lines.append(f"{self.client} takes it" + (f", with {restrictions} restriction(s)" if restrictions else ""))
        else:
            lines.append(f"{self.client} does NOT take it: {len(self.findings) - limited} problem(s)")
        return "\n".join(lines)


def _places(names: Sequence[str]) -> str:
    """The place, or what kind of places and how many."""
    if len(names) == 1:
        return names[0]
    kinds = Counter(map(collapse, names))
    first, count = next(iter(kinds.items()))
    return f"{first} x{count}" + (f" and {len(names) - count} more" if len(kinds) > 1 else "")
