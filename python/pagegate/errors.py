"""What pagegate raises. Every class says what happened, to which page and vCPU, in which state, and what to do."""

from __future__ import annotations


class PagegateError(Exception):
    """The base of all errors of this package.

    Where the error is about a place in the guest, these attributes name it; otherwise they are ``None``.
    """

    vcpu: int | None = None
    """Index of the vCPU."""
    gpa: int | None = None
    """Guest-physical address in bytes, shared bit stripped."""
    state: str | None = None
    """The state of the page, or of all pages: ``"private"``, ``"shared"`` or ``"mixed"``."""
    rip: int | None = None
    """The guest's instruction pointer."""


class KvmUnavailable(PagegateError):
    """There is no /dev/kvm, or it may not be opened."""


class NotSupported(PagegateError):
    """This host or this VM type cannot do what was asked."""


class BadBacking(PagegateError):
    """KVM_RUN failed with EFAULT and without a memory fault: the host memory behind a memslot cannot be reached."""


class Livelock(PagegateError):
    """A fault came again and again though its page is in the accessed state: no conversion can satisfy it."""


class PrivateMemoryError(PagegateError):
    """The host wanted bytes of a private page; ``gpa`` is the first one."""


class PolicyError(PagegateError):
    """A policy is none, or a hook or handler answered with what it must not."""


class TestbedError(PagegateError):
    """The testbed's machine could not be started, or ended badly."""

    __test__ = False  # for pytest, which takes every Test* class for a test
