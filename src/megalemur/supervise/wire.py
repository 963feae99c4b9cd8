"""JSON lines over TCP between the supervisors of a run. Nothing else is understood, strangers are not listened to."""

import hmac
import selectors
import socket
import time
from collections.abc import Sequence
from typing import Any

from megalemur.config.strict_json import canonical_json, parse_json

_LINE_BYTES = 1 << 16
_SEND_SECONDS = 2.0

Message = dict[str, Any]


class Line:
    """One connection. Sending never waits longer than a moment; a line that cannot be sent is a lost connection."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(_SEND_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.lost = False
        self.rank: int | None = None
        """Who is at the other end, once that is known."""
        self._rest = b""

    def send(self, message: Message) -> None:
        """Send one message; failure sets `lost`."""
        try:
            self.socket.sendall(canonical_json(message) + b"\n")
        except OSError:
            self.lost = True

    def receive(self) -> list[Message]:
        """What has arrived; call it when there is something. Nonsense, overlong lines and the end set `lost`."""
        try:
            data = self.socket.recv(_LINE_BYTES)
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _LINE_BYTES:
            self.lost = True
        try:
            messages = [parse_json(line) for line in lines]
        except ValueError:
            self.lost = True
            return []
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        """End it."""
        self.socket.close()


class Listener:
    """Rank 0's end: lines of ranks that know the token."""

    def __init__(self, address: tuple[str, int], token: str):
        """Listen.

        Raises:
            OSError: the address cannot be used.
        """
        self._token = token
        self._server = _server(address)
        self._server.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self.lines: dict[int, Line] = {}
        """By rank."""

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.getsockname()[1]

    def poll(self, seconds: float) -> list[tuple[int, Message]]:
        """(rank, message) of what arrives within `seconds`; lost lines are left in `lines` for the caller to see."""
        heard: list[tuple[int, Message]] = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                self._accept()
                continue
            line: Line = key.data
            messages = line.receive()
            if line.rank is None and messages:
                self._greet(line, messages.pop(0))
            if line.rank is not None:
                heard += [(line.rank, message) for message in messages]
            if line.lost:
                self._selector.unregister(line.socket)
                line.close()
        return heard

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            return  # it went away again
        self._selector.register(connection, selectors.EVENT_READ, Line(connection))

    def _greet(self, line: Line, hello: Message) -> None:
        rank, token = hello.get("rank"), hello.get("token")
        known = isinstance(token, str) and hmac.compare_digest(token.encode(), self._token.encode())
        if not known or not isinstance(rank, int) or rank in self.lines:
            line.lost = True
            return
        line.rank, self.lines[rank] = rank, line

    def close(self, linger: float) -> None:
        """Send nothing more, and wait at most `linger` seconds until all have read what was sent."""
        for line in self.lines.values():
            if not line.lost:
                try:
                    line.socket.shutdown(socket.SHUT_WR)
                except OSError:
                    line.lost = True
        deadline = time.monotonic() + linger
        while (left := deadline - time.monotonic()) > 0 and not all(line.lost for line in self.lines.values()):
            self.poll(left)
        self._server.close()


def _server(address: tuple[str, int]) -> socket.socket:
    """A listening socket on the interface of `address`, or on all where this machine does not have that address."""
    host, port = address
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(where[:2], family=family, backlog=4096)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise
    return socket.create_server(("", port), backlog=4096)


class Caller:
    """Another rank's end: keeps trying until rank 0 is there; what is said before that is kept."""

    _RETRY_SECONDS = 0.3

    def __init__(self, address: tuple[str, int], hello: Message):
        self._address, self._hello = address, hello
        self._unsent: list[Message] = []
        self._next_try = 0.0
        self._line: Line | None = None

    @property
    def connected(self) -> bool:
        """Whether rank 0 was reached."""
        return self._line is not None

    @property
    def lost(self) -> bool:
        """Whether it was reached and is gone."""
        return self._line is not None and self._line.lost

    def send(self, message: Message) -> None:
        """Send, now or once connected."""
        if self._line is None:
            self._unsent.append(message)
        else:
            self._line.send(message)

    def poll(self, seconds: float) -> Sequence[Message]:
        """What arrives within `seconds`."""
        if self._line is None:
            self._connect(seconds)
            return ()
        if self._line.lost:
            time.sleep(seconds)
            return ()
        with selectors.DefaultSelector() as selector:
            selector.register(self._line.socket, selectors.EVENT_READ)
            return self._line.receive() if selector.select(seconds) else ()

    def _connect(self, seconds: float) -> None:
        if time.monotonic() < self._next_try:
            time.sleep(seconds)
            return
        self._next_try = time.monotonic() + self._RETRY_SECONDS
        try:
            line = Line(socket.create_connection(self._address, timeout=_SEND_SECONDS))
        except OSError:
            time.sleep(seconds)
            return
        for message in (self._hello, *self._unsent):
            line.send(message)
        self._line, self._unsent = line, []

    def close(self) -> None:
        """End it."""
        if self._line is not None:
            self._line.close()
