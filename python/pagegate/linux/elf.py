"""What is needed of ELF files: the facts in a kernel module, and whether a program needs a dynamic loader.

Only 64-bit files for x86 are known. Files may be anything; whatever does not fit raises ValueError.
"""

import struct
from dataclasses import dataclass

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_X86_64 = 62
_INTERPRETER = 3
"""The type of the program header that names the dynamic loader (PT_INTERP)."""


@dataclass(frozen=True)
class _Table:
    offset: int
    size: int
    count: int


def modinfo(module: bytes) -> dict[str, list[str]]:
    """Return the facts in a kernel module's section .modinfo, for each key its values.

    Raises:
        ValueError: it is no kernel module.

    """
    _, table, names_index = _tables(module)
    sections = [_entry(_SECTION, module, table, index) for index in range(table.count)]
    if names_index >= len(sections):
        raise ValueError("no kernel module: it has no names of sections")
    names = _content(module, sections[names_index])
    for section in sections:
        if names[section[0] :].startswith(b".modinfo\0"):
            found: dict[str, list[str]] = {}
            for fact in _content(module, section).split(b"\0"):
                key, equals, value = fact.partition(b"=")
                if equals:
                    found.setdefault(key.decode(errors="replace"), []).append(value.decode(errors="replace"))
            return found
    raise ValueError("no kernel module: it has no section .modinfo")


def is_static(program: bytes) -> bool:
    """Whether a program needs no dynamic loader.

    Raises:
        ValueError: it is no program for 64-bit x86.

    """
    table, _, _ = _tables(program)
    return all(_entry(_PROGRAM, program, table, index)[0] != _INTERPRETER for index in range(table.count))


def _tables(file: bytes) -> tuple[_Table, _Table, int]:
    """The tables of program headers and of sections, and the number of the section that has the sections' names."""
    if len(file) < _HEADER.size or not file.startswith(b"\x7fELF\x02\x01"):
        raise ValueError("no 64-bit ELF file")
    header = _HEADER.unpack_from(file)
    if header[2] != _X86_64:
        raise ValueError("an ELF file for another processor than x86-64")
    return _Table(header[5], header[9], header[10]), _Table(header[6], header[11], header[12]), header[13]


def _entry(form: struct.Struct, file: bytes, table: _Table, index: int) -> tuple[int, ...]:
    at = table.offset + index * table.size
    if table.size < form.size or at + form.size > len(file):
        raise ValueError("an ELF file that is cut off")
    return form.unpack_from(file, at)


def _content(file: bytes, section: tuple[int, ...]) -> bytes:
    offset, size = section[4], section[5]
    if offset + size > len(file):
        raise ValueError("an ELF file that is cut off")
    return file[offset : offset + size]
