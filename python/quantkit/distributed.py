"""Many processes at one job, as torchrun starts them: which of them this is, and how they give each other what they
make. Nothing is added up on the way, so that results do not depend on the transport. See docs/scale.md.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import DistributedError

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from .watch import Watch

# How long one may wait for another: a dead one is noticed otherwise, and one that works may take long.
PATIENCE = timedelta(days=7)
# Seconds that a broken connection waits for the reason.
REASON = 10.0


class Ranks:
    """`world` processes, of which this is number `rank`. All of them make the same calls in the same order."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks, and makes what there is one of."""
        return self.rank == 0

    @property
    def one_machine(self) -> bool:
        """Whether all are known to be on one machine."""
        return True

    def share(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """Which of `count` things in a row fall to `rank` (this one): the first, and one behind the last."""
        rank = self.rank if rank is None else rank
        return rank * count // self.world, (rank + 1) * count // self.world

    def barrier(self) -> None:
        """Wait until all are here."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank. Small things: they are pickled."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`."""
        return value

    def exchange(self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]]) -> None:
        """Send outgoing[r] to rank r, and fill incoming[r] with what it sends here, of these shapes and dtypes. What
        goes to this rank itself is copied. None of `incoming` is outgoing, too.
        """
        for theirs, mine in zip(outgoing[self.rank], incoming[self.rank], strict=True):
            mine.copy_(theirs)

    def gather_rows(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """For each of `parts` [counts[rank], ...] every rank's below one another."""
        return list(parts)

    def failed(self, error: BaseException) -> bool:
        """Tell the others that this rank stops because of `error`; whether one of them will print it."""
        return False


class TorchRanks(Ranks):
    """Those of a torch.distributed process group."""

    def __init__(self, group: dist.ProcessGroup, watch: Watch) -> None:
        import torch.distributed as dist

        from .same_host import SameHost

        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group, self._watch = group, watch
        self._failed: BaseException | None = None
        self._told = False
        self._shared: SameHost | None = None
        shared = SameHost(self.rank, self.world, self.gather)
        every = all(self.gather(shared.works))
        shared.begin()
        self._shared = shared if every else None

    @property
    def one_machine(self) -> bool:
        return self._shared is not None

    def barrier(self) -> None:
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        try:
            if self._shared is not None:
                pickles = self._shared.gather(pickle.dumps(value))
                if pickles is not None:
                    return list(map(pickle.loads, pickles))
            found: list[Any] = [None] * self.world
            dist.all_gather_object(found, value, group=self._group)
        except RuntimeError as error:
            self._lost(error)
        return found

    def broadcast(self, value: Any) -> Any:
        return self.gather(value if self.first else None)[0]

    def exchange(self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]]) -> None:
        try:
            if self._shared is None or not self._shared.exchange(outgoing, incoming):
                self._by_sockets(outgoing, incoming)
        except RuntimeError as error:
            self._lost(error)
        super().exchange(outgoing, incoming)

    def _by_sockets(self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]]) -> None:
        import torch.distributed as dist

        works, leaving, arriving = [], [], []
        for rank in range(self.world):
            if rank == self.rank:
                continue
            for tag, tensor in enumerate(incoming[rank]):
                if tensor.numel():
                    arriving.append((tensor, buffer := tensor.contiguous()))
                    works.append(dist.irecv(_raw(buffer), group=self._group, group_src=rank, tag=tag))
        # Everybody starts with another one.
        for rank in ((self.rank + i) % self.world for i in range(1, self.world)):
            for tag, tensor in enumerate(outgoing[rank]):
                if tensor.numel():
                    leaving.append(_raw(tensor.contiguous()))
                    works.append(dist.isend(leaving[-1], group=self._group, group_dst=rank, tag=tag))
        for work in works:
            if work is not None:
                work.wait()
        for tensor, buffer in arriving:
            if buffer is not tensor:
                tensor.copy_(buffer)

    def gather_rows(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        found = [part.new_empty((sum(counts), *part.shape[1:])) for part in parts]
        places = [whole.split(list(counts)) for whole in found]
        self.exchange([parts] * self.world, [[place[r] for place in places] for r in range(self.world)])
        return found

    def failed(self, error: BaseException) -> bool:
        if error is not self._failed:
            self._failed, self._told = error, self._watch.error(str(error) or type(error).__name__)
        return self._told

    def _lost(self, error: BaseException) -> NoReturn:
        def otherwise() -> NoReturn:
            raise DistributedError(f"rank {self.rank} has lost the connection to another rank ({error})") from error

        self._watch.lost(REASON, otherwise)


ONE = Ranks()
_found: Ranks | None = None


def ranks() -> Ranks:
    """Those that torchrun started, or that torch.distributed has been set up for; ONE otherwise. The first call
    connects, and waits until all are there; they stay connected until the process ends.
    """
    global _found
    if _found is None:
        _found = _connect()
    return _found


def told(error: BaseException) -> bool:
    """Whether this process need not print `error`, since rank 0 does."""
    return ranks().failed(error)


def _connect() -> Ranks:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world < 1 or ("WORLD_SIZE" in os.environ and "RANK" not in os.environ):
        raise DistributedError("WORLD_SIZE is set and RANK is not: start quantkit with torchrun, which sets all of it")
    if world == 1:
        return ONE
    import torch
    import torch.distributed as dist

    from .watch import Watch

    both = torch.cuda.is_available() and dist.is_nccl_available()
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=PATIENCE)
        group = dist.group.WORLD
    else:  # by the user's script, with whatever backend
        group = dist.new_group(backend="cpu:gloo,cuda:nccl" if both else "gloo", timeout=PATIENCE)
    assert group is not None
    rank = dist.get_rank(group)
    host = os.environ.get("MASTER_ADDR", "localhost")

    def tell(text: str) -> str:
        box = [text]
        dist.broadcast_object_list(box, group=group, group_src=0)
        return box[0]

    watch = Watch(rank, world, host, tell)
    found = TorchRanks(group, watch)
    atexit.register(watch.end)
    if threading.current_thread() is threading.main_thread():
        _wait_when_terminated()
    return found


def _wait_when_terminated() -> None:
    """torchrun ends all processes when one is gone, and may be faster than the message that says which: leave that a
    moment.
    """
    usual = signal.getsignal(signal.SIGTERM)

    def terminated(number: int, frame: FrameType | None) -> None:
        threading.Event().wait(2.0)
        if callable(usual):
            usual(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, terminated)


def _raw(tensor: Tensor) -> Tensor:
    """Its bytes."""
    import torch

    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8)
