"""What is named as an image, a kernel, an initrd or a policy: pipes, devices without an end, files made to do harm."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from pagegate import Vm
from pagegate.errors import PolicyError
from pagegate.loading import policy_file
from pagegate.testing import Fake

ALLOW = "from pagegate.policies import Allow\npolicy = Allow()\n"
HOOK = "def map_gpa_range(call):\n    return 5\n"
MEMORY = 1 << 20


def elf(segments: list[tuple[int, int]]) -> bytes:
    """An ELF file with these segments, gpa and size, all of them zeroes."""
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    return header + b"".join(struct.pack("<IIQQQQQQ", 1, 7, 0, gpa, gpa, 0, size, 1) for gpa, size in segments)


@pytest.fixture
def vm():
    with Vm(MEMORY, hypervisor=Fake([])) as vm:
        yield vm


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    yield tmp_path / "pipe"
    # What reads the source of all modules would wait for a writer.
    (tmp_path / "pipe").unlink()


@contextmanager
def written(pipe, data):
    writer = threading.Thread(target=lambda: pipe.write_bytes(data), daemon=True)
    writer.start()
    yield
    writer.join(10)
    assert not writer.is_alive()


def test_thousands_of_segments_as_large_as_memory(vm, tmp_path) -> None:
    (tmp_path / "image").write_bytes(elf([(0, MEMORY)] * 65_534))
    begin = time.monotonic()
    with pytest.raises(ValueError, match="two ELF segments overlap"):
        vm.load(tmp_path / "image")
    (tmp_path / "image").write_bytes(elf([(at * 16, 16) for at in range(65_534)]))
    vm.load(tmp_path / "image")
    assert time.monotonic() - begin < 20


def test_an_image_outside_memory_leaves_it_as_it_was(vm, tmp_path) -> None:
    vm.write(0x1000, b"kept")
    (tmp_path / "image").write_bytes(elf([(0x1000, 4096), (MEMORY - 4096, 8192)]))
    with pytest.raises(ValueError, match="lie outside the guest's"):
        vm.load(tmp_path / "image")
    assert vm.read(0x1000, 4) == b"kept"


def test_an_image_comes_through_a_pipe(vm, pipe) -> None:
    with written(pipe, b"\x90" * 100_000):
        assert vm.load(pipe, 0x2000) == 0x2000
    assert vm.read(0x2000, 100_000) == b"\x90" * 100_000


@pytest.mark.parametrize("option", ["kernel", "initrd"])
def test_devices_without_an_end(vm, tmp_path, option) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match="/dev/zero: it is a character device, which need not have an end"):
        vm.load("/dev/zero")
    with Vm(64 << 20, hypervisor=Fake([]), platform="pc") as pc:
        (tmp_path / "vmlinuz").write_bytes(b"x")
        kernel, initrd = ("/dev/zero", None) if option == "kernel" else (tmp_path / "vmlinuz", "/dev/zero")
        with pytest.raises(ValueError, match="/dev/zero: it is a character device, which need not have an end"):
            pc.boot(kernel, initrd=initrd)
    assert time.monotonic() - begin < 5, "it is not read"


def test_a_pipe_without_an_end(vm, pipe) -> None:
    """It is read to the limit."""

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), pipe.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))

    threading.Thread(target=write, daemon=True).start()
    with pytest.raises(ValueError, match="pipe: it has more than 1073741824 bytes, or no end"):
        vm.load(pipe)


INTERRUPTED = """
import signal, sys
from pagegate import Vm
from pagegate.testing import Fake
with Vm(64 << 20, hypervisor=Fake([]), platform="pc") as vm:
    print("begins", flush=True)
    vm.load(sys.argv[1]) if sys.argv[2] == "load" else vm.boot(sys.argv[1])
"""


@pytest.mark.parametrize("what", ["load", "boot"])
def test_ctrl_c_while_a_pipe_is_waited_for(pipe, what) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, pipe, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "begins\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=10)
    assert "KeyboardInterrupt" in told


# ---- policies


def test_a_policy_comes_through_a_pipe(pipe) -> None:
    with written(pipe, ALLOW.encode()):
        policy_file.load(pipe)
    # Its text is looked at, too, for answers that are no decision.
    with written(pipe, HOOK.encode()), pytest.raises(PolicyError, match="line 2: map_gpa_range returns 5"):
        policy_file.load(pipe)


def test_policies_without_an_end(tmp_path) -> None:
    with pytest.raises(PolicyError, match="/dev/zero cannot be loaded: .*it has more than 16777216 bytes, or no end"):
        policy_file.load("/dev/zero")
    (tmp_path / "large.py").write_bytes(b"#" * ((16 << 20) + 1))
    with pytest.raises(PolicyError, match=r"large.py cannot be loaded: .*16777216"):
        policy_file.load(tmp_path / "large.py")


# ---- the command line


def pagegate(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "pagegate", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=60
    )


@pytest.mark.kvm
def test_the_timeout_holds_while_the_guest_is_loaded(tmp_path, pipe) -> None:
    (tmp_path / "allow.py").write_text(ALLOW)
    done = pagegate("run", "-p", "allow.py", pipe, "--timeout", "0.5", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "Error: --timeout: the guest was not loaded within 0.5 s\n")


@pytest.mark.kvm
def test_a_device_as_an_image(tmp_path) -> None:
    (tmp_path / "allow.py").write_text(ALLOW)
    done = pagegate("run", "-p", "allow.py", "/dev/zero", cwd=tmp_path)
    assert done.returncode == 2
    assert "/dev/zero cannot be started" in done.stderr
    assert "it is a character device" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        *(("run", "-p", "allow.py", "--guest", "touch", "--timeout", each) for each in ("nan", "inf", "1e400", "1e10")),
        ("run", "-p", "allow.py", "--guest", "touch", "--memory", "17T"),
        ("run", "-p", "allow.py", "--guest", "touch", "--memory", "9" * 5000),
        ("run", "-p", "allow.py", "--guest", "touch", "--vcpus", "5000"),
        ("run", "-p", "allow.py", "--guest", "touch", "--shared-bit", str(1 << 70)),
        ("run", "-p", "allow.py", "--guest", "touch", "--shared-bit", "-1"),
        ("run", "-p", "allow.py", "--guest", "touch", "--events", "e.arrow", "--events-limit", str(1 << 64)),
        ("run", "-p", "allow.py", "--guest", "touch", "--policy-timeout", "nan"),
        ("boot", "allow.py", "--timeout", "nan"),
        ("boot", "allow.py", "-p", "allow.py", "--policy-timeout", "0"),
        ("boot", "allow.py", "--vcpus", "nan"),
        ("replay", "allow.py", "-p", "allow.py", "--show", str(1 << 64)),
        ("replay", "allow.py", "-p", "allow.py", "--memory", "17T"),
        ("trace", "e.arrow", "--requests", str(1 << 40)),
        ("trace", "e.arrow", "--requests", "nan"),
        ("bench", "--requests", "nan"),
        ("testbed", "--timeout", "nan", "--", "true"),
        ("testbed", "--cpus", str(1 << 40), "--", "true"),
    ],
)
def test_numbers_that_make_no_sense(tmp_path, arguments) -> None:
    (tmp_path / "allow.py").write_text(ALLOW)
    done = pagegate(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    assert f"'{own[-2]}'" in done.stderr
