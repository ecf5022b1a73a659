"""Several threads use one machine at once, and callbacks and finalizers do anything: none waits for ever.

A thread that waits with the interpreter taken stops all of Python, so each test runs in a process of its own.
"""

from __future__ import annotations

import pytest

from tests import programs

PARTS = """
import gc, os, sys, threading, time, weakref
import pagegate
from pagegate import Convert, PagegateError, Vm
from pagegate.testing import Fake, Step

def machine(*scripts, **arguments):
    scripts = scripts or ([Step.block()],)
    return Vm(64 * 4096, vcpus=len(scripts), hypervisor=Fake(*scripts), **arguments)

class Slow:
    def __init__(self, then=lambda: None):
        self.inside, self.then = threading.Event(), then
    def committed(self, change):
        if not change.initial:
            self.inside.set()
            time.sleep(0.3)
            self.then()

class Tried(threading.Thread):
    "Calls a function, and keeps what it raised."
    def __init__(self, call):
        super().__init__(daemon=True)
        self.call, self.said = call, None
        self.start()
    def run(self):
        try:
            self.said = self.call()
        except Exception as error:
            self.said = error
    def ended(self):
        self.join(10)
        assert not self.is_alive(), "it waits for ever"
        return self.said
"""


def passes(code: str) -> None:
    programs.passes(code, PARTS)


# ---- three threads


@pytest.mark.parametrize("then", ["lambda: None", "lambda: vm.stop()"])
def test_start_run_and_close_at_once(then: str) -> None:
    # start() converts its page tables, and a listener is told of it.
    passes(
        f"""
        vm = machine(initial="private")
        slow = Slow({then})
        vm.add_listener(slow)
        starting = Tried(lambda: vm.vcpus[0].start(rip=0x1000))
        assert slow.inside.wait(10)
        running = Tried(lambda: vm.run(timeout=5))
        time.sleep(0.1)
        closing = Tried(vm.close)
        assert starting.ended() is None, starting.said
        assert closing.ended() is None, closing.said
        assert isinstance(running.ended(), PagegateError), running.said
        assert vm.closed
        """
    )


def test_a_closed_machine_does_not_run() -> None:
    # run() waits for the vCPU, which is being started, and close() comes meanwhile: one of the two is refused.
    passes(
        """
        for _ in range(50):
            vm = machine()
            vm.vcpus[0].start(rip=0x1000)
            ready = threading.Barrier(2)
            running = Tried(lambda: (ready.wait(), vm.run(timeout=5))[1])
            ready.wait()
            while True:
                try:
                    vm.close()
                    break
                except PagegateError as error:
                    assert "the machine is running" in str(error), error
                    vm.stop()
                    assert running.ended().reason == "stopped"
            said = running.ended()
            assert "closed" in str(said) or said.reason == "stopped", said
        """
    )


def test_two_runs_at_once() -> None:
    passes(
        """
        vm = machine()
        vm.vcpus[0].start(rip=0x1000)
        ready = threading.Barrier(2)
        runs = [Tried(lambda: (ready.wait(), vm.run(timeout=0.3))[1]) for _ in range(2)]
        said = [run.ended() for run in runs]
        refused = [each for each in said if isinstance(each, PagegateError)]
        assert len(refused) == 1 and "running already" in str(refused[0]), said
        vm.close()
        """
    )


# ---- finalizers


# Each makes an object `Last` that only the machine refers to, so that it is finalized when the machine lets go of it.
HELD = {
    "policy": "vm = machine(policy=Last())",
    "wrapped policy": "vm = machine(policy=pagegate.policies.Align(4096, Last()))",
    "port": "vm = machine(); vm.on_io(0x80, Last())",
    "mmio": "vm = machine(); vm.on_mmio(0x1000_0000, 4096, Last())",
    "listener": "vm = machine(); vm.add_listener(Last())",
}
LAST = """
told = []
class Last:
    def map_gpa_range(self, call):
        return Convert()
    def __call__(self, access):
        return b""
    def committed(self, change):
        pass
    def __del__(self):
        # Whatever takes a lock of the machine's.
        repr(vm), vm.closed, vm.running, vm.policy.current, vm.stop()
        for call in (
            lambda: vm.attributes,
            lambda: vm.events.total,
            lambda: vm.convert(0, 4096, to="shared"),
            lambda: vm.add_listener(Last2()),
            lambda: vm.on_io(0x81, print),
            lambda: vm.run(timeout=0),
            vm.close,
        ):
            try:
                call()
            except (PagegateError, ValueError):
                pass
        told.append(None)
class Last2:
    def committed(self, change):
        pass
"""


@pytest.mark.parametrize("held", HELD)
def test_close_drops_what_looks_at_the_machine(held: str) -> None:
    passes(LAST + HELD[held] + "\nvm.close()\ngc.collect()\nassert told == [None]\n")


@pytest.mark.parametrize("held", HELD)
def test_the_collector_drops_what_looks_at_the_machine(held: str) -> None:
    passes(
        LAST.replace("def __del__(self):", "def __del__(self, vm=None):\n        vm = vm or self.vm")
        + HELD[held].replace("Last()", "(last := Last())")
        + """
last.vm = vm
del last, vm
for _ in range(3):
    gc.collect()
assert told == [None]
"""
    )


def test_a_replaced_policy_looks_at_the_machine() -> None:
    passes(LAST + "vm = machine(policy=Last())\nvm.policy.replace(pagegate.policies.Allow())\nassert told == [None]\n")


def test_a_removed_listener_looks_at_the_machine() -> None:
    passes(
        LAST
        + "vm = machine()\nlast = Last()\nvm.add_listener(last)\nvm.remove_listener(last)\n"
        + "del last\nassert told == [None]\n"
    )


def test_an_exception_runs_finalizers() -> None:
    # To make an exception can start the collector, which can finalize anything.
    passes(
        LAST
        + """
vm = machine()
vm.vcpus[0].start(rip=0x1000)
running = Tried(lambda: vm.run(timeout=20))
while not vm.running:
    time.sleep(0.001)
gc.set_threshold(1, 0)
for _ in range(20_000):  # without the GIL the collector starts only once in some hundred objects
    if len(told) > 50:
        break
    cycle = Last(); cycle.itself = cycle; del cycle
    try:
        vm.close()
    except PagegateError:
        pass
running.ended()
gc.set_threshold(700)
assert len(told) > 50
"""
    )


# ---- threads of vCPUs are as Python's own


def test_recursion_in_a_hook_is_an_error() -> None:
    passes(
        """
        # Through C: each level takes some of the thread's stack.
        class Deep:
            def __init__(self, of=0):
                self.of = of
            def __repr__(self):
                return repr([Deep(self.of + 1)])
        class Policy:
            def map_gpa_range(self, call):
                sys.setrecursionlimit(6000)
                repr(Deep())
        vm = machine([Step.hypercall(0x8000, 1, 16)], policy=Policy())
        vm.vcpus[0].start(rip=0x1000)
        try:
            vm.run(timeout=20)
        except RecursionError:
            pass
        else:
            raise AssertionError
        vm.close()
        """
    )


def test_threading_stack_size_is_that_of_hooks() -> None:
    passes(
        """
        threading.stack_size(48 << 20)
        sizes = []
        def size(access):
            # Of the mapping that this thread's stack pointer is in: the stack's, without its guard page.
            sp = int(open("/proc/thread-self/syscall").read().split()[-2], 16)
            for line in open("/proc/self/maps"):
                low, high = (int(word, 16) for word in line.split()[0].split("-"))
                if low <= sp < high:
                    sizes.append(high - low)
            return b"x"
        vm = machine([Step.io_read(0x80)])
        vm.on_io(0x80, size)
        vm.vcpus[0].start(rip=0x1000)
        vm.run(timeout=10)
        assert sizes and 47 << 20 <= sizes[0] <= 49 << 20, sizes
        vm.close()
        """
    )


@pytest.mark.parametrize("kind", ["trace", "profile"])
def test_debuggers_and_coverage_see_hooks(kind: str) -> None:
    passes(
        f"""
        seen = set()
        def function(frame, event, argument):
            seen.add((frame.f_code.co_name, event))
            return function
        class Policy:
            def map_gpa_range(self, call):
                x = 1
                return Convert()
        threading.set{kind}(function)
        vm = machine([Step.hypercall(0x8000, 1, 16), Step.io_read(0x80)], policy=Policy())
        def handler(access):
            return b"x"
        vm.on_io(0x80, handler)
        vm.vcpus[0].start(rip=0x1000)
        assert vm.run(timeout=10).reason == "halt"
        threading.set{kind}(None)
        events = ("call", "line" if {kind!r} == "trace" else "return")
        assert {{(name, event) for name in ("map_gpa_range", "handler") for event in events}} <= seen, seen
        seen.clear()
        vm.vcpus[0].start(rip=0x1000)
        vm.run(timeout=10)
        assert not seen
        vm.close()
        """
    )
