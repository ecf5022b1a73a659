"""Readers of a command's output that stall do not keep it from ending; one that is only slow gets everything."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from array import array

import pytest

from .boot_parts import command as boot_command
from .boot_parts import write_kernel

CHATTER = b"\xb0x\xe6\xe9\xeb\xfc"  # mov al, 'x'; out 0xe9, al; jmp to the out
SAID = b"p" * 4000
TIMEOUT = 2
LATE = 2.5
"""Seconds after which a command that is to end has ended: half a second of patience, and the end of a Python process
on a busy machine."""
DROPPED = re.compile(rb"pagegate: (\d+) bytes of output are dropped: nobody read them\n")


@pytest.fixture
def run(tmp_path):
    """`pagegate run` with a guest that never stops writing.

    Its policy has nearly filled the pipe: on a busy machine a guest writes less than a pipe's size in `TIMEOUT`.
    """
    (tmp_path / "image").write_bytes(CHATTER)
    text = f"from pagegate import *\nprint({SAID.decode()!r}, end='', flush=True)\npolicy = policies.Allow()\n"
    (tmp_path / "allow.py").write_text(text)
    return [sys.executable, "-m", "pagegate", "run", "-p", str(tmp_path / "allow.py"), str(tmp_path / "image")]


@pytest.fixture
def boot(tmp_path):
    """`pagegate boot` with a guest that writes more than a pipe holds, and hangs."""
    return boot_command(write_kernel(tmp_path), guest="hangs", says=b"0123456789abcdef" * 512)


@pytest.fixture(params=["run", "boot"])
def both(request):
    if request.param == "run" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    return request.getfixturevalue(request.param)


class Piped:
    """A process whose output goes into a pipe that is as small as one can be."""

    def __init__(self, command, *, stderr: bool = False) -> None:
        self.reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        self.writer = writer
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer if stderr else subprocess.PIPE
        )

    def wait_until_full(self) -> float:
        """Returns when it was: nothing has come for half a second."""
        now = time.monotonic()
        end, since, before = now + 30, now, 0
        while not before or now - since < 0.5:
            assert now < end, self.process.poll()
            held = array("i", [0])
            fcntl.ioctl(self.reader, termios.FIONREAD, held)
            now = time.monotonic()
            if held[0] != before:
                since, before = now, held[0]
            time.sleep(0.01)
        return since

    def ends_by(self, at: float) -> int:
        return self.process.wait(at - time.monotonic())

    def rest(self) -> bytes:
        os.close(self.writer)
        with os.fdopen(os.dup(self.reader), "rb") as file:
            return file.read()

    def errors(self) -> bytes:
        return self.process.stderr.read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        os.close(self.reader)
        with contextlib.suppress(OSError):
            os.close(self.writer)


@pytest.fixture
def piped():
    with contextlib.ExitStack() as made:

        def piped(*command, **more) -> Piped:
            one = Piped(command, **more)
            made.callback(one.close)
            return one

        yield piped


def test_the_timeout_holds_though_nobody_reads(both, piped) -> None:
    one = piped(*both, "--timeout", str(TIMEOUT))
    assert one.ends_by(one.wait_until_full() + TIMEOUT + LATE) == 0
    assert int(DROPPED.search(one.errors())[1]) > 0


def test_what_was_written_and_what_was_dropped_is_all(boot, piped) -> None:
    read = subprocess.run([*boot, "--timeout", str(TIMEOUT)], capture_output=True, timeout=30, check=True).stdout
    one = piped(*boot, "--timeout", str(TIMEOUT))
    one.process.wait(30)
    assert len(one.rest()) + int(DROPPED.search(one.errors())[1]) == len(read)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_though_nobody_reads(both, piped, number, status) -> None:
    one = piped(*both)
    one.wait_until_full()
    assert one.process.poll() is None
    one.process.send_signal(number)
    assert one.ends_by(time.monotonic() + LATE) == status
    assert DROPPED.search(one.errors())


def test_neither_stream_is_read(both, piped) -> None:
    one = piped(*both, "--timeout", str(TIMEOUT), stderr=True)
    assert one.ends_by(one.wait_until_full() + TIMEOUT + LATE) == 0


def test_the_open_file_stays_as_it_is(both, piped) -> None:
    one = piped(*both, "--timeout", str(TIMEOUT))
    one.wait_until_full()
    assert not fcntl.fcntl(one.writer, fcntl.F_GETFL) & os.O_NONBLOCK
    one.process.wait(30)
    assert not fcntl.fcntl(one.writer, fcntl.F_GETFL) & os.O_NONBLOCK


def _read_slowly(one: Piped, seconds: float) -> bytes:
    """Reads a little at a time until the process has ended and nothing is left."""
    parts = []
    while select.select([one.reader], [], [], 0.1)[0] or one.process.poll() is None:
        if select.select([one.reader], [], [], 0)[0]:
            parts.append(os.read(one.reader, 4096))
            time.sleep(seconds)
    return b"".join(parts)


def test_a_slow_reader_gets_everything(both, piped) -> None:
    one = piped(*both, "--timeout", str(TIMEOUT))
    output = _read_slowly(one, 0.1)
    assert one.process.returncode == 0
    assert not DROPPED.search(one.errors())
    assert output.endswith(b"\n")
    assert b"--timeout" in output or b"ended     timeout" in output


@pytest.mark.kvm
def test_a_run_that_has_ended_waits_for_its_reader(run, tmp_path, piped) -> None:
    # As much as three pipes hold: mov ecx, 12288; mov al, 'x'; out 0xe9, al; loop; hlt
    (tmp_path / "image").write_bytes(b"\xb9\x00\x30\x00\x00\xb0x\xe6\xe9\xe2\xfc\xf4")
    one = piped(*run)
    one.wait_until_full()
    time.sleep(1.5)
    assert one.process.poll() is None
    output = _read_slowly(one, 0)
    assert (one.process.returncode, one.errors()) == (0, b"")
    assert output.startswith(SAID + b"x" * 12288 + b"\n")


@pytest.mark.kvm
def test_what_a_policy_prints_keeps_no_run_from_ending(run, tmp_path, piped) -> None:
    text = "def memory_fault(fault):\n    print('y' * 99)\n    return Convert()\n"
    (tmp_path / "allow.py").write_text("from pagegate import *\n" + text + "map_gpa_range = memory_fault\n")
    arguments = [*run[:-1], "--guest", "pingpong", "--timeout", str(TIMEOUT)]
    one = piped(*arguments)
    assert one.ends_by(one.wait_until_full() + TIMEOUT + LATE) == 0
    assert DROPPED.search(one.errors())


@pytest.mark.kvm
def test_a_child_that_a_policy_forks_can_print(run, tmp_path) -> None:
    text = (
        "import os\npid = os.fork()\nif not pid:\n    print('from the child', flush=True)\n    os._exit(0)\n"
        "os.waitpid(pid, 0)\npolicy = policies.Allow()\n"
    )
    (tmp_path / "allow.py").write_text("from pagegate import *\nprint('before', flush=True)\n" + text)
    done = subprocess.run([*run, "--timeout", "1"], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"before\nfrom the child\nx")


def test_a_process_without_output_runs() -> None:
    command = f"exec {sys.executable} -m pagegate --version >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", command], timeout=30, check=False).returncode == 0


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "events.arrows"
    os.mkfifo(path)
    return path


def test_the_timeout_holds_while_a_reader_of_the_requests_is_waited_for(boot, fifo) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [*boot, "--timeout", "2", "--events", str(fifo)], capture_output=True, timeout=30, check=False
    )
    assert time.monotonic() - begun < 2 + LATE
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == f"Error: --timeout: nobody opened {fifo} within 2 s\n".encode()


@pytest.mark.parametrize("number", [signal.SIGINT, None], ids=["SIGINT", "timeout"])
def test_requests_that_nobody_reads_keep_no_run_from_ending(tmp_path, fifo, number) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    more = ["--timeout", "3"] if number is None else []
    command = boot_command(write_kernel(tmp_path), "--events", fifo, *more, guest="asks and hangs")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    begun = time.monotonic()
    if number is not None:
        assert select.select([reader], [], [], 30)[0]
        time.sleep(1)
        begun = time.monotonic()
        process.send_signal(number)
    _, told = process.communicate(timeout=30)
    os.close(reader)
    assert time.monotonic() - begun < LATE + (3 if number is None else 0)
    assert process.returncode == (1 if number is None else 130)
    said = [line for line in told.decode().splitlines() if line]
    assert said[-2 if number else -1 :] == [f"pagegate: {fifo}: nobody reads it", *(["interrupted"] if number else [])]


def stream(code):
    """Runs this with `out`, a stream of standard output, that is read by `cat`."""
    program = f"import sys, threading, time\nfrom pagegate.cli.streams import Stream\nout = Stream(1, 'out')\n{code}"
    line = '"$0" -c "$1" | wc -c'
    return subprocess.run(
        ["sh", "-c", line, sys.executable, program], capture_output=True, text=True, timeout=60, check=False
    )


def test_what_is_large_is_written_in_as_many_steps_as_it_has_pieces():
    seconds = "begun = time.monotonic(); out.write(bytes(size << 20)); took = time.monotonic() - begun"
    done = stream(f"for size in (1, 64): {seconds}\nprint(took, file=sys.stderr)")
    assert done.stdout.strip() == str(65 << 20)
    # By steps that copy the rest it takes a minute.
    assert float(done.stderr) < 10


def test_whoever_interrupts_a_write_can_write():
    done = stream(
        "start = threading.Thread.start\n"
        "def interrupted(thread):\n"
        "    threading.Thread.start = start\n"
        "    other = threading.Thread(target=out.write, args=(b'handler',)); other.start()\n"
        "    start(thread); other.join(20); print(other.is_alive(), file=sys.stderr)\n"
        "threading.Thread.start = interrupted\n"
        "out.write(b'written')\n"
    )
    assert (done.stdout.strip(), done.stderr) == ("14", "False\n")
