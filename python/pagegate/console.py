"""The guest's consoles, for scripts: ``vm.console``, and ``console`` of a ``devices.Console``."""

from __future__ import annotations

import re
import threading
import time
import weakref
from typing import TYPE_CHECKING

from pagegate._core import number_of_bytes, timeout_seconds
from pagegate.errors import PagegateError

if TYPE_CHECKING:
    from pagegate._core import ConsolePort, Vm

_SLICE = 0.1
"""Seconds that one wait takes at most, so that Ctrl-C works."""
_CHUNK = 64 << 10
_KEPT = 1 << 20
"""Bytes of output that ``expect`` looks through at most."""
_SHOWN = 40
"""Bytes of output in a repr."""
_TOLD = 400
"""Bytes of output in an error's message."""


class ConsoleTimeout(PagegateError, TimeoutError):
    """The guest did not write what was expected in time, or ended before; ``output`` is what it wrote instead."""

    output: bytes = b""


class Console:
    """What the guest writes to its serial port or virtio console, and reads from it.

    The last MiB of unread output is kept; ``lost`` counts what was dropped before it was read, since the first use of
    ``Vm.console`` or since the device was made. Threads may share it: each byte is read by one of them.
    """

    def __init__(self, port: ConsolePort, vm: Vm | None = None) -> None:
        """Made by ``Vm.console`` and by a device, which has a machine later."""
        self._port = port
        self._attached = weakref.ref(vm) if vm is not None else None
        self._lock = threading.Lock()
        """For what follows."""
        self._unread = bytearray()
        self._ended = False
        self.lost = 0
        """Bytes that were dropped before they were read."""

    def __repr__(self) -> str:
        """The end of what the guest wrote, which stays to be read."""
        last = self._port.tail(_SHOWN)
        said = f"the last that the guest wrote is {last!r}" if last else "the guest has written nothing"
        return f"<pagegate.Console: {said}{f', {self.lost} bytes lost' if self.lost else ''}>"

    def read(self, size: int | str = -1, timeout: float | None = None) -> bytes:
        """Reads what the guest has written: up to ``size`` bytes, or all there is.

        Waits for the first byte for up to ``timeout`` seconds, ``None`` without limit. ``b""`` when that is over, or
        nothing can come any more. ValueError for a ``timeout`` that is negative or no number of seconds.
        """
        if not isinstance(size, int):
            size = number_of_bytes(size, "size")
        deadline = time.monotonic() + timeout_seconds(timeout)
        while True:
            left = deadline - time.monotonic()
            with self._lock:
                self._take_all()
                if not self._unread and not self._ended:
                    self._take(max(0.0, min(left, _SLICE)))
                end = len(self._unread) if size < 0 else size
                data = bytes(self._unread[:end])
                del self._unread[:end]
                if data or self._ended or left <= 0 or size == 0:
                    return data

    def write(self, data: bytes | str) -> int:
        """Gives the guest bytes to read, and waits until all have room: 64 KiB wait to be read at most.

        Returns how many there were. PagegateError if the guest reads none for ten seconds.
        """
        left = data.encode() if isinstance(data, str) else _bytes(data)
        size = len(left)
        stuck = time.monotonic() + 10
        while left:
            taken = self._port.write(left)
            left = left[taken:]
            if taken:
                stuck = time.monotonic() + 10
            elif time.monotonic() > stuck:
                message = f"the guest does not read its console: {len(left)} bytes of {size} are left"
                raise PagegateError(message)
            else:
                time.sleep(0.01)
        return size

    def offer(self, data: bytes) -> int:
        """Gives the guest the first of these bytes, as many as have room, without waiting. Returns how many."""
        return self._port.write(data)

    def expect(self, pattern: str | bytes | re.Pattern[bytes], timeout: float | None = 30.0) -> re.Match[bytes]:
        """Waits until the guest's output matches a regular expression, and returns the match.

        What was matched and all before it is read. If the machine is not running, it is run meanwhile: until the match,
        for ``timeout`` seconds (``None``: without limit), or until the guest ends. Raises ConsoleTimeout in the last
        two cases, with the output in ``output``, what ``Vm.run`` raises, and ValueError for a ``timeout`` that is
        negative or no number of seconds.
        """
        wanted = _compile(pattern)
        seconds = timeout_seconds(timeout)
        with self._lock:
            self._take_all()
            if match := self._found(wanted):
                return match
        vm = self._vm()
        if vm is None or vm.closed or vm.running:
            return self._wait(wanted, seconds, None)
        over = threading.Event()
        found: list[re.Match[bytes] | ConsoleTimeout] = []
        watcher = threading.Thread(target=self._watch, args=(vm, wanted, seconds, over, found), daemon=True)
        watcher.start()
        try:
            report = vm.run() if not over.is_set() else None
        finally:
            over.set()
            watcher.join()
        result = found[0]
        if isinstance(result, ConsoleTimeout):
            if report is not None and report.reason != "stopped":
                result.add_note(f"the guest's run ended: {report.reason}")
            raise result
        return result

    def tail(self, size: int | str = 4096) -> bytes:
        """The last bytes that the guest wrote, read or not."""
        return self._port.tail(size)

    def _attach(self, vm: Vm) -> None:
        """The device was given to this machine."""
        self._attached = weakref.ref(vm)

    def _vm(self) -> Vm | None:
        return self._attached() if self._attached is not None else None

    def _watch(
        self,
        vm: Vm,
        wanted: re.Pattern[bytes],
        seconds: float,
        over: threading.Event,
        found: list[re.Match[bytes] | ConsoleTimeout],
    ) -> None:
        """Waits for the match, and then stops the run, which may not have begun yet."""
        try:
            found.append(self._wait(wanted, seconds, over))
        except ConsoleTimeout as error:
            found.append(error)
        while not over.is_set():
            vm.stop()
            over.wait(0.005)

    def _wait(self, wanted: re.Pattern[bytes], seconds: float, over: threading.Event | None) -> re.Match[bytes]:
        deadline = time.monotonic() + seconds
        vm = self._vm()
        while True:
            # Looked at before the output, so that none is missed.
            last = over.is_set() if over is not None else vm is None or not vm.running
            with self._lock:
                self._take_all()
                if match := self._found(wanted):
                    return match
                in_time = time.monotonic() < deadline
                if last or self._ended or not in_time:
                    raise self._timeout(wanted, seconds, ended=in_time)
                self._take(_SLICE)

    def _found(self, wanted: re.Pattern[bytes]) -> re.Match[bytes] | None:
        # A match of a copy, because the buffer is changed.
        if match := wanted.search(bytes(self._unread)):
            del self._unread[: match.end()]
        return match

    def _timeout(self, wanted: re.Pattern[bytes], seconds: float, *, ended: bool) -> ConsoleTimeout:
        output = bytes(self._unread)
        how = "before the run ended" if ended else f"within {seconds:g} s"
        last = output[-_TOLD:].decode(errors="replace")
        error = ConsoleTimeout(f"the guest did not write {wanted.pattern!r} {how}; its last output was:\n{last}")
        error.output = output
        return error

    def _take_all(self) -> None:
        """Takes what is there, but not more than is kept: the guest may write faster than this."""
        for _ in range(_KEPT // _CHUNK):
            before = len(self._unread)
            self._take(0.0)
            if len(self._unread) - before < _CHUNK:
                return

    def _take(self, seconds: float) -> None:
        data, lost, self._ended = self._port.read(_CHUNK, seconds)
        self.lost += lost
        self._unread += data
        if (surplus := len(self._unread) - _KEPT) > 0:
            self.lost += surplus
            del self._unread[:surplus]


def _bytes(data: bytes) -> bytes:
    # Not bytes(data): of an int that would be as many zeroes.
    try:
        return bytes(memoryview(data))
    except TypeError:
        raise TypeError(f"data is {data!r}: it must be text, or bytes") from None


def _compile(pattern: str | bytes | re.Pattern[bytes]) -> re.Pattern[bytes]:
    if isinstance(pattern, str):
        pattern = pattern.encode()
    source: object = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    if not isinstance(source, bytes):
        raise TypeError(f"pattern is {pattern!r}: it must be text, bytes, or a compiled pattern of bytes")
    return re.compile(pattern)
