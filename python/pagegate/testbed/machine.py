"""Boot the machine, run one command in it, and bring back its output and exit status.

virtme-ng's `vng` starts QEMU with the host's file system as root. The command does not use vng's own streams: it has
virtio ports of its own, so that nothing of the kernel's or of vng's is mixed into its output, and so that its exit
status cannot be mistaken for vng's. What vng, QEMU and the kernel print is kept back, and shown only if the machine
dies.
"""
# Starting programs is what this module does.
# ruff: noqa: S603

import contextlib
import fnmatch
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from pagegate.errors import TestbedError
from pagegate.testbed.kernel import find_kernel

DEFAULT_CPUS = 2
DEFAULT_MEMORY = "4G"

BOOT_LIMIT = 300.0
"""Seconds until a machine that has not come to the command is given up."""

SHUTDOWN_LIMIT = 20.0
"""Seconds from the command's end until the machine is ended by force."""

UNWIND_LIMIT = 2.0
"""Seconds that vng has to end by itself once its QEMU was killed."""

TAIL_LINES = 20
"""Console lines that are shown when the machine dies."""

PASSED_ENVIRONMENT = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TERM", "COLUMNS", "LINES", "CI"),
    *("NO_COLOR", "FORCE_COLOR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PAGEGATE_*", "PYTEST_*", "PYTHON*", "HYPOTHESIS_*"),
    *("COVERAGE_*", "COV_*", "RUST_*", "RUSTUP_*", "CARGO_*"),
)
"""Names, with wildcards, of the caller's variables that the command sees."""

# virtme-ng lays an overlay over the first, and file systems of the machine's own over the second.
_OVERLAID = tuple(map(Path, ("/etc", "/lib", "/home", "/opt", "/srv", "/usr", "/var", "/tmp")))  # noqa: S108
_HIDDEN = tuple(map(Path, ("/dev", "/proc", "/run", "/sys", "/var/cache", "/var/log", "/var/tmp")))  # noqa: S108

_MEMORY = re.compile(r"[1-9][0-9]*[MG]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")
_MOUNT_9P = "version=9p2000.L,trans=virtio,access=any,msize=512000"


class TestbedTimeoutError(TestbedError, TimeoutError):
    """The command had not ended when its time was up; the machine was stopped."""

    __test__ = False


class Sink(Protocol):
    """Where the command's output goes: a binary file, or anything else that can be written to and flushed."""

    def write(self, data: bytes, /) -> object: ...  # noqa: D102
    def flush(self) -> object: ...  # noqa: D102


def run(  # noqa: PLR0913
    argv: Sequence[str | os.PathLike[str]],
    *,
    kernel: str | os.PathLike[str] | None = None,
    cpus: int | None = None,
    memory: str = DEFAULT_MEMORY,
    deterministic: bool = False,
    rw: Sequence[str | os.PathLike[str]] = (),
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    stdin: int | None = None,
    stdout: Sink | None = None,
    stderr: Sink | None = None,
) -> int:
    """Run a command in the machine and return its exit status, 128+n if signal n ended it.

    The command runs as root, in the caller's current directory, with the caller's variables that `PASSED_ENVIRONMENT`
    names and `PAGEGATE_TESTBED=1`. It sees the host's file system. What it writes there is gone when the machine ends,
    except below a directory of `rw`.

    Args:
        argv: the command and its arguments, which arrive exactly as they are.
        kernel: the kernel image; None looks for one as `find_kernel` does.
        cpus: how many CPUs the command has; None is 2, or 1 if `deterministic`.
        memory: the machine's memory, with the unit M or G (MiB or GiB).
        deterministic: the machine's clock counts instructions, one nanosecond each. Needs one CPU.
        rw: directories that are the host's own, writable.
        env: variables to set beside the passed ones, or instead of them.
        timeout: seconds, boot included, until the machine is stopped.
        stdin: a file descriptor that the command reads; None is empty input.
        stdout: takes the command's standard output as it comes; None is this program's.
        stderr: takes the command's standard error as it comes; None is this program's.

    Raises:
        TestbedError: something that the machine needs is missing, or the machine died before the command ended.
        TestbedTimeoutError: `timeout` passed first.
        ValueError: the arguments make no sense.

    """
    command = [os.fspath(word) for word in argv]
    if not command:
        raise ValueError("argv is empty: name the command to run")
    if cpus is None:
        cpus = 1 if deterministic else DEFAULT_CPUS
    if cpus < 1:
        raise ValueError(f"cpus is {cpus}: a machine has at least 1")
    if deterministic and cpus != 1:
        raise ValueError(f"deterministic needs cpus=1, not {cpus}: only one CPU's instructions can be the clock")
    if not _MEMORY.fullmatch(memory):
        raise ValueError(f"memory is {memory!r}: write a whole number and its unit, as 512M or 4G")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"timeout is {timeout}: it must be above 0 seconds")
    machine = _Machine(
        command=command,
        kernel=find_kernel(kernel),
        cpus=cpus,
        memory=memory,
        deterministic=deterministic,
        writable=_writable_directories(rw),
        environment=_environment(os.environ, env or {}),
        tools=find_tools(),
    )
    out = stdout if stdout is not None else _own_stream("stdout")
    err = stderr if stderr is not None else _own_stream("stderr")
    with tempfile.TemporaryDirectory(prefix="pagegate-testbed-", dir=_plain_temporary_directory()) as directory:
        return _Run(machine, Path(directory), stdin, out, err, timeout).wait()


@dataclass(frozen=True)
class Tools:
    """The programs of the host that the machine needs."""

    vng: Path
    qemu: Path


def find_tools() -> Tools:
    """Find virtme-ng, QEMU and udev.

    Raises:
        TestbedError: one is missing; the message names its package.

    """
    # Not resolved: in a virtual environment the interpreter is a link to one whose neighbours are others.
    beside = Path(sys.executable).parent / "vng"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vng")
    if found is None:
        raise TestbedError("the testbed needs virtme-ng: pip install 'pagegate[testbed]'")
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise TestbedError(
            "the testbed needs QEMU's qemu-system-x86_64: install the package qemu-system-x86 (Debian, Ubuntu) or "
            "qemu-system-x86-core (Fedora)"
        )
    if not _has_udev():
        raise TestbedError(
            "the testbed needs udev, without which a command's output is lost: install the package udev (Debian, "
            "Ubuntu)"
        )
    return Tools(vng=Path(found), qemu=Path(qemu))


def _has_udev() -> bool:
    daemons = ("/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd")
    return any(os.access(daemon, os.X_OK) for daemon in daemons) or shutil.which("udevd") is not None


def _environment(caller: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    passed = {
        name: value
        for name, value in caller.items()
        if _VARIABLE.fullmatch(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in PASSED_ENVIRONMENT)
    }
    for name in extra:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name for an environment variable")
    return {**passed, "PAGEGATE_TESTBED": "1", **extra}


def _writable_directories(rw: Sequence[str | os.PathLike[str]]) -> tuple[Path, ...]:
    directories = {Path(path).resolve() for path in rw}
    for directory in directories:
        if not directory.is_dir():
            raise TestbedError(f"{directory} cannot be made writable in the testbed: it is no directory")
        if directory == Path("/"):
            raise TestbedError("the testbed's whole root cannot be writable: name a directory below it")
    # Shortest first, so that a mount does not cover one below it.
    return tuple(sorted(directories, key=lambda path: (len(path.parts), path)))


def _plain_temporary_directory() -> str:
    """A directory that the machine sees and whose name needs no quoting anywhere between vng, its shell and QEMU."""
    directory = tempfile.gettempdir()
    if _PLAIN_PATH.fullmatch(directory) and not _is_below(Path(directory), _HIDDEN):
        return directory
    return "/tmp"  # noqa: S108


def _is_below(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _own_stream(name: str) -> Sink:
    stream = getattr(sys, name)
    if stream is None:
        # This program was started with the stream closed.
        return _Tail()
    stream.flush()
    return stream.buffer if hasattr(stream, "buffer") else _TextSink(name)


class _TextSink:
    """Output for a `sys.stdout` that somebody replaced by one that takes only text."""

    def __init__(self, name: str) -> None:
        self._stream = getattr(sys, name)

    def write(self, data: bytes, /) -> object:
        return self._stream.write(data.decode(errors="replace"))

    def flush(self) -> object:
        return self._stream.flush()


@dataclass(frozen=True)
class _Machine:
    command: list[str]
    kernel: Path
    cpus: int
    memory: str
    deterministic: bool
    writable: tuple[Path, ...]
    environment: dict[str, str]
    tools: Tools

    def _all_cpus(self) -> int:
        """How many CPUs the machine has: one more than the command, where that has several.

        Whenever a CPU restores the state of its FPU, QEMU (7.2, and its development sources since) clears a flag of
        the first CPU, without a lock, and may so write back others that just changed: that it is in a guest. It then
        takes interrupts that are switched off, or its own page tables for a guest's, and the machine hangs or dies. On
        the other CPUs guests are safe.
        """
        return self.cpus + 1 if self.cpus > 1 else 1

    def vng_arguments(self, directory: Path) -> list[str]:
        """Return the call of vng.

        Every path in it lies in the run's own directory: vng passes most of its arguments through a shell without
        quoting them, and QEMU splits its options at commas.
        """
        qemu = ["-cpu", "max,+svm,+npt", "-pidfile", f"{directory}/pid", "-device", "virtio-serial-pci,id=pagegate"]
        for port, file in (("out", "out"), ("err", "err"), ("devout", "out"), ("deverr", "err"), ("status", "status")):
            qemu += ["-chardev", f"file,id=pagegate-{port},path={directory / file}"]
            qemu += ["-device", f"virtserialport,bus=pagegate.0,name=pagegate.{port},chardev=pagegate-{port}"]
        for index in range(len(self.writable)):
            export = f"local,path={directory}/rw{index},mount_tag=pagegate{index},security_model=none,multidevs=remap"
            qemu += ["-virtfs", export]
        if self.deterministic:
            qemu += ["-icount", "shift=0,sleep=off"]
        return [
            *(str(self.tools.vng), "--run", f"{directory}/kernel", "--name", "pagegate", "--user", "root", "--verbose"),
            *("--disable-kvm", "--force-9p", "--disable-microvm"),
            *("--cpus", str(self._all_cpus()), "--memory", self.memory),
            *("--qemu-opts=" + " ".join(qemu), "--exec", f"exec /bin/sh {directory}/launch"),
        ]

    def launch_script(self, *, with_stdin: bool) -> str:
        """Return the shell script that the machine runs.

        It sets the file systems up, runs the command and reports its status.
        """
        cwd = Path.cwd()
        if _is_below(cwd, _HIDDEN) and not _is_below(cwd, self.writable):
            raise TestbedError(
                f"the testbed has a {cwd} of its own, so that the command cannot run there: change the directory, "
                "or make it writable with --rw"
            )
        lines = [
            "cd /",
            "exec 3>/dev/virtio-ports/pagegate.status",
            """fail() { echo "failed $*" >&3; exit 1; }""",
            """test -c /dev/kvm || fail "its kernel offers no /dev/kvm\"""",
            "ln -sfn /dev/virtio-ports/pagegate.devout /dev/stdout",
            "ln -sfn /dev/virtio-ports/pagegate.deverr /dev/stderr",
        ]
        if self._all_cpus() > self.cpus:
            # A kernel may be built for fewer; then the command has all that there are.
            lines.append(
                f"test $(grep -c ^processor /proc/cpuinfo) -le {self.cpus} || taskset -cp 1-{self.cpus} $$ >/dev/null "
                "|| fail the package util-linux is not installed"
            )
        for index, directory in enumerate(self._forgetful_directories(cwd)):
            where, layer = shlex.quote(str(directory)), f"/run/pagegate/{index}"
            # The lower directory is "." because a path in these options would need an escaping of its own.
            lines.append(
                f"mkdir -p {layer}/upper {layer}/work && (cd {where} && "
                f"mount -t overlay -o xino=off,lowerdir=.,upperdir={layer}/upper,workdir={layer}/work pagegate {where})"
            )
        for index, directory in enumerate(self.writable):
            where = shlex.quote(str(directory))
            lines.append(
                f"mkdir -p {where} && mount -t 9p -o {_MOUNT_9P} pagegate{index} {where} "
                f"|| fail cannot make {where} writable"
            )
        assignments = [f"{name}={value}" for name, value in self.environment.items()]
        call = ["env", "-i", *assignments, "/bin/sh", "-c", 'exec "$@"', "sh", *self.command]
        lines += [
            f"cd -- {shlex.quote(str(cwd))} || fail cannot enter {shlex.quote(str(cwd))}",
            "echo started >&3",
            # In a subshell: a shell names the signal that ended its child on its own error stream, which is not to be
            # the command's.
            f"(exec {'' if with_stdin else '</dev/null'} 3>&-",
            "exec >/dev/virtio-ports/pagegate.out 2>/dev/virtio-ports/pagegate.err",
            f"exec {shlex.join(call)})",
            "echo exited $? >&3",
        ]
        return "\n".join(lines) + "\n"

    def _forgetful_directories(self, cwd: Path) -> list[Path]:
        """Directories that programs expect to be able to write to, which would be read-only otherwise."""
        chosen: list[Path] = []
        for directory in sorted({Path(self.environment.get("HOME", "")), cwd}):
            written = (*_OVERLAID, *_HIDDEN, *self.writable, *chosen)
            sensible = directory.is_absolute() and directory != Path("/") and directory.is_dir()
            if sensible and not _is_below(directory, written):
                chosen.append(directory)
        return chosen


@dataclass
class _Tail:
    """The last lines of what vng, QEMU and the kernel printed."""

    text: bytes = b""

    def write(self, data: bytes, /) -> object:
        self.text = (self.text + data)[-65536:]
        return len(data)

    def flush(self) -> object:
        return None

    def lines(self) -> list[str]:
        lines = (line.rstrip() for line in self.text.decode(errors="replace").replace("\r", "\n").splitlines())
        return [line for line in lines if line]

    def panic_line(self) -> str | None:
        return next((line.partition("Kernel panic - ")[2] for line in self.lines() if "Kernel panic - " in line), None)


@dataclass
class _Run:
    """One machine from its start to its end."""

    machine: _Machine
    directory: Path
    stdin: int | None
    stdout: Sink
    stderr: Sink
    timeout: float | None
    console: _Tail = field(default_factory=_Tail)

    def wait(self) -> int:
        """Start the machine and see it to its end; return the command's exit status."""
        launch = self.machine.launch_script(with_stdin=self.stdin is not None)
        (self.directory / "launch").write_bytes(os.fsencode(launch))
        (self.directory / "kernel").symlink_to(self.machine.kernel)
        for index, path in enumerate(self.machine.writable):
            (self.directory / f"rw{index}").symlink_to(path)
        with contextlib.ExitStack() as stack:
            selector = stack.enter_context(selectors.PollSelector())
            for name, sink in (("out", self.stdout), ("err", self.stderr)):
                os.mkfifo(self.directory / name)
                # Opened before QEMU opens the other end, which therefore does not wait.
                reader = os.open(self.directory / name, os.O_RDONLY | os.O_NONBLOCK)
                stack.callback(os.close, reader)
                _forward(selector, reader, sink)
            stack.enter_context(stopped_by_signals())
            process = stack.enter_context(self._started())
            if process.stdout is not None:
                _forward(selector, process.stdout.fileno(), self.console)
            if self.stdin is not None and process.stdin is not None:
                _feed(selector, self.stdin, process.stdin)
            self._pump(process, selector)
            return self._exit_status()

    @contextlib.contextmanager
    def _started(self) -> Iterator[subprocess.Popen[bytes]]:
        tools = self.machine.tools
        # vng calls its siblings by name, and leaves files behind if it is killed.
        path = os.pathsep.join([str(tools.vng.parent), os.environ.get("PATH", os.defpath)])
        try:
            process = subprocess.Popen(
                self.machine.vng_arguments(self.directory),
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
            # QEMU first: those above it then collect it and end by themselves. Killing all at once would leave that to
            # init, which in a container may never do it.
            if not _has_ended(process) and self._kill_qemu(process.pid):
                given_up = time.monotonic() + UNWIND_LIMIT
                while not _has_ended(process) and time.monotonic() < given_up:
                    time.sleep(0.02)
        finally:
            # The leader is collected only afterwards, so that the group's number is still its own.
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
    """Do what can be done, waiting up to `wait` seconds for something; False if nothing came of it."""
    came = [bool(key.data()) for key, _ in selector.select(wait)]
    return any(came)


def _forward(selector: selectors.BaseSelector, source: int, sink: Sink) -> None:
    """From now on pass what can be read from the source on to the sink."""

    def forward() -> bool:
        data = os.read(source, 65536)
        if data:
            sink.write(data)
            sink.flush()
        else:
            selector.unregister(source)
        return bool(data)

    selector.register(source, selectors.EVENT_READ, forward)


def _feed(selector: selectors.BaseSelector, source: int, target: IO[bytes]) -> None:
    """From now on pass what can be read from the source on to the target, and close the target at the source's end.

    Reads only after what was read before is written, so that no more is taken than the command could take.
    """
    os.set_blocking(target.fileno(), False)
    pending = b""

    def take() -> bool:
        nonlocal pending
        try:
            pending = os.read(source, 65536)
        except BlockingIOError:
            return False
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
    """Whether the process has ended; it is not collected, so that its number, which is its group's, stays taken."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


_GUARDIAN = """read -r word || { kill -s KILL -- "-$1"; rm -rf -- "$2"; }"""


@contextlib.contextmanager
def _guardian(group: int, directory: Path) -> Iterator[None]:
    """A process that kills the group and removes the directory if this one dies without having been able to."""
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
    """Let SIGTERM and SIGHUP unwind the program, as SIGINT does, so that they do not leave the machine behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
