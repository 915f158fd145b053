"""What a calibrated run takes at its peak, and what it does to take less.

Everything is predicted from headers. A layer's weights, what is known of its inputs and the hidden states of all rows
are there at once; how much of each depends on the means that are chosen here, from the fastest on, until the run keeps
to its memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from .config.recipe import AWQModifier
from .models.families import text_config

if TYPE_CHECKING:
    from .checkpoint.reader import Checkpoint
    from .config.recipe import Recipe
    from .config.run_config import RunConfig
    from .models.families import Family
    from .models.mappings import Smoothing
    from .plan import PlannedModule

# What the process itself takes: torch and threads; where data are looked at, Transformers and the model without weights
# besides.
PROCESS, CALIBRATING = 340 << 20, 70 << 20
# Packed weights that wait for the disk.
QUEUE = 16 << 20
# Compiled products of matrices, of which experts need a new one for each number of tokens, and what they leave behind.
PRODUCTS = 64 << 20
# What malloc keeps of what was freed, as a share of all that a calibration works with; and where it goes back at once.
KEPT, RETURNED = 1.3, 1.1
# num_samples: -1 means all there are, which the plan does not count.
UNLIMITED_SAMPLES = 512
# What activations of all batches may take while they wait in front of a Linear, for one forward a layer instead of two.
# The same on every machine, since the two give different results.
HELD_BYTES = 4 << 30
# Sums of one input's Gram matrix that are there at once (calibration/tree.py), and positions of a batch.
SUMS, BATCH = 3, 1024
# Into how many leaves batches are shared out over ranks, and what a rank receives of experts' tokens at most: those of
# calibration/tree.py and calibration/shared_experts.py, which import torch.
LEAVES, ROUND_BYTES = 16, 512 << 20
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Means:
    """`forwards` of a layer that looks at activations (1, 2 or "auto"); where hidden states lie (`offload`: "memory" or
    "disk"); how many experts of a layer are in memory at once (None: all); whether freed memory is kept for what comes.
    """

    forwards: int | str
    offload: str
    experts: int | None = None
    kept: bool = True

    def describe(self) -> str:
        """In words, what is not as usual."""
        found = ["hidden states on disk"] if self.offload == "disk" else []
        if self.experts is not None:
            found.append(f"{self.experts} expert{'s' if self.experts > 1 else ''} of a layer at once")
        return ", ".join(found)


def together(recipe: Recipe, places: Iterable[Smoothing], modules: Mapping[str, PlannedModule]) -> str | None:
    """Why a layer's experts have to be there all at once; None if one may come after the other."""
    for place in places:
        if place.across_experts:
            return f"{place.smooth} and its readers are smoothed together, experts among them"
    if any(isinstance(modifier, AWQModifier) and modifier.loss == "parent" for modifier in recipe.modifiers):
        return "AWQ's loss: parent runs the whole layer"
    if recipe.all_experts and any(
        m.modifier.kind == "gptq" and m.scheme.weights.strategy == "tensor" for m in modules.values()
    ):
        return "one scale by GPTQ over Linears of all experts takes them all"
    return None


def means(config: RunConfig) -> Means:
    """As the configuration has it, where nothing is planned."""
    found = _fixed(config)
    return replace(found, offload="disk", kept=False) if config.low_memory else found


def _fixed(config: RunConfig) -> Means:
    offload = config.calibration.offload
    return Means(config.global_.calibration_forwards, "memory" if offload == "auto" else offload)


@dataclass
class _Layer:
    """Bytes of the source: `outer` of all but the experts, `experts` of each; fp32 Gram matrices by distinct input."""

    outer: int = 0
    experts: dict[str, int] = field(default_factory=dict)
    grams: list[int] = field(default_factory=list)
    expert_grams: dict[str, int] = field(default_factory=dict)


class Demand:
    """What a calibrated run of this plan takes, of several `ranks` the one that takes most."""

    def __init__(
        self,
        config: RunConfig,
        checkpoint: Checkpoint,
        family: Family,
        modules: Mapping[str, PlannedModule],
        places: Iterable[Smoothing],
        ranks: int = 1,
    ) -> None:
        self.config, self.checkpoint, self.family, self.modules, self.ranks = config, checkpoint, family, modules, ranks
        self.places = list(places)
        self.awq = any(isinstance(modifier, AWQModifier) for modifier in config.recipe.modifiers)

    # Parts

    @cached_property
    def _layers(self) -> dict[int | None, _Layer]:
        found: dict[int | None, _Layer] = {}
        for name, info in self.checkpoint.tensors.items():
            if name.removesuffix(".weight") in self.family.heads:
                continue  # never read, only copied
            layer = found.setdefault(self.family.layer_of(name), _Layer())
            expert = EXPERT.search(name)
            if expert is None:
                layer.outer += info.nbytes
            else:
                layer.experts[expert[1]] = layer.experts.get(expert[1], 0) + info.nbytes
        for name, cols in self.inputs.items():
            layer = found[self.family.layer_of(f"{name}.weight")]
            expert = EXPERT.search(name)
            if expert is None:
                layer.grams.append(4 * cols * cols)
            else:
                layer.expert_grams[expert[1]] = layer.expert_grams.get(expert[1], 0) + 4 * cols * cols
        return found

    @cached_property
    def inputs(self) -> dict[str, int]:
        """The distinct inputs with a Gram matrix: all that GPTQ quantizes, and with AWQ all that become integers.
        Linears that read one input share it; each expert sees its own tokens.
        """
        needed = [
            m.name
            for m in self.modules.values()
            if m.modifier.kind == "gptq" or (self.awq and m.scheme.weights.type == "int")
        ]
        first = {member: members[0] for members in self.family.fused_sets(self.modules) for member in members}
        return {first.get(name, name): self.modules[name].cols for name in needed}

    @property
    def tokens(self) -> int:
        """At most so many positions are calibrated with."""
        dataset = self.config.dataset
        if dataset is None:
            return 0
        samples = dataset.num_samples if dataset.num_samples > 0 else UNLIMITED_SAMPLES
        return samples * dataset.max_seq_length

    @cached_property
    def hidden(self) -> int:
        return int(text_config(self.checkpoint.config).get("hidden_size", 0))

    @cached_property
    def itemsize(self) -> int:
        """Of what the forward computes in."""
        name = self.config.model.torch_dtype
        fp32 = name == "float32" or (name == "auto" and getattr(self.checkpoint, "model_dtype", None) == "F32")
        return 4 if fp32 else 2

    @property
    def gram_bytes(self) -> int:
        """fp32 [in, in] for each distinct input of the layer that has most of them."""
        return max((sum(layer.grams) + sum(layer.expert_grams.values()) for layer in self._layers.values()), default=0)

    @property
    def _shared_tokens(self) -> int:
        """Of those that one rank's batches have: leaves are not cut apart."""
        return -(-self.tokens * -(-LEAVES // self.ranks) // LEAVES)

    @property
    def states(self) -> int:
        """The hidden states of this rank's rows."""
        return self._shared_tokens * self.hidden * self.itemsize

    def held(self, forwards: int | str) -> int:
        """Where one forward serves a layer: for each token the widest input, the norm's output and the residual. The
        sweep measures what it is, and takes two forwards if it is more than HELD_BYTES.
        """
        if forwards == 2 or self.awq or not (self.inputs or self.places):
            return 0
        each = self.itemsize * (self._widest + 2 * self.hidden) if self._widest else 0
        # All ranks' together decide, since results depend on it.
        return 0 if forwards == "auto" and self.tokens * each > HELD_BYTES else self._shared_tokens * each

    @cached_property
    def _widest(self) -> int:
        """Of the inputs of Linears in layers without experts."""
        routed = {index for index, layer in self._layers.items() if layer.experts}
        cols = (m.cols for m in self.modules.values() if self.family.layer_of(f"{m.name}.weight") not in routed)
        return max(cols, default=0)

    def scratch(self, how: Means) -> int:
        """Disk for hidden states, and for what experts in groups are given and give."""
        files = 2 if how.experts is None else 5
        return files * self.states if how.offload == "disk" else 0

    @cached_property
    def ungroupable(self) -> str | None:
        """Why experts have to be there all at once; None if they may come in groups."""
        return together(self.config.recipe, self.places, self.modules)

    @property
    def experts(self) -> int:
        """The largest number of experts in a layer."""
        return max((len(layer.experts) for layer in self._layers.values()), default=0)

    # The peak

    def peak(self, how: Means) -> int:
        """Bytes at the peak of a run by `how`."""
        held = self.held(how.forwards)
        states = self.states if how.offload == "memory" else 0
        parts = [self._layers[None].outer if None in self._layers else 0]
        parts += [self._layer(layer, how, held) for index, layer in self._layers.items() if index is not None]
        process = PROCESS + CALIBRATING + (PRODUCTS if self.experts else 0)
        return process + int((KEPT if how.kept else RETURNED) * (states + max(parts)))

    @cached_property
    def _activations(self) -> int:
        """Of one batch on its way through a layer."""
        widest = max((max(m.rows, m.cols) for m in self.modules.values()), default=0)
        longest = self.config.dataset.max_seq_length if self.config.dataset is not None else 0
        return max(BATCH, longest) * self.itemsize * (8 * self.hidden + 4 * widest)

    def _layer(self, layer: _Layer, how: Means, held: int) -> int:
        """The larger of two moments: batches run, and an input's readers are worked on."""
        # Weights of other Linears than experts' are laid out anew for the forward. Smoothed ones are there in fp32.
        forward, masters = 2 * layer.outer + self._activations, 2 * layer.outer if self.places else 0
        if held and not layer.experts:
            largest = max(layer.grams, default=0)
            return held + max(forward + SUMS * largest, forward + masters + largest + self._work)
        grams = sum(layer.grams)
        outer = max(forward + SUMS * grams, layer.outer + masters + min(QUEUE, layer.outer) + grams + self._work)
        if not layer.experts:
            return outer
        sizes = sorted((size + layer.expert_grams.get(key, 0) for key, size in layer.experts.items()), reverse=True)
        routed = min(QUEUE, sum(layer.experts.values())) + self._work + self._activations
        # What the experts are given before and after, and what they give, waits with the hidden states.
        waiting = (3 if self.inputs or self.places else 2) * self.states if how.offload == "memory" else 0
        routes = 2 * self._shared_tokens * 8 * int(text_config(self.checkpoint.config).get("num_experts_per_tok") or 8)
        if self.ungroupable or (self.ranks == 1 and (how.experts is None or how.experts >= len(sizes))):
            smoothed = 2 * sum(layer.experts.values()) if self.ungroupable and self.places else 0
            # Each rank has all of them, and for their statistics what tokens of all ranks give its own.
            received = waiting // 3 + routes // 2 + ROUND_BYTES if self.ranks > 1 else 0
            return outer + sum(sizes) + smoothed + routed - self._work - self._activations + received
        pool = max(layer.expert_grams.values(), default=0)
        # Of several ranks each has its own experts, and what the others' tokens give and are given for a round of them.
        count = min(how.experts or len(sizes), -(-len(sizes) // self.ranks))
        received = ROUND_BYTES if self.ranks > 1 else 0
        return waiting + routes + max(outer, layer.outer + 2 * pool + self._group(layer, count) + routed + received)

    @staticmethod
    def _group(layer: _Layer, count: int) -> int:
        """So many experts, each of which may have seen too little and get a copy of what all saw."""
        sizes = (size + 2 * layer.expert_grams.get(key, 0) for key, size in layer.experts.items())
        return sum(sorted(sizes, reverse=True)[:count])

    @cached_property
    def _work(self) -> int:
        """A factor, its Gram matrix in order and its inverse; the rows of all readers in fp32, in order, and codes."""
        jobs = [m for m in self.modules.values() if m.modifier.kind == "gptq"]
        if not jobs:
            largest = max((m.rows * m.cols for m in self.modules.values()), default=0)
            return (6 if not self.awq else 10) * largest
        shared = {name: members for members in self.family.fused_sets(self.modules) for name in members}
        rows = {m.name: sum(self.modules[n].rows for n in shared.get(m.name, (m.name,))) for m in jobs}
        return max(3 * 4 * m.cols**2 + 10 * rows[m.name] * m.cols for m in jobs)


@dataclass(frozen=True)
class Choice:
    """The `means` of a run, their peak, and the least that any means would take with which settings changed. `bound`:
    why experts cannot come in groups; `scratch`: what lies on disk meanwhile.
    """

    means: Means
    peak: int
    least: int
    advice: str = ""
    forwards_chosen: bool = False
    bound: str | None = None
    scratch: int = 0


def choose(demand: Demand, available: int | None) -> Choice:
    """The fastest means that keep to the budget, and to what the machine has; the tightest ones if none do, or if
    `low_memory` asks for them. Only a budget changes the number of forwards, on which results depend.
    """
    config = demand.config
    budget, fixed = config.global_.memory_budget_bytes, _fixed(config)
    explicit = budget is not None or config.low_memory
    limits = [limit for limit in (budget, available) if limit is not None]
    limit = min(limits) if limits else None
    candidates = list(_ladder(demand, fixed, forwards=explicit))
    if config.low_memory and budget is None:
        chosen = _tightest(demand, candidates)
    else:
        chosen = next((c for c in candidates if limit is None or demand.peak(c) <= limit), None) or min(
            candidates, key=demand.peak
        )
    free = list(_ladder(demand, replace(fixed, forwards="auto"), forwards=True, offload=True))
    best = min(free, key=demand.peak)
    return Choice(
        chosen,
        demand.peak(chosen),
        demand.peak(best),
        _advice(config, chosen, best),
        chosen.forwards != fixed.forwards,
        demand.ungroupable if demand.experts else None,
        demand.scratch(chosen),
    )


def _ladder(demand: Demand, fixed: Means, *, forwards: bool, offload: bool = False) -> Iterator[Means]:
    """From the fastest on: what does not change results first, groups of experts as large as can be."""
    counts: Sequence[int] = _sizes(demand.experts) if demand.ungroupable is None else ()
    disk = offload or demand.config.calibration.offload == "auto"
    rounds: list[int | str] = [fixed.forwards, 2] if forwards and fixed.forwards == "auto" else [fixed.forwards]
    for number in rounds:
        plain = replace(fixed, forwards=number)
        yield plain
        tight = replace(plain, kept=False)
        places = [tight, replace(tight, offload="disk")] if disk and tight.offload == "memory" else [tight]
        yield from places
        for count in counts:
            yield from (replace(place, experts=count) for place in places)


def _sizes(experts: int) -> list[int]:
    """Sizes of groups to try: halves, thirds and so on of a layer's experts."""
    return list(dict.fromkeys(-(-experts // parts) for parts in range(2, experts + 1)))


def _tightest(demand: Demand, candidates: Sequence[Means]) -> Means:
    """The fastest of those within a twentieth of the least."""
    least = min(map(demand.peak, candidates))
    # Tight first: two forwards and hidden states on disk, the largest groups that take hardly more.
    fitting = [c for c in candidates if not c.kept and demand.peak(c) <= 1.05 * least]
    return fitting[0]


def _advice(config: RunConfig, chosen: Means, best: Means) -> str:
    """Settings that would take less than what the configuration allows."""
    found = []
    if best.offload == "disk" and chosen.offload != "disk":
        found.append("calibration.offload to auto")
    if best.forwards == 2 and chosen.forwards != 2:
        found.append("global.calibration_forwards to 2")
    return "set " + " and ".join(found) if found else ""
