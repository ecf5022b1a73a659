# One file: the stub of one extension module.
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Final, Literal, Self, SupportsIndex, TypeAlias, final, overload

from _typeshed import FileDescriptorLike
from typing_extensions import Buffer, disjoint_base

import pagegate.console

_State: TypeAlias = Literal["private", "shared"]
_Enforcement: TypeAlias = Literal["attributes", "traps", "memslots"]
_Call: TypeAlias = Literal["set_attributes", "create_memslot", "delete_memslot", "discard", "pre_fault", "other", "any"]

DOORBELL_PORT: Final[int]
"""The doorbell's port: ``out imm8, al`` there is KVM_HC_MAP_GPA_RANGE, with the same registers, answered in RAX."""

__version__: Final[str]

LIVELOCK_BOUND: Final[int]
"""Repeats of an identical fault, with no change of its page in between, after which the run ends."""

def probe() -> Host:
    """Asks /dev/kvm what this host offers. Never raises: ``problems`` of the result says what is missing."""

def _end() -> None:
    """Stops all runs, waits for them for two seconds, and lets no other begin; and ends all pagers."""

def timeout_seconds(timeout: float | None) -> float:
    """The seconds of a ``timeout`` argument, infinity for ``None``.

    ValueError if they are negative or no number of seconds.
    """

def whole_number(text: str) -> int:
    """A whole number as text, which may end in a unit: 64, 0x40, 64K, 2MiB, 1G. ValueError for anything else."""

def number_of_bytes(value: int | str, name: str) -> int:
    """An argument that is a number of bytes or an address, for which text with a unit does, too.

    ``name``: what messages call it. TypeError for what is neither an int nor text, ValueError for other text and for
    what is negative or above 64 bits.
    """

def script_guest() -> bytes:
    """The machine code that executes a ``pagegate.guests.Script``: long mode, position-independent."""

def bare_loop(
    memory: int,
    vcpus: Sequence[tuple[int, bytes, int]],
    *,
    enforcement: str,
    marks: int,
    memslots: int = 1,
    shared_bit: int | None = None,
    doorbell: bool = False,
    block: int = 4096,
    work: str = "all",
    pager: Sequence[str] | None = None,
    timeout: float | None = None,
) -> tuple[int, int, int]:
    """Runs a guest in a bare loop around KVM's ioctls: no policy, no checks, no page states, no records.

    Each of ``vcpus`` is ``(gpa, image, rdi)``: where the image is loaded and entered in long mode, its bytes, and RDI.
    The guest writes 1 to port ``marks`` where the measured part begins, and 2 where it ends. ``block``: bytes that are
    converted for an implicit request, the aligned block around the page. ``work``: how much of each conversion is
    carried out: "nothing", "enforce", "discard" or "all". ``enforcement``: "attributes", "traps" (with ``shared_bit``)
    or "memslots". ``timeout``: seconds. ``pager``: the command of a process that calls ``serve_missing`` with two more
    arguments, and has the bytes of memory, which is zeroes without one. The other arguments are as for ``Vm``; all
    pages are shared at first.

    Returns nanoseconds, requests and port IO exits of the measured part. Raises ValueError for arguments that do not
    make a machine, OSError, and KeyboardInterrupt.
    """

def serve_missing(file: str | PathLike[str], base: int, size: int) -> None:
    """Serves the userfaultfd that is the standard input, for ``size`` bytes of another process's memory at ``base``.

    For each touch it copies a page of a file there. It does not return.

    Raises OSError.
    """

@final
class Marks:
    """A handler for ``Vm.on_io`` that notes each write to its port, without entering Python.

    A read of the port returns how many writes there were.
    """

    def __new__(cls) -> Self: ...
    @property
    def now(self) -> int:
        """Nanoseconds since this object was made."""
    @property
    def written(self) -> list[tuple[int, int, int]]:
        """The writes so far: ``(vcpu, value, nanoseconds)``, timed from when this object was made."""

@final
class Host:
    """What /dev/kvm on this host offers, as far as pagegate uses it."""

    @property
    def vm_types(self) -> list[str]:
        """Types that a VM can have (KVM_CAP_VM_TYPES): "default", "sw-protected", "sev", "sev-es", "snp", "tdx"."""
    @property
    def memory_attributes(self) -> int:
        """What KVM_SET_MEMORY_ATTRIBUTES accepts, a mask: PRIVATE is 8; 0 without private memory.

        Asked of a VM of the type with private memory (KVM_CAP_MEMORY_ATTRIBUTES).
        """
    @property
    def guest_memfd(self) -> bool:
        """Whether a guest_memfd can be created (KVM_CAP_GUEST_MEMFD)."""
    @property
    def guest_memfd_flags(self) -> int:
        """Flags that a guest_memfd can have (KVM_CAP_GUEST_MEMFD_FLAGS): MMAP is 1, INIT_SHARED is 2."""
    @property
    def exit_hypercall(self) -> bool:
        """Whether KVM_HC_MAP_GPA_RANGE can exit to user space (KVM_CAP_EXIT_HYPERCALL)."""
    @property
    def pre_fault(self) -> bool:
        """Whether there is KVM_PRE_FAULT_MEMORY (KVM_CAP_PRE_FAULT_MEMORY)."""
    @property
    def max_vcpus(self) -> int:
        """vCPUs that a VM can have (KVM_CAP_MAX_VCPUS)."""
    @property
    def max_memslots(self) -> int:
        """Memslots that a VM can have (KVM_CAP_NR_MEMSLOTS)."""
    @property
    def enforcement(self) -> Literal["attributes", "memslots"] | None:
        """What ``enforcement="auto"`` selects; ``None`` if no VM can be created."""
    @property
    def problems(self) -> list[str]:
        """What is missing, one sentence each, with what to do about it."""

@final
class Region:
    """The pages for which a decision is remembered: the policy is not asked again about requests for them.

    A remembered decision answers requests of the same kind (implicit or explicit, to private or to shared) whose pages
    all lie in the region, and which the hook wants (``only``). ``gpa`` and ``size``: bytes, multiples of 4096.
    ``uses``: how many more requests it answers, at least 1. ``seconds``: how long it holds, above 0, from the time of
    the request on. Without these two it holds until ``vm.policy.forget()`` or ``replace()``. At most 4096 are kept,
    then the oldest are dropped; where two overlap the later one holds.

    Raises ValueError. A region that does not lie in guest memory, or not in the pages that its ``Convert`` names, ends
    the run with PolicyError.
    """

    def __new__(
        cls, gpa: int | str, size: int | str, *, uses: int | None = None, seconds: float | None = None
    ) -> Self: ...
    @property
    def gpa(self) -> int:
        """Start in bytes."""
    @property
    def size(self) -> int:
        """Length in bytes."""
    @property
    def uses(self) -> int | None:
        """How many more requests it answers; ``None`` for any number."""
    @property
    def seconds(self) -> float | None:
        """How long it holds; ``None`` for no limit."""
    def asdict(self) -> dict[str, Any]:
        """Its fields by name. An equal one can be made of them."""
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Convert:
    """Converts pages: those that were asked for, to the state that was asked for, unless the arguments say otherwise.

    ``to``: "private" or "shared". ``gpa`` and ``size``: bytes, multiples of 4096, inside guest memory, or text such as
    "2M"; outside of it the run ends with PolicyError.

    A page that changes state loses its bytes and reads as zeroes. So widen only to pages that hold nothing the guest
    needs, or that are in the wanted state already.

    What is converted need not be what was asked for. But a guest that touched a page touches it again until that page
    is in the state it needs: after ``LIVELOCK_BOUND`` identical faults the run ends as "livelock".

    The conversion is one transaction, or several in a row, of at most 256 MiB each. If the kernel refuses, the
    transaction is undone: an explicit request gets the errno in RAX, an implicit one ends the run with PagegateError.
    If a listener refuses, the guest tries again: an explicit request gets EAGAIN.

    What earlier transactions converted stays converted. An explicit request then gets EAGAIN, the answer after which a
    guest asks again, and the event and the report count those bytes, as the exception says them where the run ends.
    """

    def __new__(
        cls,
        to: _State | None = None,
        gpa: int | str | None = None,
        size: int | str | None = None,
        *,
        prefault: bool = False,
        discard: bool = True,
        remember: Region | dict[str, Any] | None = None,
    ) -> Self: ...
    @property
    def to(self) -> _State | None:
        """The state to convert to; ``None`` for the one asked for."""
    @property
    def gpa(self) -> int | None:
        """Start in bytes; ``None`` for that of the request."""
    @property
    def size(self) -> int | None:
        """Length in bytes; ``None`` for that of the request."""
    @property
    def discard(self) -> bool:
        """Whether the old side is freed.

        If not, it keeps its bytes, which the guest finds again when the page is converted back. Until then both sides
        take up memory. Under attributes KVM's emulation can write to the shared side of a private page; from the first
        ``discard=False`` on, such bytes are not freed any more before a page becomes shared, whichever page it is.
        """
    @property
    def prefault(self) -> bool:
        """Whether KVM maps the pages before the guest touches them (KVM_PRE_FAULT_MEMORY), if the host can."""
    @property
    def remember(self) -> Region | None:
        """For which pages this decision is remembered; ``None`` if it is for this request only."""
    def asdict(self) -> dict[str, Any]:
        """Its fields by name. An equal one can be made of them."""
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Deny:
    """Refuses. An explicit request gets ``errno``, positive, in RAX; an implicit one ends the run as "denied".

    ``errno`` is in 1..=4095, else ValueError. SNP and TDX guests accept only EINVAL and EAGAIN.
    """

    def __new__(cls, errno: int = 22, *, remember: Region | dict[str, Any] | None = None) -> Self: ...
    @property
    def errno(self) -> int:
        """What an explicit request gets in RAX."""
    @property
    def remember(self) -> Region | None:
        """For which pages this decision is remembered; ``None`` if it is for this request only."""
    def asdict(self) -> dict[str, Any]:
        """Its fields by name. An equal one can be made of them."""
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Discard:
    """Frees a poisoned page, which then reads as zeroes, and resumes the guest. Only for ``memory_poison``."""

    def __new__(cls) -> Self: ...
    def asdict(self) -> dict[str, Any]:
        """Its fields by name. An equal one can be made of them."""
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Retry:
    """Lets the guest try again: an implicit request repeats the access, an explicit one gets EAGAIN in RAX.

    After ``LIVELOCK_BOUND`` identical faults with no change of the page in between the run ends as "livelock".
    """

    def __new__(cls, *, remember: Region | dict[str, Any] | None = None) -> Self: ...
    @property
    def remember(self) -> Region | None:
        """For which pages this decision is remembered; ``None`` if it is for this request only."""
    def asdict(self) -> dict[str, Any]:
        """Its fields by name. An equal one can be made of them."""
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Stop:
    """Ends the run with ``reason`` as ``report.reason``. Nothing is converted; an explicit request gets EAGAIN."""

    def __new__(cls, reason: str) -> Self: ...
    @property
    def reason(self) -> str:
        """What ``report.reason`` is to be."""
    def asdict(self) -> dict[str, Any]:
        """Its fields by name. An equal one can be made of them."""
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@disjoint_base
class Builtin:
    """The base class of the built-in policies."""

    @property
    def hooks(self) -> tuple[Callable[[Any], Any] | None, ...]:
        """The Python policy's hooks at the end of the chain: those of ``Policy``, in their order.

        ``None`` for each that there is not.
        """

@final
class Allow(Builtin):
    """Converts whatever the guest asks for. It protects nothing."""

    def __new__(cls) -> Self: ...

@final
class DenyAll(Builtin):
    """Refuses every request, as ``Deny(errno)`` does. ``errno`` is in 1..=4095, else ValueError."""

    def __new__(cls, errno: int = 22) -> Self: ...

@final
class ExplicitOnly(Builtin):
    """Converts explicit requests as asked, and refuses implicit ones, which may be guest bugs.

    An implicit request ends the run as "denied".
    """

    def __new__(cls) -> Self: ...

@final
class Align(Builtin):
    """Widens what ``then`` converts to whole blocks of ``size`` bytes.

    For guests that touch page after page: one exit for each block in place of one for each page. ``size`` is a power of
    two, at least 4096, else ValueError. Every page of the block that changes state loses its bytes, so it is only for
    guests that keep all pages of a block in one state.

    The range is widened when the whole chain has decided, so the order of the chain does not matter: as far as memory
    and every ``Window`` go, and not at all if a ``Quota`` or a listener refuses the widened range. An answer of
    ``then`` that is no decision is an error here too.
    """

    def __new__(cls, size: int | str, then: object | None = None) -> Self: ...

@final
class Quota(Builtin):
    """Refuses conversions after which more than ``max_shared`` bytes would be shared.

    Bounds what a guest can expose. The bytes are counted with the pages locked, so that requests of several vCPUs
    cannot exceed it together. An explicit request gets EINVAL in RAX, an implicit one ends the run as "denied". What
    only ``Align`` added to a request is left out instead.
    """

    def __new__(cls, max_shared: int | str, then: object | None = None) -> Self: ...

@final
class Window(Builtin):
    """Lets pages become shared only inside one of ``ranges``.

    Each is ``(gpa, size)`` in bytes, "GPA+SIZE", or a ``range`` of addresses, which may also be given alone.

    For guests whose shared buffers lie in one place, such as a swiotlb window. Elsewhere an explicit request gets
    EINVAL in RAX, and an implicit one ends the run as "denied". Conversions to private are left to ``then``.
    Addresses and sizes are multiples of 4096, else ValueError.

    Nor does ``Align`` widen a conversion to shared past the first of the ranges that holds it, wherever it is in the
    chain.
    """

    def __new__(
        cls, ranges: range | Sequence[tuple[int | str, int | str] | str | range], then: object | None = None
    ) -> Self: ...

@final
class RateLimit(Builtin):
    """Lets ``per_second`` requests through on average, and ``burst`` at once.

    Bounds the work that a guest's requests cause on the host. A request above the rate does not reach ``then``: an
    explicit one gets EAGAIN in RAX, an implicit one makes its vCPU wait. ``per_second`` is above 0 and ``burst`` at
    least 1, else ValueError.
    """

    def __new__(cls, per_second: float, burst: int = 1, then: object | None = None) -> Self: ...

@final
class PingPong(Builtin):
    """Ends the run when a page is asked for in alternating states more than ``limit`` times in ``window`` seconds.

    For pages that two owners in the guest fight over. The report's reason says which page, how often it changed
    direction and in what time. A page that is converted with others, as ``Align`` does it, counts as one that was asked
    for. The last 256 ranges are watched. ``limit`` is in 1..=65536 and ``window`` not negative, else ValueError.
    """

    def __new__(cls, limit: int, window: float, then: object | None = None) -> Self: ...

@disjoint_base
class MemoryFault:
    """An implicit request: the guest accessed a page that is not in the accessed state.

    KVM reports it by KVM_EXIT_MEMORY_FAULT (attributes, traps) or KVM_EXIT_MMIO (memslots).

    One can be made to test a policy: ``flags`` are by default those of the access, ``state`` is the opposite of the
    accessed state. ``gpa`` and ``size`` are in bytes, multiples of 4096; ``errno`` is in 1..=4095. Raises ValueError.
    """

    def __new__(
        cls,
        gpa: int | str,
        *,
        private: bool = False,
        vcpu: int = 0,
        size: int | str = 4096,
        flags: int | None = None,
        errno: int = 14,
        state: _State | None = None,
        rip: int = 0,
        repeats: int = 0,
        time: int = 0,
        executed: bool = False,
    ) -> Self: ...
    @property
    def vcpu(self) -> int:
        """Index of the vCPU."""
    @property
    def gpa(self) -> int:
        """The page's address in bytes, without the view bit."""
    @property
    def size(self) -> int:
        """Bytes: 4096 on x86."""
    @property
    def private(self) -> bool:
        """Whether the access was one to private memory, else to shared.

        With two views: whether it was through the private view. With one: what KVM's PRIVATE flag says.
        """
    @property
    def flags(self) -> int:
        """KVM_MEMORY_EXIT_FLAG_*, as KVM reports them or, with memslots, as it would; PRIVATE is 8."""
    @property
    def errno(self) -> int:
        """EFAULT (14); EHWPOISON (133) for a poisoned page."""
    @property
    def state(self) -> _State:
        """The page's present state."""
    @property
    def rip(self) -> int:
        """The guest's instruction pointer: of the instruction that accessed the page, unless ``executed``."""
    @property
    def executed(self) -> bool:
        """Whether KVM has executed the instruction up to this access: under memslots, of a store, a push or a call.

        ``rip`` and ``regs`` are then as the instruction leaves them, such as the next one's or a call's target. Nothing
        tells where it began: the same store with a prefix and without leaves the same registers.
        """
    @property
    def repeats(self) -> int:
        """How often this same fault came before, in a row, with no change of its page; 0 for the first one."""
    @property
    def time(self) -> int:
        """When the vCPU exited: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``."""
    @property
    def regs(self) -> Registers:
        """The general registers of the vCPU, read when this is looked at: in the hook, and in the hook's own thread.

        AttributeError anywhere else, PagegateError if KVM_GET_REGS fails.
        """
    @property
    def symbol(self) -> str | None:
        """The kernel's function that the vCPU is in, such as "set_memory_decrypted+0x1f"; ``None`` if it is not known.

        Of a kernel that ``Vm.boot`` loaded, from the symbols in its image. AttributeError as for ``regs``;
        PagegateError if the run ends while they are read.
        """
    @property
    def disassembly(self) -> str | None:
        """The instruction that the vCPU is at; ``None`` if it lies in private memory. AttributeError as for ``regs``.

        A kernel's instruction is the one of its image: it patches some of them when it boots.
        """

@final
class MemoryPoison(MemoryFault):
    """The guest accessed a poisoned page (EHWPOISON). ``Convert`` is no answer: it does not repair the page.

    One can be made, as a ``MemoryFault``; ``state`` is by default the accessed one.
    """

    def __new__(
        cls,
        gpa: int | str,
        *,
        private: bool = False,
        vcpu: int = 0,
        size: int | str = 4096,
        flags: int | None = None,
        errno: int = 133,
        state: _State | None = None,
        rip: int = 0,
        repeats: int = 0,
        time: int = 0,
        executed: bool = False,
    ) -> Self: ...

@final
class MapGpaRange:
    """An explicit request: a well-formed KVM_HC_MAP_GPA_RANGE, by hypercall or doorbell.

    A malformed one gets EINVAL in RAX and reaches no policy. Nor does one to share what is no memory, such as a
    device's range: it gets 0, and nothing is done.

    One can be made to test a policy: ``raw`` follows from ``to`` and ``page_size`` and must not contradict them;
    ``state`` is by default the opposite of ``to``. Raises ValueError.
    """

    def __new__(
        cls,
        gpa: int | str,
        size: int | str = 4096,
        *,
        to: _State,
        vcpu: int = 0,
        page_size: int | str = 4096,
        raw: int | None = None,
        state: Literal["private", "shared", "mixed"] | None = None,
        time: int = 0,
    ) -> Self: ...
    @property
    def vcpu(self) -> int:
        """Index of the vCPU."""
    @property
    def gpa(self) -> int:
        """Start in bytes, a multiple of 4096, without the view bit."""
    @property
    def size(self) -> int:
        """Length in bytes, a multiple of 4096. The whole range lies in guest memory."""
    @property
    def to(self) -> _State:
        """The state that the guest asks for."""
    @property
    def page_size(self) -> int:
        """The guest's page size hint in bytes: 4096, 2 MiB or 1 GiB."""
    @property
    def raw(self) -> int:
        """RDX: bits 3:0 are the page size hint, bit 4 (encrypted) asks for private."""
    @property
    def state(self) -> Literal["private", "shared", "mixed"]:
        """The state of the range when the policy is asked.

        If the pages change while the policy decides, it is asked again, up to 16 times; then the guest gets EAGAIN.
        """
    @property
    def time(self) -> int:
        """When the vCPU exited: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``."""
    @property
    def rip(self) -> int:
        """The vCPU's instruction pointer, as ``regs.rip``. AttributeError and PagegateError as for ``regs``."""
    @property
    def regs(self) -> Registers:
        """The general registers of the vCPU, read when this is looked at: in the hook, and in the hook's own thread.

        AttributeError anywhere else, PagegateError if KVM_GET_REGS fails.
        """
    @property
    def symbol(self) -> str | None:
        """The kernel's function that the vCPU is in, such as "set_memory_decrypted+0x1f"; ``None`` if it is not known.

        Of a kernel that ``Vm.boot`` loaded, from the symbols in its image. AttributeError as for ``regs``;
        PagegateError if the run ends while they are read.
        """
    @property
    def disassembly(self) -> str | None:
        """The instruction that the vCPU is at; ``None`` if it lies in private memory. AttributeError as for ``regs``.

        A kernel's instruction is the one of its image: it patches some of them when it boots.
        """

@final
class Registers:
    """The general registers of a vCPU at one exit."""

    @property
    def rax(self) -> int: ...
    @property
    def rbx(self) -> int: ...
    @property
    def rcx(self) -> int: ...
    @property
    def rdx(self) -> int: ...
    @property
    def rsi(self) -> int: ...
    @property
    def rdi(self) -> int: ...
    @property
    def rsp(self) -> int: ...
    @property
    def rbp(self) -> int: ...
    @property
    def r8(self) -> int: ...
    @property
    def r9(self) -> int: ...
    @property
    def r10(self) -> int: ...
    @property
    def r11(self) -> int: ...
    @property
    def r12(self) -> int: ...
    @property
    def r13(self) -> int: ...
    @property
    def r14(self) -> int: ...
    @property
    def r15(self) -> int: ...
    @property
    def rip(self) -> int: ...
    @property
    def rflags(self) -> int: ...

@final
class Io:
    """One port IO exit. For string IO it stands for ``count`` accesses of ``size`` bytes."""

    @property
    def vcpu(self) -> int:
        """Index of the vCPU."""
    @property
    def port(self) -> int:
        """The port."""
    @property
    def write(self) -> bool:
        """Whether it is OUT, not IN."""
    @property
    def size(self) -> int:
        """Bytes of one access: 1, 2 or 4."""
    @property
    def count(self) -> int:
        """Number of accesses."""
    @property
    def data(self) -> bytes:
        """The bytes that were written, ``size * count`` of them; empty for a read."""

@final
class Mmio:
    """One access to an address outside guest memory."""

    @property
    def vcpu(self) -> int:
        """Index of the vCPU."""
    @property
    def gpa(self) -> int:
        """The guest-physical address, without the view bit."""
    @property
    def write(self) -> bool:
        """Whether it is a store, not a load."""
    @property
    def size(self) -> int:
        """Bytes of the access: 1 to 8."""
    @property
    def data(self) -> bytes:
        """The bytes that were stored; empty for a load."""

@final
class Latency:
    """Time from exit to resume of a run's requests, in nanoseconds, to three digits.

    0 if there were no requests.
    """

    def __new__(cls, *, p50: int, p90: int, p99: int, max: int) -> Self: ...
    def asdict(self) -> dict[str, Any]:
        """Its fields by name. An equal one can be made of them."""
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    @property
    def p50(self) -> int: ...
    @property
    def p90(self) -> int: ...
    @property
    def p99(self) -> int: ...
    @property
    def max(self) -> int: ...

@final
class Whereabouts:
    """Where a vCPU was when it ended a run.

    After "shutdown" AMD's KVM has reset the vCPU, so that ``rip`` is 0xfff0 then.
    """

    def __new__(
        cls, *, vcpu: int, rip: int, cr2: int, symbol: str | None = None, instruction: str | None = None
    ) -> Self: ...
    def asdict(self) -> dict[str, Any]:
        """Its fields by name. An equal one can be made of them."""
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    @property
    def vcpu(self) -> int:
        """Index of the vCPU."""
    @property
    def rip(self) -> int:
        """Its instruction pointer."""
    @property
    def cr2(self) -> int:
        """CR2: the linear address of its last page fault."""
    @property
    def symbol(self) -> str | None:
        """The kernel's function, such as "clear_bss+0x1f"; ``None`` where it is not known."""
    @property
    def instruction(self) -> str | None:
        """The instruction, if its bytes could be had."""

@final
class Report:
    """What a run did, and why it ended.

    One can be made from all of its fields, as ``asdict`` gives them; TypeError if they are not these.
    """

    def __new__(cls, **fields: Any) -> Self: ...
    def asdict(self) -> dict[str, Any]:
        """Its fields by name. An equal one can be made of them."""
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    def _repr_html_(self) -> str: ...
    @property
    def reason(self) -> str:
        """Why it ended.

        "halt", "shutdown", "reboot", "poweroff", "timeout", "stopped", "denied", "livelock", or a Stop's reason.
        Of a run that raised: "livelock", "interrupted" or "failed".
        """
    @property
    def requests(self) -> int:
        """Requests that reached the policy: ``faults + hypercalls``.

        Poisoned pages are not among them.
        """
    @property
    def conversions(self) -> int:
        """Requests that ended in a conversion, including those whose pages were in that state already."""
    @property
    def denied(self) -> int:
        """Requests that the policy refused."""
    @property
    def retries(self) -> int:
        """Requests that the guest had to make again."""
    @property
    def faults(self) -> int:
        """Implicit requests that reached the policy."""
    @property
    def hypercalls(self) -> int:
        """Explicit requests that reached the policy, by hypercall or doorbell."""
    @property
    def poisons(self) -> int:
        """Accesses to poisoned pages."""
    @property
    def malformed(self) -> int:
        """Explicit requests that were refused without asking the policy, and unknown hypercalls."""
    @property
    def malformed_dropped(self) -> int:
        """Malformed requests that the log dropped during the run to keep newer ones."""
    @property
    def stale(self) -> int:
        """Spurious faults: another vCPU had converted the page meanwhile, so the guest was just resumed."""
    @property
    def opened(self) -> int:
        """How often pages were opened to a vCPU without paging, in a software SEV guest."""
    @property
    def bytes_prefaulted(self) -> int:
        """Bytes that KVM mapped before the guest touched them, for ``Convert(prefault=True)``."""
    @property
    def bytes_to_private(self) -> int:
        """Bytes that became private; those that were already are not counted."""
    @property
    def bytes_to_shared(self) -> int:
        """Bytes that became shared; those that were already are not counted."""
    @property
    def device_accesses(self) -> int:
        """Accesses of devices to what is not shared, each refused."""
    @property
    def first_device_access(self) -> DeviceAccess | None:
        """The first of them; ``None`` if there were none."""
    @property
    def at(self) -> Whereabouts | None:
        """Where the vCPU was that ended the run: after "shutdown", "denied", "livelock" and a Stop; else ``None``."""
    @property
    def debug_private(self) -> bool:
        """Whether the host could read and write private pages, as ``Vm(debug_private=True)`` allows."""
    @property
    def latency(self) -> Latency:
        """Time from exit to resume of its requests."""
    @property
    def seconds(self) -> float:
        """How long the run took."""

@final
class DeviceAccess:
    """A device was told to access a page that is not shared. Nothing was read or written.

    One can be made from all of its fields, as ``asdict`` gives them; TypeError if they are not these.
    """

    def __new__(cls, **fields: Any) -> Self: ...
    def asdict(self) -> dict[str, Any]:
        """Its fields by name. An equal one can be made of them."""
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    @property
    def device(self) -> str:
        """The device's name."""
    @property
    def number(self) -> int:
        """Its number on the PCI bus, from 1."""
    @property
    def queue(self) -> int:
        """Index of its queue."""
    @property
    def descriptor(self) -> int | None:
        """Index of the first descriptor of the request that names the page; ``None`` for the queue's rings."""
    @property
    def gpa(self) -> int:
        """The first byte that is not shared, without the view bit."""
    @property
    def size(self) -> int:
        """Bytes from there to the end of the access."""
    @property
    def write(self) -> bool:
        """Whether the device was to write."""
    @property
    def state(self) -> _State:
        """The state of the page. "shared" if it was private for a moment since the driver made the request."""

@disjoint_base
class BuiltinDevice:
    """The base class of the built-in devices. Each belongs to one machine."""

@final
class Block(BuiltinDevice):
    """A disk (virtio-blk): a raw file or a block device, in sectors of 512 bytes.

    ``path``: the file, of which the bytes after the last whole sector are no part. ``read_only``: the guest cannot
    write to it. A flush by the guest is an fdatasync(2). Raises OSError, with EBUSY if it is another disk as well
    and not both are read-only, and ValueError for less than a sector.
    """

    def __new__(cls, path: str | PathLike[str], read_only: bool = False) -> Self: ...

@final
class Console(BuiltinDevice):
    """A console (virtio-console): hvc0 in Linux, which uses it as its console with console=hvc0 on its command line."""

    def __new__(cls) -> Self: ...
    @property
    def console(self) -> pagegate.console.Console:
        """Its other end, as ``Vm.console`` is that of the serial port."""

@final
class Net(BuiltinDevice):
    """A network card (virtio-net) at a tap of the host, or at a program that has the other end of a socket.

    ``tap``: the tap's name. Or a descriptor, as a number or an object with ``fileno()``: of a tap without a header
    (IFF_NO_PI, not IFF_VNET_HDR), or of a Unix datagram socket, each datagram of which is a frame. The card has a
    descriptor of its own, with O_NONBLOCK set for both. ``mac``: its address, as "52:54:00:12:34:56"; by default a
    random one. ``create``: a tap of that name is made if there is none, and goes with the machine; it is down and has
    no address.

    Frames of 64 KiB and more are lost, as are those that the other side does not take. Raises OSError where the tap
    cannot be had (ENODEV: there is none; EPERM: it needs CAP_NET_ADMIN), and ValueError for a descriptor of something
    else and for an address that is not one card's.
    """

    def __new__(cls, tap: str | FileDescriptorLike, mac: str | None = None, *, create: bool = False) -> Self: ...
    @property
    def mac(self) -> str:
        """Its address."""

@final
class Rng(BuiltinDevice):
    """A source of entropy (virtio-rng): the host's getrandom(2)."""

    def __new__(cls) -> Self: ...

@final
class Vsock(BuiltinDevice):
    """Streams between programs of the guest and of the host (virtio-vsock), as Firecracker has them.

    ``cid``: the guest's context ID, 3 or more. A program of the host connects to the Unix socket ``path``, writes
    ``CONNECT <port>`` and a newline, and reads ``OK <its own port>`` and a newline once a program of the guest has
    taken it. A program of the guest that connects to port P of context ID 2 is connected to the Unix socket
    ``<path>_P``. There are 256 streams at most.

    ``path`` is made, and removed with the machine. Raises OSError if it exists, which says so if it is a socket that
    nobody listens at any more, and ValueError for another ``cid``.
    """

    def __new__(cls, cid: int, path: str | PathLike[str]) -> Self: ...

@final
class DeviceQueue:
    """A queue in which there may be requests. Iterate over it to take them.

    One iteration takes at most as many as the queue has entries; the rest come with the next call of ``process``.
    """

    @property
    def index(self) -> int:
        """Its index."""
    @property
    def size(self) -> int:
        """How many entries it has."""
    def __iter__(self) -> Self: ...
    def __next__(self) -> DeviceRequest: ...
    def complete(self, head: int, written: int) -> None:
        """Tells the driver that a request is completed which need not be one, with any length, as a lying device does.

        ``head``: its id, 0 to 2**32-1. ``written``: 0 to 2**32-1. The request itself, if there is one, stays as it is.
        """

@final
class DeviceRequest:
    """A request: parts of guest memory to read, and parts to write."""

    @property
    def head(self) -> int:
        """Index of its first descriptor."""
    @property
    def readable(self) -> list[tuple[int, int]]:
        """What the device reads: ``(gpa, size)`` in bytes for each part, as the driver gave them."""
    @property
    def writable(self) -> list[tuple[int, int]]:
        """What the device writes: ``(gpa, size)`` in bytes for each part, as the driver gave them."""
    @property
    def readable_size(self) -> int:
        """Bytes of all readable parts."""
    @property
    def writable_size(self) -> int:
        """Bytes of all writable parts."""
    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Reads from the readable parts as if they were one, from ``offset`` on; ``size=None``: all that follows.

        DeviceAccessError if not all of it is shared memory, there is not as much, or it is more than 64 MiB.
        """
    def write(self, data: Buffer, offset: int = 0) -> None:
        """Writes to the writable parts as if they were one, from ``offset`` on.

        DeviceAccessError if not all of it is shared memory, or there is not as much.
        """
    def complete(self, written: int = 0) -> None:
        """Gives the request back to the driver. ``written``: how many bytes were written, 0 to 2**32-1.

        A request that is not completed when ``process`` returns is completed with 0.
        """

@final
class Event:
    """One request: what was asked for, decided and done.

    One can be made from all of its fields, as ``asdict`` gives them; TypeError if they are not these.
    """

    def __new__(cls, **fields: Any) -> Self: ...
    def asdict(self) -> dict[str, Any]:
        """Its fields by name. An equal one can be made of them."""
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    @property
    def sequence(self) -> int:
        """Number in the log, from 0, in the order in which requests were completed."""
    @property
    def time(self) -> int:
        """When the vCPU exited: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``."""
    @property
    def vcpu(self) -> int:
        """Index of the vCPU; 0xffffffff for what no vCPU did: "device", and "missing" if another touched the page."""
    @property
    def kind(self) -> Literal["implicit", "explicit", "poison", "unpaged", "device", "malformed", "missing"]:
        """How it came: by an access, by KVM_HC_MAP_GPA_RANGE, or by an access to a poisoned page.

        "unpaged" is no request: in a guest with ``confidential="sev"`` a private page was opened or closed to vCPUs
        without paging. No policy is asked, and the report does not count it. "device" is none either: a device was told
        to access a page that is not shared, and ``Policy.device_access`` was asked, or it accessed one that is, and its
        accesses are logged (``Vm.add_device``). "malformed": the guest asked for what makes no sense, such as a part of
        a page; no policy is asked, and ``gpa``, ``size`` and ``raw`` are as it gave them, as far as they fit.
        "missing": somebody touched a page that had no bytes yet; ``size`` is what came at once, ``latency`` how long
        its pager took.
        """
    @property
    def gpa(self) -> int:
        """Start of the pages that were asked for, in bytes."""
    @property
    def size(self) -> int:
        """Bytes that were asked for."""
    @property
    def to(self) -> _State:
        """The state that was asked for; for a poisoned page the accessed one."""
    @property
    def state(self) -> Literal["private", "shared", "mixed"]:
        """The state of the pages when the policy was asked."""
    @property
    def page_size(self) -> int:
        """The guest's page size hint in bytes; 0 unless explicit."""
    @property
    def raw(self) -> int:
        """RDX; 0 unless explicit."""
    @property
    def flags(self) -> int:
        """KVM_MEMORY_EXIT_FLAG_*; 0 if explicit."""
    @property
    def rip(self) -> int:
        """The guest's instruction pointer, as ``MemoryFault.rip``; 0 if explicit with ``platform="bare"``."""
    @property
    def repeats(self) -> int:
        """How often this same fault came before, in a row, with no change of its page; 0 if explicit."""
    @property
    def decision(self) -> Literal["convert", "deny", "retry", "discard", "stop", "none"]:
        """What the policy decided; "none" if its hook failed, and if no policy is asked."""
    @property
    def decision_gpa(self) -> int:
        """Start of what was to be converted, in bytes; 0 unless the decision is "convert"."""
    @property
    def decision_size(self) -> int:
        """Bytes that were to be converted; 0 unless the decision is "convert"."""
    @property
    def decision_to(self) -> _State:
        """The state to convert to; the one asked for unless the decision is "convert"."""
    @property
    def decision_prefault(self) -> bool:
        """Whether the decision was a ``Convert(prefault=True)``."""
    @property
    def decision_discard(self) -> bool:
        """Whether the decision was to convert and to free the old side (``discard=True``)."""
    @property
    def decision_errno(self) -> int:
        """The errno of a "deny"; else 0."""
    @property
    def outcome(
        self,
    ) -> Literal[
        "converted",
        "denied",
        "retried",
        "stopped",
        "superseded",
        "failed",
        "discarded",
        "opened",
        "closed",
        "accessed",
        "refused",
        "came",
    ]:
        """What came of the request.

        "superseded": another vCPU had converted the page meanwhile. "failed": no decision, or a conversion that failed.
        Of "unpaged": "opened" or "closed". Of "malformed": "refused". "accessed": a device accessed shared pages, as it
        was told to. Of "missing": "came", or "failed".
        """
    @property
    def done_gpa(self) -> int:
        """Start of what was converted, in bytes."""
    @property
    def done_size(self) -> int:
        """Bytes that were converted; 0 if nothing was."""
    @property
    def done_to(self) -> _State:
        """The state that it was converted to."""
    @property
    def changed(self) -> int:
        """Bytes whose state changed; those that were in that state already are not counted."""
    @property
    def errno(self) -> int:
        """What an explicit request got in RAX: 0, or a positive errno. For the others: that of a refusal, or 0."""
    @property
    def latency(self) -> int:
        """Nanoseconds from exit to resume."""
    @property
    def device(self) -> int | None:
        """Number of the device on the PCI bus; ``None`` unless "device"."""
    @property
    def queue(self) -> int | None:
        """Index of the device's queue; ``None`` unless "device"."""
    @property
    def descriptor(self) -> int | None:
        """Index of the request's first descriptor; ``None`` for the queue's rings and unless "device"."""
    @property
    def write(self) -> bool | None:
        """Whether the device was to write; ``None`` unless "device"."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Events:
    """The machine's log of requests: the newest of each vCPU. Iterating gives the oldest first.

    It can be read after the machine is closed, too.

    It is also an Arrow table, by ``__arrow_c_stream__``: ``polars.DataFrame(vm.events)``, ``pyarrow.table(vm.events)``,
    ``pandas.DataFrame.from_arrow(vm.events)``. The columns are the log's own memory and are not copied. The rows of one
    vCPU are in order, those of malformed requests for themselves: 4096 of these are kept beside the others, which they
    cannot push out. Sort by ``sequence`` (order of completion) or ``time`` (order of the exits).
    """

    @property
    def total(self) -> int:
        """Number of events so far, kept or dropped."""
    @property
    def dropped(self) -> int:
        """Number of events that were dropped to make room for newer ones."""
    @property
    def debug_private(self) -> bool:
        """Whether the host could read and write private pages, as ``Vm(debug_private=True)`` allows."""
    def since(self, sequence: int) -> list[Event]:
        """The kept events with this sequence number or a higher one."""
    def follow(self, since: int = 0, *, interval: float = 0.05) -> AsyncIterator[Event]:
        """The events as they come, for asyncio: ``async for event in vm.events.follow()``.

        From the oldest that is kept on, or from sequence number ``since``, to the last of one run: the one that is in
        progress at the call, else the last one, else the first that there will be. If the machine is closed, there
        will be no more: then to the last that is kept. ``interval``: seconds between two looks at the log, 0.05 by
        default.
        """
    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Event: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[Event]: ...
    def _repr_html_(self) -> str: ...
    def __arrow_c_stream__(self, requested_schema: object | None = None) -> Any: ...
    def __arrow_c_schema__(self) -> Any: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Event]: ...

@final
class PolicyHandle:
    """The policy that judges a machine's requests, and its remembered decisions (``remember=``)."""

    @property
    def current(self) -> object | None:
        """The policy as it was given; ``None`` for the default, which converts as asked."""
    def replace(self, policy: object) -> None:
        """Puts another policy in place, also while the machine runs.

        Each request is judged by one of the two: those that come after this has returned by the new one, those that are
        being judged meanwhile by the old one. ``seen``, ``spared`` and the remembered decisions are those of the new
        one; a built-in policy keeps those of the Python policy in its chain, also while it is not in place. The new
        one's ``configure`` is called before. Raises PolicyError for an object that is no policy, and the old one
        stays; PagegateError if the machine is closed.
        """
    def forget(self, region: Region | None = None) -> None:
        """Drops remembered decisions for the pages of a region, or all: the policy is asked again."""
    @property
    def seen(self) -> int:
        """Requests that the Python policy was asked about; poisoned pages are not counted."""
    @property
    def spared(self) -> int:
        """Requests that were answered by a remembered decision, without asking the policy."""

@final
class Change:
    """Pages that are converted, all of them from one state to the other, as a listener is told."""

    @property
    def gpa(self) -> int:
        """Start in bytes, without the view bit."""
    @property
    def size(self) -> int:
        """Length in bytes."""
    @property
    def to(self) -> _State:
        """The state that they are converted to."""
    @property
    def initial(self) -> bool:
        """Whether they are in that state already.

        A new listener is told of the present states first, and one that failed of those of the pages concerned.
        """

@final
class Attributes:
    """The state of every page. This is the only copy: KVM has no ioctl to read attributes back."""

    def _repr_html_(self) -> str: ...
    def is_private(self, gpa: int | str) -> bool:
        """Whether the page that holds ``gpa`` is private. IndexError outside memory."""
    def state(self, gpa: int | str, size: int | str | None = None) -> Literal["private", "shared", "mixed"]:
        """The state of a range of whole pages, by default of the page at ``gpa``.

        ``gpa`` and ``size``: bytes, multiples of 4096. IndexError for a gpa outside memory, ValueError for what is no
        range of pages in memory.
        """
    def runs(self, gpa: int | str = 0, size: int | str | None = None) -> list[tuple[int, int, _State]]:
        """Maximal runs of one state as ``(gpa, size, state)`` in bytes, ascending, by default of all memory.

        Raises as ``state`` does.
        """
    @property
    def private_bytes(self) -> int:
        """Bytes that are private."""
    @property
    def generation(self) -> int:
        """How many conversions changed the state of at least one page. One that was undone does not count."""

@final
class MemoryUsage:
    """Resident bytes of guest memory."""

    @property
    def shared(self) -> int:
        """Resident bytes of the shared side."""
    @property
    def private(self) -> int:
        """Resident bytes of the private side; see ``exact``."""
    @property
    def exact(self) -> bool:
        """Whether ``private`` was counted, by cachestat(2): Linux 6.5 and later, left out of some small kernels.

        If not, it is an upper bound: the bytes in state private.
        """
    @property
    def missing(self) -> int:
        """Bytes that are not there yet: nobody has touched their pages, and they come from a folder or a pager."""

@final
class MissingPage:
    """A page that somebody touches and that has no bytes yet, as a pager's ``missing`` is told of it."""

    @property
    def gpa(self) -> int:
        """Its address, without the view's bit."""
    @property
    def size(self) -> int:
        """Bytes: 4096."""
    @property
    def state(self) -> str:
        """Its state: ``"private"`` or ``"shared"``."""
    @property
    def by(self) -> str:
        """Who touches it: ``"vcpu"``, ``"kvm"`` for itself, ``"device"``, or ``"host"``, by ``read`` for one."""
    @property
    def vcpu(self) -> int | None:
        """The vCPU's index, if it is one."""
    @property
    def around(self) -> tuple[int, int]:
        """Address and size of the missing pages of its state around it, without a gap: at most the 2 MiB that it is in.

        An answer as long as that has the bytes of all of them.
        """

@final
class TouchedPage:
    """A page that was missing until somebody touched it."""

    @property
    def gpa(self) -> int:
        """Its address, without the view's bit."""
    @property
    def state(self) -> str:
        """Its state then: ``"private"`` or ``"shared"``."""
    @property
    def by(self) -> str:
        """Who touched it first: ``"vcpu"``, ``"kvm"`` for itself, ``"device"``, or ``"host"``, by ``read`` for one."""
    @property
    def vcpu(self) -> int | None:
        """The vCPU's index, if it was one."""
    @property
    def size(self) -> int:
        """Bytes that came at once: its own, and those of missing pages around it."""

@final
class Vcpu:
    """One vCPU of a machine."""

    @property
    def index(self) -> int:
        """Its number, from 0."""
    def start(self, *, mode: Literal["real", "protected", "long"] = "long", **registers: int) -> None:
        """Sets all registers for the next run.

        ``registers``: any general register; cr0, cr2, cr3, cr4, cr8, efer, fs_base, gs_base; and segment registers, by
        selector. General registers that are not named are 0, except ``rsp`` in mode "long": each vCPU has a page of
        stack below the page tables.

        "real": 16 bits, segments at 0. "protected": 32 bits, flat segments, no paging. "long": 64 bits, ring 0, all of
        memory identity-mapped in each view, by tables at the top of memory, which become shared: six pages for up to a
        GiB. There is no IDT: an exception ends the run as "shutdown".

        With two views, ``rip`` is moved to the shared view if its page is shared, because an instruction can be fetched
        only through the view of the page's state.

        Raises TypeError for a register that does not exist, ValueError for a value that does not fit, NotSupported for
        a view bit that mode "long" cannot map, PagegateError while the vCPU runs.
        """
    def regs(self) -> dict[str, int]:
        """The general registers by name. PagegateError while the vCPU runs."""
    def sregs(self) -> dict[str, int]:
        """The control registers, EFER and the bases of FS and GS by name. PagegateError while the vCPU runs."""

@final
class Vm:
    """A virtual machine in which a policy decides whether pages are converted.

    ``memory``: bytes from gpa 0 on, a multiple of 4096. ``vcpus``: at least 1. ``policy``: any
    object with hooks, see ``Policy``; ``None`` converts as asked. ``vm_type``: "auto", "default" or "sw-protected".
    ``enforcement``: "auto", "attributes" (by KVM_SET_MEMORY_ATTRIBUTES, on hosts with private memory), "traps" (the
    same on the view that a page is not in, with host memory on both sides) or "memslots" (on any host). ``shared_bit``:
    the address bit that selects a page's shared view, above all of memory and below 52; ``private_bit``: the bit that
    selects its private view instead; ``None`` for both: one view of each page. ``initial``: the state of all pages at
    first, "shared" unless ``confidential`` is given. ``events``: how many requests the log keeps, 2**32 at most.
    ``memslots``: memory is divided into this many equal parts, and no memslot crosses from one to the next.
    ``hypervisor``: a ``pagegate.testing.Fake`` in place of /dev/kvm.

    Where KVM shadows page tables, the memslots of each TiB take it seconds, and 2 GiB of the host's memory. Ctrl-C ends
    the wait.

    Sizes and addresses, here and in the methods, may be text, too: "64M", "2MiB", "0x1000".

    ``platform``: "bare" (no interrupts; a HLT ends the vCPU) or "pc" (for Linux, see ``boot``; memory above 3 GiB
    goes on at 4 GiB). ``confidential``: "sev" for a guest that believes in SEV, all of it private at first, with the
    C-bit as ``private_bit``: nothing is encrypted, and the host is trusted. ``debug_private``: ``read`` and ``write``
    reach private pages, too, unless they are in a guest_memfd that cannot be mapped; the report says so.
    ``policy_timeout``: seconds that a call of a hook, handler or listener by a vCPU may take, looked at 40 times a
    second. One that takes longer gets a PolicyTimeoutError as soon as it executes Python code, which ends the run.

    ``pager``: no page has bytes at first, and each gets them from here when it is first touched: an object with a
    method ``missing(page)`` that returns the bytes of the ``MissingPage``, or a file in which a page's offset is its
    address. It needs userfaultfd(2), as ``Vm.resume(lazy=True)`` does.

    Raises KvmUnavailable, NotSupported, PolicyError, and ValueError for an argument out of range.
    """

    def __new__(
        cls,
        memory: int | str,
        *,
        vcpus: int = 1,
        policy: object | None = None,
        vm_type: str = "auto",
        enforcement: str = "auto",
        shared_bit: int | None = None,
        private_bit: int | None = None,
        initial: _State | None = None,
        events: int = 65536,
        memslots: int = 1,
        hypervisor: Fake | None = None,
        platform: str = "bare",
        confidential: str | None = None,
        debug_private: bool = False,
        policy_timeout: float | None = None,
        pager: object | None = None,
    ) -> Self: ...
    @property
    def memory(self) -> int:
        """Bytes of guest memory."""
    @property
    def shared_bit(self) -> int | None:
        """The address bit that selects a page's shared view; ``None`` if each page has one view."""
    @property
    def private_bit(self) -> int | None:
        """The address bit that selects a page's private view; ``None`` if none does."""
    @property
    def platform(self) -> Literal["bare", "pc"]:
        """What is around the vCPUs: "bare" or "pc"."""
    @property
    def confidential(self) -> Literal["sev"] | None:
        """What the guest is made to believe: "sev"; ``None`` for an ordinary guest."""
    @property
    def enforcement(self) -> _Enforcement:
        """How page states are enforced."""
    @property
    def closed(self) -> bool:
        """Whether the machine is closed."""
    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """The vCPUs, by index."""
    @property
    def attributes(self) -> Attributes:
        """The state of every page."""
    @property
    def policy(self) -> PolicyHandle:
        """The policy in place, to look at or replace."""
    @property
    def events(self) -> Events:
        """The log of requests. It is there after ``close``, too."""
    def load(self, image: Buffer | str | PathLike[str], at: int | str = 0x1000) -> int:
        """Loads bytes, a raw file or an ELF file's segments into guest memory, and returns the entry point.

        ``image``: bytes, which are loaded as they are, or a path. ``at``: where they go, for what is no ELF file. Pages
        that the image covers become shared first: KVM reads code from the shared side, and the host cannot write to the
        private one. Raises OSError, ValueError for an image that does not fit or is malformed, PagegateError.
        """
    def boot(self, kernel: str | PathLike[str], *, initrd: str | PathLike[str] | None = None, append: str = "") -> None:
        """Loads a Linux kernel, so that the next ``run`` boots it.

        ``kernel``: the path of a bzImage (a distribution's vmlinuz) or of an ELF vmlinux. ``initrd``: the path of its
        initial RAM disk. ``append``: its command line; console=ttyS0 and panic=-1 are added where it has no such word.
        All vCPUs are started. A confidential guest gets all of it in private memory.

        Raises OSError, ValueError that says what is wrong with a file or does not fit, PagegateError without
        ``platform="pc"``, if a kernel was booted already, or while the machine runs.
        """
    @property
    def console(self) -> pagegate.console.Console:
        """The guest's serial console, ttyS0. PagegateError without ``platform="pc"``."""
    def symbol(self, rip: int) -> str | None:
        """The function of the booted kernel at an address, such as "set_memory_decrypted+0x1f".

        ``None`` outside of its text, for an image without symbols, and as long as the kernel has not got far enough to
        tell where KASLR has put it. PagegateError while it runs: a hook has ``request.symbol``.
        """
    @property
    def ram(self) -> list[tuple[int, int]]:
        """The ranges of addresses that are memory, as ``(gpa, size)`` in bytes: one, or two around a hole."""
    @property
    def running(self) -> bool:
        """Whether a run is in progress. It is from before ``configure`` of its policy is called."""
    @property
    def waits_for(self) -> list[tuple[str, str]]:
        """What the end of the run in progress waits for: pairs of a device's name and "read", "write", "flush".

        Empty without a run that is to end. A disk's file answers when it likes: what the host has begun, only a signal
        that ends the process makes it give up, if anything does.
        """
    def on_io(self, port: int, handler: Callable[[Io], Any] | Marks) -> None:
        """Sets the handler of a port. For a read it returns ``size * count`` bytes, for a write its result is ignored.

        Handlers are called on vCPU threads. A read answered with anything else ends the run with PolicyError. A port
        without a handler reads as ones. Raises ValueError for the doorbell and for a port that has a handler already.
        """
    def on_mmio(self, gpa: int | str, size: int | str, handler: Callable[[Mmio], Any]) -> None:
        """Sets the handler of ``size`` bytes outside guest memory and its views; otherwise as ``on_io``.

        With two views it answers accesses through either: the bit in ``gpa`` that selects one is ignored.
        """
    def add_device(self, device: object, *, name: str | None = None, log_accesses: bool = False) -> None:
        """Puts a virtio device on the PCI bus of a machine with ``platform="pc"``, before ``boot``.

        ``device``: one of ``pagegate.devices``, or an object of your own, see ``pagegate.devices.Device``. ``name``:
        what events and messages call it. It reaches shared pages only; see ``Policy.device_access``.
        ``log_accesses``: the log has an event "accessed" for each of its accesses to memory, those to a queue's rings,
        too. PagegateError without ``platform="pc"`` or after ``boot``, PolicyError for an object that is no device,
        ValueError for a 32nd.
        """
    def refresh_device(self, name: str) -> None:
        """Reads the configuration of a virtio device again, and tells its driver if it has changed.

        The size of a ``Block``'s file, or ``config`` of a device in Python. ``name``: as ``add_device`` was told; it
        stands for all devices that have it. At any time, also while the machine runs. ValueError if there is none,
        PagegateError for a disk of less than a sector, and what ``config`` raises.
        """
    def add_listener(self, listener: object) -> None:
        """Tells an object the present states, and from then on every conversion; see ``pagegate.Listener``.

        No conversion in between is missed or told twice. Raises PolicyError for an object that is no listener.
        """
    def remove_listener(self, listener: object) -> None:
        """Stops telling an object of conversions.

        It waits for those under way, and after it nothing more is told. From inside of a listener it does not wait, and
        the conversion under way is still told to its end.

        ValueError if it is no listener of this machine.
        """
    def run(self, timeout: float | None = None) -> Report:
        """Runs every started vCPU, each in its own thread, until one ends the run, all halt or ``timeout`` is over.

        ``timeout``: seconds, ``None`` for no limit. ``timeout``, ``stop`` and Ctrl-C bring every vCPU out of the guest
        at once. A hook or handler that is being called is not interrupted: the run ends after it returns. An exception
        that a hook raises ends the run and is raised here, with vCPU, gpa, state and rip as notes; if there are
        several, only the first.

        After "timeout", "stopped", "denied", "livelock", a Stop or an exception, ``run`` can be called again, and a
        request that was not answered is put to the policy again (after a Stop, an explicit one has got EAGAIN). After
        "halt" the guest continues after the HLT; after "shutdown" the vCPU has to be started again. A vCPU that
        halted rests, in further runs too, until all have halted or it is started again.

        A vCPU's thread is as one that Python started: it has that size of stack, and what ``threading.settrace`` was
        given traces its hooks. At the interpreter's end runs are stopped and waited for, two seconds at most; a call
        that has not returned then never does.

        Raises BadBacking, Livelock, PolicyError, PagegateError for an exit that cannot be handled or if no vCPU is
        started, and ValueError for a ``timeout`` that is negative or no number of seconds.
        """
    def run_async(self, timeout: float | None = None) -> Coroutine[Any, Any, Report]:
        """The same for asyncio, in a thread: ``report = await vm.run_async()``. Cancelling it stops the run."""
    @property
    def report(self) -> Report | None:
        """The report of the last run, also of one that raised.

        Its reason is then "livelock", "interrupted" if a signal's handler raised, as Ctrl-C does, or else "failed".

        ``None`` before the first one, and if ``configure`` or ``running`` of its policy raised.
        """
    def stop(self) -> None:
        """Ends the run in progress as "stopped", from any thread, also while ``configure`` or ``running`` is called.

        Does nothing without one.
        """
    def read(self, gpa: int | str, n: int | str) -> bytes:
        """Reads ``n`` bytes of shared pages, and with ``debug_private`` of private ones.

        Raises PrivateMemoryError, which names the first private page, and ValueError outside memory.
        """
    def write(self, gpa: int | str, data: Buffer) -> None:
        """Writes ``data`` to shared pages, and with ``debug_private`` to private ones.

        Raises PrivateMemoryError, which names the first private page, and ValueError outside memory; then nothing is
        written.
        """
    def convert(self, gpa: int | str, size: int | str, *, to: _State) -> None:
        """Converts pages without asking the policy. They lose their bytes and read as zeroes.

        ``gpa`` and ``size``: bytes, multiples of 4096. Raises ValueError for what is no range of pages in memory,
        PagegateError if the kernel or a listener refuses, and what a listener raises. More than 256 MiB are converted
        in parts: if a later one fails, the message or a note says what was converted and stays so.
        """
    def snapshot(self, folder: str | PathLike[str]) -> None:
        """Puts the machine aside: writes all of it to a new folder, from which ``resume`` goes on.

        Between runs. ``folder``: a path that does not exist. It is there when all of it is written, and not before, and
        only its owner can read it, for it has all of the guest's memory, private pages included. Pages of zeroes take
        no room. It also has the states of pages, vCPUs, interrupt controllers, clock, devices and the booted kernel's
        file; neither disks nor the policy, the log and the console's text. The machine can run on.

        Raises FileExistsError and other OSErrors, NotSupported for private memory in a guest_memfd that the host cannot
        read and while a store of a vCPU is unanswered, PagegateError while the machine runs.
        """

    def reset_to(self, folder: str | PathLike[str]) -> None:
        """Puts the machine back to a snapshot of it or of one that was made alike. Its next ``run`` goes on from there.

        Between runs, of a machine that was resumed lazily. What was touched since then is freed, and comes back from
        the folder when it is touched again. Page states and registers are put back; devices are reset and go on as they
        were then; disks keep their bytes. The policy, the log and the console stay; ``working_set`` begins anew.
        Checksums of memory are not checked.

        Raises as ``Vm.resume``, and then nothing has changed, NotSupported for a machine that was not resumed lazily,
        PagegateError while it runs or its pager hangs. After any other failure, such as a listener's, it cannot run
        before it was put back.
        """
    @staticmethod
    def resume(
        folder: str | PathLike[str],
        *,
        policy: object | None = None,
        devices: Sequence[object] | None = None,
        events: int = 65536,
        debug_private: bool = False,
        policy_timeout: float | None = None,
        lazy: bool = False,
        pager: object | None = None,
        hypervisor: Fake | None = None,
    ) -> Vm:
        """A machine that goes on from a snapshot: its next ``run`` continues where the guest was.

        ``folder``: as ``snapshot`` has written it. ``devices``: the devices of ``add_device``, of the same types and in
        the same order; a disk with what it had then. ``policy``, ``events``, ``debug_private``, ``policy_timeout`` and
        ``hypervisor``: as for ``Vm``. All else is as it was. Guests in other machines may go on from the same folder. A
        vsock's streams have ended, and its driver is told so.

        ``lazy``: the guest goes on at once, and each page is read from the folder when it is first touched: by a vCPU,
        a device, ``read`` or KVM itself. So the folder's files of memory have to stay as they are, and their checksums
        are not checked. It needs userfaultfd(2), which root has. ``pager``: as for ``Vm``, in place of the folder's
        files of memory; it is asked for every page, also for one of zeroes.

        Raises OSError, ValueError for a snapshot that is damaged, which names the file, and for other devices,
        NotSupported for a snapshot of another format or of a host with features that this one lacks, else as ``Vm``.
        """

    def memory_usage(self) -> MemoryUsage:
        """Resident bytes of guest memory, on each side."""
    def working_set(self) -> list[TouchedPage]:
        """The pages that were missing until they were touched, in this order.

        By the guest, and by ``read``, ``snapshot`` and the like. Only ``lazy=True`` and ``pager=`` make pages missing.
        """
    def close(self) -> None:
        """Frees the machine, its memory and all descriptors. PagegateError while it runs, and from a listener.

        ``events`` and ``report`` stay as long as this object.

        It waits for conversions under way, whose listeners are told to their end; after it none succeeds.
        """
    def __enter__(self) -> Self: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

@final
class ConsolePort:
    """The other end of the guest's serial port or virtio console: ``pagegate.console.Console`` reads and writes it."""

    def read(self, n: int, seconds: float) -> tuple[bytes, int, bool]:
        """Takes up to ``n`` bytes that the guest wrote; how many before them were dropped; whether no more can come.

        Waits up to ``seconds`` for the first one. No more can come once the machine is closed.
        """
    def write(self, data: Buffer) -> int:
        """Gives the guest bytes to read, and returns how many were taken: at most 64 KiB wait to be read."""
    def tail(self, n: int | str) -> bytes:
        """The last ``n`` bytes that the guest wrote, read or not."""

@final
class Step:
    """One step of a script: what a vCPU of a Fake does next."""

    @staticmethod
    def fail(errno: int) -> Step:
        """KVM_RUN fails with ``errno`` and does not write kvm_run."""
    @staticmethod
    def exit(reason: int, words: tuple[int, int, int] = (0, 0, 0), *, errno: int = 0) -> Step:
        """KVM_RUN ends with this exit_reason, these first words of kvm_run's union, and this errno (0: success)."""
    @staticmethod
    def memory_fault(gpa: int | str, *, flags: int = 8, size: int | str = 4096, errno: int = 14) -> Step:
        """KVM_EXIT_MEMORY_FAULT, once, whatever state the page is in."""
    @staticmethod
    def access(gpa: int | str, *, write: bool = False) -> Step:
        """An access that faults or not as the slots and attributes have it; it is executed again after a fault."""
    @staticmethod
    def hypercall(gpa: int | str, pages: int, attributes: int, *, nr: int = 12) -> Step:
        """KVM_EXIT_HYPERCALL. Reply: RAX."""
    @staticmethod
    def doorbell(gpa: int | str, pages: int, attributes: int, *, nr: int = 12) -> Step:
        """The same request by the doorbell. Reply: RAX."""
    @staticmethod
    def io_write(port: int, data: bytes | Sequence[int], *, size: int = 1) -> Step:
        """OUT, or OUTS if ``data`` is more than ``size`` bytes."""
    @staticmethod
    def io_read(port: int, *, size: int = 1, count: int = 1) -> Step:
        """IN, or INS if ``count`` is above 1. Reply: the data."""
    @staticmethod
    def read_msr(index: int) -> Step:
        """RDMSR of an MSR that KVM leaves to user space. Reply: a byte, 1 for #GP, and the eight that were read."""
    @staticmethod
    def write_msr(index: int, data: int) -> Step:
        """WRMSR to such an MSR. Reply: a byte, 1 for #GP."""
    @staticmethod
    def block() -> Step:
        """KVM_RUN does not return until the vCPU is kicked."""
    @staticmethod
    def halt() -> Step:
        """HLT."""
    @staticmethod
    def shutdown() -> Step:
        """A triple fault: KVM_EXIT_SHUTDOWN."""
    @staticmethod
    def internal_error(suberror: int) -> Step:
        """KVM_EXIT_INTERNAL_ERROR."""

@final
class Reply:
    """What a vCPU of a Fake got as the answer to a step."""

    @property
    def step(self) -> int:
        """Index of the step."""
    @property
    def data(self) -> bytes:
        """The bytes: RAX, or the data that was read."""
    @property
    def value(self) -> int | None:
        """``data`` as a signed integer if it is eight bytes, else ``None``."""

@final
class Fake:
    """A hypervisor without KVM: each vCPU executes its script ``cycles`` times, then halts.

    ``private_memory``: whether it acts as a host with private memory. ``memslots``: how many a VM can have.
    """

    def __new__(
        cls, *scripts: Sequence[Step], private_memory: bool = True, memslots: int = 32764, cycles: int = 1
    ) -> Self: ...
    def inject(
        self,
        call: _Call,
        errno: int,
        *,
        after: int = 0,
        half_done: bool = False,
        forever: bool = False,
    ) -> None:
        """Makes a call fail with ``errno``, after ``after`` more calls that succeed.

        ``call``: "other" are those without a name here, which create vCPUs, guest_memfds and interrupt controllers, or
        read and set a vCPU's state; "any" counts all together. KVM_RUN is none of them: see ``Step.fail``.
        ``forever``: all later ones fail too. ``half_done``: before it fails it does its work on the first half of its
        range.
        """
    def replies(self, vcpu: int = 0) -> list[Reply]:
        """The answers that a vCPU got so far; none are kept if ``cycles`` is above 1."""
    def is_private(self, gpa: int | str) -> bool:
        """Whether the page at ``gpa`` has the attribute PRIVATE."""
    def slot_at(self, gpa: int | str) -> bool | None:
        """Whether the memslot at ``gpa`` has a guest_memfd; ``None`` if there is no memslot."""
    @property
    def slots(self) -> int:
        """How many memslots there are."""
    def calls(self, call: _Call) -> int:
        """How many calls of this kind were made."""

@final
class Trial:
    """Asks a policy without a machine, and carries its decisions out on a map of page states."""

    def __new__(cls, policy: object | None, memory: int | str, initial: str) -> Self: ...
    def judge(self, request: MemoryFault | MapGpaRange) -> Convert | Deny | Discard | Retry | Stop:
        """Asks the policy, and converts in the map what it converts. ValueError for a request outside memory."""
    def state(self, gpa: int | str, size: int | str) -> Literal["private", "shared", "mixed"]:
        """The state of a range of whole pages."""
    def runs(self) -> list[tuple[int, int, _State]]:
        """Maximal runs of one state as ``(gpa, size, state)`` in bytes, ascending."""
    @property
    def shared_bytes(self) -> int:
        """Bytes that are shared."""

@final
class Trace:
    """Requests that were recorded or generated, and facts about their machine: a sequence of events.

    It is also an Arrow table, by ``__arrow_c_stream__``, as ``vm.events``.
    """

    @property
    def memory(self) -> int:
        """Bytes of guest memory."""
    @property
    def shared_bytes(self) -> int:
        """Bytes that were shared when the trace began."""
    @property
    def debug_private(self) -> bool:
        """Whether the host could read and write private pages, as ``Vm(debug_private=True)`` allows."""
    @property
    def truncated(self) -> bool:
        """Whether it was read from an IPC stream that ends in the middle, because its writer was killed."""
    def write(self, path: str | PathLike[str]) -> None:
        """Writes it to a file that ends in .parquet, .arrow (IPC file) or .arrows (IPC stream).

        Of a pipe the reader is waited for, until Ctrl-C. Raises OSError, and ValueError for another name.
        """
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Event: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[Event]: ...
    def _repr_html_(self) -> str: ...
    def __iter__(self) -> TraceIterator: ...
    def __arrow_c_stream__(self, requested_schema: object | None = None) -> Any: ...
    def __arrow_c_schema__(self) -> Any: ...

@final
class TraceIterator:
    """Iterates over the events of a trace."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> Event: ...

def event_words() -> dict[str, list[str]]:
    """The words that an event's kind, decision and outcome can be, by these names."""

def _regular_file(path: str | PathLike[str], most: int) -> bytes | None:
    """The bytes of a regular file of at most ``most`` bytes; Ctrl-C ends the reading.

    ``None`` for what is no regular file: a pipe's writer would be waited for. Raises OSError, and ValueError for a
    larger one.
    """

def read_trace(source: object, *, memory: int | str | None = None, initial: _State | None = None) -> Trace:
    """Reads a trace from a file of any of the formats, ``vm.events``, or any Arrow table with their columns.

    ``memory`` (bytes) and ``initial`` (the state of all pages at first) are for a table whose schema metadata, which
    has both, was lost. An IPC stream that ends in the middle is read up to there, and ``truncated`` is set. A file may
    be damaged, or made to do harm: whatever it says, reading it takes at most 512 times its size and 64 MiB of memory.
    Raises OSError, TypeError for another ``source``, and ValueError for what is no trace.
    """

def synthetic_trace(requests: int = 1_000_000, *, seed: int = 0, vcpus: int = 1) -> Trace:
    """Generates a trace of ``requests`` requests: a busy guest of 1 GiB that starts out private.

    Each is converted as asked. The same arguments give the same trace. About 60 of 100 requests share bounce buffers of
    256 KiB or take them back (explicit), 25 touch pages of rings (implicit), 10 touch one of eight pages privately and
    shared in turn (implicit), and 5 are for 2 MiB blocks (explicit). ``requests`` is at most 100 million and ``vcpus``
    at least 1, else ValueError. MemoryError where there is no memory for it.
    """

@final
class Judged:
    """What a policy decided on the requests of a trace, in counts."""

    @property
    def converted(self) -> int:
        """Decisions to convert."""
    @property
    def denied(self) -> int:
        """Decisions to refuse."""
    @property
    def retried(self) -> int:
        """Decisions to let the guest try again."""
    @property
    def stopped(self) -> int:
        """Decisions to end the run."""
    @property
    def discarded(self) -> int:
        """Decisions to free a poisoned page."""
    @property
    def bytes_to_private(self) -> int:
        """Bytes that became private."""
    @property
    def bytes_to_shared(self) -> int:
        """Bytes that became shared."""
    @property
    def peak_shared(self) -> int:
        """The most bytes that were shared at a time."""
    @property
    def ping_pongs(self) -> int:
        """Conversions of pages of which some had been converted before."""
    @property
    def ends(self) -> int | None:
        """Sequence number of the first request at which the run would have ended; ``None`` if at none."""
    @property
    def differences(self) -> int:
        """Decisions that are not the recorded ones."""
    def __eq__(self, other: object, /) -> bool: ...

@final
class Difference:
    """A request on which the policies and the recording do not agree."""

    @property
    def event(self) -> Event:
        """The request, with what was decided when it was recorded."""
    @property
    def decisions(self) -> tuple[Convert | Deny | Discard | Retry | Stop, ...]:
        """What each policy decided, in the order of the policies."""

@final
class Replay:
    """The result of a replay."""

    @property
    def requests(self) -> int:
        """Requests that were put to each policy."""
    @property
    def missing(self) -> int:
        """Requests that are not in the trace, by the gaps between the sequence numbers."""
    @property
    def recorded(self) -> Judged:
        """What was decided and done when the trace was recorded."""
    @property
    def policies(self) -> tuple[Judged, ...]:
        """What each policy would have decided and done, in the order of the policies."""
    @property
    def differences(self) -> tuple[Difference, ...]:
        """The first requests on which the policies and the recording do not agree."""
    @property
    def different(self) -> int:
        """Number of all such requests."""

def replay(trace: object, *policies: object, keep: int = 1000) -> Replay:
    """Puts the requests of a trace to each policy, in the order in which the recorded one was asked.

    No KVM is needed, and a chain of built-in policies never enters Python. ``trace`` is a Trace, or what ``read``
    takes. ``policies`` are as for ``Vm``; each has page states of its own, and decisions with ``remember=`` are
    remembered. ``keep``: how many differences are kept. The requests are always the recorded ones: what the guest would
    have asked for after another decision is not known. Beside the trace it takes at most 64 MiB of memory and 2 KiB for
    each request, and 8 MiB for each TiB of guest memory, for each policy and once more.

    Raises what a hook raises, with notes; PolicyError; ValueError for what is no trace.
    """

@final
class Recorder:
    """Writes a machine's events to a file while it runs, from now on, in a thread of its own.

    ``path`` ends in .parquet, .arrow (IPC file) or .arrows (IPC stream); the file is created, or overwritten. The
    first two can be read once the recorder is closed, the last at any time. No vCPU waits for it: events that the log
    dropped before they were written are counted as lost, and so are those above ``limit``, which bounds the file,
    with 65536 malformed requests beside the others. If the file cannot be written, the run in progress ends as
    "stopped" and ``close`` raises the error. It may be a pipe: its reader is waited for here and in ``close``, until
    Ctrl-C. At the end of a ``with`` by an exception a reader that has stalled is not waited for.

    Raises OSError, and ValueError for another name.
    """

    def __new__(cls, vm: Vm, path: str | PathLike[str], *, limit: int | None = None) -> Self: ...
    @property
    def written(self) -> int:
        """Events that are in the file; 0 until it is closed."""
    @property
    def lost(self) -> int:
        """Events that are not in the file: dropped by the log, or above ``limit``. 0 until it is closed."""
    @property
    def lost_malformed(self) -> int:
        """Malformed requests among those that are lost. 0 until it is closed."""
    def close(self, *, timeout: float | None = None) -> None:
        """Writes the remaining events and closes the file; a second call does nothing. Raises OSError.

        ``timeout``: after so many seconds a pipe's reader that has read nothing for half a second is given up, with
        TimeoutError. ``None``: never.
        """
    def __enter__(self) -> Self: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...
