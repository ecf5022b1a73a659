"""Attaches this process's standard input and output to a guest's console, for as long as the guest runs."""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
from typing import TYPE_CHECKING, Self

from pagegate.cli.life import SoFar
from pagegate.cli.printing import console as terminal_on
from pagegate.cli.summary import strip
from pagegate.cli.telling import folded
from pagegate.cli.terminal import HELP, Keys, Output, Raw, descriptor, is_ours

if TYPE_CHECKING:
    from types import TracebackType

    from pagegate import Vm
    from pagegate.console import Console

_CHUNK = 4096
_READ_SECONDS = 0.1
"""How long the console is waited for at a time."""
_RETRY_SECONDS = 0.02
_LIVE_SECONDS = 1.0


class Attached:
    """While it is entered, what the guest writes is printed, and what is typed or piped in goes to the guest.

    A terminal is raw meanwhile. Nothing more of standard input is read after the end.
    """

    def __init__(self, vm: Vm, console: Console, *, err: bool) -> None:
        """``console``: one of the guest's. ``err``: its output goes to standard error, else to standard output."""
        self._vm = vm
        self._console = console
        self._output = Output(sys.stderr if err else sys.stdout)
        self._own = Output(sys.stderr)
        self._over = threading.Event()
        self._raw: Raw | None = None
        self._wake: tuple[int, int] | None = None
        self._amid_line = False
        self._printer = threading.Thread(target=self._print, name="console output", daemon=True)
        self._typist: threading.Thread | None = None
        self._live: SoFar | None = None
        self.ended_by_key = False
        """Whether the run was ended by Ctrl-A x."""
        self.failure: OSError | None = None
        """Why the guest's output could not be written, which ended the run."""

    def __enter__(self) -> Self:
        """Sets the terminal and begins to pass bytes on."""
        try:
            file = self._input()
            if file is not None:
                self._wake = os.pipe()
                arguments = (file, self._wake[0])
                self._typist = threading.Thread(target=self._type, args=arguments, name="console input", daemon=True)
                self._typist.start()
            self._printer.start()
        except BaseException:
            self._restore()
            raise
        return self

    def _input(self) -> int | None:
        """The descriptor to read input from, if there is any. A terminal is raw from then on."""
        file = descriptor(sys.stdin)
        if file is None or not os.isatty(file):
            return file
        if not is_ours(file):
            return None
        try:
            self._raw = Raw(file)
        except termios.error:
            return None
        self.say(HELP)
        return file

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restores the terminal and prints what the guest has written until now."""
        self._over.set()
        self._restore()
        if self._typist is not None and self._wake is not None:
            os.write(self._wake[1], b"x")
            self._typist.join(_LIVE_SECONDS)
            if not self._typist.is_alive():
                for file in self._wake:
                    os.close(file)
        try:
            self._printer.join()
        finally:
            # Once more if it is a signal that ended this: from then on no reader that has stalled is waited for.
            self._printer.join(_LIVE_SECONDS)
        lost = self._console.lost
        if lost and self.failure is None:
            self.say(f"{lost} bytes of the guest's output are not printed: they came faster than they could be written")

    def _restore(self) -> None:
        if self._raw is not None:
            self._raw.restore()

    def say(self, text: str) -> None:
        """Prints a line of this program's own, which begins a line also where the guest has not ended its last one."""
        begin = "\n" if self._amid_line and self._own.is_terminal and self._output.is_terminal else ""
        self._amid_line = self._amid_line and not begin
        try:
            text = f"pagegate: {text.rstrip()}"
            # What has colours fits, and they would be counted.
            text = text if "\x1b" in text else folded(text, err=True)
            self._own.write(f"{begin}{text}\n".encode(errors="replace"))
        except OSError:
            # Where standard error cannot be written there is nobody to tell.
            return

    def say_waiting(self, text: str) -> None:
        """Prints what the end of the run waits for. From then on Ctrl-C is not the guest's any more."""
        self._restore()
        self.say(text)

    def _stop(self) -> None:
        """Ends the run, which may not have begun yet."""
        while not self._over.is_set():
            self._vm.stop()
            self._over.wait(_RETRY_SECONDS)

    def _print(self) -> None:
        """Prints the guest's output, and what is left of it when the run is over."""
        console = self._console
        try:
            while True:
                last = self._over.is_set()
                data = console.read(_CHUNK, timeout=0 if last else _READ_SECONDS)
                if data:
                    self._amid_line = not data.endswith(b"\n")
                    self._output.write(data)
                elif last:
                    break
            if self._amid_line:
                self._amid_line = False
                self._output.write(b"\n")
        except OSError as error:
            self.failure = error
            self._stop()

    def _type(self, file: int, wake: int) -> None:
        """Gives the guest what is typed or piped in, until the run is over or there is no more."""
        keys = None if self._raw is None else Keys()
        poll = select.poll()
        poll.register(file, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while True:
            ready = [each for each, _ in poll.poll(None if self._live is None else _LIVE_SECONDS * 1000)]
            if self._over.is_set() or wake in ready:
                return
            if file not in ready:
                if self._live is not None and (news := self._live.news()):
                    self.say(news)
                continue
            try:
                data = os.read(file, _CHUNK)
            except BlockingIOError:
                continue
            except OSError:  # a terminal that is gone
                return
            if not data:
                return
            if keys is None:
                self._pipe(data)
                continue
            for part in keys.split(data):
                if isinstance(part, str):
                    self._command(part)
                else:
                    # As with any terminal, what is typed to a guest that does not read is lost in the end.
                    self._console.offer(part)

    def _pipe(self, data: bytes) -> None:
        """Gives the guest all of it, and waits as long as it does not read."""
        while not self._over.is_set():
            data = data[self._console.offer(data) :]
            if not data:
                return
            self._over.wait(_RETRY_SECONDS)

    def _command(self, key: str) -> None:
        if key == "x":
            self.ended_by_key = True
            # Before the run has ended, so that Ctrl-C and Ctrl-\\ work if a policy's hook does not return.
            self._restore()
            self._stop()
        elif key == "s":
            self.say(f"memory {_drawn(self._vm)}")
        elif key == "r":
            self._live = SoFar(self._vm) if self._live is None else None
            self.say(self._live.line() if self._live is not None else "requests are not shown any more")
        else:
            self.say(HELP)


def _drawn(vm: Vm) -> str:
    """The strip of memory with its colours, if standard error is a terminal that has any."""
    terminal = terminal_on(err=True)
    with terminal.capture() as capture:
        terminal.print(strip(vm, terminal.width - len("pagegate: memory ")))
    return capture.get()
