"""Guests on /dev/kvm: starting, loading, devices, ending."""

from __future__ import annotations

import struct
import threading
import time

import pytest
from pagegate import Deny, Policy, PrivateMemoryError
from pagegate.guests import Script

pytestmark = pytest.mark.kvm

PAGE = 4096
FAR = 0x1000_0000
HLT = b"\xf4"
UD2 = b"\x0f\x0b"

STORE = {1: b"\x88\x07", 2: b"\x66\x89\x07", 4: b"\x89\x07", 8: b"\x48\x89\x07"}  # mov [rdi], rax
LOAD = {1: b"\x8a\x07", 2: b"\x66\x8b\x07", 4: b"\x8b\x07", 8: b"\x48\x8b\x07"}  # mov rax, [rdi]
WORD = 0x8877_6655_4433_2211


def run_code(vm, code, *, mode="long", vcpu=0, at=0x1000, **registers):
    vm.load(code, at=at)
    vm.vcpus[vcpu].start(mode=mode, rip=at, **registers)
    return vm.run(timeout=10)


def load_imm(mode):
    """Code that only this mode decodes as a load of 0x12..., and the value it loads."""
    return {
        "real": (b"\xb8\x34\x12", 0x1234),
        "protected": (b"\xb8\x78\x56\x34\x12", 0x1234_5678),
        "long": (b"\x48\xb8" + struct.pack("<Q", WORD), WORD),
    }[mode]


# ---- starting


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_each_mode_executes_its_own_code(make, mode) -> None:
    vm = make()
    code, value = load_imm(mode)
    assert run_code(vm, code + HLT, mode=mode).reason == "halt"
    regs = vm.vcpus[0].regs()
    assert regs["rax"] == value
    assert regs["rip"] == 0x1000 + len(code) + 1


@pytest.mark.parametrize("register", ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r11", "r15"])
def test_registers_start_as_given(make, register) -> None:
    vm = make()
    run_code(vm, HLT, **{register: 0x1234_5678_9ABC})
    assert vm.vcpus[0].regs()[register] == 0x1234_5678_9ABC


def test_unknown_registers_and_modes_are_refused(make) -> None:
    vm = make()
    with pytest.raises(TypeError, match="rxx.*rax"):
        vm.vcpus[0].start(rxx=1)
    with pytest.raises(ValueError, match="mode.*long"):
        vm.vcpus[0].start(mode="virtual")
    with pytest.raises(ValueError, match="rax"):
        vm.vcpus[0].start(rax=-1)


def test_long_mode_maps_all_memory_to_itself(make, shared_bit) -> None:
    vm = make(shared_bit=shared_bit)
    for view in (0, 1 << shared_bit):
        run_code(vm, STORE[8] + HLT, rdi=view | 0x50_0000, rax=WORD)
        assert vm.attributes.is_private(0x50_0000) == (view == 0)
        run_code(vm, LOAD[8] + HLT, rdi=view | 0x50_0000)
        assert vm.vcpus[0].regs()["rax"] == WORD


def test_a_stack_is_usable(make) -> None:
    vm = make()
    run_code(vm, b"\x50\x5b" + HLT, rsp=0x8000, rax=WORD)  # push rax; pop rbx
    assert vm.vcpus[0].regs()["rbx"] == WORD
    assert vm.read(0x8000 - 8, 8) == struct.pack("<Q", WORD)


# ---- loading


def test_bytes_are_loaded_at_their_address(make) -> None:
    vm = make()
    data = bytes(range(256)) * 40
    assert vm.load(data, at=0x2345) == 0x2345
    assert vm.read(0x2345, len(data)) == data


def test_a_raw_file_is_loaded(make, tmp_path) -> None:
    path = tmp_path / "image"
    code, value = load_imm("long")
    path.write_bytes(code + HLT)
    vm = make()
    for name in (path, str(path)):
        entry = vm.load(name, at=0x3000)
        assert entry == 0x3000
        vm.vcpus[0].start(rip=entry)
        assert vm.run(timeout=10).reason == "halt"
        assert vm.vcpus[0].regs()["rax"] == value


def elf(code, *, vaddr=0x7000_0000, paddr=0x20_0000, entry=0, zeroes=0, machine=62):
    """An ELF file of one segment: the code, then zeroes."""
    start = 64 + 56
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, vaddr + entry, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    program = struct.pack("<IIQQQQQQ", 1, 5, start, vaddr, paddr, len(code), len(code) + zeroes, PAGE)
    return ident + header + program + code


def test_an_elf_file_is_loaded_at_its_physical_address_and_entered_there(make, tmp_path) -> None:
    path = tmp_path / "guest.elf"
    code, value = load_imm("long")
    path.write_bytes(elf(UD2 + code + HLT, entry=len(UD2), zeroes=10_000))
    vm = make()
    vm.write(0x20_0000, b"\xcc" * 16384)
    entry = vm.load(path)
    assert entry == 0x20_0002
    size = len(UD2 + code + HLT)
    assert vm.read(0x20_0000, size + 10_000 + 1) == UD2 + code + HLT + bytes(10_000) + b"\xcc"
    vm.vcpus[0].start(rip=entry)
    assert vm.run(timeout=10).reason == "halt"
    assert vm.vcpus[0].regs()["rax"] == value


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(elf(HLT, machine=183), id="other-machine"),
        pytest.param(elf(HLT)[:70], id="cut-off"),
        pytest.param(elf(HLT, paddr=1 << 40), id="outside"),
        pytest.param(elf(HLT, paddr=(1 << 64) - 16), id="wraps"),
        pytest.param(b"\x7fELF", id="only-magic"),
    ],
)
def test_elf_files_that_cannot_be_loaded_are_refused(make, tmp_path, image) -> None:
    path = tmp_path / "guest.elf"
    path.write_bytes(image)
    with pytest.raises(ValueError, match="ELF|outside"):
        make().load(path)


def test_the_error_names_a_missing_file(make, tmp_path) -> None:
    with pytest.raises(Exception, match="nowhere"):
        make().load(tmp_path / "nowhere")


def test_images_outside_memory_are_refused(make) -> None:
    vm = make()
    with pytest.raises(ValueError, match="outside"):
        vm.load(b"x" * 100, at=(16 << 20) - 50)


def test_loading_makes_private_pages_shared(make) -> None:
    vm = make(initial="private")
    code, value = load_imm("long")
    assert run_code(vm, code + HLT).reason == "halt"
    assert vm.vcpus[0].regs()["rax"] == value
    assert not vm.attributes.is_private(0x1000)
    assert vm.attributes.is_private(0x2000)


# ---- devices


@pytest.mark.parametrize("size", [1, 2, 4])
def test_port_io_of_each_size(make, size) -> None:
    out, in_ = {1: (b"\xee", b"\xec"), 2: (b"\x66\xef", b"\x66\xed"), 4: (b"\xef", b"\xed")}[size]
    seen = []

    def handler(io):
        seen.append((io.vcpu, io.port, io.write, io.size, io.count, io.data))
        return bytes(range(0xA1, 0xA1 + size))

    vm = make()
    vm.on_io(0xE9, handler)
    assert run_code(vm, out + b"\x31\xc0" + in_ + HLT, rdx=0xE9, rax=WORD).reason == "halt"
    assert seen == [
        (0, 0xE9, True, size, 1, struct.pack("<Q", WORD)[:size]),
        (0, 0xE9, False, size, 1, b""),
    ]
    assert vm.vcpus[0].regs()["rax"] == int.from_bytes(bytes(range(0xA1, 0xA1 + size)), "little")


def test_string_io_transfers_all_bytes(make) -> None:
    seen = []
    answers = iter(b"hello")
    vm = make()
    vm.on_io(0xE9, lambda io: seen.append((io.size, io.count, io.data)))
    vm.on_io(0xEA, lambda io: bytes(next(answers) for _ in range(io.size * io.count)))
    vm.write(0x5000, b"a message")
    # rep outsb; mov dx, 0xea; mov ecx, 5; rep insb
    code = b"\xf3\x6e\x66\xba\xea\x00\xb9\x05\x00\x00\x00\xf3\x6c" + HLT
    assert run_code(vm, code, rdx=0xE9, rcx=9, rsi=0x5000, rdi=0x6000).reason == "halt"
    assert b"".join(data for _, _, data in seen) == b"a message"
    assert all(len(data) == size * count for size, count, data in seen)
    assert vm.read(0x6000, 6) == b"hello\0"


def test_a_port_without_a_handler_reads_ones(make) -> None:
    vm = make()
    run_code(vm, b"\xed" + HLT, rdx=0x99)
    assert vm.vcpus[0].regs()["rax"] == 0xFFFF_FFFF


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_of_each_size(make, size) -> None:
    seen = []
    data = bytes(range(0xA1, 0xA1 + size))

    def handler(mmio):
        seen.append((mmio.vcpu, mmio.gpa, mmio.write, mmio.size, mmio.data))
        return data

    vm = make()
    vm.on_mmio(FAR, PAGE, handler)
    assert run_code(vm, STORE[size] + b"\x31\xc0" + LOAD[size] + HLT, rdi=FAR + 16, rax=WORD).reason == "halt"
    assert seen == [
        (0, FAR + 16, True, size, struct.pack("<Q", WORD)[:size]),
        (0, FAR + 16, False, size, b""),
    ]
    assert vm.vcpus[0].regs()["rax"] == int.from_bytes(data, "little")


def test_a_handler_that_raises_is_called_again(make) -> None:
    seen = []

    def handler(io):
        seen.append(io.data)
        if len(seen) == 1:
            raise ValueError("not now")
        return b"\x42"

    vm = make()
    vm.on_io(0xE9, handler)
    vm.load(b"\xec" + HLT, at=0x1000)
    vm.vcpus[0].start(rip=0x1000, rdx=0xE9)
    with pytest.raises(ValueError, match="not now") as caught:
        vm.run(timeout=10)
    assert "vCPU 0" in caught.value.__notes__
    assert vm.run(timeout=10).reason == "halt"
    assert len(seen) == 2
    assert vm.vcpus[0].regs()["rax"] & 0xFF == 0x42


# ---- ending a run and running again


def test_a_triple_fault_is_a_shutdown(make) -> None:
    vm = make()
    assert run_code(vm, UD2).reason == "shutdown"
    assert run_code(vm, HLT).reason == "halt"


def test_the_last_of_several_vcpus_to_halt_ends_the_run(make) -> None:
    vm = make(vcpus=4)
    for vcpu in range(4):
        script = Script()
        script.barrier(0x8000, 4)
        script.add(0x8008, vcpu + 1)
        script.start(vm, vcpu, at=0x10000 * (vcpu + 1))
    assert vm.run(timeout=20).reason == "halt"
    assert int.from_bytes(vm.read(0x8008, 8), "little") == 1 + 2 + 3 + 4


def counting(vm, vcpu=0, at=0x1000):
    """Starts a guest that increments the word at 0x8000 for ever."""
    vm.load(b"\x48\xff\x07\xeb\xfb", at=at)  # inc qword [rdi]; jmp
    vm.vcpus[vcpu].start(rip=at, rdi=0x8000)


def count(vm):
    return int.from_bytes(vm.read(0x8000, 8), "little")


def goes_on(vm):
    """Runs for 50 ms, and again as long as the vCPU got nothing of that: the host may be busy."""
    before, end = count(vm), time.monotonic() + 60
    while count(vm) == before:
        assert time.monotonic() < end, "the guest does not go on"
        assert vm.run(timeout=0.05).reason == "timeout"


def test_a_run_goes_on_after_a_timeout(make) -> None:
    vm = make()
    counting(vm)
    for _ in range(3):
        goes_on(vm)


def test_a_run_goes_on_after_stop(make, in_background) -> None:
    vm = make()
    counting(vm)
    run = in_background(vm)
    while count(vm) == 0:
        pass
    vm.stop()
    assert run.join().reason == "stopped"
    goes_on(vm)


def test_a_halted_guest_goes_on_after_its_hlt(make) -> None:
    vm = make()
    assert run_code(vm, HLT + b"\xb8\x07\x00\x00\x00" + HLT).reason == "halt"
    assert vm.run(timeout=10).reason == "halt"
    assert vm.vcpus[0].regs()["rax"] == 7


class Denying(Policy):
    def __init__(self) -> None:
        self.deny = True
        self.faults = []

    def memory_fault(self, fault):
        self.faults.append((fault.gpa, fault.private, fault.state, fault.rip))
        return Deny() if self.deny else super().memory_fault(fault)


def test_a_denied_access_is_made_again_in_the_next_run(make, shared_bit) -> None:
    policy = Denying()
    vm = make(shared_bit=shared_bit, policy=policy)
    assert run_code(vm, STORE[8] + LOAD[8] + HLT, rdi=0x30_0000, rax=WORD).reason == "denied"
    assert vm.run(timeout=10).reason == "denied"
    assert vm.attributes.private_bytes == 0
    policy.deny = False
    assert vm.run(timeout=10).reason == "halt"
    assert len(policy.faults) == 3
    assert len(set(policy.faults)) == 1
    assert policy.faults[0][:3] == (0x30_0000, True, "shared")
    assert vm.attributes.is_private(0x30_0000)
    assert vm.vcpus[0].regs()["rax"] == WORD


def test_a_denied_vcpu_can_be_started_afresh(make, shared_bit) -> None:
    vm = make(shared_bit=shared_bit, policy=Denying())
    code, value = load_imm("long")
    for _ in range(3):
        assert run_code(vm, LOAD[8] + HLT, rdi=0x30_0000).reason == "denied"
    assert run_code(vm, code + HLT).reason == "halt"
    assert vm.vcpus[0].regs()["rax"] == value
    assert vm.attributes.private_bytes == 0


def test_machines_run_side_by_side(make) -> None:
    vms = [make() for _ in range(3)]
    for vm in vms:
        counting(vm)
    reports = []
    threads = [threading.Thread(target=lambda vm=vm: reports.append(vm.run(timeout=1.0))) for vm in vms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.reason for report in reports] == ["timeout"] * 3
    assert all(count(vm) > 0 for vm in vms)


# ---- access by the host


def test_host_and_guest_share_shared_memory(make) -> None:
    vm = make()
    vm.write(0x30_0000, struct.pack("<Q", WORD))
    run_code(vm, LOAD[8] + b"\x48\xff\xc0" + STORE[8] + HLT, rdi=0x30_0000)
    assert vm.read(0x30_0000, 8) == struct.pack("<Q", WORD + 1)


def test_only_the_guest_can_access_private_memory(make) -> None:
    vm = make()
    vm.write(0x30_0000, b"shared bytes")
    vm.convert(0x30_0000, 2 * PAGE, to="private")
    run_code(vm, STORE[8] + HLT, rdi=0x30_1000, rax=WORD)
    for access in (lambda: vm.read(0x2F_F000, 4 * PAGE), lambda: vm.write(0x2F_F000, bytes(4 * PAGE))):
        with pytest.raises(PrivateMemoryError, match="0x300000") as caught:
            access()
        assert caught.value.gpa == 0x30_0000
    run_code(vm, LOAD[8] + HLT, rdi=0x30_1000)
    assert vm.vcpus[0].regs()["rax"] == WORD
    vm.convert(0x30_0000, 2 * PAGE, to="shared")
    assert vm.read(0x30_0000, 2 * PAGE) == bytes(2 * PAGE)
