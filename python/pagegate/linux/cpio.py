"""Writes cpio archives in the format newc, from which Linux takes its first file system.

The same entries give the same bytes: no times, no owners but root, and the order in which they were added.
"""

import os
import stat
from dataclasses import dataclass
from typing import Final

LARGEST: Final = 1 << 30
"""Bytes that the files of an archive may have in all."""

_PATH_MAX = 4096
_NAME_MAX = 255
_TRAILER = b"TRAILER!!!"
_BLOCK = 512


@dataclass(frozen=True)
class _Entry:
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


class Archive:
    """An archive that is being made. Paths are absolute; directories above an entry are added as they are needed.

    Each method raises ValueError if the path is none, or if something else is there.
    """

    def __init__(self) -> None:
        """An empty archive."""
        self._entries: dict[str, _Entry] = {}
        self._size = 0

    def __contains__(self, path: str) -> bool:
        """Whether there is anything at this path."""
        return _normal(path) in self._entries

    def directory(self, path: str) -> None:
        """Add a directory, if it is not there."""
        self._parents(f"{_normal(path)}/")

    def file(self, path: str, data: bytes, *, executable: bool = False) -> None:
        """Add a file, which all may read."""
        self._size += len(data)
        if self._size > LARGEST:
            raise ValueError(f"the files have more than {LARGEST >> 20} MiB in all: leave some out, or use a disk")
        self._add(path, _Entry(stat.S_IFREG | (0o755 if executable else 0o644), data))

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, _Entry(stat.S_IFLNK | 0o777, os.fsencode(target)))

    def character_device(self, path: str, major: int, minor: int) -> None:
        """Add a character device, for root only."""
        self._add(path, _Entry(stat.S_IFCHR | 0o600, device=(major, minor)))

    def to_bytes(self) -> bytes:
        """The whole archive."""
        parts: list[bytes] = []
        for inode, (path, entry) in enumerate(self._entries.items(), 1):
            parts += [_header(inode, entry, os.fsencode(path)), entry.data, bytes(-len(entry.data) % 4)]
        parts.append(_header(0, _Entry(0), _TRAILER))
        return b"".join([*parts, bytes(-sum(map(len, parts)) % _BLOCK)])

    def _add(self, path: str, entry: _Entry) -> None:
        name = _normal(path)
        self._parents(name)
        if name in self._entries:
            raise ValueError(f"there is already something at {path} in the guest: choose another path")
        self._entries[name] = entry

    def _parents(self, name: str) -> None:
        at = name.find("/")
        while at >= 0:
            parent = self._entries.setdefault(name[:at], _Entry(stat.S_IFDIR | 0o755))
            if not stat.S_ISDIR(parent.mode):
                raise ValueError(f"/{name[:at]} in the guest is no directory: choose another path than /{name}")
            at = name.find("/", at + 1)


def _normal(path: str) -> str:
    """The path without the first slash, as the archive has it."""
    parts = [part for part in path.split("/") if part]
    if not path.startswith("/") or not parts or path.endswith("/") or "\0" in path or {".", ".."} & set(parts):
        raise ValueError(f"{path!r} is no path of a file in the guest: write one as /root/data")
    name = "/".join(parts)
    if len(os.fsencode(path)) >= _PATH_MAX or any(len(os.fsencode(part)) > _NAME_MAX for part in parts):
        raise ValueError(f"{path[:40]!r}... is too long for a path in the guest")
    if os.fsencode(name) == _TRAILER:
        raise ValueError(f"{path!r} is how an archive ends: choose another path in the guest")
    return name


def _header(inode: int, entry: _Entry, name: bytes) -> bytes:
    """A header with the name after it, padded."""
    fields = (
        *(inode, entry.mode, 0, 0),  # owner and group: root
        *(2 if stat.S_ISDIR(entry.mode) else 1, 0),  # links; the time
        *(len(entry.data), 0, 0),  # the device that the file is on
        *(*entry.device, len(name) + 1, 0),  # no checksum in this format
    )
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name + b"\0"
    return header + bytes(-len(header) % 4)
