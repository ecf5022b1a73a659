"""Asks a service outside this process over a Unix socket; without an answer in time nothing is converted.

For decisions that the VMM cannot or must not make itself: by an attestation service, a fleet-wide quota, a human. If
the service is down, slow, or answers what is not allowed, a request takes at most ``limit`` seconds, connecting
included. Then an explicit request gets EAGAIN, and an implicit one ends the run with the reason.

    python examples/external_service.py /tmp/judge.sock &
    pagegate run -p examples/external_service.py -o socket=/tmp/judge.sock --guest demo

The protocol is a line of JSON each way, one request at a time on a connection, and a connection for each vCPU:

    {"id": 1, "kind": "explicit", "vcpu": 0, "gpa": 4096, "size": 4096, "to": "shared", "state": "private", "time": 9}
    {"id": 1, "decision": "convert"}, or "deny" (with "errno", if not 22), "retry", or "stop" (with "reason")
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import socketserver
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket
from typing import TYPE_CHECKING, Any

from pagegate import Convert, Deny, MapGpaRange, MemoryFault, Policy, Retry, Stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagegate import Decision

LONGEST_LINE = 4096


class ServiceError(Exception):
    """The service gave no answer, or one that is not allowed."""


class Connection:
    """A connection to the service. Close it after a failure: the next line could be the late answer to this request."""

    def __init__(self, path: Path, deadline: float) -> None:
        self._number = 0
        self._socket = socket(AF_UNIX, SOCK_STREAM)
        try:
            self._socket.settimeout(left(deadline))
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise

    def ask(self, request: dict[str, object], deadline: float) -> dict[str, Any]:
        """Sends a request and returns the answer. Raises ServiceError or OSError, by the deadline."""
        self._number += 1
        self._socket.settimeout(left(deadline))
        self._socket.sendall(json.dumps({"id": self._number, **request}).encode() + b"\n")
        answer = parsed(self._line(deadline))
        if answer.get("id") != self._number or isinstance(answer.get("id"), bool):
            raise ServiceError("an answer to another request")
        return answer

    def _line(self, deadline: float) -> bytes:
        line = b""
        while b"\n" not in line:
            if len(line) >= LONGEST_LINE:
                raise ServiceError(f"a line of more than {LONGEST_LINE} bytes")
            # Set for each part, so that a service that sends single bytes gets no more time.
            self._socket.settimeout(left(deadline))
            part = self._socket.recv(LONGEST_LINE - len(line))
            if not part:
                raise ServiceError("hung up")
            line += part
        line, _, rest = line.partition(b"\n")
        if rest:
            raise ServiceError("more than one line")
        return line

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()


def left(deadline: float) -> float:
    """Seconds until the deadline; TimeoutError if it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def parsed(line: bytes) -> dict[str, Any]:
    """The JSON object in a line."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        raise ServiceError("no JSON") from None
    if not isinstance(answer, dict):
        raise ServiceError("no JSON object")
    return answer


def decided(answer: dict[str, Any]) -> Decision:
    """The decision in an answer. ServiceError if it is not clearly one."""
    match answer.get("decision"):
        case "convert":
            return Convert()
        case "deny":
            number = answer.get("errno", errno.EINVAL)
            if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= 4095:
                raise ServiceError("an errno that is none")
            return Deny(number)
        case "retry":
            return Retry()
        case "stop":
            return Stop(f"the service said: {answer.get('reason', 'stop')}")
        case _:
            raise ServiceError("no decision")


@dataclass
class ExternalService(Policy):
    """Asks the service at ``socket``."""

    socket: Path
    limit: float = 0.5
    """Seconds that a decision may take, connecting included."""

    def __post_init__(self) -> None:
        """Does not connect yet: the service may be started after the machine."""
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"limit is {self.limit}: it must be a number of seconds above 0")
        # By vCPU. Each is one thread, so that no two threads use one connection.
        self._connections: dict[int, Connection] = {}

    def close(self) -> None:
        """Closes all connections. Call it when no machine runs."""
        while self._connections:
            self._connections.popitem()[1].close()

    def memory_fault(self, fault: MemoryFault) -> Decision:
        """An implicit request. Without an answer the run ends."""
        try:
            return self._ask("implicit", fault, "private" if fault.private else "shared")
        except (ServiceError, OSError) as error:
            return Stop(f"external service: {said(error)}")

    def map_gpa_range(self, call: MapGpaRange) -> Decision:
        """An explicit request. Without an answer the guest gets EAGAIN."""
        try:
            return self._ask("explicit", call, call.to)
        except (ServiceError, OSError):
            return Deny(errno.EAGAIN)

    def _ask(self, kind: str, request: MemoryFault | MapGpaRange, to: str) -> Decision:
        deadline = time.monotonic() + self.limit
        about: dict[str, object] = {
            "kind": kind,
            "vcpu": request.vcpu,
            "gpa": request.gpa,
            "size": request.size,
            "to": to,
            "state": request.state,
            "time": request.time,
        }
        connection = self._connections.pop(request.vcpu, None)
        if connection is None:
            connection = Connection(self.socket, deadline)
        try:
            decision = decided(connection.ask(about, deadline))
            left(deadline)
        except BaseException:
            connection.close()
            raise
        self._connections[request.vcpu] = connection
        return decision


def said(error: Exception) -> str:
    """Why there is no answer."""
    return "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__


# ---- a service, as an example


def judge(request: dict[str, Any]) -> dict[str, object]:
    """Refuses to share more than 1 MiB at once, or anything in the first 16 MiB."""
    shares = request["to"] == "shared"
    if shares and (request["size"] > 1 << 20 or request["gpa"] < 16 << 20):
        return {"decision": "deny"}
    return {"decision": "convert"}


class Service(socketserver.ThreadingUnixStreamServer):
    """Answers on every connection in a thread of its own."""

    daemon_threads = True

    def __init__(self, path: Path, judge: Callable[[dict[str, Any]], dict[str, object]] = judge) -> None:
        # Removes the socket of an earlier service, but no other file.
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.stat().st_mode):
                path.unlink()
        self.judge = judge
        super().__init__(str(path), Answering)


class Answering(socketserver.StreamRequestHandler):
    """One connection."""

    server: Service

    def handle(self) -> None:
        """Answers line by line, until the other side closes or sends what is no request."""
        while line := self.rfile.readline(LONGEST_LINE):
            try:
                request = parsed(line)
                answer = {**self.server.judge(request), "id": request["id"]}
            except (ServiceError, KeyError, TypeError):
                return
            try:
                self.wfile.write(json.dumps(answer).encode() + b"\n")
            except OSError:
                return


def main() -> None:
    """Serves until it is interrupted."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} SOCKET")
    path = Path(sys.argv[1])
    with contextlib.suppress(KeyboardInterrupt), Service(path) as service:
        path.chmod(0o600)
        service.serve_forever()


if __name__ == "__main__":
    main()
