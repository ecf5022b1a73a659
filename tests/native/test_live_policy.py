"""Remembered decisions, and policies that are replaced in a run, with guests on /dev/kvm."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from pagegate import Convert, Region
from pagegate.guests import Script
from pagegate.loading.watch import Changes, Watcher
from pagegate.script import load

pytestmark = pytest.mark.kvm

PAGE = 4096
DATA = 0x30_0000
PAGES = 16


class Counting:
    def __init__(self, decision=None) -> None:
        self.decision = decision or Convert()
        self.asked = []

    def memory_fault(self, fault):
        self.asked.append((fault.vcpu, fault.gpa, fault.private))
        return self.decision

    def map_gpa_range(self, call):
        self.asked.append((call.vcpu, call.gpa, call.to))
        return self.decision


def test_decisions_on_implicit_requests_are_remembered(make, shared_bit, expecting) -> None:
    policy = Counting(Convert(remember=Region(DATA, PAGES * PAGE)))
    vm = make(policy=policy, shared_bit=shared_bit)
    script = expecting(shared_bit=shared_bit)
    begin = script.fill(DATA, PAGES * PAGE, 0x11)
    wrong = script.expect(script.check(DATA, PAGES * PAGE, 0x11))
    script.touch(DATA | 1 << shared_bit, PAGES)
    script.loop(begin, 3)
    script.start(vm)
    report = vm.run(timeout=60)
    assert (report.reason, report.conversions, script.result(vm, wrong)) == ("halt", 3 * 2 * PAGES, 0)
    assert policy.asked == [(0, DATA, True), (0, DATA, False)]
    assert (vm.policy.seen, vm.policy.spared) == (2, 3 * 2 * PAGES - 2)
    assert vm.attributes.runs(DATA, PAGES * PAGE) == [(DATA, PAGES * PAGE, "shared")]


def test_forgotten_between_two_runs(make) -> None:
    policy = Counting(Convert(remember=Region(DATA, PAGES * PAGE)))
    vm = make(policy=policy)
    script = Script(call="doorbell")
    for page in range(4):
        script.map(DATA + page * PAGE, PAGE, to="private")
    for forget, asked in ((False, 1), (False, 1), (True, 2)):
        if forget:
            vm.policy.forget()
        script.start(vm)
        assert vm.run(timeout=20).conversions == 4
        assert len(policy.asked) == asked


def test_replaced_under_load(make, bit) -> None:
    # Each request goes to exactly one of the policies, once.
    rounds, vcpus = 24, 2
    policies = [Counting()]
    vm = make(policy=policies[0], vcpus=vcpus, shared_bit=bit)
    scripts, at = [], 0x1000
    for vcpu in range(vcpus):
        base = DATA + vcpu * (PAGES << 12)
        script = Script(call="doorbell")
        if bit is None:
            begin = script.map(base, PAGE, to="private")
            script.map(base, PAGE, to="shared")
            script.loop(begin, rounds)
        else:
            begin = script.touch(base, 1)
            script.touch(base | 1 << bit, 1)
            script.loop(begin, rounds)
        at = -(-script.start(vm, vcpu, at=at) // PAGE) * PAGE
        scripts.append(script)
    done = threading.Event()

    def reload() -> None:
        while not done.is_set():
            policies.append(Counting())
            vm.policy.replace(policies[-1])
            time.sleep(0.002)

    thread = threading.Thread(target=reload)
    thread.start()
    try:
        report = vm.run(timeout=100)
    finally:
        done.set()
        thread.join()
    assert report.reason == "halt"
    assert report.requests == report.conversions == 2 * rounds * vcpus
    asked = [each for policy in policies for each in policy.asked]
    assert len(asked) == report.requests
    assert sum(1 for policy in policies if policy.asked) > 1


POLICY = """
import pagegate
EDITION = {edition}
asked = []
class Mine(pagegate.Policy):
    def map_gpa_range(self, call):
        asked.append((EDITION, call.vcpu, call.gpa, call.to, call.time))
        return pagegate.Convert()
"""


def test_a_file_that_is_edited_under_load(make, tmp_path) -> None:
    """The watcher loads files that are written in two steps, and one that is broken."""
    vcpus = 2
    file = tmp_path / "mine.py"
    file.write_text(POLICY.format(edition=0))
    said, loaded = [], []
    first = load(file)
    vm = make(policy=first, vcpus=vcpus)
    scripts, at = [], 0x1000
    for vcpu in range(vcpus):
        script = Script(call="doorbell")
        script.map(DATA + vcpu * PAGE, PAGE, to="private")
        script.map(DATA + vcpu * PAGE, PAGE, to="shared")
        script.loop(0, 1 << 30)
        at = -(-script.start(vm, vcpu, at=at) // PAGE) * PAGE
        scripts.append(script)

    class Machine:
        class policy:  # noqa: N801 - as the machine calls it
            current = None

            @staticmethod
            def replace(policy) -> None:
                loaded.append(policy)
                vm.policy.replace(policy)

    def asked_of(policy):
        return sys.modules[type(policy).__module__].asked

    def edit() -> None:
        wait(lambda: asked_of(first))
        for edition in (1, 2):
            text = POLICY.format(edition=edition)
            file.write_text(text[: len(text) // 2])
            file.write_text(text)
            wait(lambda edition=edition: len(loaded) == edition and asked_of(loaded[-1]))
        file.write_text("for")
        wait(lambda: any("the policy in force stays" in line for line in said))
        vm.stop()

    def wait(condition) -> None:
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)

    with Watcher(Machine(), Changes(file), lambda: load(file), said.append):
        thread = threading.Thread(target=edit)
        thread.start()
        report = vm.run(timeout=100)
        thread.join()
    assert report.reason == "stopped"
    assert len(loaded) == 2
    asked = [each for policy in (first, *loaded) for each in asked_of(policy)]
    assert {edition for edition, *_ in asked} == {0, 1, 2}
    # Every request is counted once, also one that was with the policy when the run ended.
    assert len(asked) == len(set(asked)) == report.requests == vm.events.total
    for vcpu in range(vcpus):
        states = [to for _, index, _, to, _ in sorted(asked, key=lambda each: each[-1]) if index == vcpu]
        assert states == ["private", "shared"] * (len(states) // 2) + ["private"] * (len(states) % 2)
