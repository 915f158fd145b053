"""Token rows grouped into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CalibrationError


@dataclass(frozen=True)
class Batch:
    """Rows of token ids [rows, tokens]; `mask` is 1 for real tokens and None if all are. Pads stand at the end.
    `index`: which of all rows these are.
    """

    input_ids: Tensor
    mask: Tensor | None
    index: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """How many of the positions are real tokens."""
        return self.input_ids.numel() if self.mask is None else int(self.mask.sum())


def batches(rows: Sequence[Sequence[int]], max_tokens: int = 1024, pad_id: int = 0) -> list[Batch]:
    """Group `rows` into batches of at most `max_tokens` positions (a longer row is a batch of its own).

    A thousand positions are the fastest on a CPU: matrix products gain nothing from more, all else loses the cache.

    Rows of equal length share a batch without padding; where lengths differ, rows are taken in order of length, so
    that little is padded. Deterministic.
    """
    if not rows:
        raise CalibrationError("calibration data: no rows")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups: list[list[int]] = []
    for index in order:
        length = len(rows[index])
        # Less than a quarter of a batch may be padding, measured on its shortest row.
        if groups and (len(groups[-1]) + 1) * length <= max_tokens and len(rows[groups[-1][0]]) * 4 >= length * 3:
            groups[-1].append(index)
            continue
        groups.append([index])
    return [_batch([rows[i] for i in group], pad_id, tuple(group)) for group in groups]


def _batch(rows: list[Sequence[int]], pad_id: int, index: tuple[int, ...]) -> Batch:
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    if all(len(row) == length for row in rows):
        return Batch(input_ids, None, index)
    lengths = torch.tensor([len(row) for row in rows])
    return Batch(input_ids, (torch.arange(length) < lengths[:, None]).to(torch.int64), index)
