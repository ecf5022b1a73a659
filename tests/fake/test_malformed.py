"""Malformed requests cost a guest little. They take no room from others, in the log or in a file."""

from __future__ import annotations

import pagegate
import pytest
from pagegate import Vm, trace
from pagegate.testing import Fake, Step

PAGE, PRIVATE = 4096, 16
KEPT = 4096
WRITTEN = 65536
MALFORMED = Step.doorbell(1, 1, PRIVATE)


def flood(count, *, events=65536, vcpus=1):
    """A guest that makes two requests and then many malformed ones."""
    requests = [Step.doorbell(0, 1, PRIVATE), Step.doorbell(PAGE, 1, PRIVATE)]
    vm = Vm("1M", vcpus=vcpus, events=events, hypervisor=Fake(*[[*requests, *[MALFORMED] * count]] * vcpus))
    for vcpu in vm.vcpus:
        vcpu.start(rip=0x1000)
    return vm


@pytest.mark.parametrize("vcpus", [1, 3])
def test_the_log_keeps_the_requests_and_the_newest_malformed_ones(vcpus):
    each = 7000
    with flood(each, events=4 * vcpus, vcpus=vcpus) as vm:
        report = vm.run(timeout=60)
        assert (report.requests, report.malformed) == (2 * vcpus, each * vcpus)
        events = list(vm.events)
        judged = [event for event in events if event.kind == "explicit"]
        malformed = [event for event in events if event.kind == "malformed"]
        assert len(judged) == 2 * vcpus
        assert len(malformed) == min(4 * vcpus, KEPT)
        assert malformed[-1].sequence == vm.events.total - 1
        assert [event.sequence for event in events] == sorted(event.sequence for event in events)
        assert {event.vcpu for event in judged} == set(range(vcpus))
        assert {event.vcpu for event in malformed} <= set(range(vcpus))
        assert report.malformed_dropped == report.malformed - len(malformed)
        assert vm.events.dropped == report.malformed_dropped


def test_it_keeps_so_many_of_them():
    with flood(6000) as vm:
        report = vm.run(timeout=60)
        assert len(vm.events) == KEPT + 2
        assert report.malformed_dropped == 6000 - KEPT
        assert vm.run(timeout=60).malformed_dropped == 0, "of that run"
        assert trace.read(vm.events)[0].kind == "explicit"
        assert len(trace.read(vm.events)) == KEPT + 2


def test_without_a_log_none_is_kept():
    with flood(10, events=0) as vm:
        assert vm.run(timeout=60).malformed_dropped == 10
        assert len(vm.events) == 0


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "arrows"])
def test_the_file_has_the_requests_and_so_many_malformed_ones_as_its_limit(tmp_path, suffix):
    file = tmp_path / f"events.{suffix}"
    with flood(1000) as vm:
        with trace.Recorder(vm, file, limit=5) as recorder:
            vm.run(timeout=60)
        assert (recorder.written, recorder.lost, recorder.lost_malformed) == (7, 995, 995)
    kinds = [event.kind for event in trace.read(file)]
    assert kinds == ["explicit"] * 2 + ["malformed"] * 5


def test_the_limit_of_the_others_leaves_room_for_malformed_ones(tmp_path):
    file = tmp_path / "events.arrow"
    steps = [MALFORMED, *(Step.doorbell(page * PAGE, 1, PRIVATE) for page in range(6)), MALFORMED]
    with Vm("1M", hypervisor=Fake(steps)) as vm:
        vm.vcpus[0].start(rip=0x1000)
        with trace.Recorder(vm, file, limit=2) as recorder:
            vm.run(timeout=60)
        assert (recorder.written, recorder.lost, recorder.lost_malformed) == (4, 4, 0)
    assert [event.sequence for event in trace.read(file)] == [0, 1, 2, 7]


def test_what_is_lost_is_counted_exactly_in_a_flood(tmp_path):
    """It is faster than the recorder, and more than a file takes."""
    count = WRITTEN + 40_000
    file = tmp_path / "events.arrows"
    with flood(count) as vm:
        with trace.Recorder(vm, file) as recorder:
            report = vm.run(timeout=120)
        read = trace.read(file)
        written = [event.kind for event in read].count("malformed")
        assert written <= WRITTEN
        assert len(read) == recorder.written == written + 2
        assert recorder.lost == recorder.lost_malformed == count - written
        assert report.malformed == count


def test_a_recorder_that_begins_later_counts_from_then_on(tmp_path):
    with Vm("1M", hypervisor=Fake([MALFORMED, Step.block(), MALFORMED, Step.doorbell(0, 1, 16)])) as vm:
        vm.vcpus[0].start(rip=0x1000)
        vm.run(timeout=0.3)
        assert vm.events.total == 1
        with trace.Recorder(vm, tmp_path / "events.arrow") as recorder:
            vm.run(timeout=60)
        assert (recorder.written, recorder.lost, recorder.lost_malformed) == (2, 0, 0)


def test_the_report_says_it():
    with flood(5000) as vm:
        assert "malformed=5000" in repr(vm.run(timeout=60))
        assert pagegate.Report(**vm.report.asdict()).malformed_dropped == 5000 - KEPT
