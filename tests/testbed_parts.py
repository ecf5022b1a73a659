"""Helpers of the tests of `pagegate testbed`."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from pagegate.testbed import kernel


def own_surroundings(tmp_path, monkeypatch) -> None:
    """Give the test a cache and a current directory of its own, and no kernel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(kernel.KERNEL_VARIABLE, raising=False)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def write_image(path: Path, release: str = "7.3.4") -> Path:
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x300).to_bytes(2, "little")
    text = f"{release} (someone@somewhere) #1".encode()
    image[0x500 : 0x500 + len(text)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    return path


def wait_until(condition) -> None:
    given_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < given_up
        time.sleep(0.02)


def wait_for_end(pid: int) -> None:
    """Wait until this process has ended; a zombie counts as ended."""

    def ended() -> bool:
        try:
            return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(ended)


def leaves_nothing_behind(program: str, pid: Path, end: signal.Signals) -> None:
    """End a Python program by a signal; the process that it started, with its id in ``pid``, must be gone then."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=subprocess.DEVNULL,
        # If the tests run in the background of a script, SIGINT is ignored, and the child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_until(lambda: pid.exists() and pid.read_text())
        process.send_signal(end)
        assert process.wait(timeout=10) != 0
    finally:
        process.kill()
        process.wait()
    wait_for_end(int(pid.read_text()))
