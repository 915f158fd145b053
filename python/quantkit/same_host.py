"""What ranks on one machine give each other, through memory that they share: several times as fast as by sockets.

Each rank has two buffers in turn, which the others map. It puts what it sends into one, all tell each other where
what is for whom begins, and each takes out what is for itself. Who tells where the next things are has taken out the
last ones, so a buffer is free again when the turn comes back to it.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# More goes by sockets: the buffers stay as large as they have been.
MOST_BYTES = 128 << 20
_ALIGN = 64
_NAME = "quantkit-exchange"


class _Buffer:
    """A file without a name that begins with `token`, so that a process is not taken for another; until it is used."""

    def __init__(self, token: int, path: str | None = None) -> None:
        """`path`: of another process's; None: a new one. OSError if it is none of these."""
        if path is None:
            self.fd = os.memfd_create(_NAME)
            os.write(self.fd, token.to_bytes(8, "little"))
        else:
            if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
                raise OSError(f"{path} is no buffer")
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.pread(self.fd, 8, 0) != token.to_bytes(8, "little"):
                raise OSError(f"{path} is another's buffer")
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def bytes(self, size: int, *, grow: bool) -> Tensor:
        """The first `size`, uint8 [size]."""
        if self._bytes.numel() < size:
            if grow:
                os.ftruncate(self.fd, size)
            self._bytes = torch.frombuffer(mmap.mmap(self.fd, os.fstat(self.fd).st_size), dtype=torch.uint8)
        return self._bytes[:size]


class SameHost:
    """Rank `rank` of those that `gather` gives values of. `works`: whether this one could map the buffers of all, which
    have to be on one machine.
    """

    def __init__(self, rank: int, gather: Callable[[tuple[int, ...]], Sequence[Sequence[int]]]) -> None:
        self._rank, self._turn = rank, 0
        token = secrets.randbits(63)
        own = [_Buffer(token), _Buffer(token)]
        places = gather((token, os.getpid(), own[0].fd, own[1].fd))
        self._buffers: list[list[_Buffer]] = []
        try:
            for r, (theirs, process, *fds) in enumerate(places):
                self._buffers.append(own if r == rank else [_Buffer(theirs, f"/proc/{process}/fd/{fd}") for fd in fds])
            self.works = True
        except OSError:
            self.works = False

    def exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[Tensor]],
        gather: Callable[[list[int]], Sequence[Sequence[int]]],
    ) -> bool:
        """See `Ranks.exchange`, for bytes. `gather` gives every rank's numbers, as many as there are ranks and one.
        False, and nothing is done, if any rank has too much to send.
        """
        begins, position, seen = [], 0, dict[tuple[tuple[int, int], ...], int]()
        places: list[tuple[int, Tensor]] = []
        for rank, tensors in enumerate(outgoing):
            # What goes to several ranks is there once.
            key = tuple((tensor.data_ptr(), tensor.numel()) for tensor in tensors if tensor.numel())
            if rank == self._rank or not key or key in seen:
                begins.append(seen.get(key, 0))
                continue
            seen[key] = position
            begins.append(position)
            for tensor in tensors:
                places.append((position, tensor))
                position += -(-tensor.numel() // _ALIGN) * _ALIGN
        turn, self._turn = self._turn, 1 - self._turn
        fits = position <= MOST_BYTES
        if fits and position:
            mine = self._buffers[self._rank][turn].bytes(position, grow=True)
            for begin, tensor in places:
                mine[begin : begin + tensor.numel()].copy_(tensor)
        told = gather([*begins, position if fits else -1])
        if any(numbers[-1] < 0 for numbers in told):
            return False
        for rank, buffers in enumerate(incoming):
            if rank == self._rank or not any(buffer.numel() for buffer in buffers):
                continue
            theirs = self._buffers[rank][turn].bytes(told[rank][-1], grow=False)
            begin = told[rank][self._rank]
            for buffer in buffers:
                buffer.copy_(theirs[begin : begin + buffer.numel()])
                begin += -(-buffer.numel() // _ALIGN) * _ALIGN
        return True
