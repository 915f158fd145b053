"""What ranks give each other arrives, through shared memory as through sockets, and wherever it lies."""

from __future__ import annotations

import pytest

from .ranks import ended, start

GIVE = """
import os, sys
import torch
from quantkit import distributed, same_host
ranks = distributed.ranks()
assert ranks.one_machine and ranks.world == int(os.environ["WORLD_SIZE"])
if sys.argv[1] == "sockets":
    ranks._shared = None
elif sys.argv[1] == "large":  # more than fits, on one rank: all go by sockets
    same_host.MOST_BYTES = 1000 if ranks.rank == 1 else 1 << 20
for size in (0, 1, 2000):
    for turn in range(3):
        found = ranks.gather((ranks.rank, "x" * size, torch.full((2,), turn)))
        assert [rank for rank, _, _ in found] == list(range(ranks.world))
        assert all(len(text) == size and bool((x == turn).all()) for _, text, x in found)
        assert ranks.broadcast([ranks.rank, turn]) == [0, turn]

def piece(sender, receiver, dtype, rows, cols):
    x = torch.arange(rows * cols).view(rows, cols) + 100 * sender + 10 * receiver
    return (x % 120).to(dtype)

for dtype in (torch.float32, torch.bfloat16, torch.int8):
    for rows, cols in ((3, 5), (0, 4), (40, 33)):
        outgoing, incoming = [], []
        for other in range(ranks.world):
            wide = torch.zeros(rows, cols + 3, dtype=dtype)
            wide[:, 1 : cols + 1] = piece(ranks.rank, other, dtype, rows, cols)
            outgoing.append([wide[:, 1 : cols + 1], piece(ranks.rank, other, dtype, 1, 7)])
            incoming.append([torch.full((rows, cols + 2), 7).to(dtype)[:, 2:], torch.empty(1, 7, dtype=dtype)])
        ranks.exchange(outgoing, incoming)
        for other in range(ranks.world):
            strided, flat = incoming[other]
            assert torch.equal(strided, piece(other, ranks.rank, dtype, rows, cols))
            assert torch.equal(flat, piece(other, ranks.rank, dtype, 1, 7))
            assert rows == 0 or bool((strided._base[:, :2] == 7).all()), "nothing beside it is touched"
counts = [r + 1 for r in range(ranks.world)]
own = torch.full((counts[ranks.rank], 2), float(ranks.rank))
(rows,) = ranks.gather_rows([own], counts)
assert rows[:, 0].tolist() == [float(r) for r in range(ranks.world) for _ in range(r + 1)]
print("all there")
"""

GONE = """
import os, sys
from quantkit import distributed
ranks = distributed.ranks()
if ranks.rank == 1:
    os._exit(3)
ranks.gather(0)
print("not reached")
"""


@pytest.mark.parametrize("how", ["memory", "sockets", "large"])
def test_all_arrives(how: str) -> None:
    for status, out, error in ended(start(["-c", GIVE, how], 3), 60):
        assert status == 0, error
        assert out == "all there\n"


def test_nobody_waits_for_a_rank_that_is_gone() -> None:
    (first, out, error), (second, *_), (third, *_) = ended(start(["-c", GONE], 3), 60)
    assert second == 3 and first and third and not out
    assert "rank 1" in error
