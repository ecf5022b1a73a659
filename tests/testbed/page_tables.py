"""What a guest's own page tables say about its memory, read from the host's side, and whether pagegate agrees."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from .conftest import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagegate import Vm

ENTRIES = 512
PRESENT = 1 << 0
LARGE = 1 << 7
LA57 = 1 << 12
ADDRESS = (1 << 52) - PAGE
DIRECT_MAP = {4: 0xFFFF_8880_0000_0000, 5: 0xFF11_0000_0000_0000}
"""Where Linux maps all memory, by the levels of its page tables; booted with nokaslr."""
IMAGE = range(0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_A000_0000)
"""Where Linux maps its own image. The variables that it shares, .bss..decrypted, are used only here."""


class Mapping(NamedTuple):
    """An entry of a page table that maps memory or a device."""

    virtual: int
    gpa: int
    size: int
    private: bool
    """Whether the C-bit is set."""


class Comparison(NamedTuple):
    """Page states beside page tables. Pages are given by their gpa."""

    compared: int
    """Pages that the direct map or the image maps."""
    unmapped: list[int]
    """Pages that neither of them maps."""
    aliases: list[int]
    """Pages of the image that are shared, which the direct map still has as private: no access goes that way."""
    wrong: list[Mapping]
    """All other mappings whose C-bit is not what the page's state is, a page each."""


def levels(vm: Vm) -> int:
    return 5 if vm.vcpus[0].sregs()["cr4"] & LA57 else 4


def mappings(vm: Vm) -> Iterator[Mapping]:
    """All that the first vCPU's page tables map. What is mapped many times by one table is found once."""
    assert vm.private_bit is not None
    c_bit = 1 << vm.private_bit
    top = levels(vm)
    seen: set[tuple[int, int]] = set()
    todo = [(vm.vcpus[0].sregs()["cr3"] & ADDRESS & ~c_bit, top, 0)]
    while todo:
        table, level, base = todo.pop()
        if (table, level) in seen:
            continue
        seen.add((table, level))
        size = PAGE * ENTRIES ** (level - 1)
        for index, entry in enumerate(struct.unpack(f"<{ENTRIES}Q", vm.read(table, PAGE))):
            if not entry & PRESENT:
                continue
            virtual = base + index * size
            if level == top and index >= ENTRIES // 2:
                virtual += (1 << 64) - ENTRIES * size
            gpa = entry & ADDRESS & ~c_bit
            if level == 1 or entry & LARGE:
                # Bit 12 of a large page's entry is no address, but PAT.
                yield Mapping(virtual, gpa & -size, size, bool(entry & c_bit))
            else:
                todo.append((gpa, level - 1, virtual))


def compare(vm: Vm) -> Comparison:
    """Compares the state of every page with all mappings of it. The machine has debug_private and does not run."""
    private = {
        page: state == "private" for gpa, size, state in vm.attributes.runs() for page in range(gpa, gpa + size, PAGE)
    }
    direct = DIRECT_MAP[levels(vm)]
    mapped: set[int] = set()
    image_shares: set[int] = set()
    aliases: list[Mapping] = []
    wrong: list[Mapping] = []
    for mapping in mappings(vm):
        for offset in range(0, mapping.size, PAGE):
            page, virtual = mapping.gpa + offset, mapping.virtual + offset
            if page not in private:
                continue
            is_alias = virtual == direct + page
            if is_alias or virtual in IMAGE:
                mapped.add(page)
            if virtual in IMAGE and not mapping.private:
                image_shares.add(page)
            if mapping.private != private[page]:
                found = Mapping(virtual, page, PAGE, mapping.private)
                (aliases if is_alias and mapping.private else wrong).append(found)
    wrong += [alias for alias in aliases if alias.gpa not in image_shares]
    excused = [alias.gpa for alias in aliases if alias.gpa in image_shares]
    return Comparison(len(mapped), sorted(private.keys() - mapped), excused, wrong)
