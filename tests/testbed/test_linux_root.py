"""`pagegate boot` with a Debian root file system on a disk: a login on hvc0, and a shell over vsock.

PAGEGATE_TEST_GUESTS   a folder with kernels, as in test_linux.py, and with their modules in lib/modules. One is booted.
PAGEGATE_TEST_ROOT     the disk, which examples/linux_root.sh has made; it has to be writable
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from .test_linux import EXPLICIT, GIVE, IMPLICIT, kernels

if TYPE_CHECKING:
    from pathlib import Path

ROOT = os.environ.get("PAGEGATE_TEST_ROOT")
SECONDS = 300
"""Until the login. It takes 40 s, and more while the host does other things."""
PORT = 52


class Terminal:
    """A process's standard input and standard error, as a guest's console."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.output = b""
        self._unread = b""

    def expect(self, text: bytes, seconds: float) -> None:
        """Waits until the output after what was expected before has this text."""
        end = time.monotonic() + seconds
        file = self._process.stderr.fileno()
        while text not in self._unread:
            left = end - time.monotonic()
            assert left > 0, f"no {text!r} within {seconds} s in {self.output.decode(errors='replace')}"
            if select.select([file], [], [], left)[0]:
                data = os.read(file, 1 << 16)
                assert data, f"it ended before {text!r}: {self.output.decode(errors='replace')}"
                self.output += data
                self._unread += data
        self._unread = self._unread.partition(text)[2]

    def type(self, line: bytes) -> None:
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()


@contextmanager
def booted(*arguments: object):
    command = [sys.executable, "-m", "pagegate", "boot", *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def over_vsock(path: Path, line: bytes) -> bytes:
    """What the guest's shell writes until it has ended."""
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(60)
        stream.connect(str(path))
        stream.sendall(b"CONNECT %d\n" % PORT)
        lines = stream.makefile("rb")
        answer = lines.readline()
        assert answer.startswith(b"OK "), answer
        stream.sendall(line + b"; exit\n")
        return lines.read()


@pytest.mark.skipif(ROOT is None, reason="$PAGEGATE_TEST_ROOT names no disk: make one with examples/linux_root.sh")
@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.parametrize("confidential", ["none", "sev"])
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_a_debian_root_file_system(kernel, confidential, tmp_path) -> None:
    path = tmp_path / "vsock"
    arguments = ["--disk", ROOT, "--append", "root=/dev/vda quiet", "--confidential", confidential, "--json"]
    begun = time.monotonic()

    def told(what: str) -> None:
        print(f"{kernel.name}, {confidential}: {what} after {time.monotonic() - begun:.0f} s")

    with booted(kernel, *arguments, "--console", "hvc0", "--vsock", f"3:{path}", "--rng") as process:
        hvc0 = Terminal(process)
        hvc0.expect(b"guest login: ", SECONDS)
        told("login")
        hvc0.type(b"root")
        hvc0.expect(b"~# ", 60)
        word = f"{confidential}-{os.getpid()}".encode()
        hvc0.type(b"tty; echo " + word + b" >/root/said; . /etc/os-release; echo $ID-$((6 * 7))")
        hvc0.expect(b"/dev/hvc0\r\n", 60)
        hvc0.expect(b"debian-42\r\n", 60)
        told("a command on hvc0")
        answer = over_vsock(path, b"cat /root/said; id -un; dmesg | grep -c 'Encryption Features active: AMD SEV'")
        assert answer.split() == [word, b"root", b"1" if confidential == "sev" else b"0"]
        told("a command over vsock")
        hvc0.type(b"poweroff")
        process.stdin.close()
        # Read at the same time, so that neither pipe is full.
        process.stdin = None
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        facts = json.loads(out)
        told("power-off")
    assert (facts["reason"], facts["confidential"]) == ("poweroff", confidential)
    assert (facts["device_accesses"], facts["denied"], facts["malformed"]) == (0, 0, 0)
    if confidential == "sev":
        assert abs(facts["implicit"] - IMPLICIT) <= GIVE
        assert facts["explicit"] >= EXPLICIT - GIVE
    else:
        assert facts["requests"] == 0
    assert not path.exists()
    # The file system was left in order, and has what the guest wrote.
    subprocess.run(["e2fsck", "-fn", ROOT], check=True, capture_output=True)
    said = subprocess.run(["debugfs", "-R", "cat /root/said", ROOT], check=True, capture_output=True).stdout
    assert said.strip() == word
