"""A disk's throughput: the same kernel and image under pagegate and under QEMU in one run, and as a software SEV guest.

    pagegate testbed -- python benches/disk.py VMLINUZ [MODULES]

VMLINUZ: a distribution's kernel. MODULES: its lib/modules/<release>, if that is not beside it. QEMU's side is its
machine "pc" with KVM, virtio-blk on PCI, and the cache that pagegate has, the host's.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from pathlib import Path

from pagegate import Vm, devices, linux

MIB = 1 << 20
DISK = 256 * MIB
MEMORY = 256 * MIB
TURNS = 3
COMMAND = f"""
now() {{ read up idle </proc/uptime; echo "$1 $up"; }}
for turn in $(seq {TURNS}); do
    now read; dd if=/dev/vda of=/dev/null bs=1M iflag=direct 2>/dev/null; now end
    now write; dd if=/dev/zero of=/dev/vda bs=1M count={DISK // MIB} oflag=direct 2>/dev/null; now end
done
"""


def rates(output: str) -> dict[str, float]:
    """MiB a second of the fastest turn, by the guest's clock."""
    found: dict[str, list[float]] = {"read": [], "write": []}
    for what, begun, ended in re.findall(r"(read|write) ([\d.]+)\s+end ([\d.]+)", output):
        found[what].append(float(ended) - float(begun))
    return {what: DISK / MIB / min(times) for what, times in found.items()}


def pagegate(kernel: Path, initrd: Path, disk: Path, **how: str) -> dict[str, float]:
    with Vm(MEMORY, platform="pc", **how) as vm:
        vm.add_device(devices.Block(disk))
        vm.boot(kernel, initrd=initrd, append="quiet")
        report = vm.run(timeout=300)
        output = vm.console.tail(1 << 20).decode(errors="replace")
    if report.reason != "poweroff":
        raise SystemExit(f"{report.reason}:\n{output}")
    return rates(output)


def qemu(kernel: Path, initrd: Path, disk: Path) -> dict[str, float]:
    command = [
        *("qemu-system-x86_64", "-enable-kvm", "-cpu", "host", "-m", f"{MEMORY // MIB}M", "-nographic", "-no-reboot"),
        *("-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet"),
        *("-drive", f"file={disk},format=raw,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, stdin=subprocess.DEVNULL)
    return rates(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", type=Path)
    parser.add_argument("modules", type=Path, nargs="?")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        initrd, disk = Path(folder, "initrd"), Path(folder, "disk.img")
        where = {"modules_directory": arguments.modules} if arguments.modules else {"kernel": arguments.kernel}
        initrd.write_bytes(linux.build(command=COMMAND, modules=["virtio_pci", "virtio_blk"], **where))
        disk.write_bytes(bytes(DISK))
        sides = {
            "QEMU": lambda: qemu(arguments.kernel, initrd, disk),
            "pagegate": lambda: pagegate(arguments.kernel, initrd, disk),
            "pagegate, SEV": lambda: pagegate(arguments.kernel, initrd, disk, confidential="sev"),
        }
        print(f"{'MiB a second':<16}{'read':>8}{'write':>8}{'of QEMU':>16}{'seconds':>10}")
        base = None
        for name, side in sides.items():
            begun = time.monotonic()
            found = side()
            base = base or found
            of_base = "".join(f"{found[what] / base[what]:>8.2f}" for what in ("read", "write"))
            seconds = time.monotonic() - begun
            print(f"{name:<16}{found['read']:>8.1f}{found['write']:>8.1f}{of_base}{seconds:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
