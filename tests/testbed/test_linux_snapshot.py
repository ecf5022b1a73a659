"""A stock kernel is put aside while it runs, and goes on in a new process: with its memory, its disk and its requests.

PAGEGATE_TEST_GUESTS    a folder with the kernels, as in test_linux.py, and with their modules in lib/modules
PAGEGATE_TEST_MODULES   a folder with a module built for them, as in test_linux_module.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from pagegate import Vm, devices, linux
from pagegate.linux.initramfs import STATUS
from pagegate.linux.kernel import image_release

from .conftest import MIB
from .test_linux import MEMORY, SECONDS, kernels
from .test_linux_devices import MODULES, file_on
from .test_linux_module import COUNTS

TRAPS = {"confidential": "sev", "enforcement": "traps"}
MEMSLOTS = {"confidential": "sev", "enforcement": "memslots"}
DATA = 8 * MIB
COMMAND = f"""uptimes() {{ for cpu in $(seq $(nproc)); do taskset $cpu cut -d ' ' -f 1 /proc/uptime; done; }}
mkdir /mnt && mount -t ext4 /dev/vda /mnt
mount -t tmpfs tmpfs /tmp
dd if=/dev/urandom of=/tmp/data bs={DATA} count=1 iflag=fullblock 2>/dev/null
sha256sum </tmp/data
(i=0; while [ ! -e /tmp/stop ]; do echo count $i $(date +%s; uptimes; date +%s); i=$((i+1)); sleep 0.2; done) &
read -r go
touch /tmp/stop; wait
sha256sum </tmp/data
cat /mnt/before
echo "written later" >/mnt/after
umount /mnt
[ ! -e /convert.ko ] || {{ insmod /convert.ko seconds=2 && dmesg | grep workers=; }}"""

# The wall clock, the uptime on each vCPU (there are at most two: their numbers are taken as masks), the wall clock.
TICK = re.compile(r"^count (\d+) (\d+) ([\d. ]+) (\d+)\r?$", re.MULTILINE)
TSC = 0x10
"""The MSR of the time-stamp counter."""
SLACK = 2
"""Seconds that it may take to be put aside and to go on."""
PAUSE = 5
"""Seconds that the guest is put aside, which its clocks do not count."""

GOES_ON = """
import json
import time
from pagegate import Vm, devices
begun = time.monotonic()
with Vm.resume({saved!r}, devices=[devices.Block({disk!r})], events=1 << 18, lazy={lazy}) as vm:
    first = vm.console.expect(r"count (\\d+)", timeout={seconds})[1].decode()
    seconds = time.monotonic() - begun
    read, pages = sum(page.size for page in vm.working_set()), [page.gpa for page in vm.working_set()]
    vm.console.expect(r"count 7 .*\\r\\n", timeout={seconds})
    vm.console.write("go\\n")
    report = vm.run(timeout={seconds})
    told = {{"first": int(first), "reason": report.reason, "requests": report.requests, "faults": report.faults}}
    told |= {{"hypercalls": report.hypercalls, "refused": report.device_accesses}}
    told |= {{"seconds": seconds, "read": read, "pages": len(pages), "distinct": len(set(pages))}}
    print(json.dumps(told | {{"output": vm.console.tail(1 << 20).decode(errors="replace")}}))
"""


def module(kernel: Path) -> dict[str, Path]:
    """The module for the initrd, if there is one for this kernel."""
    path = Path(os.environ.get("PAGEGATE_TEST_MODULES", "/nowhere"), f"convert-{image_release(kernel)}.ko")
    return {"/convert.ko": path} if path.is_file() else {}


def disk_with(folder: Path) -> Path:
    files, disk = folder / "files", folder / "disk.img"
    files.mkdir()
    (files / "before").write_text("written before\n")
    with disk.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(files), str(disk)], check=True)
    return disk


class Tick(NamedTuple):
    """What the guest has printed."""

    count: int
    first: int
    """The wall clock before the others, without the fraction."""
    uptimes: list[float]
    last: int
    """The wall clock after the others."""


def ticks(output: str) -> list[Tick]:
    found = TICK.finditer(output)
    return [Tick(int(each[1]), int(each[2]), [*map(float, each[3].split())], int(each[4])) for each in found]


class Clocks:
    """How the clocks of a guest have to go on that was put aside after this tick."""

    def __init__(self, saved: Path, before: Tick) -> None:
        self.before = before
        msrs = dict(json.loads((saved / "state.json").read_bytes())["vcpus"][0]["msrs"])
        self.known = msrs[TSC] != 0

    def check(self, output: str, seconds: float) -> None:
        """They go on from there at the same rate, and the first tick came so many seconds later at most."""
        after = ticks(output)
        assert [tick.count for tick in after] == list(range(self.before.count + 1, self.before.count + 1 + len(after)))
        assert len(after) > 2
        uptimes = [uptime for tick in (self.before, *after) for uptime in tick.uptimes]
        assert uptimes == sorted(uptimes)
        # The time at which the uptime was 0, as each tick has it: between these.
        least = max(tick.first - tick.uptimes[0] for tick in (self.before, *after))
        most = min(tick.last + 1 - tick.uptimes[-1] for tick in (self.before, *after))
        assert least < most + 0.1
        later = after[0].uptimes[0] - self.before.uptimes[-1]
        print(f"uptime {later:.2f} s later, {seconds:.2f} s after it went on")
        # Where KVM reads the counter as 0, as in the testbed, all the time since the guest's boot may be counted again.
        assert later < seconds + SLACK + (0 if self.known else time.monotonic())


@pytest.mark.timeout(2 * SECONDS + 60)
@pytest.mark.parametrize(
    ("how", "vcpus", "ways"),
    [(TRAPS, 1, ["lazily", "eagerly"]), (TRAPS, 2, ["lazily"]), (MEMSLOTS, 2, ["eagerly"])],
    ids=str,
)
@pytest.mark.parametrize("kernel", kernels()[:1])
def test_a_guest_goes_on_where_it_was(kernel, how, vcpus, ways, tmp_path) -> None:
    disk, initrd, extra = disk_with(tmp_path), tmp_path / "initrd", module(kernel)
    initrd.write_bytes(linux.build(command=COMMAND, modules=MODULES, kernel=kernel, files=extra))
    with Vm(MEMORY, vcpus=vcpus, platform="pc", **how) as vm:
        vm.add_device(devices.Block(disk), name="disk")
        vm.boot(kernel, initrd=initrd, append="quiet")
        before = vm.console.expect(r"count 3 .*\r\n", timeout=SECONDS)
        summed = re.search(r"^([0-9a-f]{64})  -", vm.console.tail(4096).decode(), re.MULTILINE)
        assert summed
        vm.snapshot(tmp_path / "saved")
        states = vm.attributes.runs()
        manifest = json.loads((tmp_path / "saved" / "manifest.json").read_bytes())
        assert manifest["machine"]["vcpus"] == vcpus
    clocks = Clocks(tmp_path / "saved", ticks(before[0].decode())[0])
    assert len(clocks.before.uptimes) == vcpus
    time.sleep(PAUSE)
    for way in ways:
        used = disk.with_name(f"used-{way}.img")
        shutil.copy(disk, used)
        goes_on(tmp_path / "saved", used, way == "lazily", summed[1], vcpus if extra else None, clocks)
    # What was put aside is as it was: another one goes on from it.
    with Vm.resume(tmp_path / "saved", devices=[devices.Block(disk, read_only=False)], lazy=True) as again:
        assert again.attributes.runs() == states
        for _ in range(2):
            begun = time.monotonic()
            output = again.console.expect(r"(?s)count \d+ .*count 6 .*?\r\n", timeout=SECONDS)[0].decode()
            clocks.check(output, time.monotonic() - begun)
            again.reset_to(tmp_path / "saved")
            assert again.attributes.runs() == states


def goes_on(saved: Path, disk: Path, lazy: bool, summed: str, converting: int | None, clocks: Clocks) -> None:
    """Resumes it in a new process. ``converting``: the vCPUs whose pages a module converts, if there is one."""
    program = textwrap.dedent(GOES_ON).format(saved=str(saved), disk=str(disk), seconds=SECONDS, lazy=lazy)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, ""), done
    told = json.loads(done.stdout)
    output = told["output"].replace("\r\n", "\n")
    assert (told["first"], told["reason"], told["refused"]) == (4, "poweroff", 0), output
    clocks.check(output, told["seconds"])
    assert f"{summed}  -\nwritten before\n" in output
    assert f"{STATUS}0\n" in output
    assert "Kernel panic" not in output
    assert file_on(disk, "/after", disk.parent) == b"written later\n"
    assert told["distinct"] == told["pages"]
    assert (0 < told["read"] < MEMORY // 10) if lazy else not told["read"]
    if converting is not None:
        counts = COUNTS.search(output)
        assert counts, output
        workers, asked, failed, touched, _, lost = map(int, counts.groups())
        assert (workers, failed, lost) == (converting, 0, 0)
        assert told["hypercalls"] == asked > 0
        assert told["faults"] >= touched > 0


@pytest.mark.timeout(2 * SECONDS + 60)
@pytest.mark.parametrize("kernel", kernels()[:1])
def test_the_command_line_puts_aside_and_goes_on(kernel, tmp_path) -> None:
    initrd, saved = tmp_path / "initrd", tmp_path / "saved"
    initrd.write_bytes(linux.build(command="echo before; read -r go; echo after"))

    def pagegate(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pagegate", *arguments, "--timeout", str(SECONDS)]
        return subprocess.run(command, input=typed, capture_output=True, text=True, check=False, timeout=2 * SECONDS)

    given = ("boot", str(kernel), "--initrd", str(initrd), "--memory", "256M", "--append", "quiet", "--json")
    done = pagegate(*given, "--save", str(saved), "--save-when", "^before")
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert (told["reason"], told["ended_well"], told["saved"]) == ("stopped", True, str(saved))
    assert "after" not in done.stderr
    for more in ([], ["--lazy"]):
        done = pagegate("resume", str(saved), *more, typed="go\n")
        assert done.returncode == 0, done
        assert "after" in done.stdout
        assert "poweroff after" in done.stdout
    done = pagegate("resume", str(saved), "--rng")
    assert (done.returncode, done.stdout) == (2, "")
    assert "devices has 1, and the snapshot has 0: none" in done.stderr
