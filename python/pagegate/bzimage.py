"""What the start of a Linux kernel image for x86 says, by the boot protocol (Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

START = 0x1_0000
"""Bytes from a file's start on that the functions here need at most: the version's text may be this far in."""

_BOOT_FLAG = slice(0x1FE, 0x200)
_MAGIC = slice(0x202, 0x206)
_VERSION = slice(0x20E, 0x210)
_SECTOR = 0x200
_LONGEST_VERSION = 65


def is_bzimage(start: bytes) -> bool:
    """Whether a file that starts so is a bzImage. It may still be one that cannot be booted."""
    return start[_MAGIC] == b"HdrS" and start[_BOOT_FLAG] == b"\x55\xaa"


def version(start: bytes) -> bytes | None:
    """The text of its version from its start on, and what follows; ``None`` if it is no kernel image for x86."""
    if start[_MAGIC] != b"HdrS":
        return None
    # An offset from the end of the first sector.
    at = int.from_bytes(start[_VERSION], "little") + _SECTOR
    return start[at : at + _LONGEST_VERSION]
