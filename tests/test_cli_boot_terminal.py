"""`pagegate boot` in a terminal, on the fake hypervisor: raw mode, keys, and that the terminal is restored."""

from __future__ import annotations

import os
import pty
import select
import signal
import termios
import time
from contextlib import contextmanager

import pytest
from pagegate.cli.terminal import Keys

from .boot_parts import SLOW, command, write_kernel
from .cli_parts import policy

__all__ = ["policy"]


@pytest.fixture
def image(tmp_path):
    return write_kernel(tmp_path)


class InTerminal:
    """A process on a terminal of its own."""

    def __init__(self, arguments) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(arguments[0], arguments)
        self.before = termios.tcgetattr(self._terminal)
        self.output = ""
        self._status = None

    def type(self, keys) -> None:
        os.write(self._terminal, keys)

    def expect(self, text, within=20.0) -> None:
        """Waits until the output after what was expected before has this text."""
        end = time.monotonic() + within
        while text not in self.output:
            assert time.monotonic() < end, f"no {text!r} in {self.output!r}"
            self._read()
        self.output = self.output.partition(text)[2]

    def _read(self) -> bool:
        if not select.select([self._terminal], [], [], 0.1)[0]:
            return True
        try:
            self.output += os.read(self._terminal, 4096).decode(errors="replace")
        except OSError:  # its last process has ended
            return False
        return True

    def mode(self):
        return termios.tcgetattr(self._terminal)

    def is_raw(self) -> bool:
        return not self.mode()[3] & (termios.ECHO | termios.ICANON | termios.ISIG)

    def end(self) -> int:
        """Reads the rest, and returns the exit status."""
        ended = time.monotonic() + 30
        while self._read():
            assert time.monotonic() < ended, self.output
            if (
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                and not select.select([self._terminal], [], [], 0.2)[0]
            ):
                break
        self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def close(self) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)


@contextmanager
def terminal(*arguments, **guest):
    process = InTerminal(command(*arguments, **guest))
    try:
        yield process
    finally:
        process.close()


def test_the_keys(image):
    with terminal(image, guest="hangs", says=b"login: ") as console:
        console.expect("pagegate: Ctrl-A x ends the guest")
        console.expect("login: ")
        assert console.is_raw()
        console.type(b"\x01?")
        console.expect("\r\npagegate: Ctrl-A x ends the guest")
        console.type(b"\x01s")
        console.expect("pagegate: memory 0 ")
        console.expect("512 MiB\r\n")
        console.type(b"\x01r")
        console.expect("0 implicit, 0 explicit; 0 bytes shared, 512 MiB private\r\n")
        console.type(b"\x01r")
        console.expect("not shown any more")
        console.type(b"\x03\x1c\x1a\x04")
        time.sleep(0.3)
        assert os.waitid(os.P_PID, console.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        console.type(b"\x01x")
        console.expect("ended by Ctrl-A x")
        assert console.mode() == console.before
        assert console.end() == 0


def test_what_is_typed_reaches_the_guest(image, policy, tmp_path, monkeypatch):
    replies = tmp_path / "replies"
    monkeypatch.setenv("REPLIES", str(replies))
    with terminal(image, "-p", policy(SLOW), guest="asks and reads", says=b"ready") as console:
        console.expect("ready")
        console.type(b"a\r\x03\x01\x01z")
        console.expect("powered off")
        assert console.mode() == console.before
        assert console.end() == 0
    assert replies.read_bytes() == b"a\r\x03\x01z"


def test_a_live_line_of_requests(image, policy):
    with terminal(image, "-p", policy(SLOW), guest="asks and hangs", says=b"ready\r\n") as console:
        console.expect("ready")
        console.type(b"\x01r")
        console.expect("pagegate: 0 implicit, 0 explicit")
        console.expect("pagegate: 0 implicit, 1 explicit; 4 KiB shared, 524284 KiB private; the last:")
        console.type(b"\x01x")
        assert console.end() == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_the_terminal_is_restored_after_a_signal(image, number, status):
    with terminal(image, guest="hangs", says=b"ready") as console:
        console.expect("ready")
        assert console.is_raw()
        os.kill(console.pid, number)
        assert console.end() == status
        assert console.mode() == console.before


def test_the_terminal_is_restored_after_an_exception(image, policy):
    file = policy(SLOW.replace("return", "raise KeyError; return"))
    with terminal(image, "-p", file, guest="asks", says=b"ready") as console:
        console.expect("ready")
        assert console.is_raw()
        console.expect("KeyError")
        assert console.end() == 1
        assert console.mode() == console.before


def test_a_process_in_the_background_leaves_the_terminal_alone(image):
    arguments = command(image, "--timeout", "3", guest="hangs", says=b"ready")
    shell = ["/bin/bash", "-c", 'set -m; "$@" & wait $!', "bash", *arguments]
    console = InTerminal(shell)
    try:
        console.expect("ready")
        assert console.mode() == console.before
        console.type(b"\x01x\n")
        console.expect("still running after")
        assert console.end() == 0
    finally:
        console.close()


def test_keys_across_reads():
    keys = Keys()
    typed = [b"ab\x01", b"x", b"\x01\x01c", b"\x01", b"\x01", b"\x01s\x01rd"]
    assert [list(keys.split(each)) for each in typed] == [[b"ab"], ["x"], [b"\x01c"], [], [b"\x01"], ["s", "r", b"d"]]
