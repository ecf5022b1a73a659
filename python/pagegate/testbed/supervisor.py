"""Start the machine, pass the command's input and output on, and see it to its end.

Whatever happens to this process, the machine's processes and files do not outlive it. What vng, QEMU and the kernel
print is kept back, and shown only if the machine dies.
"""
# Starting programs is what this module does.
# ruff: noqa: S603

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from pagegate.errors import TestbedError
from pagegate.testbed.terminal import END_KEY

BOOT_LIMIT = 300.0
"""Seconds after which a machine that has not started the command is ended."""

SHUTDOWN_LIMIT = 20.0
"""Seconds that the machine has to shut down once the command has ended; then it is killed."""

UNWIND_LIMIT = 2.0
"""Seconds that vng has to end by itself once its QEMU was killed; then it is killed, too."""

TAIL_LINES = 20
"""Console lines that are shown when the machine dies."""


class TestbedTimeoutError(TestbedError, TimeoutError):
    """The command had not ended when `timeout` had passed; the machine was stopped."""

    __test__ = False


class Sink(Protocol):
    """Where the command's output goes: a binary file, or anything else that can be written to and flushed."""

    def write(self, data: bytes, /) -> object: ...  # noqa: D102
    def flush(self) -> object: ...  # noqa: D102


@dataclass
class Tail:
    """Keeps the end of what is written to it."""

    text: bytes = b""

    def write(self, data: bytes, /) -> object:
        """Keep the newest 64 KiB."""
        self.text = (self.text + data)[-65536:]
        return len(data)

    def flush(self) -> object:
        """Do nothing."""

    def lines(self) -> list[str]:
        """Return the lines that are not empty."""
        lines = (line.rstrip() for line in self.text.decode(errors="replace").replace("\r", "\n").splitlines())
        return [line for line in lines if line]

    def panic_line(self) -> str | None:
        """Return what the kernel said when it panicked, or None if it did not."""
        return next((line.partition("Kernel panic - ")[2] for line in self.lines() if "Kernel panic - " in line), None)


@dataclass
class Supervisor:
    """One machine from its start to its end."""

    arguments: Sequence[str]
    """vng's command line."""

    directory: Path
    """The run's own directory. The machine's ports and QEMU's process id are files in it."""

    stdin: int | None
    stdout: Sink
    stderr: Sink
    timeout: float | None
    console: Tail = field(default_factory=Tail)
    """What vng, QEMU and the kernel print."""

    def wait(self) -> int:
        """Start the machine and see it to its end; return the command's exit status."""
        with contextlib.ExitStack() as stack:
            selector = stack.enter_context(selectors.PollSelector())
            for name, sink in (("out", self.stdout), ("err", self.stderr)):
                os.mkfifo(self.directory / name)
                # Opened first, so that QEMU need not wait when it opens the other end.
                reader = os.open(self.directory / name, os.O_RDONLY | os.O_NONBLOCK)
                stack.callback(os.close, reader)
                _forward(selector, reader, sink)
            stack.enter_context(stopped_by_signals())
            process = stack.enter_context(self._started())
            if process.stdout is not None:
                _forward(selector, process.stdout.fileno(), self.console)
            if self.stdin is not None and process.stdin is not None:
                _feed(selector, self.stdin, process.stdin, END_KEY if os.isatty(self.stdin) else None)
            self._pump(process, selector)
            return self._exit_status()

    @contextlib.contextmanager
    def _started(self) -> Iterator[subprocess.Popen[bytes]]:
        # vng finds its own helper programs by PATH, and leaves temporary files behind if it is killed.
        path = os.pathsep.join([str(Path(self.arguments[0]).parent), os.environ.get("PATH", os.defpath)])
        try:
            process = subprocess.Popen(
                self.arguments,
                stdin=subprocess.DEVNULL if self.stdin is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                cwd="/",
                env={**os.environ, "PATH": path, "TMPDIR": str(self.directory)},
                start_new_session=True,
            )
        except OSError as error:
            raise TestbedError(
                f"virtme-ng could not be started: {error}; reinstall it with pip install 'pagegate[testbed]'"
            ) from error
        try:
            with _guardian(process.pid, self.directory):
                yield process
        finally:
            self._stop(process)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            process.wait()

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """End what is left of the machine."""
        try:
            # QEMU first: its parents then collect it and end by themselves. If all were killed at once, init would have
            # to collect them, and in a container it may never do so.
            if not _has_ended(process) and self._kill_qemu(process.pid):
                given_up = time.monotonic() + UNWIND_LIMIT
                while not _has_ended(process) and time.monotonic() < given_up:
                    time.sleep(0.02)
        finally:
            # The group's leader is not collected yet, so its number cannot have been given to another group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def _kill_qemu(self, group: int) -> bool:
        try:
            pid = int((self.directory / "pid").read_text())
            if os.getpgid(pid) != group:
                return False
            os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError):
            return False
        return True

    def _pump(self, process: subprocess.Popen[bytes], selector: selectors.BaseSelector) -> None:
        """Pass input and output on until the machine has ended."""
        begun = time.monotonic()
        command_ended: float | None = None
        while not _has_ended(process):
            _turn(selector, wait=0.1)
            now = time.monotonic()
            if self._report("exited") is not None:
                command_ended = command_ended or now
                if now - command_ended > SHUTDOWN_LIMIT:
                    break
            elif self.timeout is not None and now - begun > self.timeout:
                raise TestbedTimeoutError(
                    f"the command had not ended after {self.timeout:g} s, boot included; "
                    "the testbed's machine was stopped"
                )
            elif now - begun > BOOT_LIMIT and self._report("started") is None:
                raise self._death(f"the testbed's machine did not come up within {BOOT_LIMIT:g} s")
        while _turn(selector, wait=0):
            pass

    def _report(self, word: str) -> str | None:
        """What the machine reported under `word`, or None if it has not."""
        try:
            lines = (self.directory / "status").read_text(errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return None
        return next((line.removeprefix(word).strip() or word for line in lines if line.startswith(word)), None)

    def _exit_status(self) -> int:
        status = self._report("exited")
        if status is not None:
            return int(status)
        failure = self._report("failed")
        if failure is not None:
            raise TestbedError(f"the testbed could not run the command: {failure}")
        panic = self.console.panic_line()
        if panic is not None:
            raise self._death(f"the testbed's kernel panicked ({panic})")
        phase = "while the command ran" if self._report("started") else "before the command began"
        raise self._death(f"the testbed's machine ended {phase}")

    def _death(self, sentence: str) -> TestbedError:
        lines = self.console.lines()[-TAIL_LINES:]
        return TestbedError(
            "\n".join([f"{sentence}; its last lines:" if lines else sentence, *(f"  {line}" for line in lines)])
        )


def _turn(selector: selectors.BaseSelector, wait: float) -> bool:
    """Handle what is ready, waiting up to `wait` seconds for it; return whether any output was passed on."""
    came = [bool(key.data()) for key, _ in selector.select(wait)]
    return any(came)


def _forward(selector: selectors.BaseSelector, source: int, sink: Sink) -> None:
    """Have the selector's loop pass what comes from the source on to the sink."""

    def forward() -> bool:
        data = os.read(source, 65536)
        if data:
            sink.write(data)
            sink.flush()
        else:
            selector.unregister(source)
        return bool(data)

    selector.register(source, selectors.EVENT_READ, forward)


def _feed(selector: selectors.BaseSelector, source: int, target: IO[bytes], end: bytes | None) -> None:
    """Have the selector's loop pass what comes from the source on to the target, and close the target at its end.

    Where `end` comes, it raises KeyboardInterrupt.

    It reads only when all that it read before is written, so that little is taken from the source that the command
    never reads.
    """
    os.set_blocking(target.fileno(), False)
    pending = b""

    def take() -> bool:
        nonlocal pending
        try:
            pending = os.read(source, 65536)
        except BlockingIOError:
            return False
        if end is not None and end in pending:
            raise KeyboardInterrupt
        selector.unregister(source)
        if pending:
            selector.register(target, selectors.EVENT_WRITE, give)
        else:
            target.close()
        return False

    def give() -> bool:
        nonlocal pending
        try:
            pending = pending[os.write(target.fileno(), pending) :]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            pending = b""
            selector.unregister(target)
            return False
        if not pending:
            selector.unregister(target)
            selector.register(source, selectors.EVENT_READ, take)
        return False

    selector.register(source, selectors.EVENT_READ, take)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended. It is not collected, so its number, which is its group's, is not given away."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


_GUARDIAN = """read -r word || { kill -s KILL -- "-$1"; rm -rf -- "$2"; }"""


@contextlib.contextmanager
def _guardian(group: int, directory: Path) -> Iterator[None]:
    """Start a process that kills the group and removes the directory if this process is killed before it could."""
    guardian = subprocess.Popen(
        ["/bin/sh", "-c", _GUARDIAN, "sh", str(group), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            guardian.communicate(b"done\n")


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise an exception, as SIGINT does, so that what was started is ended first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
