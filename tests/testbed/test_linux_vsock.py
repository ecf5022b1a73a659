"""Linux's own driver of vsock, in a plain guest and in a software SEV guest, with programs at both ends.

The kernels are those of test_linux.py; their modules have to be beside them, in lib/modules. The guest's program is
tests/guests/vsock, which needs a C compiler.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from pagegate import Vm, devices, linux

from .conftest import MIB
from .test_linux import MEMORY, SECONDS, kernels, running_to_power_off

SOURCE = Path(__file__).parents[1] / "guests" / "vsock" / "vsock.c"
MODULES = ["virtio_pci", "vmw_vsock_virtio_transport"]
CID = 42
# What each line does, the host knows, too.
COMMAND = f"""mount -t tmpfs tmpfs /tmp
dd if=/dev/urandom of=/tmp/data bs={MIB} count=1 iflag=fullblock 2>/dev/null
sha256sum </tmp/data
vsock connect 52 'cat /tmp/data'
vsock connect 53 sha256sum
vsock connect 54 true || echo refused
vsock listen 22 cat
vsock listen 23 sh"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("vsock") / "vsock"
    flags = ["-static", "-nostdlib", "-fno-stack-protector", "-O1"]
    subprocess.run([compiler, *flags, "-o", path, SOURCE], check=True)
    return path


def listen(path: Path, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(SECONDS)
    listener.bind(f"{path}_{port}")
    listener.listen()
    return listener


def accept(listener: socket.socket) -> socket.socket:
    stream, _ = listener.accept()
    stream.settimeout(SECONDS)
    return stream


def connect(path: Path, port: int) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(SECONDS)
    stream.connect(str(path))
    stream.sendall(b"CONNECT %d\n" % port)
    answer = stream.makefile("rb", buffering=0).readline()
    assert answer.startswith(b"OK "), answer
    return stream


@contextmanager
def no_room_in_epoll():
    """This user has as many watches as it may have."""
    limit = Path("/proc/sys/fs/epoll/max_user_watches")
    before = limit.read_text()
    limit.write_text("0")
    try:
        yield
    finally:
        limit.write_text(before)


def read_all(stream: socket.socket) -> bytes:
    return b"".join(iter(lambda: stream.recv(1 << 16), b""))


def exchange(stream: socket.socket, data: bytes) -> bytes:
    """What the other side answers to these bytes, while they are being sent and after that."""

    def send() -> None:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    answer = read_all(stream)
    sender.join()
    return answer


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("confidential", [None, "sev"])
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_streams_in_both_directions(kernel, confidential, program, tmp_path) -> None:
    initrd, path = tmp_path / "initrd", tmp_path / "vsock"
    files = {"/bin/vsock": program}
    initrd.write_bytes(linux.build(command=COMMAND, modules=MODULES, kernel=kernel, files=files))
    data = random.Random(13).randbytes(MIB)
    with Vm(MEMORY, platform="pc", confidential=confidential, events=8192) as vm:
        vm.add_device(devices.Vsock(CID, path))
        vm.boot(kernel, initrd=initrd, append="quiet")
        with listen(path, 52) as uploads, listen(path, 53) as downloads, running_to_power_off(vm):
            with accept(uploads) as stream:
                uploaded = read_all(stream)
            with accept(downloads) as stream:
                assert exchange(stream, data) == f"{hashlib.sha256(data).hexdigest()}  -\n".encode()
            vm.console.expect("refused", timeout=SECONDS)
            vm.console.expect("listening", timeout=SECONDS)
            with no_room_in_epoll(), socket.socket(socket.AF_UNIX) as stream:
                stream.settimeout(SECONDS)
                stream.connect(str(path))
                assert stream.recv(1) == b"", "it is refused, and the run goes on"
            with connect(path, 22) as stream:
                assert exchange(stream, data[: MIB // 4]) == data[: MIB // 4]
            vm.console.expect("listening", timeout=SECONDS)
            with connect(path, 23) as stream:
                assert exchange(stream, b"echo $((6 * 7))\n") == b"42\n"
        output = vm.console.tail(1 << 16).decode()
        assert f"{hashlib.sha256(uploaded).hexdigest()}  -\r\n" in output
        assert len(uploaded) == MIB
        assert not [event for event in vm.events if event.kind == "device"]
    assert not path.exists()
