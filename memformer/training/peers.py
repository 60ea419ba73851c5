"""Watches the other processes of a run: where one is lost, the others end at once with a sentence that names it.

JAX notices a lost process when its heartbeat times out, and aborts with a dump of its coordination service. A TCP
connection to process 0 shows it earlier: the kernel closes the connections of a process that is killed, and keepalive
packets find a host that is gone.
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any

from jax._src import distributed as coordination

from memformer.training.config import RunError
from memformer.training.flags import report_errors

__all__ = ["Peers"]

KEY = "memformer/peers"
# An error of the runtime arrives before the report that a process was lost, which is its cause; so many seconds are
# left for the report.
GRACE = 2.0
LOST = (
    "{} was lost: it was killed, or its host or its network is gone. This process ends too; rerun the command on all "
    "hosts, and a training run resumes from its newest checkpoint."
)


class Peers:
    """Connections between process 0 and all others; a context manager around what the processes do together.

    Leaving it without an error tells the others that this process is done. An error is printed as `report_errors`
    does and sent to the others, and the process ends: the shutdown of JAX would wait for processes that are gone.

    Args:
      index: of this process.
      count: number of processes; with one, nothing is watched.
      silence: seconds without an answer after which a host counts as lost.

    Example:
      >>> with Peers(0, count=1):
      ...     pass
    """

    def __init__(self, index: int = 0, count: int = 1, silence: int = 100):
        self._index, self._several, self._silence = index, count > 1, silence
        self._names: dict[socket.socket, str] = {}
        # peers that have said how they end
        self._ended: set[socket.socket] = set()
        # this process ends by an error of its own, and no longer because of one elsewhere
        self._failing = False
        self._over = threading.Event()
        self._server: Any = None
        if not self._several:
            return
        self._selector = selectors.DefaultSelector()
        state: Any = coordination.global_state
        if index == 0:
            both: dict[str, Any] = (
                {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
            )
            self._server = socket.create_server(("", 0), backlog=count, **both)
            self._selector.register(self._server, selectors.EVENT_READ)
            self._token = secrets.token_hex(16)
            state.client.key_value_set(KEY, f"{self._server.getsockname()[1]} {self._token} {socket.gethostname()}")
        else:
            address = state.coordinator_address.rpartition(":")[0].strip("[]")
            self._connect(address, *state.client.blocking_key_value_get(KEY, 60_000).split())
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def _connect(self, address: str, port: str, token: str, host: str) -> None:
        # without a connection (a firewall), JAX's own heartbeat remains
        with contextlib.suppress(OSError):
            peer = socket.create_connection((address, int(port)), timeout=30)
            peer.settimeout(None)
            self._add(peer, f"process 0 on host {host}")
            peer.sendall(f"{token} process {self._index} on host {socket.gethostname()}\n".encode())

    def _add(self, peer: socket.socket, name: str) -> None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # three packets without an answer, sooner than JAX's heartbeat; other systems than Linux have their own times
        pause = max(1, self._silence // 5)
        for option, value in (("TCP_KEEPIDLE", pause), ("TCP_KEEPINTVL", pause), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._names[peer] = name
        self._selector.register(peer, selectors.EVENT_READ)

    def _watch(self) -> None:
        texts: dict[socket.socket, bytes] = {}
        while not self._over.is_set():
            for key, _ in self._selector.select(timeout=1.0):
                peer: Any = key.fileobj
                if peer is self._server:
                    self._add(peer.accept()[0], "")
                    continue
                try:
                    part = peer.recv(4096)
                except OSError:
                    part = b""
                *lines, texts[peer] = (texts.get(peer, b"") + part).split(b"\n")
                for line in lines:
                    self._hear(peer, line.decode(errors="replace"))
                if not part:
                    self._selector.unregister(peer)
                    name = self._names.pop(peer)
                    if name and peer not in self._ended:
                        self._end("lost", LOST.format(name))

    def _hear(self, peer: socket.socket, line: str) -> None:
        if not self._names[peer]:
            token, _, name = line.partition(" ")
            # others than our processes may connect to an open port
            self._names[peer] = name if secrets.compare_digest(token, self._token) else ""
            return
        kind, _, text = line.partition(" ")
        self._ended.add(peer)
        if kind != "done":
            self._end(kind, text)

    def _end(self, kind: str, text: str) -> None:
        """Ends this process because of another one, which is lost or has failed."""
        if self._over.is_set() or (kind == "failed" and self._failing):
            return
        self._tell(f"{kind} {text}")
        sys.stderr.write(f"error: {text}\n")
        sys.stderr.flush()
        os._exit(1)

    def _tell(self, message: str) -> None:
        for peer, name in list(self._names.items()):
            if name:
                with contextlib.suppress(OSError):
                    peer.sendall(message.encode() + b"\n")

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not self._several:
            return
        if error is None:
            self._over.set()
            self._tell("done")
            return
        self._failing = True
        time.sleep(GRACE)
        self._over.set()
        code: Any = 1
        if isinstance(error, (RunError, KeyboardInterrupt, SystemExit)):
            try:
                with report_errors():
                    raise error
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        else:
            sys.excepthook(type(error), error, trace)
        reason = str(error) if isinstance(error, RunError) else type(error).__name__
        self._tell(f"failed process {self._index} on host {socket.gethostname()} has ended: {' '.join(reason.split())}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
