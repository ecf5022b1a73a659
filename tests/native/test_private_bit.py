"""Two views by a bit that means private, as in a SEV guest: the plain address is the shared view."""

from __future__ import annotations

import struct

import pagegate
import pytest
from pagegate import Convert, Deny, NotSupported, PrivateMemoryError, Vm
from pagegate.guests import Script

pytestmark = pytest.mark.kvm

PAGE = 4096
DATA = 0x30_0000
BIT = 35
PRIVATE = DATA | 1 << BIT
HLT = b"\xf4"
ADD = b"\x48\x01\x07"  # add [rdi], rax
ENFORCEMENTS = ["auto", "traps", "memslots"] if "sw-protected" in pagegate.probe().vm_types else ["auto"]


@pytest.fixture(params=ENFORCEMENTS)
def vm_with(request, make):
    def vm_with(policy=None, **kwargs) -> Vm:
        return make(private_bit=BIT, enforcement=request.param, policy=policy, **kwargs)

    return vm_with


def test_both_directions_of_implicit_requests(vm_with, recorder) -> None:
    policy = recorder()
    vm = vm_with(policy)
    assert (vm.private_bit, vm.shared_bit) == (BIT, None)
    script = Script()
    script.fill(DATA, PAGE, 0x11)
    script.fill(PRIVATE, PAGE, 0x22)
    private = script.check(PRIVATE, PAGE, 0x22)
    again = script.check(DATA, PAGE, 0)
    script.fill(DATA, PAGE, 0x33)
    script.start(vm)
    report = vm.run(timeout=60)
    assert [script.result(vm, check) for check in (private, again)] == [0, 0]
    assert vm.read(DATA, PAGE) == vm.read(PRIVATE, PAGE) == b"\x33" * PAGE
    told = [(fault.gpa, fault.size, fault.private, fault.state) for fault in policy.requests]
    assert told == [(DATA, PAGE, True, "shared"), (DATA, PAGE, False, "private")]
    assert (report.faults, report.bytes_to_private, report.bytes_to_shared) == (2, PAGE, PAGE)


def test_explicit_requests_through_either_view(vm_with, recorder) -> None:
    policy = recorder()
    vm = vm_with(policy)
    script = Script(call="doorbell")
    answers = [script.map(DATA, PAGE, to="private"), script.map(PRIVATE + PAGE, PAGE, to="private")]
    script.start(vm)
    vm.run(timeout=60)
    assert [script.result(vm, answer) for answer in answers] == [0, 0]
    assert [call.gpa for call in policy.requests] == [DATA, DATA + PAGE]
    assert vm.attributes.state(DATA, 2 * PAGE) == "private"
    with pytest.raises(PrivateMemoryError):
        vm.read(DATA, 1)


def test_a_read_modify_write_is_completed(vm_with) -> None:
    vm = vm_with()
    vm.write(DATA, struct.pack("<Q", 5))
    vm.load(ADD + HLT, at=0x1000)
    for address, faults in ((DATA, 0), (PRIVATE, 1), (DATA, 1)):
        vm.vcpus[0].start(mode="long", rip=0x1000, rdi=address, rax=7)
        report = vm.run(timeout=60)
        assert (report.reason, report.faults) == ("halt", faults)
    assert vm.read(DATA, 8) == struct.pack("<Q", 7), "each side began with zeroes"


def test_a_denied_access_is_made_again(vm_with, recorder) -> None:
    policy = recorder(Deny(), Convert())
    vm = vm_with(policy)
    vm.load(ADD + HLT, at=0x1000)
    vm.vcpus[0].start(mode="long", rip=0x1000, rdi=PRIVATE, rax=7)
    report = vm.run(timeout=60)
    assert (report.reason, report.at.vcpu) == ("denied", 0)
    assert vm.run(timeout=60).reason == "halt"
    assert vm.attributes.is_private(DATA)


def test_two_vcpus_convert_the_same_pages(vm_with) -> None:
    vm = vm_with(vcpus=2)
    for vcpu, address in enumerate((DATA, PRIVATE)):
        script = Script()
        script.touch(address, 8)
        script.loop(0, 1 << 40)
        script.start(vm, vcpu, at=0x1_0000 * (vcpu + 1))
    report = vm.run(timeout=3)
    assert report.reason == "timeout"
    assert report.conversions > 16
    assert report.bytes_to_private - report.bytes_to_shared == vm.attributes.private_bytes


@pytest.mark.parametrize("enforcement", ["traps", "attributes"])
def test_an_ordinary_vm_type_has_no_private_memory(enforcement) -> None:
    with pytest.raises(NotSupported, match=f"{enforcement}.*private memory"):
        Vm(1 << 20, vm_type="default", enforcement=enforcement, shared_bit=BIT)


def test_a_host_without_software_protected_vms_has_no_traps() -> None:
    if "sw-protected" in pagegate.probe().vm_types:
        with Vm(1 << 20, enforcement="traps", shared_bit=BIT) as vm:
            assert vm.enforcement == "traps"
    else:
        with pytest.raises(NotSupported, match="no VM type .sw-protected.*testbed"):
            Vm(1 << 20, enforcement="traps", shared_bit=BIT)
