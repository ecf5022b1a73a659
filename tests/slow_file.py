"""A file that does not answer until it is told to: FUSE, as far as one file needs it. Mounting it needs root."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

_HEADER = struct.Struct("<IIQQIIII")
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _RELEASE = 1, 2, 3, 4, 14, 15, 16, 18
_FSYNC, _FLUSH, _INIT, _INTERRUPT, _DESTROY, _BATCH_FORGET = 20, 25, 26, 36, 38, 42
_SILENT = (_FORGET, _BATCH_FORGET, _INTERRUPT, _DESTROY)
_DIRECT_IO, _DETACH = 1, 2
_ROOT, _FILE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class SlowFile:
    """While it is entered there is the file; reads, writes and flushes of it wait until `answer` is set.

    One whose caller is ended by a signal fails. Otherwise not even SIGKILL would end the caller.
    """

    def __init__(self, folder: Path, size: int) -> None:
        """Mounts a file system on this folder. Raises OSError."""
        self.path = folder / "slow.img"
        self.size = size
        self.answer = threading.Event()
        self.asked = threading.Event()
        """Something waits."""
        self._interrupted: set[int] = set()
        self._folder = os.fsencode(folder)
        self._fuse = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._fuse},rootmode=40000,user_id=0,group_id=0".encode()
        if _libc.mount(b"pagegate", self._folder, b"fuse", 0, options):
            os.close(self._fuse)
            raise OSError(ctypes.get_errno(), "cannot mount FUSE")
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        """Serves it."""
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Answers what waits, and unmounts it."""
        self.answer.set()
        _libc.umount2(self._folder, _DETACH)
        self._thread.join(10)
        os.close(self._fuse)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fuse, 1 << 20)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return  # it is unmounted
            _, op, unique, node, *_ = _HEADER.unpack_from(request)
            if op in (_READ, _WRITE, _FSYNC) and not self.answer.is_set():
                self.asked.set()
                threading.Thread(target=self._later, args=(op, unique, node, request), daemon=True).start()
            elif op == _INTERRUPT:
                self._interrupted.update(struct.unpack_from("<Q", request, _HEADER.size))
            elif op not in _SILENT:
                self._reply(op, unique, node, request)
            if op == _DESTROY:
                return

    def _later(self, op: int, unique: int, node: int, request: bytes) -> None:
        while not self.answer.wait(0.02):
            if unique in self._interrupted:
                self._answer(unique, b"", errno.EINTR)
                return
        self._reply(op, unique, node, request)

    def _reply(self, op: int, unique: int, node: int, request: bytes) -> None:
        body, error = b"", 0
        if op == _INIT:
            body = struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, 0, 8, 6, 1 << 17, 1, 32, 0, 0, *[0] * 7)
        elif op == _LOOKUP and request[_HEADER.size :].rstrip(b"\0") == os.fsencode(self.path.name):
            body = struct.pack("<QQQQII", _FILE, 0, 60, 60, 0, 0) + self._attributes(_FILE)
        elif op in (_GETATTR, _SETATTR):
            body = struct.pack("<QII", 60, 0, 0) + self._attributes(node)
        elif op == _OPEN:
            body = struct.pack("<QII", 0, _DIRECT_IO, 0)
        elif op == _READ:
            _, offset, size = struct.unpack_from("<QQI", request, _HEADER.size)
            body = bytes(max(0, min(size, self.size - offset)))
        elif op == _WRITE:
            body = struct.pack("<II", struct.unpack_from("<QQI", request, _HEADER.size)[2], 0)
        elif op not in (_RELEASE, _FSYNC, _FLUSH):
            error = errno.ENOENT if op == _LOOKUP else errno.ENOSYS
        self._answer(unique, body, error)

    def _answer(self, unique: int, body: bytes, error: int) -> None:
        try:
            os.write(self._fuse, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)
        except OSError:
            return  # whoever asked is gone

    def _attributes(self, node: int) -> bytes:
        mode, size = (0o40755, 0) if node == _ROOT else (0o100644, self.size)
        return struct.pack("<6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
