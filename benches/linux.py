"""What it costs to boot Linux to /init, in instructions, beside other programs that boot the same kernel.

It runs in the deterministic testbed, whose clock counts instructions:

    pagegate testbed --deterministic --timeout 1800 -- python benches/linux.py KERNEL... [--beside 'NAME=COMMAND']...

Each KERNEL is a bzImage, which decompresses itself on all sides, or an ELF vmlinux, which nobody has to decompress. An
ordinary guest is measured beside QEMU's microvm. A software SEV guest under traps is measured beside each COMMAND, in
which {kernel}, {initrd} and {mib} are replaced: a program that boots it in the same way, and ends when the guest writes
0xfe to port 0x64. All sides get the command line of --append, which COMMAND has to have itself.

The initrd is made here. Its /init is a few instructions: a line in the kernel's log, then that port, and 0x501, at
which QEMU gets a device that ends it. What is counted is all of a program that is started, and of pagegate all from
making the machine to closing it, as the interpreter is running already. The files are in memory by then.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import goals
from goals import Row
from pagegate import Vm, policies, probe
from pagegate.linux.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MIB = 256
TURNS = 3
"""How often each side is measured. The least counts."""
SECONDS = 300
"""Of the testbed's clock, after which a boot has failed."""
LINE = "pagegate: init"
"""What /init writes to the kernel's log."""
APPEND = "console=ttyS0 earlyprintk=serial,ttyS0,115200 pci=off panic=-1 nokaslr i8042.noaux i8042.nokbd i8042.nopnp"
MICROVM = ["-M", "microvm", "-enable-kvm", "-cpu", "host", "-m", str(MIB), "-nodefaults", "-no-user-config"]
MICROVM += ["-display", "none", "-no-reboot", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0x501,iosize=2"]
MEMORY = Path("/dev/shm")
"""Files are copied here: the testbed reads those of the host through a file system that keeps nothing."""
FIRMWARE = ("bios-microvm.bin", "pvh.bin", "linuxboot_dma.bin", "kvmvapic.bin")
SHARE = (Path("/usr/share/qemu"), Path("/usr/share/seabios"))
TRAPS_GOAL, MICROVM_GOAL = 1.05, 1.0


def init() -> bytes:
    """/init, as an ELF file."""
    # An error (3), which is printed under "quiet" as well.
    path, line = b"/dev/kmsg\0", f"<3>{LINE}\n".encode()

    def code(path_at: int, line_at: int) -> bytes:
        """Both addresses are below 4 GiB."""
        return b"".join(
            [
                b"\xbf" + path_at.to_bytes(4, "little"),  # mov edi, path
                bytes.fromhex("be01000000 b802000000 0f05"),  # mov esi, O_WRONLY; mov eax, open; syscall
                b"\x89\xc7\xbe" + line_at.to_bytes(4, "little"),  # mov edi, eax; mov esi, line
                b"\xba" + len(line).to_bytes(4, "little"),  # mov edx, length
                bytes.fromhex("b801000000 0f05"),  # mov eax, write; syscall
                bytes.fromhex("bf03000000 b8ac000000 0f05"),  # mov edi, 3; mov eax, iopl; syscall
                bytes.fromhex(
                    "66ba0105 b0fe ee e664 ebfe"
                ),  # mov dx, 0x501; mov al, 0xfe; out dx, al; out 0x64, al; jmp $
            ]
        )

    base, headers = 0x40_0000, 64 + 56
    start = base + headers
    end = start + len(code(0, 0))
    content = code(end, end + len(path)) + path + line
    size = headers + len(content)
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    return identity + header + segment + content


def initrd() -> bytes:
    archive = Archive()
    archive.character_device("/dev/console", 5, 1)
    archive.character_device("/dev/kmsg", 1, 11)
    archive.file("/init", init(), executable=True)
    return archive.to_bytes()


def started(command: Sequence[str], folder: Path) -> str:
    """Runs a program and returns what it printed."""
    with (folder / "out").open("w+b") as out:
        # Its exit status says nothing: QEMU's device makes one of the byte that was written.
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=SECONDS, check=False)
        out.seek(0)
        return out.read().decode(errors="replace")


def booted(kernel: Path, archive: Path, append: str, confidential: str | None) -> str:
    """Boots it in pagegate and returns what it wrote to its console."""
    enforcement = "auto" if confidential is None else "traps"
    policy = policies.Allow()
    with Vm(MIB << 20, policy=policy, platform="pc", confidential=confidential, enforcement=enforcement) as vm:
        vm.boot(kernel, initrd=archive, append=append)
        report = vm.run(timeout=SECONDS)
        output = vm.console.tail(1 << 20).decode(errors="replace")
        if report.reason != "reboot":
            sys.exit(f"linux: the run ended with {report.reason!r}:\n{output}")
        return output


def microvm(folder: Path) -> list[str]:
    """The command of QEMU, copied with what it needs."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        sys.exit("linux: this needs qemu-system-x86_64")
    shutil.copy(program, folder / "qemu")
    listed = subprocess.run(["ldd", program], stdout=subprocess.PIPE, text=True, check=True).stdout
    for line in listed.splitlines():
        name, _, found = line.strip().partition(" => ")
        if found.startswith("/"):
            shutil.copy(found.split()[0], folder / name)
    for name in FIRMWARE:
        found_in = next((share for share in SHARE if (share / name).is_file()), None)
        if found_in is not None:
            shutil.copy(found_in / name, folder / name)
    return ["env", f"LD_LIBRARY_PATH={folder}", str(folder / "qemu"), "-L", str(folder), *MICROVM]


def least(sides: dict[str, Callable[[], str]]) -> dict[str, float]:
    """Instructions of each side. The sides take turns."""
    found = dict.fromkeys(sides, float("inf"))
    for turn in range(TURNS):
        for name, side in sides.items():
            # Lets the kernel finish with the machine before, and not equally long in each turn.
            time.sleep(0.7 + 0.13 * turn)
            before = time.monotonic()
            output = side()
            taken = (time.monotonic() - before) * 1e9
            if LINE not in output:
                sys.exit(f"linux: {name}: /init was not reached:\n{output}")
            print(f"linux: {name}: {taken:,.0f}, {len(output):,} bytes of console", file=sys.stderr, flush=True)
            found[name] = min(found[name], taken)
    return found


def rows(given: Path, append: str, beside: dict[str, str], folder: Path) -> list[Row]:
    """Those of one kernel."""
    kernel, archive = folder / "kernel", folder / "initrd"
    shutil.copy(given, kernel)
    archive.write_bytes(initrd())
    qemu = [*microvm(folder), "-kernel", str(kernel), "-initrd", str(archive), "-append", append]
    sides: dict[str, Callable[[], str]] = {
        "ordinary": lambda: booted(kernel, archive, append, None),
        "microvm": lambda: started(qemu, folder),
    }
    if beside:
        sides["traps"] = lambda: booted(kernel, archive, append, "sev")
    for name, text in beside.items():
        command = [word.format(kernel=kernel, initrd=archive, mib=MIB) for word in shlex.split(text)]
        copied = shutil.copy(shutil.which(command[0]) or command[0], folder / f"beside-{len(sides)}")
        sides[name] = lambda command=[copied, *command[1:]]: started(command, folder)
    cost = least(sides)

    def row(ours: str, theirs: str, goal: float) -> Row:
        name = f"{given.name}: {ours}, against {theirs}"
        detail = f"{cost[ours] / 1e6:,.0f} and {cost[theirs] / 1e6:,.0f} million instructions"
        return Row(name, goal, [round(cost[ours] / cost[theirs], 4)], "the testbed's KVM", detail)

    return [row("ordinary", "microvm", MICROVM_GOAL), *(row("traps", name, TRAPS_GOAL) for name in beside)]


def named(text: str) -> tuple[str, str]:
    name, equals, command = text.partition("=")
    if not equals or not shlex.split(command):
        raise argparse.ArgumentTypeError("write NAME=COMMAND")
    return name, command


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", type=Path, nargs="+", metavar="KERNEL")
    parser.add_argument("--append", default=APPEND, help="the command line")
    parser.add_argument("--beside", type=named, action="append", default=[], metavar="NAME=COMMAND")
    arguments = parser.parse_args()
    if "sw-protected" not in probe().vm_types:
        sys.exit("linux: this kernel has no software-protected VMs: run this in the testbed")
    found: list[Row] = []
    for kernel in arguments.kernels:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            found += rows(kernel, arguments.append, dict(arguments.beside), Path(folder))
    judged = goals.all_judged(found, {})
    print(goals.markdown(goals.once(judged)))
    return 1 if any(row.fails for row in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
