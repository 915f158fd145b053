"""A recipe at work: the sweep's visitor that runs the modifiers on each layer, in their order."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from .. import ops
from ..calibration.hooks import CacheRecorder
from ..calibration.layer import Layer
from ..calibration.statistics import Statistics, Wants
from ..config.recipe import AWQModifier, GPTQModifier, Modifier, SmoothQuantModifier
from ..config.schemes import QuantizationArgs
from ..distributed import ONE, Ranks
from ..errors import CalibrationError
from ..memory import together
from ..models.mappings import Smoothing
from ..plan import Plan
from ..report.calibration import CalibrationReport, ModuleReport
from . import awq, gptq, smoothquant
from .activations import static_scale, wants
from .division import OwnSink, gathered, owners
from .rtn import quantize_weight
from .shared import GlobalScales
from .sink import Sink
from .smooth_check import require_harmless
from .working import Working


class Pipeline:
    """See `calibration.layer.Visitor`. Results go to `sink`, what happened to `report`.

    Codes that depend on no data are made before the only forward, which then runs with what will be served. Otherwise
    every modifier works in turn on the statistics of an input, or of all the layer's inputs at once. Of several `ranks`
    each does a part of what takes long, and all of the rest.
    """

    def __init__(self, plan: Plan, sink: Sink, report: CalibrationReport, ranks: Ranks = ONE) -> None:
        self.plan, self.sink, self.report, self.ranks = plan, sink, report, ranks
        self.modules = plan.modules
        self.scale_dtypes = {name: plan.scale_dtype(name) for name in plan.modules}
        self.packs = {name: plan.packs(name) for name in plan.modules}
        self.clips = any(isinstance(m, AWQModifier) and m.clip for m in plan.recipe.modifiers)
        self.caches = plan.attentions if plan.kv_cache is not None else ()
        self.queries = self.caches if plan.attention is not None else ()
        self.shared = GlobalScales(plan)
        pooling = [m for m in plan.recipe.modifiers if isinstance(m, GPTQModifier) and m.low_data == "all_tokens"]
        self.pools_below = max((m.min_tokens_per_module for m in pooling), default=0)
        places = [place for group in plan.smoothings.values() for place in group]
        self.together = together(plan.recipe, places, plan.modules) is not None
        self.statistics = self._statistics()
        self.ranges = self._ranges()

    def _statistics(self) -> dict[str, Wants]:
        """Which inputs the modifiers work on; with any transform all, so that readers left out of it are noticed."""
        found = {}
        transforms_by_gram = any(isinstance(m, AWQModifier) for m in self.plan.recipe.modifiers)
        for name, planned in self.modules.items():
            by_gram = planned.modifier.kind == "gptq" or (transforms_by_gram and planned.scheme.weights.type == "int")
            if by_gram or self.plan.smoothings:
                found[name] = Wants(gram=by_gram)
        return found

    def _ranges(self) -> dict[str, Wants]:
        found = {}
        for name, planned in self.modules.items():
            inputs = planned.scheme.input_activations
            if inputs is not None and planned.scheme.needs_calibration:
                found[name] = wants(inputs)
        return found

    def across(self, index: int) -> str | None:
        """AWQ changes weights whose outputs have gone through the layer already; so does smoothing a Linear."""
        for place, modifier in self._places(index):
            if isinstance(modifier, AWQModifier):
                return "AWQ smooths Linears by the inputs of others behind them"
            if place.kind != "norm":
                return f"{place.smooth} is smoothed, which is no norm"
        return None

    def norms(self, index: int) -> Mapping[str, Collection[str]]:
        """Those that are smoothed."""
        return {place.smooth: place.balance for place, _ in self._places(index)}

    def _among(self, layer: Layer) -> Ranks:
        """Who works on what is here of a layer."""
        return ONE if layer.owners else self.ranks

    def _assign(self, layer: Layer) -> None:
        if isinstance(self.sink, OwnSink):
            self.sink.assign(layer.owners)

    def _places(self, index: int) -> list[tuple[Smoothing, Modifier]]:
        modifiers, found = self.plan.recipe.modifiers, self.plan.smoothings
        return [(place, modifiers[i]) for i, places in found.items() for place in places if place.layer == index]

    def prepare(self, layer: Layer) -> None:
        """What is smoothed, tried; codes that wait for nothing."""
        require_harmless([place for place, _ in self._places(layer.index)], layer)
        self._assign(layer)
        for name in layer.linears:
            if name in self.modules and name not in self.statistics:
                common = self.shared.of(name, lambda member: layer.linears[member].weight.data)
                self._keep(layer, name, self._round(name, layer.linears[name].weight.data, common=common))

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        """Every modifier in turn, on the readers of the inputs that there are statistics of."""
        working = Working(layer, statistics)
        here = [name for name in layer.linears if name in self.modules and name in statistics]
        for index, modifier in enumerate(self.plan.recipe.modifiers):
            for place in self.plan.smoothings.get(index, ()):
                if place.layer != layer.index or not any(name in statistics for name in place.balance):
                    continue
                if isinstance(modifier, SmoothQuantModifier):
                    working.smooth(place, smoothquant.scales(modifier, place, working))
                elif isinstance(modifier, AWQModifier):
                    s, loss, before = awq.search(modifier, place, working, self.modules, self._among(layer))
                    working.smooth(place, s)
                    self.report.smoothed(place.smooth, loss, before)
            self._quantize(modifier, [n for n in here if self.modules[n].modifier is modifier], working)
        rewritten = sorted(name for name in working.masters if name in self.plan.rewritten)
        quantized = {f"{name}.weight" for name in here}
        working.masters = {name: value for name, value in working.masters.items() if name not in quantized}
        working.settle()
        for name in rewritten:
            self.sink.tensor(name, layer.tensor(name))

    def _quantize(self, modifier: object, names: list[str], working: Working) -> None:
        if not names:
            return
        started = time.perf_counter()
        if isinstance(modifier, GPTQModifier):
            ranks = self._among(working.layer)
            outcomes = gptq.quantize(
                modifier, names, working, self.modules, self.scale_dtypes, self.packs, self.shared, ranks
            )
        else:
            ranks = self._among(working.layer)
            of = owners([float(working.weight(name).numel()) for name in names], ranks)
            outcomes = gathered(
                {
                    name: self._round(name, working.weight(name), working, self.shared.of(name, working.weight))
                    for name, rank in zip(names, of, strict=True)
                    if rank == ranks.rank
                },
                ranks,
            )
            outcomes = {name: outcomes[name] for name in names}
        each = (time.perf_counter() - started) / len(names)
        for name, outcome in outcomes.items():
            self._keep(working.layer, name, outcome, each)

    def _round(
        self, name: str, weight: torch.Tensor, working: Working | None = None, common: torch.Tensor | None = None
    ) -> gptq.Outcome:
        """To nearest; with a Gram matrix the loss is told. `common`: NVFP4's global scale."""
        args: QuantizationArgs = self.modules[name].scheme.weights
        seen = working.statistics.get(name) if working is not None else None
        gram = seen.gram if seen is not None else None
        clip = self.clips and args.type == "int" and args.num_bits == 4
        if clip and gram is not None:
            args = _clipped(args)
        quantized = quantize_weight(
            name,
            weight,
            args,
            scale_dtype=self.scale_dtypes[name],
            pack=self.packs[name],
            importance=gram.diagonal().contiguous() if clip and gram is not None else None,
            global_scale=common,
        )
        if gram is None or seen is None:
            return gptq.Outcome(quantized, "rtn", seen.count if seen is not None else 0)
        total = gptq.energy(quantized.dequantize() - weight.float(), seen)
        power = gptq.energy(weight, seen)
        per_output = max(1, seen.count) * weight.shape[0]
        return gptq.Outcome(quantized, "awq", seen.count, total / per_output, total / power if power > 0 else None)

    def _keep(self, layer: Layer, name: str, outcome: gptq.Outcome, seconds: float = 0.0) -> None:
        linear = layer.linears[name]
        linear.weight = torch.nn.Parameter(outcome.quantized.dequantize(linear.weight.dtype), requires_grad=False)
        layer.release(f"{name}.weight")
        self.sink.weight(name, outcome.quantized)
        floor = ops.MIN_SCALE.get(self.scale_dtypes[name], 0.0)
        self.report.add(
            ModuleReport(
                name,
                outcome.method,
                outcome.tokens,
                outcome.loss,
                outcome.relative,
                outcome.dampening,
                outcome.dead,
                int((outcome.quantized.scale.abs() <= floor).sum()),
                seconds,
            )
        )

    def observe(self, layer: Layer, ranges: Mapping[str, Statistics], caches: Mapping[str, CacheRecorder]) -> None:
        """Static scales, from what the layer sees with its final weights."""
        self._assign(layer)
        for name, seen in ranges.items():
            inputs = self.modules[name].scheme.input_activations
            assert inputs is not None
            self.sink.input(name, *static_scale(seen, inputs))
        for attention, recorder in caches.items():
            key, value = (self._scale(attention, recorder, part) for part in ("key", "value"))
            self.sink.cache(attention, key, value)
            if attention in self.queries:
                self.sink.query(attention, self._scale(attention, recorder, "query"))

    def _scale(self, attention: str, recorder: CacheRecorder, part: str) -> torch.Tensor:
        """Of what `recorder` kept: the largest code for the largest magnitude."""
        args, largest = self.plan.kv_cache, recorder.kept.get(part)
        assert args is not None
        if largest is None:
            what = "attends to no queries that are seen" if part == "query" else "puts no keys and values into a cache"
            key = "a group for attention" if part == "query" else "kv_cache_scheme"
            raise CalibrationError(f"{attention}: its forward {what}, so {key} cannot be calibrated; leave it out")
        extreme = largest.flatten() if args.strategy == "channel" else largest.amax(1)
        extreme = extreme.amax().reshape(1) if args.strategy == "tensor" else extreme
        divisor = ops.FP8_MAX[torch.float8_e4m3fn] if args.type == "float" else args.divisor
        return ops.symmetric_scale(extreme, divisor)


def _clipped(args: QuantizationArgs) -> QuantizationArgs:
    """The same with each group's range searched for least squared error, columns weighed by their inputs."""
    return replace(args, observer="mse", observer_kwargs={"norm": 2.0, "search_range": 0.3, "search_steps": 6})
