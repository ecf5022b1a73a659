"""A child that is forked from a process whose machines run: it disturbs nothing, prints nothing, and takes no time."""

from __future__ import annotations

import textwrap

import pytest

from tests.programs import passes

SOON = 1.5
"""Seconds in which a child ends on a busy machine. It waited for two before."""
PARTS = """
import gc, os, socket, sys, threading, time
from pagegate import PagegateError, Vm, devices, trace
from pagegate.testing import Fake, Step

FOLDER = {folder!r}
ASK, BLOCK = Step.hypercall(0x10_0000, 1, 0), Step.block()
SOCKET, EVENTS = FOLDER + "/vsock", FOLDER + "/x.arrows"

class Allow:
    def map_gpa_range(self, call):
        forks(call) if "forks" in globals() else None
        return Convert()

from pagegate import Convert
vm = Vm(64 << 20, platform="pc", policy=Allow(), hypervisor=Fake([ASK, *[BLOCK] * 100]))
vm.add_device(devices.Vsock(5, SOCKET))
recorder = trace.Recorder(vm, EVENTS)
reports = []

def run():
    vm.vcpus[0].start(mode="real")
    thread = threading.Thread(target=lambda: reports.append(vm.run(timeout=30)))
    thread.start()
    while not vm.events.total:
        time.sleep(0.01)
    return thread

def child_ends(within):
    begun = time.monotonic()
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        assert time.monotonic() - begun < 20
        time.sleep(0.01)
    assert time.monotonic() - begun < within, "the child took too long"
    return os.waitstatus_to_exitcode(ended[1])

def parent_goes_on(thread):
    assert vm.running and os.path.exists(SOCKET)
    with socket.socket(socket.AF_UNIX) as host:
        host.connect(SOCKET)
    vm.stop()
    thread.join()
    assert reports[0].reason == "stopped", reports
    recorder.close()
    assert recorder.written == vm.events.total == len(trace.read(EVENTS)) == 1
    vm.close()
"""

LEAVES = {
    "_exit": "os._exit(7)",
    "exit": "sys.exit(7)",
    "everything dropped": "del recorder, vm; gc.collect(); sys.exit(7)",
    "stop": "vm.stop(); sys.exit(7)",
    "close": """
        recorder.close()
        try:
            vm.close()
        except PagegateError:
            sys.exit(7)
    """,
    "run": """
        try:
            vm.run()
        except PagegateError:
            sys.exit(7)
    """,
    "a machine of its own": """
        with Vm(2 << 20, hypervisor=Fake([ASK])) as own, trace.Recorder(own, FOLDER + "/own.arrows") as recorder:
            own.vcpus[0].start(mode="real")
            assert own.run(timeout=10).reason == "halt"
        assert recorder.written == 1
        sys.exit(7)
    """,
    "a machine of its own that runs at the end": """
        own = Vm(1 << 20, hypervisor=Fake([BLOCK] * 100))
        own.vcpus[0].start(mode="real")
        threading.Thread(target=own.run, daemon=True).start()
        while not own.running:
            time.sleep(0.01)
        sys.exit(7)
    """,
}


@pytest.mark.parametrize("leaves", LEAVES.values(), ids=LEAVES.keys())
def test_a_child_of_a_process_whose_machine_runs(tmp_path, leaves) -> None:
    code = """
        thread = run()
        pid = os.fork()
        if pid == 0:
            leave()
            os._exit(1)
        assert child_ends(WITHIN) == 7
        parent_goes_on(thread)
    """
    within = 20 if "own" in leaves else SOON
    leave = "def leave():\n    global recorder, vm\n" + textwrap.indent(textwrap.dedent(leaves).strip(), "    ")
    passes(code.replace("WITHIN", str(within)), PARTS.format(folder=str(tmp_path)) + leave + "\n")


@pytest.mark.parametrize("leaves", ["os._exit(7)", "sys.exit(7)"])
def test_a_child_that_a_hook_forks(tmp_path, leaves) -> None:
    """It has only the vCPU's thread, in which the hook is called."""
    code = f"""
        pid = None
        def forks(call):
            global pid
            pid = os.fork()
            if pid == 0:
                {leaves}
        thread = run()
        status = child_ends({SOON})
        assert status in (0, 7), status
        parent_goes_on(thread)
    """
    passes(code, PARTS.format(folder=str(tmp_path)))


def test_a_pool_of_processes_beside_a_machine_that_runs(tmp_path) -> None:
    code = """
        import multiprocessing
        thread = run()
        begun = time.monotonic()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(abs, [-1, -2, -3]) == [1, 2, 3]
            pool.close()
            pool.join()
        assert time.monotonic() - begun < 2.5
        parent_goes_on(thread)
    """
    passes(code, PARTS.format(folder=str(tmp_path)))
