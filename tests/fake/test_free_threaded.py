"""CPython without the GIL: hooks of different vCPUs run at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import threading
import time

import pytest
from pagegate import Convert
from pagegate.testing import Step

pytestmark = pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this CPython is built with the GIL"
)

PAGE = 4096


def test_importing_the_package_leaves_the_gil_off() -> None:
    # Importing a module that does not say that it can do without the GIL switches it on, with a warning.
    code = "import pagegate, sys; sys.exit(sys._is_gil_enabled())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode == 0


class Meet:
    """Spins in each vCPU's hook until the other's has begun. With the GIL the first would not let the other begin."""

    def __init__(self) -> None:
        self.inside = [False, False]
        self.met = [False, False]

    def map_gpa_range(self, call) -> Convert:
        self.inside[call.vcpu] = True
        end = time.monotonic() + 20
        while not self.inside[1 - call.vcpu] and time.monotonic() < end:
            pass
        self.met[call.vcpu] = self.inside[1 - call.vcpu]
        return Convert()


def test_a_hook_runs_while_another_vcpus_hook_does_not_let_go(make) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(100)
    try:
        policy = Meet()
        vm, _ = make(*([Step.doorbell(page * PAGE, 1, 0x10)] for page in (8, 9)), policy=policy)
        assert vm.run(timeout=60).conversions == 2
    finally:
        sys.setswitchinterval(before)
    assert policy.met == [True, True]


class Keeps:
    """Hands each request to another thread, and looks at it again when many more were made."""

    def __init__(self) -> None:
        self.requests: list[tuple[object, int]] = []
        self.lock = threading.Lock()

    def map_gpa_range(self, call) -> Convert:
        with self.lock:
            self.requests.append((call, call.gpa))
        return Convert()


def test_a_request_that_another_thread_keeps_is_not_written_again(make) -> None:
    policy = Keeps()
    scripts = [[Step.doorbell((8 + 8 * vcpu + page) * PAGE, 1, 0x10) for page in range(8)] for vcpu in range(2)]
    vm, _ = make(*scripts, policy=policy, cycles=200)
    wrong: list[object] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set() or policy.requests:
            with policy.lock:
                taken, policy.requests = policy.requests, []
            wrong.extend(request for request, gpa in taken if request.gpa != gpa)

    thread = threading.Thread(target=look)
    thread.start()
    report = vm.run(timeout=120)
    over.set()
    thread.join()
    assert report.hypercalls == 2 * 8 * 200
    assert wrong == []
