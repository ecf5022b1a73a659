"""A module in stock kernels that converts pages and touches them on two vCPUs at once: tests/guests/convert.

PAGEGATE_TEST_GUESTS            a folder with the kernels, and an initrd, as in test_linux.py
PAGEGATE_TEST_MODULES           a folder with the modules of tests/guests built for them: files convert-RELEASE.ko
PAGEGATE_TEST_MODULE_SECONDS    how long it runs in each test; by default 10
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from pagegate import Vm, linux
from pagegate.linux.initramfs import STATUS
from pagegate.linux.kernel import image_release
from pagegate.policies import Allow

from .page_tables import compare
from .test_linux import MEMORY, SECONDS, kernels
from .test_linux_page_tables import ALIASES_AT_MOST

LASTS = int(os.environ.get("PAGEGATE_TEST_MODULE_SECONDS", "10"))
SLACK = 120
"""Seconds that loading the module and powering off take at most, besides."""
COUNTS = re.compile(r"workers=(\d+) asked=(\d+) failed=(\d+) touched=(\d+) contended=(\d+) lost=(\d+)")
COMMAND = f"""echo booted
read -r go
insmod /convert.ko seconds={LASTS} && dmesg | grep workers="""


def module(kernel: Path, name: str = "convert") -> Path:
    folder = os.environ.get("PAGEGATE_TEST_MODULES")
    if not folder:
        pytest.skip("$PAGEGATE_TEST_MODULES names no folder of modules")
    release = image_release(kernel)
    path = Path(folder, f"{name}-{release}.ko")
    if not path.is_file():
        pytest.skip(f"there is no {path}: tests/in-testbed builds it if linux-headers-{release} is installed")
    return path


@pytest.mark.timeout(SECONDS + LASTS + 2 * SLACK)
@pytest.mark.parametrize("enforcement", ["traps", "memslots"])
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_two_vcpus_convert_and_touch_at_once(kernel, enforcement, tmp_path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(linux.build(command=COMMAND, files={"/convert.ko": module(kernel)}))
    vm = Vm(
        MEMORY,
        vcpus=2,
        policy=Allow(),
        enforcement=enforcement,
        platform="pc",
        confidential="sev",
        debug_private=True,
        events=1 << 18,
    )
    with vm:
        vm.boot(kernel, initrd=initrd, append="quiet nokaslr")
        vm.console.expect("booted", timeout=SECONDS)
        boot = vm.events.total
        vm.console.write("go\n")
        report = vm.run(timeout=LASTS + SLACK)
        output = vm.console.tail(1 << 20).decode(errors="replace")
        assert report.reason == "poweroff", output
        assert f"{STATUS}0\r\n" in output
        assert vm.events.dropped == 0
        events = [event for event in vm.events.since(boot) if event.kind != "unpaged"]
        outcomes = Counter(event.outcome for event in events)

        counts = COUNTS.search(output)
        assert counts, output
        print(f"{kernel.name}, {enforcement}: {counts[0]}; {report.faults} implicit, {dict(outcomes)}")
        workers, asked, failed, touched, contended, lost = map(int, counts.groups())
        assert (workers, failed, lost) == (2, 0, 0)
        # Every explicit request of the guest arrived, once, and every access to a page in the wrong state.
        assert report.hypercalls == asked > 0
        assert touched <= report.faults <= touched + contended + 1
        assert {event.vcpu for event in events} == {0, 1}
        assert outcomes.keys() <= {"converted", "superseded"}
        assert report.conversions == outcomes["converted"]
        assert report.requests == outcomes.total()

        found = compare(vm)
        assert found.wrong == []
        assert len(found.aliases) <= ALIASES_AT_MOST
