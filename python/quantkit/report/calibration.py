"""What a calibrated run did to each Linear: for the terminal, and as quantkit_report.json beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..plan import collapse
from .table import table

SHOWN = 12


@dataclass(frozen=True)
class ModuleReport:
    """One Linear. `loss`: mean squared change of its output per token and channel, `relative`: as a share of the
    output's mean square; None where no Gram matrix was at hand. `dampening`: what made it positive definite.
    `floored`: scales at their smallest value, since a group is all zero. `seconds`: its share of the layer's time.
    """

    name: str
    method: str
    tokens: int = 0
    loss: float | None = None
    relative: float | None = None
    dampening: float | None = None
    dead: int = 0
    floored: int = 0
    seconds: float = 0.0


@dataclass
class CalibrationReport:
    """Everything, modules as they stand in the source. `once`: how many layers one forward served; `twice`: why each
    other one took two. `listener` hears each module's line.
    """

    modules: list[ModuleReport] = field(default_factory=list)
    smoothings: dict[str, tuple[float, float]] = field(default_factory=dict)
    tokens: int = 0
    expert_tokens: dict[str, int] = field(default_factory=dict)
    silent_experts: list[str] = field(default_factory=list)
    once: int = 0
    twice: dict[str, str] = field(default_factory=dict)
    listener: Callable[[str], None] | None = field(default=None, repr=False)

    def add(self, module: ModuleReport) -> None:
        """One more Linear is done."""
        self.modules.append(module)
        if self.listener is not None and module.relative is not None:
            self.listener(f"{module.name} loss {module.loss:.3g} ({100 * module.relative:.2g}%) {module.seconds:.2f} s")

    def smoothed(self, place: str, loss: float, before: float) -> None:
        """A place was smoothed: the searched loss, and that without smoothing."""
        self.smoothings[place] = (loss, before)

    def take_in(self, modules: Iterable[ModuleReport], smoothings: Mapping[str, tuple[float, float]]) -> None:
        """What another process did, and this one may have done, too."""
        known = {module.name for module in self.modules}
        self.modules += [module for module in modules if module.name not in known]
        self.smoothings |= {place: found for place, found in smoothings.items() if place not in self.smoothings}

    def sort(self, modules: Sequence[str], places: Sequence[str]) -> None:
        """Put all in this order of their names."""
        order = {name: i for i, name in enumerate(modules)}
        self.modules.sort(key=lambda module: order[module.name])
        self.silent_experts.sort(key=lambda name: order[name])
        self.expert_tokens = dict(sorted(self.expert_tokens.items(), key=lambda item: order[item[0]]))
        self.smoothings = {place: self.smoothings[place] for place in places if place in self.smoothings}

    def to_json(self) -> str:
        """All of it, for programs."""
        found: dict[str, Any] = {
            "tokens": self.tokens,
            "modules": [{k: v for k, v in asdict(m).items() if k != "seconds"} for m in self.modules],
            "smoothings": {k: {"loss": a, "without": b} for k, (a, b) in self.smoothings.items()},
            "expert_tokens": self.expert_tokens,
            "silent_experts": self.silent_experts,
            "one_forward": self.once,
            "two_forwards": self.twice,
        }
        return json.dumps(found, indent=2)

    def render(self) -> str:
        """Losses, worst first, and whatever needs a look: dampening raised, dead inputs, experts with few tokens."""
        lines: list[str] = []
        measured = sorted((m for m in self.modules if m.relative is not None), key=lambda m: -(m.relative or 0))
        if measured:
            rows = [
                [m.name, m.method, f"{100 * (m.relative or 0):.3f}%", f"{m.loss:.3e}", f"{m.seconds:.2f}"]
                for m in measured[:SHOWN]
            ]
            lines.append(table(["Linear (largest loss first)", "method", "of output", "loss", "s"], rows))
            if len(measured) > SHOWN:
                share = sum(m.relative or 0 for m in measured) / len(measured)
                lines.append(
                    f"... and {len(measured) - SHOWN} more; mean {100 * share:.3f}% (all in quantkit_report.json)"
                )
        lines += self.remarks()
        return "\n".join(lines)

    def remarks(self) -> list[str]:
        """What is out of the ordinary, counted and named."""
        found = []
        usual = min((m.dampening for m in self.modules if m.dampening is not None), default=0.0)
        for what, members in (
            (
                "dampening was raised, since the Gram matrix was not positive definite",
                [f"{m.name} ({m.dampening:g})" for m in self.modules if (m.dampening or 0) > usual],
            ),
            ("inputs are always zero", [f"{m.name} ({m.dead})" for m in self.modules if m.dead]),
            (
                "scales are at their floor, since groups are all zero",
                [f"{m.name} ({m.floored})" for m in self.modules if m.floored],
            ),
            (
                "few calibration tokens reached the expert",
                [f"{m.name} ({m.tokens}, {m.method})" for m in self.modules if "few" in m.method],
            ),
            ("no calibration token reached the expert", self.silent_experts),
        ):
            if members:
                more = f" and {len(members) - 5} more" if len(members) > 5 else ""
                found.append(f"note: {what} in {len(members)} Linears: {', '.join(members[:5])}{more}")
        reasons: dict[str, list[str]] = {}
        for layer, why in self.twice.items():
            reasons.setdefault(collapse(why), []).append(layer)
        for why, layers in reasons.items():
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            found.append(f"two forwards instead of one in {layers[0]}{more}: {why}")
        if self.expert_tokens:
            counts = sorted(self.expert_tokens.values())
            found.append(
                f"tokens per expert: {counts[0]} at least, {counts[len(counts) // 2]} in the median, {counts[-1]} at "
                f"most (of {self.tokens})"
            )
        return found
