"""What a user would write instead of pagegate: a VMM in Python, with fcntl, mmap and ctypes alone.

It runs the same guest code as the benchmarks on a software-protected VM and has the kernel do the same work for each
explicit request: set the attribute, discard the old side, answer. No policy, no checks, no page states, no events.

    python benches/plain.py [REQUESTS]
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys
import time
from typing import TYPE_CHECKING

from pagegate import guests, workload

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = 4096
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_CPUID2 = 0x4008AE90
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_REGS = 0x4090AE82
KVM_ENABLE_CAP = 0x4068AEA3
KVM_SET_USER_MEMORY_REGION2 = 0x40A0AE49
KVM_SET_MEMORY_ATTRIBUTES = 0x4020AED2
KVM_CREATE_GUEST_MEMFD = 0xC040AED4
KVM_RUN = 0xAE80

KVM_X86_SW_PROTECTED_VM = 1
KVM_CAP_EXIT_HYPERCALL = 201
KVM_MEM_GUEST_MEMFD = 4
PRIVATE = 1 << 3
MAP_GPA_RANGE = 12
ENCRYPTED = 1 << 4
EXIT_IO, EXIT_HYPERCALL, EXIT_HLT = 2, 3, 5
KEEP_SIZE, PUNCH_HOLE = 1, 2

EXIT_REASON, UNION = 8, 32
HYPERCALL = struct.Struct("<4Q")
HYPERCALL_RET = UNION + 56
IO = struct.Struct("<BBHIQ")
ATTRIBUTES = struct.Struct("<4Q")
REASON = struct.Struct("<I")
WORD = struct.Struct("<Q")
SEGMENT = struct.Struct("<QIH10B")

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def page_tables(base: int) -> bytes:
    """PML4, PDPT and PD: the first GiB mapped to itself."""
    large = b"".join(WORD.pack(i << 21 | 0x87) for i in range(512))
    return WORD.pack(base + PAGE | 7).ljust(PAGE, b"\0") + WORD.pack(base + 2 * PAGE | 7).ljust(PAGE, b"\0") + large


class Plain:
    """One VM with one vCPU."""

    def __init__(self, memory: int, at: int, image: bytes, table: int) -> None:
        self.kvm = kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.vm = fcntl.ioctl(kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM)
        fcntl.ioctl(
            self.vm, KVM_ENABLE_CAP, struct.pack("<II4Q64x", KVM_CAP_EXIT_HYPERCALL, 0, 1 << MAP_GPA_RANGE, 0, 0, 0)
        )
        self.private = fcntl.ioctl(self.vm, KVM_CREATE_GUEST_MEMFD, bytearray(struct.pack("<8Q", memory, *[0] * 7)))
        self.shared = os.memfd_create("plain")
        os.ftruncate(self.shared, memory)
        self.memory = mmap.mmap(self.shared, memory)
        view = ctypes.c_char.from_buffer(self.memory)
        host = ctypes.addressof(view)
        del view
        region = struct.pack("<IIQQQQII112x", 0, KVM_MEM_GUEST_MEMFD, 0, memory, host, 0, self.private, 0)
        fcntl.ioctl(self.vm, KVM_SET_USER_MEMORY_REGION2, region)

        tables = memory - 3 * PAGE
        self.memory[tables : tables + 3 * PAGE] = page_tables(tables)
        self.memory[at : at + len(image)] = image
        self.vcpu = fcntl.ioctl(self.vm, KVM_CREATE_VCPU, 0)
        self.run_page = mmap.mmap(self.vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE))
        self._set_cpuid(kvm)
        self._set_registers(tables, rip=at, rdi=table)

    def close(self) -> None:
        """All of it: what lives on would have the kernel tell it of every page that others free."""
        self.run_page.close()
        self.memory.close()
        for fd in (self.vcpu, self.private, self.shared, self.vm, self.kvm):
            os.close(fd)

    def _set_cpuid(self, kvm: int) -> None:
        cpuid = bytearray(8 + 256 * 40)
        struct.pack_into("<I", cpuid, 0, 256)
        fcntl.ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid)
        fcntl.ioctl(self.vcpu, KVM_SET_CPUID2, cpuid)

    def _set_registers(self, cr3: int, *, rip: int, rdi: int) -> None:
        sregs = bytearray(312)
        fcntl.ioctl(self.vcpu, KVM_GET_SREGS, sregs)
        code = SEGMENT.pack(0, 0xFFFFFFFF, 0x08, 0b1011, 1, 0, 0, 1, 1, 1, 0, 0, 0)
        data = SEGMENT.pack(0, 0xFFFFFFFF, 0x10, 0b0011, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        for i, segment in enumerate([code, data, data, data, data, data]):
            sregs[i * SEGMENT.size : (i + 1) * SEGMENT.size] = segment
        # cr0, cr2, cr3, cr4, cr8, efer: after eight segments and two table registers
        struct.pack_into("<6Q", sregs, 8 * SEGMENT.size + 2 * 16, 0x80000033, 0, cr3, 0x620, 0, 0x500)
        fcntl.ioctl(self.vcpu, KVM_SET_SREGS, bytes(sregs))
        registers = [0] * 18
        registers[5], registers[16], registers[17] = rdi, rip, 2
        fcntl.ioctl(self.vcpu, KVM_SET_REGS, struct.pack("<18Q", *registers))

    def convert(self, gpa: int, size: int, attributes: int) -> None:
        to_private = attributes & ENCRYPTED
        if not to_private and self._written(gpa, size):
            self._punch(self.shared, gpa, size)
        fcntl.ioctl(self.vm, KVM_SET_MEMORY_ATTRIBUTES, ATTRIBUTES.pack(gpa, size, PRIVATE if to_private else 0, 0))
        self._punch(self.shared if to_private else self.private, gpa, size)

    def _punch(self, file: int, gpa: int, size: int) -> None:
        if libc.fallocate(file, PUNCH_HOLE | KEEP_SIZE, gpa, size):
            raise OSError(ctypes.get_errno(), "fallocate")

    def _written(self, gpa: int, size: int) -> bool:
        """Whether KVM's emulation, which knows no attributes, left anything on the shared side."""
        try:
            return os.lseek(self.shared, gpa, os.SEEK_DATA) < gpa + size
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return False

    def run(self) -> tuple[int, int]:
        """Until HLT: the nanoseconds and the requests between the guest's marks."""
        page, vcpu = self.run_page, self.vcpu
        begun = ended = requests = before = after = 0
        while True:
            fcntl.ioctl(vcpu, KVM_RUN, 0)
            (reason,) = REASON.unpack_from(page, EXIT_REASON)
            if reason == EXIT_HYPERCALL:
                nr, gpa, pages, attributes = HYPERCALL.unpack_from(page, UNION)
                if nr != MAP_GPA_RANGE:
                    raise RuntimeError(f"hypercall {nr}")
                self.convert(gpa, pages * PAGE, attributes)
                requests += 1
                WORD.pack_into(page, HYPERCALL_RET, 0)
            elif reason == EXIT_IO:
                write, _, port, _, offset = IO.unpack_from(page, UNION)
                if write and port == workload.MARKS:
                    now = time.monotonic_ns()
                    if page[offset] == workload.END:
                        ended, after = now, requests
                    else:
                        begun, before = now, requests
            elif reason == EXIT_HLT:
                return ended - begun, after - before
            else:
                raise RuntimeError(f"exit reason {reason}")


def measure(load: workload.Workload) -> float:
    """Seconds of the workload's measured part."""
    ((at, image, table),) = load.images()
    machine = Plain(load.memory, at, image, table)
    try:
        nanoseconds, requests = machine.run()
    finally:
        machine.close()
    if requests != load.requests:
        raise RuntimeError(f"{requests} requests in place of {load.requests}")
    return nanoseconds / 1e9


def main(arguments: Sequence[str]) -> None:
    load = workload.make("explicit", int(arguments[0]) if arguments else 1000, call="hypercall")
    print(f"{measure(load) / load.requests * 1e9:,.0f} ns a request")


if __name__ == "__main__":
    if not guests.hypercall_completes():
        sys.exit("plain: a guest's hypercall does not complete on this host; run this in the testbed")
    main(sys.argv[1:])
