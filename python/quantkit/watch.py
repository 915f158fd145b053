"""Who of many processes is still there. Every rank holds a connection to rank 0 that says nothing while all is well.

The kernel closes a dead process's connections, so that its end is known at once and by name, even to those who
compute. They then end too, whatever they are at: output is made so that a process may be killed at any moment.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from .errors import DistributedError

# Seconds: for all ranks to come, for an error to be told, and for one's own error to come first.
START, TELL, OWN = 300.0, 5.0, 1.0
# Of a connection to a machine that is gone without closing it: until it is asked, between questions, and how many.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))
FAILED = 1


class _Peer:
    """The other end of a connection: JSON objects, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.name, self.rank, self.ended = "", -1, False
        self._unread = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, message: dict[str, Any]) -> bool:
        """Whether it could be sent."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come; None if the connection is closed."""
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Watch:
    """Rank `rank` of `world`, at least two. `host` is where rank 0 runs; `tell` gives all of them rank 0's text."""

    def __init__(self, rank: int, world: int, host: str, tell: Callable[[str], str]) -> None:
        self.rank, self.world = rank, world
        self._over = threading.Event()  # this process's own end is told, or another's
        self._peers: dict[int, _Peer] = {}
        if rank == 0:
            self._gather(tell)
        else:
            self._join(host, tell("").split())
        self._thread = threading.Thread(target=self._run, name="quantkit-watch", daemon=True)
        self._thread.start()

    def _gather(self, tell: Callable[[str], str]) -> None:
        token = secrets.token_hex(16)
        with socket.create_server(("", 0)) as server:
            tell(f"{server.getsockname()[1]} {token}")
            deadline = time.monotonic() + START
            while len(self._peers) < self.world - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, self.world)) - set(self._peers))
                    raise DistributedError(
                        f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {self.world} did not "
                        f"come within {START:.0f} s; look for its errors above"
                    ) from None
                connection.settimeout(10)
                peer = _Peer(connection)
                hello = (peer.receive() or [{}])[0]
                if not secrets.compare_digest(str(hello.get("token", "")), token):
                    connection.close()
                    continue
                connection.settimeout(None)
                peer.rank = int(hello["rank"])
                peer.name = f"rank {peer.rank} (process {hello['process']} on {hello['host']})"
                self._peers[peer.rank] = peer

    def _join(self, host: str, address: list[str]) -> None:
        port, token = address
        try:
            connection = socket.create_connection((host, int(port)), timeout=START)
        except OSError as error:
            raise DistributedError(
                f"rank {self.rank} cannot reach rank 0 at {host}:{port}: {error.strerror or error}"
            ) from error
        connection.settimeout(None)
        peer = _Peer(connection)
        peer.rank, peer.name = 0, f"rank 0 (on {host})"
        peer.send({"token": token, "rank": self.rank, "process": os.getpid(), "host": socket.gethostname()})
        self._peers[0] = peer

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        for other in self._peers.values():
            selector.register(other.connection, selectors.EVENT_READ, other)
        while selector.get_map():
            for key, _ in selector.select():
                peer = key.data
                messages = peer.receive()
                for message in messages or ():
                    self._heard(peer, message)
                if messages is None:
                    selector.unregister(peer.connection)
                    if not peer.ended:
                        self._fail(
                            f"{peer.name} is gone: killed, out of memory, or its machine is", silent=self.rank > 1
                        )

    def _heard(self, peer: _Peer, message: dict[str, Any]) -> None:
        if "end" in message:
            peer.ended = True
        elif "error" in message:
            self._fail(f"{peer.name}: {message['error']}")
        elif "failed" in message:
            self._fail(message["failed"], silent=True)

    def _fail(self, text: str, *, silent: bool = False) -> None:
        """Another rank is at its end, and so is this one, unless an error of its own comes first."""
        for other in self._peers.values():
            if self.rank == 0:
                other.send({"failed": text})
        if self._over.wait(OWN if self.rank == 0 else 0):
            return
        self._over.set()
        if not silent:
            print(
                f"quantkit: error: {text}. All ranks stop; the same command goes on with what is done",
                file=sys.stderr,
                flush=True,
            )
        sys.stdout.flush()
        os._exit(FAILED)

    def error(self, text: str) -> bool:
        """Tell the others that this rank stops because of `text`; whether rank 0, if this is another, will print it."""
        if self._over.is_set():
            return False
        self._over.set()
        if self.rank == 0:
            for peer in self._peers.values():
                peer.send({"failed": f"rank 0: {text}"})
            return False
        told = self._peers[0].send({"error": text})
        self._thread.join(TELL)  # until rank 0 closes the connection
        return told

    def end(self) -> None:
        """Tell the others that this rank has done all it had to."""
        self._over.set()
        for peer in self._peers.values():
            peer.send({"end": True})

    def lost(self, seconds: float, otherwise: Callable[[], NoReturn]) -> NoReturn:
        """Something went wrong with the connection between ranks: whoever is gone will be known in a moment, which ends
        this process; if not, `otherwise`.
        """
        time.sleep(seconds)
        otherwise()
