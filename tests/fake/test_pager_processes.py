"""Pagers and the process that they are in: one that forks, a child with the machine, Ctrl-C, the interpreter's end."""

from __future__ import annotations

import textwrap

import pytest

from tests.programs import passes

pytestmark = pytest.mark.userfault

PARTS = """
import os, signal, sys, threading, time
from pagegate import PagegateError, Vm
from pagegate.testing import Fake

PAGE, PARENT = 4096, os.getpid()

def machine(pager):
    return Vm(1 << 20, hypervisor=Fake([], private_memory=False), pager=pager)

class Pager:
    def missing(self, page):
        return b"p" * PAGE

def waited(pid):
    begun = time.monotonic()
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        assert time.monotonic() - begun < 20
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])
"""


def test_a_pager_that_forks_answers_in_the_parent_only() -> None:
    passes(
        textwrap.dedent(PARTS)
        + textwrap.dedent(
            """
            children = []

            class Forks(Pager):
                def missing(self, page):
                    if not children:
                        children.append(os.fork())
                        if children[0]:
                            # The child would be first.
                            time.sleep(0.3)
                    return (b"p" if os.getpid() == PARENT else b"c") * PAGE

            vm = machine(Forks())
            assert [vm.read(page * PAGE, 1) for page in range(30)] == [b"p"] * 30
            assert len(vm.working_set()) == 30
            assert waited(children[0]) == 0
            vm.close()
            """
        )
    )


def test_a_child_changes_nothing() -> None:
    passes(
        textwrap.dedent(PARTS)
        + textwrap.dedent(
            """
            vm = machine(Pager())
            vm.read(0, 2 * PAGE)
            calls = {
                "convert": lambda: vm.convert(0, PAGE, to="private"),
                "write": lambda: vm.write(0, b"child"),
                "load": lambda: vm.load(b"child", at=0),
                "start": lambda: vm.vcpus[0].start(mode="long", rip=0),
            }
            pid = os.fork()
            if pid == 0:
                for name, call in calls.items():
                    try:
                        call()
                        os._exit(1)
                    except PagegateError as error:
                        assert "forked from" in str(error), (name, error)
                begun = time.monotonic()
                vm.close()
                os._exit(0 if time.monotonic() - begun < 0.5 else 2)
            assert waited(pid) == 0
            assert vm.read(0, 2 * PAGE) == b"p" * 2 * PAGE
            assert not vm.attributes.is_private(0)
            vm.close()
            """
        )
    )


def test_the_tables_of_a_vcpu_are_waited_for_until_ctrl_c() -> None:
    passes(
        textwrap.dedent(PARTS)
        + textwrap.dedent(
            """
            answer = threading.Event()

            class Hangs(Pager):
                def missing(self, page):
                    answer.wait(20)
                    return super().missing(page)

            vm = machine(Hangs())
            timer = threading.Timer(0.3, os.kill, [PARENT, signal.SIGINT])
            timer.start()
            begun = time.monotonic()
            try:
                vm.vcpus[0].start(mode="long", rip=0)
                raise SystemExit("it was started")
            except KeyboardInterrupt:
                assert time.monotonic() - begun < 5
            answer.set()
            timer.join()
            vm.vcpus[0].start(mode="long", rip=0)
            vm.close()
            """
        )
    )


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "dropped"])
def test_the_interpreters_end_does_not_wait_for_each_pager(closes) -> None:
    passes(
        textwrap.dedent(PARTS)
        + textwrap.dedent(
            f"""
            class AtTheEnd:
                def __init__(self):
                    self.vms = [machine(Pager()) for _ in range(10)]
                    [vm.read(0, 1) for vm in self.vms]

                def __del__(self, clock=time.monotonic, print=print, closes={closes}):
                    begun = clock()
                    if closes:
                        [vm.close() for vm in self.vms]
                    self.vms.clear()
                    assert clock() - begun < 0.5, clock() - begun

            # Of a module, so that it is there until modules are cleared.
            sys.at_the_end = AtTheEnd()
            """
        )
    )
