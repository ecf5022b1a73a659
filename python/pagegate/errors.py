"""The exceptions. A message says what happened, to which page and vCPU, in which state, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagegate._core import Report


class PagegateError(Exception):
    """The base class of all errors of this package.

    The attributes say where in the guest it happened; they are ``None`` for errors that have no such place.
    """

    vcpu: int | None = None
    """Index of the vCPU."""
    gpa: int | None = None
    """Guest-physical address in bytes, without the shared bit."""
    state: str | None = None
    """The state of the page, or of all pages: ``"private"``, ``"shared"`` or ``"mixed"``."""
    rip: int | None = None
    """The guest's instruction pointer."""
    symbol: str | None = None
    """The kernel's function that it is in, such as ``"set_memory_decrypted+0x1f"``."""
    report: Report | None = None
    """What the run did that it ended."""


class KvmUnavailable(PagegateError):
    """/dev/kvm does not exist or cannot be opened."""


class NotSupported(PagegateError):
    """This host or this VM type cannot do what was asked."""


class BadBacking(PagegateError):
    """KVM_RUN failed with EFAULT and reported no memory fault: a memslot's host memory cannot be accessed."""


class Livelock(PagegateError):
    """An access faulted ``LIVELOCK_BOUND`` times though its page is in the accessed state: converting cannot help."""

    instruction: str | None = None
    """The instruction that the vCPU is at, if its bytes could be had."""
    cr2: int | None = None
    """CR2 of the vCPU: the linear address of its last page fault."""


class PrivateMemoryError(PagegateError):
    """``Vm.read`` or ``Vm.write`` met a private page; ``gpa`` is the first one."""


class DeviceAccessError(PagegateError):
    """A device in Python read or wrote a request whose bytes are not all shared memory.

    A device need not catch it: the request fails, and the guest goes on.
    """


class PolicyError(PagegateError):
    """An object is no policy or listener, or a hook or handler returned what is not allowed."""


class PolicyTimeoutError(PolicyError):
    """A hook, handler or listener took longer than ``policy_timeout``. It is raised in that call."""

    def __str__(self) -> str:
        """Say it where no text was given: CPython makes the exception from the class."""
        return super().__str__() or "this call took longer than policy_timeout"


class TestbedError(PagegateError):
    """The testbed's machine could not be started, or did not end as it should."""

    __test__ = False  # else pytest takes the class for a test
