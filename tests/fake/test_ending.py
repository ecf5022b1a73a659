"""The interpreter ends while hooks, handlers and listeners are being called: nothing crashes or freezes."""

from __future__ import annotations

import time

import pytest

from tests.programs import SLOW, passes, run

# A guest that keeps asking, and callbacks that give the interpreter up.
PARTS = """
import os, sys, sysconfig, threading, time
from pagegate import Convert, Discard, Vm
from pagegate.testing import Fake, Step

entered = threading.Event()

def work(seconds):
    entered.set()
    time.sleep(seconds)

class Policy:
    def __init__(self, seconds):
        self.seconds = seconds
    def map_gpa_range(self, call):
        work(self.seconds)
        return Convert()
    def memory_fault(self, fault):
        work(self.seconds)
        return Convert()
    def memory_poison(self, poison):
        work(self.seconds)
        return Discard()

class Listener:
    def __init__(self, seconds):
        self.seconds = seconds
    def prepare(self, change):
        work(self.seconds)
    def committed(self, change):
        pass

STEPS = {
    "map_gpa_range": [Step.hypercall(0x8000, 1, 16), Step.hypercall(0x8000, 1, 0)],
    "memory_fault": [Step.access(0x8000), Step.access(0x8000 | 1 << 40)],
    "memory_poison": [Step.memory_fault(0x8000, errno=133)],
    "io": [Step.io_read(0x80)],
    "string io": [Step.io_write(0x80, bytes(64))],
    "mmio": [Step.access(0x1000_0000)],
    "listener": [Step.hypercall(0x8000, 1, 16), Step.hypercall(0x8000, 1, 0)],
}

def machine(what, seconds):
    two_views = {"shared_bit": 40} if what == "memory_fault" else {}
    fake = Fake(STEPS[what], cycles=1_000_000)
    asks = what in ("map_gpa_range", "memory_fault", "memory_poison")
    policy = Policy(seconds) if asks else None
    vm = Vm(64 * 4096, hypervisor=fake, policy=policy, **two_views)
    if what in ("io", "string io"):
        vm.on_io(0x80, lambda access: (work(seconds), b"" if access.write else b"x")[1])
    if what == "mmio":
        vm.on_mmio(0x1000_0000, 4096, lambda access: (work(seconds), bytes(access.size))[1])
    if what == "listener":
        vm.add_listener(Listener(seconds))
        entered.clear()
    vm.vcpus[0].start(rip=0x1000)
    return vm
"""

CALLBACKS = ["map_gpa_range", "memory_fault", "memory_poison", "io", "string io", "mmio", "listener"]


def ends_well(code: str, within: float, parts: str = PARTS) -> None:
    """The program says "end of main" and no more, and ends `within` this many seconds of it."""
    begun = time.monotonic()
    done = run(code, parts)
    took = time.monotonic() - begun
    assert (done.returncode, done.stdout, done.stderr) == (0, "end of main\n", "")
    assert took < within + 4, "and the interpreter's start"


@pytest.mark.parametrize("what", CALLBACKS)
@pytest.mark.parametrize(("seconds", "within"), [(0.001, 1), (1000, 2)], ids=["waited for", "left behind"])
def test_short_calls_are_waited_for_and_long_ones_left_behind(what: str, seconds: float, within: float) -> None:
    ends_well(
        f"""
        vm = machine({what!r}, {seconds})
        threading.Thread(target=vm.run, daemon=True).start()
        assert entered.wait(10)
        print("end of main")
        """,
        within,
    )


# Answers that run code for long, when they are looked at ("repr") or dropped ("del"). Other objects that do.
ANSWERS = """
how = "{how}"
class Answer(bytes if how == "del" else object):
    def __repr__(self):
        if how == "repr":
            work(2.7)
        return "an answer"
    def __del__(self):
        if how == "del":
            work(2.7)

class Answers:
    def map_gpa_range(self, call):
        return Answer(b"x") if how == "del" else Answer()
    memory_fault = memory_poison = device_access = prepare = __call__ = map_gpa_range
    def committed(self, change):
        pass

class Late:
    def __getattr__(self, name):
        work(2.7)
        raise AttributeError(name)
    def __index__(self):
        work(2.7)
        return 1
    __float__ = __index__

class Dropped(Policy):
    def __del__(self):
        work(2.7)
"""


@pytest.mark.parametrize("what", CALLBACKS)
def test_a_call_that_returns_while_the_interpreter_is_taken_down(what: str) -> None:
    ends_well(
        f"""
        vm = machine({what!r}, 2.7)
        threading.Thread(target=vm.run, daemon=True).start()
        assert entered.wait(10)
        print("end of main")
        sys.stdout = Slow()
        """,
        within=3.5,
        parts=PARTS + SLOW.format(seconds=1.5),
    )


@pytest.mark.parametrize("how", ["repr", "del"])
@pytest.mark.parametrize("what", ["map_gpa_range", "memory_fault", "memory_poison", "io", "mmio", "listener"])
def test_an_answer_whose_code_runs_while_the_interpreter_is_taken_down(what: str, how: str) -> None:
    ends_well(
        f"""
        fake = Fake(STEPS[{what!r}])
        asks = {what!r} in ("map_gpa_range", "memory_fault", "memory_poison")
        views = {{"shared_bit": 40}} if {what!r} == "memory_fault" else {{}}
        vm = Vm(64 * 4096, hypervisor=fake, policy=Answers() if asks else None, **views)
        if {what!r} == "io":
            vm.on_io(0x80, Answers())
        if {what!r} == "mmio":
            vm.on_mmio(0x1000_0000, 4096, Answers())
        if {what!r} == "listener":
            vm.add_listener(Answers())
        vm.vcpus[0].start(rip=0x1000)
        threading.Thread(target=vm.run, daemon=True).start()
        assert entered.wait(10)
        print("end of main")
        sys.stdout = Slow()
        """,
        within=3.5,
        parts=PARTS + SLOW.format(seconds=1.5) + ANSWERS.format(how=how),
    )


@pytest.mark.parametrize(
    "call",
    [
        "Vm(64 * 4096, hypervisor=Fake([]), policy=Late())",
        "vm.policy.replace(Late())",
        "vm.add_listener(Late())",
        "Vm(16 << 20, platform='pc', hypervisor=Fake([])).add_device(Late())",
        "vm.read(Late(), 1)",
        "vm.run(timeout=Late())",
        "vm.close()",
        "vm.policy.replace(Answers())",
        "boxes.clear()",
    ],
)
def test_a_call_of_another_thread_that_runs_code_while_the_interpreter_is_taken_down(call: str) -> None:
    ends_well(
        f"""
        vm = Vm(64 * 4096, hypervisor=Fake([]), policy=Dropped(0))
        boxes = [Vm(64 * 4096, hypervisor=Fake([]), policy=Dropped(0))]
        threading.Thread(target=lambda: {call}, daemon=True).start()
        assert entered.wait(10)
        print("end of main")
        sys.stdout = Slow()
        """,
        within=3.5,
        parts=PARTS + SLOW.format(seconds=3.2) + ANSWERS.format(how="del"),
    )


def test_the_rest_of_the_program_ends_as_it_would() -> None:
    # What was registered before pagegate was imported is called after pagegate has stopped its machines.
    code = """
        vm = machine("io", 0.001)
        done = []
        def body():
            done.append(vm.run().reason)
        threading.Thread(target=body, daemon=True).start()
        assert entered.wait(10)
        print("end of main")
        def last():
            time.sleep(0.2)
            assert done == ["stopped"], done
            try:
                vm.run(timeout=1)
            except Exception as error:
                assert "the interpreter is ending" in str(error), error
            else:
                raise AssertionError("it ran")
            assert vm.read(0, 4) == bytes(4)
            vm.close()
    """
    before = "import atexit\nlast = None\natexit.register(lambda: last())\n"
    passes(code, before + PARTS, said="end of main\n")


def test_after_a_call_was_left_behind_nothing_waits_for_it() -> None:
    ends_well(
        """
        vm = machine("listener", 1000)
        # Without the GIL modules are taken down before, and the class of the error with them.
        late = TypeError if sysconfig.get_config_var("Py_GIL_DISABLED") else ()
        class Last:
            def __del__(self, write=os.write, vm=vm, late=late):
                try:
                    vm.convert(0x8000, 4096, to="private")
                except late:
                    pass
                except Exception as error:
                    if "has not returned" not in str(error):
                        write(1, str(error).encode())
                else:
                    write(1, b"converted")
        last = Last()
        threading.Thread(target=vm.run, daemon=True).start()
        assert entered.wait(10)
        print("end of main")
        """,
        within=3,
    )
