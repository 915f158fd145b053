"""A sweep's visitor that saves what it is given: the same files, whatever of a layer is in memory at once, and on
whichever rank.

A layer's experts go into files of some size each, in their order; all else of the layer into one more behind them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from ..distributed import ONE, Ranks
from .expert_groups import projection
from .layer import Layer, Onlooker
from .shared_experts import collected
from .statistics import HISTOGRAM_BINS, Statistics, Wants

if TYPE_CHECKING:
    from ..models.families import Family
    from .hooks import CacheRecorder
    from .statistics_writer import StatisticsWriter

# Experts' statistics wait until there are so many bytes of them, which then make a file.
PORTION = 256 << 20
_EXPERT = re.compile(r".*\.experts\.\d+\.")


class Gatherer(Onlooker):
    """Changes nothing, and gives what it sees to `writer`, which rank 0 has; see `calibration.layer.Visitor`.

    One forward a layer does, but for experts that are `apart`: where they are to see all tokens (`every`), what they
    give then is not what goes on; where they come in groups, or are shared out over ranks, what is known of some of
    them goes before the next ones come.
    """

    def __init__(
        self,
        gathered: Mapping[str, Wants],
        caches: Collection[str],
        queries: Collection[str],
        family: Family,
        writer: StatisticsWriter | None,
        *,
        every: bool = False,
        apart: Collection[str] = (),
        ranks: Ranks = ONE,
    ) -> None:
        self.statistics = {name: wanted for name, wanted in gathered.items() if name in apart}
        self.ranges = {name: wanted for name, wanted in gathered.items() if name not in self.statistics}
        self.caches, self.queries = caches, queries
        self._family, self._writer, self._every, self._ranks = family, writer, every, ranks
        self._order = {name: i for i, name in enumerate(gathered)}
        self._portion: dict[str, Statistics] = {}
        self._silent: list[str] = []
        self._bytes = 0
        self._shared: set[str] = set()  # readers of an input that has been written

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        """Some experts', on each rank of its own; each time behind those of the time before."""
        seen = collected({name: s for name, s in statistics.items() if s.count}, self._ranks, on_all=False)
        silent = [
            name for theirs in self._ranks.gather([n for n, s in statistics.items() if not s.count]) for name in theirs
        ]
        if self._writer is None:
            return
        names = sorted((*seen, *silent), key=self._order.__getitem__)
        for _, members in groupby(names, key=lambda name: _EXPERT.match(name)[0]):  # type: ignore[index]
            for name in members:
                if name in seen:
                    self._take(layer, name, seen[name])
                else:
                    self._silent.append(name)
            if self._bytes >= PORTION:
                self._write()

    def observe(self, layer: Layer, ranges: Mapping[str, Statistics], caches: Mapping[str, CacheRecorder]) -> None:
        """All else, and the layer is done."""
        experts = {name: seen for name, seen in ranges.items() if self._family.is_expert(name)}
        if experts:
            self.finish(layer, experts)
        if self._writer is not None:
            self._write()
            others = {name: seen for name, seen in ranges.items() if name not in experts}
            self._writer.add(others, {name: recorder.heads() for name, recorder in caches.items()})

    def _take(self, layer: Layer, name: str, seen: Statistics) -> None:
        if name in self._shared:
            return
        if self._every and projection(name) in self._family.expert_parts[:2]:
            # All experts read this input, also those that are not here.
            experts = name[: name.rindex(".experts.")]
            readers = [
                n
                for n in self._order
                if n.startswith(f"{experts}.experts.") and projection(n) in self._family.expert_parts[:2]
            ]
            self._shared.update(readers)
        else:
            readers = [name]
        if not any(seen is other for other in self._portion.values()):
            channels = len(seen.min)
            self._bytes += channels * (2 * channels if seen.gram is not None else 8)
            self._bytes += 8 * HISTOGRAM_BINS if seen.histogram is not None else 0
        self._portion.update(dict.fromkeys(readers, seen))

    def _write(self) -> None:
        """What waits makes a file."""
        if (self._portion or self._silent) and self._writer is not None:
            self._writer.add(self._portion, {}, self._silent)
        self._portion, self._silent, self._bytes = {}, [], 0
