"""A disk's file that does not answer: the end of a run says what it waits for, and Ctrl-C is a way out."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import threading
import time

import pytest
from pagegate import Vm, devices
from pagegate.testing import Fake, Step

from tests.slow_file import SlowFile

from .test_virtio import DATA, MEMORY, NEXT, WRITE, chain, completed, kick, ready

READ, FLUSH, OUT = 0, 4, 1
STATUS = DATA + 0x1000
SAYS = "pagegate: waiting for the disk slow.img's write to end; Ctrl-C ends pagegate without it"


@pytest.fixture
def slow(tmp_path):
    try:
        made = SlowFile(tmp_path, 1 << 20)
    except OSError as error:
        pytest.skip(f"no FUSE: {error}")
    with made:
        yield made


def machine(path, kind):
    vm = Vm(MEMORY, platform="pc", hypervisor=Fake([*ready(), *kick(), Step.block(), Step.block()]))
    vm.add_device(devices.Block(path), name=path.name)
    vm.vcpus[0].start(rip=0x1000)
    vm.write(DATA, struct.pack("<IIQ", kind, 0, 0))
    data = (DATA + 0x100, 512, NEXT | (WRITE if kind == READ else 0))
    parts = [(DATA, 16, NEXT), *([data] if kind != FLUSH else []), (STATUS, 1, WRITE)]
    chain(vm, *parts)
    return vm


@pytest.mark.parametrize(("kind", "what"), [(READ, "read"), (OUT, "write"), (FLUSH, "flush")])
def test_a_machine_says_what_the_end_of_its_run_waits_for(slow, kind, what):
    with machine(slow.path, kind) as vm:
        assert vm.waits_for == []
        run = threading.Thread(target=vm.run)
        run.start()
        assert slow.asked.wait(20)
        assert vm.waits_for == [], "the run is not to end"
        vm.stop()
        end = time.monotonic() + 10
        while not vm.waits_for and time.monotonic() < end:
            time.sleep(0.01)
        assert vm.waits_for == [("slow.img", what)]
        assert run.is_alive()
        slow.answer.set()
        run.join(10)
        assert not run.is_alive()
        assert vm.waits_for == []
        assert vm.report.reason == "stopped"
        assert len(completed(vm)) == 1
        assert vm.read(STATUS, 1) == bytes(1)


PROGRAM = """
import sys
from pathlib import Path
from pagegate.cli.deadline import Deadline
from pagegate.cli.interrupt import Interrupt
from pagegate.cli.waiting import Waiting
from tests.fake.test_slow_disk import OUT, machine

vm = machine(Path(sys.argv[1]), OUT)
print("begins", flush=True)
with Waiting(vm, lambda text: print(f"pagegate: {text}", flush=True)) as waiting:
    with Interrupt(vm, Deadline(None), waiting):
        print(vm.run().reason, flush=True)
"""


@pytest.fixture
def program(slow):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(slow.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "begins\n"
            assert slow.asked.wait(30)
            process.send_signal(signal.SIGINT)
            yield process
        finally:
            slow.answer.set()
            process.kill()


def test_the_command_says_it_and_a_further_ctrl_c_ends_it(slow, program):
    assert program.stdout.readline() == SAYS + "\n"
    program.send_signal(signal.SIGINT)
    assert program.wait(10) == -signal.SIGINT
    assert not slow.answer.is_set()


def test_where_the_host_answers_after_all_the_run_has_its_report(slow, program):
    assert program.stdout.readline() == SAYS + "\n"
    slow.answer.set()
    assert program.stdout.readline() == "stopped\n"
    assert program.wait(10) == 0


def test_nothing_is_said_where_it_answers_at_once(slow, program):
    slow.answer.set()
    assert program.stdout.read() == "stopped\n"
    assert program.wait(10) == 0
