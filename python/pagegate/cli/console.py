"""Prints what a guest writes to the debug console's port and to the serial port COM1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pagegate.cli.telling import folded

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagegate import Io, Vm

_DEBUG_CONSOLE = 0xE9
_COM1 = 0x3F8
_LINE_CONTROL, _LINE_STATUS = _COM1 + 3, _COM1 + 5
_DIVISOR_LATCH = 0x80
_IDLE = b"\x60"


class Console:
    """Prints the guest's bytes as they come."""

    def __init__(self, *, err: bool, phases: tuple[str, ...] = ()) -> None:
        """``err``: stderr, else stdout. With ``phases`` a byte written to the debug console is the index of a line."""
        self._err = err
        self._phases = phases
        self._latch = False
        self._amid_line = False
        self.before: Callable[[], None] | None = None
        """Called before anything is printed, in the vCPU's thread."""

    def attach(self, vm: Vm) -> None:
        """Sets the handlers of the ports."""
        vm.on_io(_DEBUG_CONSOLE, self._debug)
        vm.on_io(_COM1, self._serial)
        vm.on_io(_LINE_CONTROL, self._line_control)
        vm.on_io(_LINE_STATUS, self._line_status)

    def end(self) -> None:
        """Ends the guest's last line, if it is not ended."""
        if self._amid_line:
            self._print(b"\n")

    def _debug(self, io: Io) -> bytes:
        if not io.write:
            # Guests detect the debug console by this value.
            return bytes([_DEBUG_CONSOLE]) * (io.size * io.count)
        if self._phases:
            lines = [f"{each + 1}. {self._phases[each]}" for each in io.data if each < len(self._phases)]
            self._print("".join(f"{folded(line, err=self._err)}\n" for line in lines).encode())
        else:
            self._print(io.data)
        return b""

    def _serial(self, io: Io) -> bytes:
        if not io.write:
            return bytes(io.size * io.count)
        if not self._latch:  # with the latch set it is the divisor of the baud rate
            self._print(io.data)
        return b""

    def _line_control(self, io: Io) -> bytes:
        if io.write:
            self._latch = bool(io.data[-1] & _DIVISOR_LATCH)
            return b""
        return bytes(io.size * io.count)

    def _line_status(self, io: Io) -> bytes:
        return b"" if io.write else _IDLE * (io.size * io.count)

    def _print(self, data: bytes) -> None:
        if data:
            if self.before is not None and not self._amid_line:
                self.before()
            self._amid_line = not data.endswith(b"\n")
            click.echo(data, nl=False, err=self._err)
