"""Reports, events and decisions are values: as dicts, for pickle, and readable."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pagegate
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagegate import (
    Convert,
    Deny,
    DeviceAccess,
    Discard,
    Event,
    Latency,
    Region,
    Report,
    Retry,
    Stop,
    Vm,
    Whereabouts,
    _core,
    devices,
    policies,
    trace,
)
from pagegate.guests import Script
from pagegate.script import load
from pagegate.testing import Fake, PolicyTester, Step

VALUES = [
    Convert(),
    Convert("shared", 0x1000, 0x2000, prefault=True, discard=False, remember=Region(0x1000, 0x2000, uses=3)),
    Deny(5, remember=Region(0, 4096, seconds=0.25)),
    Deny(),
    Retry(),
    Discard(),
    Stop("enough"),
    Region(0x1000, 0x3000),
]


@pytest.fixture
def vm():
    class Once(pagegate.Policy):
        def map_gpa_range(self, call):
            return Stop("enough") if call.gpa else Convert()

    steps = [Step.doorbell(0, 1, 16), Step.doorbell(1, 1, 16), Step.doorbell(4096, 1, 16)]
    with Vm("1M", policy=Once(), hypervisor=Fake(steps)) as vm:
        vm.vcpus[0].start(rip=0x1000)
        vm.run(timeout=10)
        yield vm


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_decisions(value):
    for again in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert (again, repr(again)) == (value, repr(value))


def values_of_each_class(vm):
    access = DeviceAccess(
        device="disk", number=1, queue=0, descriptor=None, gpa=4096, size=16, write=True, state="private"
    )
    seen = Report(**{**_fields(vm.report), "first_device_access": access, "device_accesses": 1})
    values = [*VALUES, *vm.events, access, seen, vm.report, vm.report.latency, vm.report.at]
    assert {type(value) for value in values} == {
        kind for kind in vars(_core).values() if isinstance(kind, type) and hasattr(kind, "asdict")
    }
    return values


def test_every_object_is_made_again_of_its_dict(vm):
    for value in values_of_each_class(vm):
        told = value.asdict()
        for fields in (told, json.loads(json.dumps(told))):
            again = type(value)(**fields)
            assert again.asdict() == told
            assert repr(again) == repr(value)
            if type(value).__eq__ is not object.__eq__:
                assert again == value


@given(st.floats(1e-9, 1e12, exclude_min=True))
def test_a_region_is_made_again_with_the_same_time(seconds):
    region = Region(0, 4096, seconds=seconds)
    assert Region(**region.asdict()) == region


def test_what_is_no_dict_of_a_region():
    for wrong in (3, {"gpa": 0}, {"gpa": 0, "size": 4096, "odd": 1}):
        with pytest.raises(TypeError):
            Deny(remember=wrong)
    with pytest.raises(ValueError, match="multiples of 4096"):
        Deny(remember={"gpa": 1, "size": 4096})


def test_events(vm):
    for event in vm.events:
        again = pickle.loads(pickle.dumps(event))
        assert (again, hash(again), again.asdict()) == (event, hash(event), event.asdict())
        assert Event(**event.asdict()) == event
        assert list(event.asdict())[:5] == ["sequence", "time", "vcpu", "kind", "gpa"]
        json.dumps(event.asdict())
    with pytest.raises(TypeError, match="the field sequence is missing"):
        Event()
    with pytest.raises(TypeError, match="there are other fields"):
        Event(**vm.events[0].asdict(), odd=1)
    with pytest.raises(ValueError, match='kind is "odd": it must be one of "implicit"'):
        Event(**{**vm.events[0].asdict(), "kind": "odd"})


def test_reports(vm):
    report = vm.report
    told = report.asdict()
    assert (told["reason"], told["requests"], told["malformed"], told["at"]["vcpu"]) == ("enough", 2, 1, 0)
    assert set(told["latency"]) == {"p50", "p90", "p99", "max"}
    json.dumps(told)
    again = pickle.loads(pickle.dumps(report))
    assert (again.asdict(), repr(again), str(again.at)) == (told, repr(report), str(report.at))
    assert again == copy.deepcopy(report) == report
    assert again != Report(**{**told, "denied": 7})
    assert report != told
    with pytest.raises(TypeError, match="the field reason is missing"):
        Report()


def test_every_class_has_a_repr_that_says_something():
    bare = [
        name
        for name, kind in vars(_core).items()
        if isinstance(kind, type) and kind.__repr__ is object.__repr__ and name not in ("Builtin",)
    ]
    assert bare == []


def test_what_the_reprs_say(vm, tmp_path):
    class Mine(pagegate.Policy):
        def __repr__(self):
            return "Mine()"

        def memory_fault(self, fault):
            return Convert()

    class Plain(pagegate.Policy):
        pass

    class Told(pagegate.Listener):
        pass

    class Echo(pagegate.devices.Device):
        pass

    here = f"{__name__}.test_what_the_reprs_say.<locals>"
    (tmp_path / "mine.py").write_text("from pagegate import Policy\nclass Ring(Policy): pass\n")
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    script = Script()
    script.halt()
    said = {
        repr(vm.events): "<pagegate.Events: 3 kept of 3>",
        repr(vm.attributes): "<pagegate.Attributes: 0x1000 bytes of 0x100000 private, generation 1>",
        repr(policies.Quota("8M", policies.Align("2M", Mine()))): "Quota(0x800000, Align(0x200000, Mine()))",
        repr(policies.Window([(0, 4096)])): "Window([(0x0, 0x1000)])",
        repr(pagegate.devices.Block(disk, read_only=True)): f"<pagegate.devices.Block {disk}, read only>",
        repr(pagegate.devices.Rng()): "<pagegate.devices.Rng>",
        repr(Plain()): f"<{here}.Plain policy>",
        repr(Told()): f"<{here}.Told listener>",
        repr(Echo()): f"<{here}.Echo device>",
        repr(load(tmp_path / "mine.py")): "<mine.Ring policy>",
        repr(PolicyTester(Mine(), memory="1M")): (
            "<pagegate.testing.PolicyTester of Mine(): 0x0 bytes of 0x100000 shared>"
        ),
        repr(PolicyTester(memory="1M", initial="shared")): (
            "<pagegate.testing.PolicyTester of no policy: 0x100000 bytes of 0x100000 shared>"
        ),
        repr(pagegate.devices.Console().console): "<pagegate.Console: the guest has written nothing>",
        repr(script): "<pagegate.guests.Script of 1 operations>",
    }
    assert {is_: expected for is_, expected in said.items() if is_ != expected} == {}
    assert repr(vm.policy).startswith("<pagegate.PolicyHandle: <")
    assert repr(vm.policy).endswith("seen 2, spared 0>")
    long = Mine()
    for _ in range(900):
        long = policies.Quota(1 << 20, long)
    assert repr(long).count("Quota(") == 900


def test_notebooks_get_tables_with_what_a_guest_wrote_escaped(vm):
    assert "<td>enough</td>" in vm.report._repr_html_()
    assert vm.events._repr_html_().count("<tr>") == 4
    assert pagegate.trace.synthetic(100)._repr_html_().count("<tr>") == 22
    assert 'title="0x0 + 0x1000 private"' in vm.attributes._repr_html_()
    told = Report(
        **{
            **_fields(vm.report),
            "at": Whereabouts(vcpu=0, rip=0x1000, cr2=0),
            "latency": Latency(p50=11_763_711, p90=11_763_711, p99=11_763_711, max=912_345),
            "bytes_to_shared": 3 << 20,
            "bytes_to_private": 8192,
            "bytes_prefaulted": 1234567,
        }
    )._repr_html_()
    rows = dict(re.findall("<tr><td>(.*?)</td><td>(.*?)</td></tr>", told))
    assert rows["latency"] == "p50 11.76 ms, p90 11.76 ms, p99 11.76 ms, max 912.3 µs"
    assert [rows[f"bytes_{each}"] for each in ("to_shared", "to_private", "prefaulted")] == [
        "3 MiB",
        "8 KiB",
        "1234567 bytes",
    ]
    assert rows["at"] == "vcpu 0, rip 0x1000, cr2 0x0"
    assert "first_device_access" not in rows
    assert "None" not in told
    assert "<td>4 KiB</td>" in vm.events._repr_html_()
    hostile = Report(**{**_fields(vm.report), "reason": "<script>"})
    assert "<script>" not in hostile._repr_html_()
    assert "&lt;script&gt;" in hostile._repr_html_()


def _fields(report):
    return {name: getattr(report, name) for name in report.asdict()}


SIZES = "it must be a multiple of 4096, from 4096 to 1 << 52 (4 PiB)"


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        (lambda vm: Vm("64X"), ValueError, "memory is '64X': it must be a whole number, such as 64, 0x40, 64K"),
        (lambda vm: Vm(1.5), TypeError, "memory is 1.5: it must be an int, such as 64 << 20, or text such as 64M"),
        (lambda vm: Vm(-1), ValueError, f"memory is -1, which is out of range: {SIZES}"),
        (lambda vm: Vm("-4K"), ValueError, f"memory is '-4K', which is out of range: {SIZES}"),
        (lambda vm: Vm(1 << 64), ValueError, f"memory is {1 << 64}, which is out of range: {SIZES}"),
        (lambda vm: Vm(1 << 60), ValueError, f"memory is {1 << 60:#x} bytes: {SIZES}"),
        (lambda vm: Vm(0), ValueError, f"memory is 0x0 bytes: {SIZES}"),
        (lambda vm: trace.read(vm.events, memory=-1), ValueError, "a multiple of 4096, from 4096 to 16 << 40 (16 TiB)"),
        (lambda vm: Vm("1M", shared_bit=-1), ValueError, "shared_bit is -1, which is out of range: it must be above"),
        (lambda vm: Vm("1M", events=-1), ValueError, "events is -1, which is out of range"),
        (lambda vm: Vm("1M", vcpus="2"), TypeError, "vcpus is '2': it must be an int"),
        (lambda vm: Vm("1M", policy=3), pagegate.PolicyError, "3 is no policy: it has none of the hooks memory_fault"),
        (lambda vm: vm.on_io("0x3f8", print), TypeError, "port is '0x3f8': it must be an int, such as 0x3f8"),
        (lambda vm: vm.on_io(0x3F8, 3), TypeError, "handler is 3: it must be callable"),
        (lambda vm: Deny("EINVAL"), TypeError, "errno is 'EINVAL': it must be an int, such as errno.EINVAL"),
        (lambda vm: vm.run(timeout="5"), TypeError, "timeout is '5': it must be a number of seconds, such as 5.0"),
        (lambda vm: vm.vcpus[0].start(mode=16), ValueError, 'mode is "16": it must be one of "real", "protected"'),
        (lambda vm: vm.vcpus[0].start(rip="a"), TypeError, "rip is 'a': it must be an int"),
        (lambda vm: policies.Quota(-1), ValueError, "max_shared is -1, which is out of range"),
        (lambda vm: policies.Window(3), TypeError, "ranges is 3: it must be a range of addresses, such as range("),
        (lambda vm: Step.hypercall("x", 1, 0), ValueError, "gpa is 'x': it must be a whole number"),
        (lambda vm: Step.hypercall(0, [], 0), TypeError, "pages is []: it must be an int"),
        (lambda vm: Step.io_write(0x80, [256]), TypeError, "data is [256]: it must be bytes, or integers from 0"),
        (lambda vm: Step.io_read(0x80, size="1"), TypeError, "size is '1': it must be an int, such as 1, 2 or 4"),
        (lambda vm: Fake().inject(3, 1), TypeError, "call is 3: it must be text"),
        (lambda vm: Fake().inject("discard", "EIO"), TypeError, "errno is 'EIO': it must be an int, such as errno."),
        (lambda vm: Fake().is_private(None), TypeError, "gpa is None: it must be an int, such as 0x10_0000"),
        (lambda vm: devices.Console().console.read(1.5), TypeError, "size is 1.5: it must be an int"),
        (lambda vm: devices.Console().console.tail("x"), ValueError, "size is 'x': it must be a whole number"),
        (lambda vm: devices.Console().console.write(3), TypeError, "data is 3: it must be text, or bytes"),
        (lambda vm: devices.Console().console.expect(3), TypeError, "pattern is 3: it must be text, bytes, or a"),
        (lambda vm: trace.Recorder(3, "x.arrows"), TypeError, "vm is 3: it must be a Vm"),
        (lambda vm: Script().start(3), TypeError, "vm is 3: it must be the Vm that runs the script"),
        (lambda vm: Script().start(vm, 1), ValueError, "vcpu is 1: the machine has 1, from 0 on"),
        (lambda vm: Script().start(vm, "0"), TypeError, "vcpu must be an int, not str"),
        (lambda vm: Script().result("vm", 0), TypeError, "vm is 'vm': it must be the Vm that runs the script"),
        (lambda vm: PolicyTester("x", memory="1M"), pagegate.PolicyError, "'x' is no policy"),
        (
            lambda vm: PolicyTester(Wide(gpa=0xFF000), memory="1M").call(0x2000, 0x2000, to="shared"),
            pagegate.PolicyError,
            "guest's 0x100000 bytes; no size is named, so it is the request's",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_what_it_must_be(vm, wrong, kind, said):
    with pytest.raises(kind) as caught:
        wrong(vm)
    assert said in str(caught.value)


class Wide(pagegate.Policy):
    def __init__(self, **fields):
        self.answer = Convert(**fields)

    def map_gpa_range(self, call):
        return self.answer


def test_sizes_can_be_text():
    with Vm("2M", hypervisor=Fake([])) as vm:
        assert vm.memory == 2 << 20
    assert PolicyTester(policies.Quota("8K"), memory="1M").memory == 1 << 20
    assert pagegate.trace.read(pagegate.trace.synthetic(1), memory="1G").memory == 1 << 30
