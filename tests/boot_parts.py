"""Helpers of the tests of `pagegate boot`: a made-up kernel, and the command on the fake hypervisor."""

import bz2
import functools
import gzip
import importlib
import lzma
import os
import random
import struct
import sys
from pathlib import Path

from pagegate import Vm, cli
from pagegate.testing import Fake, Step

PAGE = 4096
C_BIT = 1 << 47
"""The C-bit of a SEV guest on the fake."""
POWER_OFF = Step.io_write(0x600, [0x34])
REBOOT = Step.io_write(0x64, [0xFE])
SLOW = "import time\ndef map_gpa_range(call):\n    time.sleep(0.7)\n    return Convert()\n"
"""A policy file's text: it takes its time for an explicit request."""
OUT, DATA = 0x10_0000, 0x20_0000
READ = [Step.io_read(0x3F8)] * 16
GUESTS = {
    "powers off": [POWER_OFF],
    "reboots": [REBOOT],
    "halts": [],
    "shuts down": [Step.shutdown()],
    "hangs": [Step.block()] * 1000,
    "asks": [
        Step.hypercall(OUT, 1, 0),
        Step.hypercall(DATA, 512, 0),
        Step.access(OUT | C_BIT, write=True),
        Step.hypercall(1, 1, 0),
        POWER_OFF,
    ],
    "asks often": [*(Step.hypercall(DATA, count, 0) for count in range(1, 21)), POWER_OFF],
    "touches": [Step.access(OUT), POWER_OFF],
    "asks and reads": [Step.hypercall(OUT, 1, 0), *READ, POWER_OFF],
    "asks and hangs": [Step.hypercall(OUT, 1, 0), *READ, Step.block()],
}
"""What the guests do after they have written to their console. A policy may delay what comes after a request."""


def kernel() -> bytes:
    """A bzImage that can be loaded (Documentation/arch/x86/boot.rst of Linux)."""
    made = bytearray(PAGE)
    struct.pack_into("<B", made, 0x1F1, 1)  # setup_sects
    struct.pack_into("<I", made, 0x1F4, (PAGE - 1024) // 16)  # syssize
    struct.pack_into("<HBB4sH", made, 0x1FE, 0xAA55, 0xEB, 0x66, b"HdrS", 0x20F)  # boot_flag, jump, header, version
    struct.pack_into("<B", made, 0x211, 1)  # loadflags: LOADED_HIGH
    struct.pack_into("<I", made, 0x22C, 0x7FFF_FFFF)  # initrd_addr_max
    struct.pack_into("<IBBHI", made, 0x230, 2 << 20, 1, 21, 3, 2047)  # kernel_alignment ... xloadflags, cmdline_size
    struct.pack_into("<QI", made, 0x258, 16 << 20, 1 << 20)  # pref_address, init_size
    return bytes(made)


def compressed_kernel(how: str) -> bytes:
    """A bzImage whose vmlinux is compressed: by gzip, bz2, xz or lzma."""
    code = random.Random(0).randbytes(1 << 20) * 2
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 16 << 20, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    address = 0xFFFF_FFFF_8100_0000
    segment = struct.pack("<IIQQQQQQ", 1, 7, PAGE, address, 16 << 20, len(code), len(code), PAGE)
    vmlinux = (header + segment).ljust(PAGE, b"\0") + code
    compress = {
        "gzip": gzip.compress,
        "bz2": bz2.compress,
        "xz": functools.partial(lzma.compress, check=lzma.CHECK_CRC32),
        "lzma": functools.partial(lzma.compress, format=lzma.FORMAT_ALONE),
    }
    payload = compress[how](vmlinux)
    if how != "gzip":  # which ends with it
        payload += struct.pack("<I", len(vmlinux))
    made = bytearray(kernel())
    struct.pack_into("<II", made, 0x248, len(made) - 1024, len(payload))  # payload_offset, payload_length
    made += payload
    made += bytes(-len(made) % 16)
    struct.pack_into("<I", made, 0x1F4, (len(made) - 1024) // 16)
    return bytes(made)


def write_kernel(folder: Path) -> Path:
    path = folder / "vmlinuz"
    path.write_bytes(kernel())
    return path


def write_policy(folder: Path, text: str = "policy = policies.Allow()\n") -> Path:
    path = folder / "mine.py"
    path.write_text("from pagegate import *\n" + text)
    return path


def command(file: Path, *arguments: object, guest: str = "powers off", says: bytes = b"") -> list[str]:
    """`pagegate boot` with a made-up kernel, on a fake with this guest."""
    return [sys.executable, __file__, guest, says.hex(), "boot", str(file), *map(str, arguments)]


def _main() -> None:
    """Runs `pagegate` on a fake. Writes what the guest got for each IN to the file that $REPLIES names."""
    guest, says = sys.argv[1], bytes.fromhex(sys.argv[2])
    sys.argv[1:3] = []
    fake = Fake([*(Step.io_write(0x3F8, [each]) for each in says), *GUESTS[guest]])
    boot = importlib.import_module("pagegate.cli.boot")
    boot.Vm = functools.partial(Vm, hypervisor=fake)
    boot._check_host = lambda: None
    try:
        cli.main()
    finally:
        if "REPLIES" in os.environ:
            read = [reply.data for reply in fake.replies() if len(reply.data) == 1]
            Path(os.environ["REPLIES"]).write_bytes(b"".join(read).rstrip(b"\0"))


if __name__ == "__main__":
    _main()
