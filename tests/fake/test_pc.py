"""A machine for Linux: its serial port, how it ends, its MSRs, and what `Vm.boot` refuses."""

from __future__ import annotations

import errno

import pytest
from pagegate import NotSupported, PagegateError, Vm
from pagegate.testing import Fake, Step

from tests.boot_parts import C_BIT, POWER_OFF, REBOOT, kernel, write_kernel

from .conftest import BIT

PAGE = 4096
MEMORY = 64 << 20
COM1, LINE_STATUS = 0x3F8, 0x3FD
DATA_READY, ROOM = 1, 0x60
SEV_STATUS, MIGRATION_CONTROL = 0xC001_0131, 0x4B56_4D08
DENIED = b"\1"


@pytest.fixture
def pc():
    """Makes a machine with platform="pc", started at 0 without paging, with a vCPU for each script."""
    machines = []

    def pc(*scripts, **kwargs):
        fake = Fake(*map(list, scripts))
        arguments = {"platform": "pc", "vcpus": max(1, len(scripts))} | kwargs
        vm = Vm(MEMORY, hypervisor=fake, **arguments)
        machines.append(vm)
        for vcpu in vm.vcpus:
            vcpu.start(mode="protected")
        return vm, fake

    yield pc
    for vm in machines:
        vm.close()


# ---- what kind of machine it is


def test_a_sev_machine(pc) -> None:
    vm, fake = pc([], confidential="sev")
    assert (vm.platform, vm.confidential, vm.enforcement) == ("pc", "sev", "traps")
    assert (vm.private_bit, vm.shared_bit) == (C_BIT.bit_length() - 1, None)
    assert vm.attributes.runs() == [(0, MEMORY, "private")]
    assert fake.is_private(0)
    assert not fake.is_private(C_BIT)


@pytest.mark.parametrize("kwargs", [{}, {"enforcement": "memslots"}], ids=["auto", "memslots"])
def test_a_plain_machine(pc, kwargs) -> None:
    vm, _ = pc([], **kwargs)
    assert (vm.platform, vm.confidential, vm.enforcement) == ("pc", None, "memslots")
    assert (vm.private_bit, vm.shared_bit) == (None, None)
    assert vm.attributes.runs() == [(0, MEMORY, "shared")]


def test_a_bare_machine_says_so() -> None:
    with Vm(MEMORY, hypervisor=Fake([])) as vm:
        assert (vm.platform, vm.confidential, vm.enforcement) == ("bare", None, "attributes")


def test_a_sev_machine_without_private_memory_gets_memslots() -> None:
    fake = Fake([], private_memory=False)
    with Vm(MEMORY, platform="pc", confidential="sev", hypervisor=fake) as vm:
        assert vm.enforcement == "memslots"


def test_the_c_bit_can_be_chosen(pc) -> None:
    vm, fake = pc([], confidential="sev", private_bit=BIT)
    assert vm.private_bit == BIT
    assert not fake.is_private(1 << BIT)


@pytest.mark.parametrize("bit", [48, 51])
def test_a_c_bit_that_addresses_do_not_have(bit) -> None:
    with pytest.raises(NotSupported, match=f"48 bits.*{(1 << bit) + MEMORY:#x}.*private_bit"):
        Vm(MEMORY, platform="pc", confidential="sev", private_bit=bit, hypervisor=Fake([]))


def test_attributes_are_for_small_guests() -> None:
    with pytest.raises(NotSupported, match="traps.*memslots"):
        Vm(MEMORY, platform="pc", enforcement="attributes", hypervisor=Fake([]))


# ---- MSRs


def test_the_msrs_of_a_sev_guest(pc) -> None:
    steps = [
        Step.read_msr(SEV_STATUS),
        Step.read_msr(MIGRATION_CONTROL),
        Step.read_msr(0x10A),
        Step.write_msr(MIGRATION_CONTROL, 1),
        Step.write_msr(MIGRATION_CONTROL, 0),
        Step.write_msr(SEV_STATUS, 0),
        Step.write_msr(0x10A, 1),
        Step.read_msr(SEV_STATUS),
    ]
    vm, fake = pc(steps, confidential="sev")
    assert vm.run(timeout=10).reason == "halt"
    one = (1).to_bytes(8, "little")
    nothing = DENIED + bytes(8)
    assert [reply.data for reply in fake.replies()] == [
        *(b"\0" + one, nothing, nothing),
        *(b"\0", b"\0", DENIED, DENIED),
        b"\0" + one,
    ]


@pytest.mark.parametrize("platform", ["pc", "bare"])
def test_no_other_machine_has_msrs_here(pc, platform) -> None:
    msrs = [SEV_STATUS, MIGRATION_CONTROL, 0x10A]
    vm, fake = pc([*map(Step.read_msr, msrs), *(Step.write_msr(msr, 1) for msr in msrs)], platform=platform)
    assert vm.run(timeout=10).reason == "halt"
    assert [reply.data for reply in fake.replies()] == [DENIED + bytes(8)] * 3 + [DENIED] * 3


# ---- the serial port


def test_what_the_guest_writes(pc) -> None:
    vm, fake = pc([*(Step.io_write(COM1, [each]) for each in b"hello\n"), Step.io_read(LINE_STATUS)])
    assert vm.run(timeout=10).reason == "halt"
    assert vm.console.tail() == b"hello\n"
    assert fake.replies()[-1].data == bytes([ROOM])


def test_what_the_guest_reads(pc) -> None:
    vm, fake = pc([Step.io_read(COM1), Step.io_read(LINE_STATUS)] * 3)
    assert vm.console.write("ab") == 2
    vm.run(timeout=10)
    read = [reply.data for reply in fake.replies()]
    assert read[:4] == [b"a", bytes([ROOM | DATA_READY]), b"b", bytes([ROOM])]


def test_the_port_has_its_handlers(pc) -> None:
    vm, _ = pc([])
    for port in (COM1, 0x64, 0x600, 0xCF9):
        with pytest.raises(ValueError, match=f"{port:#x}"):
            vm.on_io(port, print)


# ---- the end of a machine


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        pytest.param(POWER_OFF, "poweroff", id="sleep-control"),
        pytest.param(REBOOT, "reboot", id="keyboard-controller"),
        pytest.param(Step.io_write(0x602, [1]), "reboot", id="reset-register"),
        pytest.param(Step.io_write(0xCF9, [6]), "reboot", id="reset-control"),
    ],
)
def test_a_guest_ends_its_machine(pc, step, reason) -> None:
    vm, _ = pc([step, Step.io_write(COM1, b"!")], [Step.block()])
    report = vm.run(timeout=30)
    assert (report.reason, report.at) == (reason, None)
    assert vm.console.tail() == b"", "the run ends with the access"
    assert not vm.running


@pytest.mark.parametrize(
    ("port", "byte"), [(0x64, 0xD1), (0x60, 0xFE), (0x600, 0x20), (0x600, 0x14), (0x601, 0x34), (0x602, 0), (0xCF9, 2)]
)
def test_other_writes_do_not_end_it(pc, port, byte) -> None:
    vm, _ = pc([Step.io_write(port, [byte]), Step.io_write(COM1, b"!")])
    assert vm.run(timeout=10).reason == "halt"
    assert vm.console.tail() == b"!"


def test_a_bare_machine_has_no_such_ports() -> None:
    with Vm(MEMORY, hypervisor=Fake([POWER_OFF, REBOOT])) as vm:
        vm.vcpus[0].start(mode="protected")
        assert vm.run(timeout=10).reason == "halt"


# ---- booting


def test_boot_starts_every_vcpu(tmp_path) -> None:
    fake = Fake([Step.io_write(COM1, b"a")], [Step.io_write(COM1, b"b")])
    with Vm(MEMORY, vcpus=2, platform="pc", hypervisor=fake) as vm:
        with pytest.raises(PagegateError, match="start"):
            vm.run(timeout=1)
        vm.boot(write_kernel(tmp_path))
        assert vm.run(timeout=10).reason == "halt"
        assert sorted(vm.console.tail()) == sorted(b"ab")


def test_a_kernel_is_booted_once(tmp_path) -> None:
    with Vm(MEMORY, platform="pc", hypervisor=Fake([])) as vm:
        vm.boot(write_kernel(tmp_path))
        with pytest.raises(PagegateError, match="booted a kernel already"):
            vm.boot(tmp_path / "vmlinuz")


def test_a_bare_machine_does_not_boot(tmp_path) -> None:
    with Vm(MEMORY, hypervisor=Fake([])) as vm, pytest.raises(PagegateError, match="platform=.pc"):
        vm.boot(write_kernel(tmp_path))


def test_a_machine_that_runs_does_not_boot(pc, tmp_path, in_background) -> None:
    vm, _ = pc([Step.block()])
    running = in_background(vm)
    running.wait_until_in_progress()
    with pytest.raises(PagegateError, match="running"):
        vm.boot(write_kernel(tmp_path))
    vm.stop()
    assert running.join().reason == "stopped"


ELF = b"\x7fELF\2\1\1" + bytes(9)
BAD = {
    "empty": (b"", "empty"),
    "text": (b"#!/bin/sh\n", "not a kernel"),
    "cut-off": (kernel()[:1000], "cut off.*1000"),
    "header-only": (kernel()[:0x210], "cut off"),
    "arm64": (ELF + b"\2\0\xb7\0" + bytes(100), "arm64"),
    "32-bit": (b"\x7fELF\1\1\1" + bytes(9) + b"\2\0\3\0" + bytes(100), "x86-64"),
    "elf-header-only": (ELF[:10], ""),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "gzip"),
    "initrd": (b"070701" + bytes(100), "initrd"),
}


@pytest.mark.parametrize(("content", "says"), BAD.values(), ids=BAD)
def test_a_bad_file_is_named(pc, tmp_path, content, says) -> None:
    vm, _ = pc([], confidential="sev")
    path = tmp_path / "bad kernel"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: .*{says}"):
        vm.boot(path)
    # A refused file changes nothing.
    vm.boot(write_kernel(tmp_path))


def test_a_missing_file_is_an_oserror_as_pythons_own(pc, tmp_path) -> None:
    vm, _ = pc([])
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as pythons:
        missing.open("rb")
    for arguments in ({"kernel": missing}, {"kernel": write_kernel(tmp_path), "initrd": missing}):
        with pytest.raises(FileNotFoundError) as raised:
            vm.boot(**arguments)
        assert raised.value.errno == errno.ENOENT
        assert str(raised.value) == str(pythons.value)
    with pytest.raises(IsADirectoryError):
        vm.boot(tmp_path)


@pytest.mark.parametrize(
    ("append", "says"), [("x" * 3000, "command line has.*2047"), ("a\0b", "NUL"), ("a\nb", "line break")]
)
def test_a_bad_command_line(pc, tmp_path, append, says) -> None:
    vm, _ = pc([])
    with pytest.raises(ValueError, match=says):
        vm.boot(write_kernel(tmp_path), append=append)
    vm.boot(tmp_path / "vmlinuz")


def test_an_initrd_that_does_not_fit(pc, tmp_path) -> None:
    vm, _ = pc([])
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(MEMORY)
    with pytest.raises(ValueError, match=f"initrd has {MEMORY} bytes"):
        vm.boot(write_kernel(tmp_path), initrd=large)


def test_memory_that_is_too_small_for_a_kernel(tmp_path) -> None:
    with (
        Vm(4 << 20, platform="pc", hypervisor=Fake([])) as vm,
        pytest.raises(ValueError, match="memory"),
    ):
        vm.boot(write_kernel(tmp_path))


def test_no_symbols(pc, tmp_path) -> None:
    vm, _ = pc([])
    assert vm.symbol(0xFFFF_FFFF_8100_0000) is None
    vm.boot(write_kernel(tmp_path))
    assert vm.symbol(0xFFFF_FFFF_8100_0000) is None


def test_a_confidential_kernel_is_in_private_memory(tmp_path) -> None:
    with Vm(MEMORY, platform="pc", confidential="sev", hypervisor=Fake([]), debug_private=True) as vm:
        vm.boot(write_kernel(tmp_path), append="quiet")
        assert vm.attributes.private_bytes == MEMORY
        assert b"quiet console=ttyS0 panic=-1" in vm.read(0, 1 << 20)


@pytest.mark.parametrize(
    ("append", "line"),
    [
        ("", b"console=ttyS0 panic=-1"),
        ("console=hvc0", b"console=hvc0 panic=-1"),
        ("panic=5 quiet", b"panic=5 quiet console=ttyS0"),
        ("quiet -- console=x panic=1", b"quiet console=ttyS0 panic=-1 -- console=x panic=1"),
        ("-- single", b"console=ttyS0 panic=-1 -- single"),
        ("quiet --x x-- --", b"quiet --x x-- console=ttyS0 panic=-1 --"),
    ],
)
def test_the_command_line(tmp_path, append, line) -> None:
    with Vm(MEMORY, platform="pc", hypervisor=Fake([])) as vm:
        vm.boot(write_kernel(tmp_path), append=append)
        assert b"\0" + line + b"\0" in vm.read(0, 1 << 20)
