"""What ranks on one machine give each other, through memory that they share: several times as fast as by sockets.

Each rank has two buffers in turn, which the others map. It puts what it sends into one, all tell each other by pipes
where what is for whom begins, and each takes out what is for itself. Who tells where the next things are has taken out
the last ones, so a buffer is free again when the turn comes back to it. The kernel closes a dead rank's pipes.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
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
    """Rank `rank` of those that `gather` gives values of. `works`: whether this one could reach the buffers and pipes
    of all, which have to be on one machine; once all have been asked, `begin` is next.

    RuntimeError, of whatever is called, if another one is gone.
    """

    def __init__(self, rank: int, world: int, gather: Callable[[tuple[int, ...]], Sequence[tuple[int, ...]]]) -> None:
        self._rank, self._turn = rank, 0
        token = secrets.randbits(63)
        own = [_Buffer(token), _Buffer(token)]
        # One from each other rank, of which it opens the end to write to.
        pipes = [os.pipe() if r != rank else (-1, -1) for r in range(world)]
        self._inbox = [reading for reading, _ in pipes]
        self._ends = [writing for _, writing in pipes]
        self._outbox = [-1] * world
        places = gather((token, os.getpid(), own[0].fd, own[1].fd, *self._ends))
        self._buffers: list[list[_Buffer]] = []
        try:
            for r, (theirs, process, *fds) in enumerate(places):
                folder = f"/proc/{process}/fd"
                self._buffers.append(own if r == rank else [_Buffer(theirs, f"{folder}/{fd}") for fd in fds[:2]])
                if r != rank:
                    self._outbox[r] = os.open(f"{folder}/{fds[2 + rank]}", os.O_WRONLY | os.O_CLOEXEC)
            self.works = True
        except OSError:
            self.works = False

    def begin(self) -> None:
        """All others have opened what they write to: nobody else has it open any more."""
        for fd in self._ends:
            if fd >= 0:
                os.close(fd)

    def _numbers(self, own: Sequence[int]) -> list[tuple[int, ...]]:
        """Every rank's `own`, a few numbers, as many on each."""
        form = struct.Struct(f"<{len(own)}q")
        message = form.pack(*own)
        found = []
        try:
            for fd in self._outbox:
                if fd >= 0:
                    os.write(fd, message)
            for fd in self._inbox:
                data = b"" if fd >= 0 else message
                while len(data) < form.size:
                    more = os.read(fd, form.size - len(data))
                    if not more:
                        raise RuntimeError("its pipe is closed")
                    data += more
                found.append(form.unpack(data))
        except OSError as error:
            raise RuntimeError(str(error)) from error
        return found

    def gather(self, own: bytes) -> list[bytes] | None:
        """Every rank's `own`. None, and nothing is done, if any rank has too much."""
        fits = len(own) <= MOST_BYTES
        turn = self._take_turn()
        if fits and own:
            buffer = self._buffers[self._rank][turn].bytes(len(own), grow=True)
            buffer.numpy().data[:] = own
        told = self._numbers([len(own) if fits else -1])
        if any(size < 0 for (size,) in told):
            return None
        return [
            own if rank == self._rank else self._buffers[rank][turn].bytes(size, grow=False).numpy().tobytes()
            for rank, (size,) in enumerate(told)
        ]

    def exchange(self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]]) -> bool:
        """See `Ranks.exchange`; what goes to this rank itself is left out. False, and nothing is done, if any rank has
        too much to send.
        """
        begins, position, seen = [], 0, dict[tuple[object, ...], int]()
        places: list[tuple[int, Tensor]] = []
        for rank, tensors in enumerate(outgoing):
            # What goes to several ranks is there once.
            key = tuple((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors if x.numel())
            if rank == self._rank or not key or key in seen:
                begins.append(seen.get(key, 0))
                continue
            seen[key] = position
            begins.append(position)
            for tensor in tensors:
                places.append((position, tensor))
                position += _room(tensor)
        turn = self._take_turn()
        fits = position <= MOST_BYTES
        if fits and position:
            mine = self._buffers[self._rank][turn].bytes(position, grow=True)
            for begin, tensor in places:
                _like(tensor, mine, begin).copy_(tensor)
        told = self._numbers([*begins, position if fits else -1])
        if any(numbers[-1] < 0 for numbers in told):
            return False
        for rank, tensors in enumerate(incoming):
            if rank == self._rank or not any(tensor.numel() for tensor in tensors):
                continue
            theirs = self._buffers[rank][turn].bytes(told[rank][-1], grow=False)
            begin = told[rank][self._rank]
            for tensor in tensors:
                tensor.copy_(_like(tensor, theirs, begin))
                begin += _room(tensor)
        return True

    def _take_turn(self) -> int:
        turn, self._turn = self._turn, 1 - self._turn
        return turn


def _room(tensor: Tensor) -> int:
    """Bytes that it takes in a buffer."""
    return -(-tensor.numel() * tensor.itemsize // _ALIGN) * _ALIGN


def _like(tensor: Tensor, buffer: Tensor, begin: int) -> Tensor:
    """What lies at `begin` of `buffer`, of the tensor's shape and dtype."""
    return buffer[begin : begin + tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)
