"""The states that pagegate has of a stock kernel's pages are those of the kernel's own page tables, after its boot.

PAGEGATE_TEST_GUESTS and the initrd are as in test_linux.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pagegate import Vm, linux
from pagegate.policies import Allow

from .conftest import PAGE
from .page_tables import compare, levels
from .test_linux import MEMORY, SECONDS, SHARED_AT_LEAST, kernels

if TYPE_CHECKING:
    from pathlib import Path

ALIASES_AT_MOST = 16
"""What is left of .bss..decrypted after the boot: 3 pages in Linux 6.1, 5 in 6.12."""


@pytest.fixture(scope="module")
def initrd(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("linux") / "initrd"
    path.write_bytes(linux.build(command="echo booted; read -r go"))
    return path


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("enforcement", ["traps", "memslots"])
@pytest.mark.parametrize("kernel", kernels())
def test_every_state_is_that_of_the_page_tables(kernel, enforcement, initrd) -> None:
    vm = Vm(MEMORY, policy=Allow(), enforcement=enforcement, platform="pc", confidential="sev", debug_private=True)
    with vm:
        vm.boot(kernel, initrd=initrd, append="quiet nokaslr")
        vm.console.expect("booted", timeout=SECONDS)
        found = compare(vm)
        print(
            f"{kernel.name}, {enforcement}, {levels(vm)} levels: {found.compared} pages of {vm.memory // PAGE} compared"
        )
        print(f"not mapped: {found.unmapped}, aliases: {found.aliases}")
        assert found.wrong == []
        assert len(found.unmapped) < vm.memory // PAGE // 100
        assert 0 < len(found.aliases) <= ALIASES_AT_MOST
        assert vm.memory - vm.attributes.private_bytes >= SHARED_AT_LEAST

        # A state that were otherwise would be found.
        page, _, state = vm.attributes.runs()[-1]
        vm.convert(page, PAGE, to="shared" if state == "private" else "private")
        assert page in {mapping.gpa for mapping in compare(vm).wrong}
