"""Helpers of the tests of `pagegate guest`: modules, packages and a busybox that are made up, and a cpio reader."""

import io
import os
import resource
import shutil
import struct
import tarfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from pagegate.linux import cache

from .testbed_parts import write_program

RELEASE = "6.1.0-7-cloud-amd64"

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, which unpacks packages")

APPLETS = "bin/sh\nusr/bin/[\nbin/mount\nsbin/insmod\n../etc/x\n"


def elf(sections: dict[str, bytes] | None = None, *, code: bytes = b"", interpreter: bool = False) -> bytes:
    """An ELF file: a program of this code, which is loaded with the headers at 0x400000, and these sections."""
    program_headers = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x40_0000, 0x40_0000, 0x1000, 0x1000, 0x1000)
    if interpreter:
        program_headers += struct.pack("<IIQQQQQQ", 3, 4, 0, 0, 0, 0, 0, 1)
    start = 64 + len(program_headers)
    body, table, names = bytearray(code), bytes(64), b"\0"
    for name, content in {**(sections or {}), ".shstrtab": b""}.items():
        name_at, names = len(names), names + name.encode() + b"\0"
        content = names if name == ".shstrtab" else content
        table += struct.pack("<IIQQQQIIQQ", name_at, 1, 0, 0, start + len(body), len(content), 0, 0, 1, 0)
        body += content
    header = struct.pack(
        *("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, 0x40_0000 + start, 64, start + len(body), 0),
        *(64, 56, len(program_headers) // 56, 64, len(table) // 64, len(table) // 64 - 1),
    )
    return header + program_headers + bytes(body) + table


def module(*facts: str) -> bytes:
    return elf({".text": b"\x90" * 7, ".modinfo": b"\0".join(fact.encode() for fact in (*facts, "license=GPL", ""))})


def busybox(listed: str = APPLETS, *, interpreter: bool = False) -> bytes:
    """A static program that prints this list."""
    text = listed.encode()
    # write(1, text, size); exit(0)
    code = b"\xb8\x01\0\0\0\xbf\x01\0\0\0\x48\x8d\x35\x10\0\0\0\xba" + struct.pack("<I", len(text)) + b"\x0f\x05"
    code += b"\xb8\x3c\0\0\0\x31\xff\x0f\x05"
    return elf(code=code + text, interpreter=interpreter)


def image(release: str = RELEASE) -> bytes:
    """The beginning of a bzImage."""
    made = bytearray(0x1000)
    made[0x202:0x206] = b"HdrS"
    made[0x20E:0x210] = (0x300).to_bytes(2, "little")
    text = f"{release} (someone@somewhere) #1".encode()
    made[0x500 : 0x500 + len(text)] = text
    return bytes(made)


CONFIG = b"CONFIG_AMD_MEM_ENCRYPT=y\nCONFIG_KVM_GUEST=y\n"
KERNEL = {
    f"boot/vmlinuz-{RELEASE}": image(RELEASE),
    f"boot/config-{RELEASE}": CONFIG,
    f"lib/modules/{RELEASE}/kernel/virtio_blk.ko": module("depends="),
    f"lib/modules/{RELEASE}/build": "/usr/src/headers",
    "usr/share/doc/x": b"not needed",
}


def deb(path: Path, files: dict[str, bytes | str], mode: int = 0o644) -> Path:
    """A Debian package of these files; a str is the target of a link."""

    def archive(content: dict[str, bytes | str]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name, data in content.items():
                member = tarfile.TarInfo(f"./{name}")
                member.mode = mode
                if isinstance(data, str):
                    member.type, member.linkname = tarfile.SYMTYPE, data
                    tar.addfile(member)
                else:
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return out.getvalue()

    control = b"Package: made-up\nVersion: 1\nArchitecture: amd64\nMaintainer: a\nDescription: b\n"
    members = {
        "debian-binary": b"2.0\n",
        "control.tar": archive({"control": control}),
        "data.tar": archive(files),
    }
    text = b"!<arch>\n"
    for name, data in members.items():
        text += f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path


@contextmanager
def largest_file(size: int):
    """Let no file of this process and its children be larger, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def left() -> list[str]:
    """What is in the cache."""
    return sorted(path.name for path in cache.cache_directory().iterdir())


# Stands in for apt-get and apt-cache. For each package that is offered $FAKE_APT has NAME.control, which apt-cache show
# prints, NAME.version and NAME.deb.
_APT = """#!/bin/sh
echo "$0 $*" | sed 's|.*/||' >>"$FAKE_APT/calls"
case " $* " in
*" policy "*)
    for name; do :; done
    if [ -e "$FAKE_APT/$name.control" ]; then
        echo "$name:"; echo "  Installed: (none)"; echo "  Candidate: $(cat "$FAKE_APT/$name.version")"
    fi ;;
*" show "*)
    for name; do :; done
    cat "$FAKE_APT/${name%%=*}.control" ;;
*" --print-uris "*)
    echo "'somewhere' x.deb 3000000 SHA256:0" ;;
*" download "*)
    while [ "$1" != download ]; do shift; done; shift
    for name; do
        test -e "$FAKE_APT/${name%%=*}.deb" || { echo "E: 404  Not Found" >&2; exit 100; }
        cp "$FAKE_APT/${name%%=*}.deb" "${name%%=*}.deb"
    done ;;
esac
"""


class Offer:
    """Has a stand-in for apt offer packages."""

    def __init__(self, tmp_path, monkeypatch) -> None:
        self._host = tmp_path / "apt"
        self._host.mkdir()
        write_program(tmp_path / "path" / "apt-get", _APT)
        write_program(tmp_path / "path" / "apt-cache", _APT)
        monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_APT", str(self._host))

    def __call__(self, name, files, *, depends="", version="1:6.1-2") -> None:
        """Offer a package of these files."""
        stanza = f"Package: {name}\nDepends: {depends}\nDescription: x\n\nPackage: old\nDepends: linux-image-old\n"
        (self._host / f"{name}.control").write_text(stanza)
        (self._host / f"{name}.version").write_text(version)
        deb(self._host / f"{name}.deb", files)

    def lose(self, name) -> None:
        """Have apt know the package, but not be able to download it."""
        (self._host / f"{name}.deb").unlink()

    def calls(self) -> list[str]:
        file = self._host / "calls"
        return file.read_text().splitlines() if file.exists() else []


class Entry(NamedTuple):
    """An entry of a cpio archive; `data` of a link is its target."""

    mode: int
    data: bytes
    device: tuple[int, int]


def entries(archive: bytes) -> dict[str, Entry]:
    """Read a cpio archive as Documentation/driver-api/early-userspace/buffer-format.rst of Linux describes it."""
    found: dict[str, Entry] = {}
    inodes, at = set(), 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        number = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        inode, mode, uid, gid, links, time, size, _, _, major, minor, name_size, check = number
        raw = archive[at + 110 : at + 110 + name_size]
        assert raw.endswith(b"\0")
        assert raw.count(b"\0") == 1
        name = raw[:-1].decode("utf-8", "surrogateescape")
        at += -(-(110 + name_size) // 4) * 4
        data = archive[at : at + size]
        assert len(data) == size
        at += -(-size // 4) * 4
        if name == "TRAILER!!!":
            assert set(archive[at:]) <= {0}
            assert len(archive) % 512 == 0
            return found
        assert (uid, gid, time, check) == (0, 0, 0, 0)
        assert links >= 1
        assert inode not in inodes
        assert name not in found
        parent = name.rpartition("/")[0]
        assert not parent or found[parent].mode & 0o170000 == 0o040000, f"{name} comes before its directory"
        inodes.add(inode)
        found[name] = Entry(mode, data, (major, minor))
