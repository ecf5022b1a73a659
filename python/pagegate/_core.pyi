# One file: the stub of one extension module.
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias, final

from typing_extensions import Buffer, disjoint_base

_State: TypeAlias = Literal["private", "shared"]

DOORBELL_PORT: Final[int]
"""The doorbell's port: ``out imm8, al`` there is KVM_HC_MAP_GPA_RANGE, with the same registers, answered in RAX."""

__version__: Final[str]

LIVELOCK_BOUND: Final[int]
"""Repeats of an identical fault, with no change of its page in between, after which the run ends."""

def probe() -> Host:
    """Asks /dev/kvm what this host offers. Never raises: ``problems`` of the result says what is missing."""

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
    timeout: float | None = None,
) -> tuple[int, int, int]:
    """Runs a guest in a bare loop around KVM's ioctls: no policy, no checks, no page states, no records.

    Each of ``vcpus`` is ``(gpa, image, rdi)``: where the image is loaded and entered in long mode, its bytes, and RDI.
    The guest writes 1 to port ``marks`` where the measured part begins, and 2 where it ends. ``block``: bytes that are
    converted for an implicit request, the aligned block around the page. ``work``: how much of each conversion is
    carried out: "nothing", "enforce", "discard" or "all". ``enforcement``: "attributes" or "memslots". ``timeout``:
    seconds. The other arguments are as for ``Vm``; all pages are shared at first.

    Returns nanoseconds, requests and port IO exits of the measured part. Raises ValueError for arguments that do not
    make a machine, OSError, and KeyboardInterrupt.
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
    all lie in the region. ``gpa`` and ``size``: bytes, multiples of 4096. ``uses``: how many more requests it answers,
    at least 1. ``seconds``: how long it holds, above 0, from the time of the request on. Without these two it holds
    until ``vm.policy.forget()`` or ``replace()``. At most 4096 are kept, then the oldest are dropped; where two overlap
    the later one holds.

    Raises ValueError. A region that does not lie in guest memory, or not in the pages that its ``Convert`` names, ends
    the run with PolicyError.
    """

    def __new__(cls, gpa: int, size: int, *, uses: int | None = None, seconds: float | None = None) -> Self: ...
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
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Convert:
    """Converts pages: those that were asked for, to the state that was asked for, unless the arguments say otherwise.

    ``to``: "private" or "shared". ``gpa`` and ``size``: bytes, multiples of 4096, inside guest memory; else the run
    ends with PolicyError.

    A page that changes state loses its bytes and reads as zeroes. So widen only to pages that hold nothing the guest
    needs, or that are in the wanted state already.

    The conversion is one transaction, or several in a row, of at most 256 MiB each. If the kernel refuses, the
    transaction is undone: an explicit request gets the errno in RAX, an implicit one ends the run with PagegateError.
    If a listener refuses, the guest tries again: an explicit request gets EAGAIN.
    """

    def __new__(
        cls,
        to: _State | None = None,
        gpa: int | None = None,
        size: int | None = None,
        *,
        prefault: bool = False,
        discard: bool = True,
        remember: Region | None = None,
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
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Deny:
    """Refuses. An explicit request gets ``errno``, positive, in RAX; an implicit one ends the run as "denied".

    ``errno`` is in 1..=4095, else ValueError. SNP and TDX guests accept only EINVAL and EAGAIN.
    """

    def __new__(cls, errno: int = 22, *, remember: Region | None = None) -> Self: ...
    @property
    def errno(self) -> int:
        """What an explicit request gets in RAX."""
    @property
    def remember(self) -> Region | None:
        """For which pages this decision is remembered; ``None`` if it is for this request only."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Discard:
    """Frees a poisoned page, which then reads as zeroes, and resumes the guest. Only for ``memory_poison``."""

    def __new__(cls) -> Self: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Retry:
    """Lets the guest try again: an implicit request repeats the access, an explicit one gets EAGAIN in RAX.

    After ``LIVELOCK_BOUND`` identical faults with no change of the page in between the run ends as "livelock".
    """

    def __new__(cls, *, remember: Region | None = None) -> Self: ...
    @property
    def remember(self) -> Region | None:
        """For which pages this decision is remembered; ``None`` if it is for this request only."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Stop:
    """Ends the run with ``reason`` as ``report.reason``. Nothing is converted; an explicit request gets EAGAIN."""

    def __new__(cls, reason: str) -> Self: ...
    @property
    def reason(self) -> str:
        """What ``report.reason`` is to be."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@disjoint_base
class Builtin:
    """The base class of the built-in policies."""

    @property
    def hooks(self) -> tuple[Callable[[Any], Any] | None, ...]:
        """The Python policy's hooks at the end of the chain: memory_fault, map_gpa_range, memory_poison.

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
    """Widens what ``then`` converts to whole blocks of ``size`` bytes, up to the end of memory.

    For guests that touch page after page: one exit for each block in place of one for each page. ``size`` is a power of
    two, at least 4096, else ValueError. Every page of the block that changes state loses its bytes, so it is only for
    guests that keep all pages of a block in one state.
    """

    def __new__(cls, size: int, then: object | None = None) -> Self: ...

@final
class Quota(Builtin):
    """Refuses conversions after which more than ``max_shared`` bytes would be shared.

    Bounds what a guest can expose. The bytes are counted with the pages locked, so that requests of several vCPUs
    cannot exceed it together. An explicit request gets EINVAL in RAX, an implicit one ends the run as "denied".
    """

    def __new__(cls, max_shared: int, then: object | None = None) -> Self: ...

@final
class Window(Builtin):
    """Lets pages become shared only inside one of ``ranges``, each ``(gpa, size)`` in bytes.

    For guests whose shared buffers lie in one place, such as a swiotlb window. Elsewhere an explicit request gets
    EINVAL in RAX, and an implicit one ends the run as "denied". Conversions to private are left to ``then``. ``gpa``
    and ``size`` are multiples of 4096, else ValueError.
    """

    def __new__(cls, ranges: Sequence[tuple[int, int]], then: object | None = None) -> Self: ...

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
    direction and in what time. The last 256 ranges that were asked for are watched. ``limit`` is in 1..=65536 and
    ``window`` not negative, else ValueError.
    """

    def __new__(cls, limit: int, window: float, then: object | None = None) -> Self: ...

@disjoint_base
class MemoryFault:
    """An implicit request: the guest accessed a page that is not in the accessed state.

    KVM reports it by KVM_EXIT_MEMORY_FAULT (attributes) or KVM_EXIT_MMIO (memslots).

    One can be made to test a policy: ``flags`` are by default those of the access, ``state`` is the opposite of the
    accessed state. ``gpa`` and ``size`` are in bytes, multiples of 4096; ``errno`` is in 1..=4095. Raises ValueError.
    """

    def __new__(
        cls,
        gpa: int,
        *,
        private: bool = False,
        vcpu: int = 0,
        size: int = 4096,
        flags: int | None = None,
        errno: int = 14,
        state: _State | None = None,
        rip: int = 0,
        repeats: int = 0,
        time: int = 0,
    ) -> Self: ...
    @property
    def vcpu(self) -> int:
        """Index of the vCPU."""
    @property
    def gpa(self) -> int:
        """The page's address in bytes, without the shared bit."""
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
        """The guest's instruction pointer."""
    @property
    def repeats(self) -> int:
        """How often this same fault came before, in a row, with no change of its page; 0 for the first one."""
    @property
    def time(self) -> int:
        """When the vCPU exited: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``."""

@final
class MemoryPoison(MemoryFault):
    """The guest accessed a poisoned page (EHWPOISON). ``Convert`` is no answer: it does not repair the page.

    One can be made, as a ``MemoryFault``; ``state`` is by default the accessed one.
    """

    def __new__(
        cls,
        gpa: int,
        *,
        private: bool = False,
        vcpu: int = 0,
        size: int = 4096,
        flags: int | None = None,
        errno: int = 133,
        state: _State | None = None,
        rip: int = 0,
        repeats: int = 0,
        time: int = 0,
    ) -> Self: ...

@final
class MapGpaRange:
    """An explicit request: a well-formed KVM_HC_MAP_GPA_RANGE, by hypercall or doorbell.

    A malformed one gets EINVAL in RAX and reaches no policy.

    One can be made to test a policy: ``raw`` follows from ``to`` and ``page_size`` and must not contradict them;
    ``state`` is by default the opposite of ``to``. Raises ValueError.
    """

    def __new__(
        cls,
        gpa: int,
        size: int = 4096,
        *,
        to: _State,
        vcpu: int = 0,
        page_size: int = 4096,
        raw: int | None = None,
        state: Literal["private", "shared", "mixed"] | None = None,
        time: int = 0,
    ) -> Self: ...
    @property
    def vcpu(self) -> int:
        """Index of the vCPU."""
    @property
    def gpa(self) -> int:
        """Start in bytes, a multiple of 4096, without the shared bit."""
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
        """The guest-physical address."""
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

    @property
    def p50(self) -> int: ...
    @property
    def p90(self) -> int: ...
    @property
    def p99(self) -> int: ...
    @property
    def max(self) -> int: ...

@final
class Report:
    """What a run did, and why it ended."""

    @property
    def reason(self) -> str:
        """Why it ended: "halt", "shutdown", "timeout", "stopped", "denied", "livelock", or a Stop's reason."""
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
    def stale(self) -> int:
        """Spurious faults: another vCPU had converted the page meanwhile, so the guest was just resumed."""
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
    def latency(self) -> Latency:
        """Time from exit to resume of its requests."""
    @property
    def seconds(self) -> float:
        """How long the run took."""

@final
class Event:
    """One request: what was asked for, decided and done."""

    @property
    def sequence(self) -> int:
        """Number in the log, from 0, in the order in which requests were completed."""
    @property
    def time(self) -> int:
        """When the vCPU exited: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``."""
    @property
    def vcpu(self) -> int:
        """Index of the vCPU."""
    @property
    def kind(self) -> Literal["implicit", "explicit", "poison"]:
        """How it came: by an access, by KVM_HC_MAP_GPA_RANGE, or by an access to a poisoned page."""
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
        """The guest's instruction pointer; 0 if explicit."""
    @property
    def repeats(self) -> int:
        """How often this same fault came before, in a row, with no change of its page; 0 if explicit."""
    @property
    def decision(self) -> Literal["convert", "deny", "retry", "discard", "stop", "none"]:
        """What the policy decided; "none" if its hook failed."""
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
    def outcome(self) -> Literal["converted", "denied", "retried", "stopped", "superseded", "failed", "discarded"]:
        """What came of the request.

        "superseded": another vCPU had converted the page meanwhile. "failed": no decision, or a conversion that failed.
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
    def __eq__(self, other: object, /) -> bool: ...

@final
class Events:
    """The machine's log of requests: the newest of each vCPU. Iterating gives the oldest first.

    It is also an Arrow table, by ``__arrow_c_stream__``: ``polars.DataFrame(vm.events)``, ``pyarrow.table(vm.events)``,
    ``pandas.DataFrame.from_arrow(vm.events)``. The columns are the log's own memory and are not copied. The rows of one
    vCPU are in order; with several vCPUs, sort by ``sequence`` (order of completion) or ``time`` (order of the exits).
    """

    @property
    def total(self) -> int:
        """Number of events so far, kept or dropped."""
    @property
    def dropped(self) -> int:
        """Number of events that were dropped to make room for newer ones."""
    def since(self, sequence: int) -> list[Event]:
        """The kept events with this sequence number or a higher one."""
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
        one; a built-in policy keeps those of the Python policy in its chain, also while it is not in place. Raises
        PolicyError for an object that is no policy, and the old one stays; PagegateError if the machine is closed.
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
        """Start in bytes, without the shared bit."""
    @property
    def size(self) -> int:
        """Length in bytes."""
    @property
    def to(self) -> _State:
        """The state that they are converted to."""
    @property
    def initial(self) -> bool:
        """Whether they are in that state already: a new listener is told of the present states first."""

@final
class Attributes:
    """The state of every page. This is the only copy: KVM has no ioctl to read attributes back."""

    def is_private(self, gpa: int) -> bool:
        """Whether the page that holds ``gpa`` is private. IndexError outside memory."""
    def state(self, gpa: int, size: int | None = None) -> Literal["private", "shared", "mixed"]:
        """The state of a range of whole pages, by default of the page at ``gpa``.

        ``gpa`` and ``size``: bytes, multiples of 4096. IndexError for a gpa outside memory, ValueError for what is no
        range of pages in memory.
        """
    def runs(self, gpa: int = 0, size: int | None = None) -> list[tuple[int, int, _State]]:
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

        "real": 16 bits, segments at 0. "protected": 32 bits, flat segments, no paging. "long": 64 bits, ring 0, the
        first GiB and its shared views identity-mapped by tables in the top six pages of memory, which become shared.
        There is no IDT: an exception ends the run as "shutdown".

        With a shared bit, ``rip`` is moved to the shared view if its page is shared, because an instruction can be
        fetched only through the view of the page's state.

        Raises TypeError for a register that does not exist, ValueError for a value that does not fit, NotSupported for
        a shared bit that mode "long" cannot map, PagegateError while the vCPU runs.
        """
    def regs(self) -> dict[str, int]:
        """The general registers by name. PagegateError while the vCPU runs."""

@final
class Vm:
    """A virtual machine in which a policy decides whether pages are converted.

    ``memory``: bytes from gpa 0 on, a multiple of 4096. ``vcpus``: at least 1. ``policy``: any object with hooks, see
    ``Policy``; ``None`` converts as asked. ``vm_type``: "auto", "default" or "sw-protected". ``enforcement``: "auto",
    "attributes" (by KVM_SET_MEMORY_ATTRIBUTES, on hosts with private memory) or "memslots" (on any host).
    ``shared_bit``: the address bit that selects a page's shared view, above all of memory and below 52; ``None`` for
    one view of each page. ``initial``: the state of all pages at first. ``events``: how many requests the log keeps.
    ``memslots``: memory is divided into this many equal parts, and no memslot crosses from one to the next.
    ``hypervisor``: a ``pagegate.testing.Fake`` in place of /dev/kvm.

    Raises KvmUnavailable, NotSupported, PolicyError, and ValueError for an argument out of range.
    """

    def __new__(
        cls,
        memory: int,
        *,
        vcpus: int = 1,
        policy: object | None = None,
        vm_type: str = "auto",
        enforcement: str = "auto",
        shared_bit: int | None = None,
        initial: _State = "shared",
        events: int = 65536,
        memslots: int = 1,
        hypervisor: Fake | None = None,
    ) -> Self: ...
    @property
    def memory(self) -> int:
        """Bytes of guest memory."""
    @property
    def shared_bit(self) -> int | None:
        """The address bit that selects a page's shared view; ``None`` if each page has one view."""
    @property
    def enforcement(self) -> Literal["attributes", "memslots"]:
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
        """The log of requests."""
    def load(self, image: Buffer | str | PathLike[str], at: int = 0x1000) -> int:
        """Loads bytes, a raw file or an ELF file's segments into guest memory, and returns the entry point.

        ``image``: bytes, which are loaded as they are, or a path. ``at``: where they go, for what is no ELF file. Pages
        that the image covers become shared first: KVM reads code from the shared side, and the host cannot write to the
        private one. Raises OSError, ValueError for an image that does not fit or is malformed, PagegateError.
        """
    def on_io(self, port: int, handler: Callable[[Io], Any] | Marks) -> None:
        """Sets the handler of a port. For a read it returns ``size * count`` bytes, for a write its result is ignored.

        Handlers are called on vCPU threads. A read answered with anything else ends the run with PolicyError. A port
        without a handler reads as ones. Raises ValueError for the doorbell and for a port that has a handler already.
        """
    def on_mmio(self, gpa: int, size: int, handler: Callable[[Mmio], Any]) -> None:
        """Sets the handler of ``size`` bytes outside guest memory and its views; otherwise as ``on_io``."""
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
        "halt" the guest continues after the HLT; after "shutdown" the vCPU has to be started again.

        Raises BadBacking, Livelock, PolicyError, PagegateError for an exit that cannot be handled or if no vCPU is
        started, and ValueError for a negative ``timeout``.
        """
    def stop(self) -> None:
        """Ends the run in progress as "stopped", from any thread. Does nothing if there is none."""
    def read(self, gpa: int, n: int) -> bytes:
        """Reads ``n`` bytes of shared pages.

        Raises PrivateMemoryError, which names the first private page, and ValueError outside memory.
        """
    def write(self, gpa: int, data: Buffer) -> None:
        """Writes ``data`` to shared pages.

        Raises PrivateMemoryError, which names the first private page, and ValueError outside memory; then nothing is
        written.
        """
    def convert(self, gpa: int, size: int, *, to: _State) -> None:
        """Converts pages without asking the policy. They lose their bytes and read as zeroes.

        ``gpa`` and ``size``: bytes, multiples of 4096. Raises ValueError for what is no range of pages in memory,
        PagegateError if the kernel or a listener refuses, and what a listener raises.
        """
    def memory_usage(self) -> MemoryUsage:
        """Resident bytes of guest memory, on each side."""
    def close(self) -> None:
        """Frees the machine, its memory and all descriptors. PagegateError while it runs."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

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
    def memory_fault(gpa: int, *, flags: int = 8, size: int = 4096, errno: int = 14) -> Step:
        """KVM_EXIT_MEMORY_FAULT, once, whatever state the page is in."""
    @staticmethod
    def access(gpa: int, *, write: bool = False) -> Step:
        """An access that faults or not as the slots and attributes have it; it is executed again after a fault."""
    @staticmethod
    def hypercall(gpa: int, pages: int, attributes: int, *, nr: int = 12) -> Step:
        """KVM_EXIT_HYPERCALL. Reply: RAX."""
    @staticmethod
    def doorbell(gpa: int, pages: int, attributes: int, *, nr: int = 12) -> Step:
        """The same request by the doorbell. Reply: RAX."""
    @staticmethod
    def io_write(port: int, data: bytes | Sequence[int], *, size: int = 1) -> Step:
        """OUT, or OUTS if ``data`` is more than ``size`` bytes."""
    @staticmethod
    def io_read(port: int, *, size: int = 1, count: int = 1) -> Step:
        """IN, or INS if ``count`` is above 1. Reply: the data."""
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
        call: Literal["set_attributes", "create_memslot", "delete_memslot", "discard", "pre_fault"],
        errno: int,
        *,
        after: int = 0,
        half_done: bool = False,
        forever: bool = False,
    ) -> None:
        """Makes a call fail with ``errno``, after ``after`` more calls that succeed.

        ``forever``: all later ones fail too. ``half_done``: before it fails it does its work on the first half of its
        range.
        """
    def replies(self, vcpu: int = 0) -> list[Reply]:
        """The answers that a vCPU got so far; none are kept if ``cycles`` is above 1."""
    def is_private(self, gpa: int) -> bool:
        """Whether the page at ``gpa`` has the attribute PRIVATE."""
    def slot_at(self, gpa: int) -> bool | None:
        """Whether the memslot at ``gpa`` has a guest_memfd; ``None`` if there is no memslot."""
    @property
    def slots(self) -> int:
        """How many memslots there are."""
    def calls(self, call: Literal["set_attributes", "create_memslot", "delete_memslot", "discard", "pre_fault"]) -> int:
        """How many calls of this kind were made."""

@final
class Trial:
    """Asks a policy without a machine, and carries its decisions out on a map of page states."""

    def __new__(cls, policy: object | None, memory: int, initial: str) -> Self: ...
    def judge(self, request: MemoryFault | MapGpaRange) -> Convert | Deny | Discard | Retry | Stop:
        """Asks the policy, and converts in the map what it converts. ValueError for a request outside memory."""
    def state(self, gpa: int, size: int) -> Literal["private", "shared", "mixed"]:
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
    def truncated(self) -> bool:
        """Whether it was read from an IPC stream that ends in the middle, because its writer was killed."""
    def write(self, path: str | PathLike[str]) -> None:
        """Writes it to a file that ends in .parquet, .arrow (IPC file) or .arrows (IPC stream).

        Raises OSError, and ValueError for another name.
        """
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Event: ...
    def __iter__(self) -> TraceIterator: ...
    def __arrow_c_stream__(self, requested_schema: object | None = None) -> Any: ...
    def __arrow_c_schema__(self) -> Any: ...

@final
class TraceIterator:
    """Iterates over the events of a trace."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> Event: ...

def read_trace(source: object, *, memory: int | None = None, initial: _State | None = None) -> Trace:
    """Reads a trace from a file of any of the formats, ``vm.events``, or any Arrow table with their columns.

    ``memory`` (bytes) and ``initial`` (the state of all pages at first) are for a table whose schema metadata, which
    has both, was lost. An IPC stream that ends in the middle is read up to there, and ``truncated`` is set. Raises
    OSError, TypeError for another ``source``, and ValueError for what is no trace.
    """

def synthetic_trace(requests: int = 1_000_000, *, seed: int = 0, vcpus: int = 1) -> Trace:
    """Generates a trace of ``requests`` requests: a busy guest of 1 GiB that starts out private.

    Each is converted as asked. The same arguments give the same trace. About 60 of 100 requests share bounce buffers of
    256 KiB or take them back (explicit), 25 touch pages of rings (implicit), 10 touch one of eight pages privately and
    shared in turn (implicit), and 5 are for 2 MiB blocks (explicit). ``requests`` is at most 100 million and ``vcpus``
    at least 1, else ValueError.
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
    have asked for after another decision is not known.

    Raises what a hook raises, with notes; PolicyError; ValueError for what is no trace.
    """

@final
class Recorder:
    """Writes a machine's events to a file while it runs, from now on, in a thread of its own.

    ``path`` ends in .parquet, .arrow (IPC file) or .arrows (IPC stream); the file is created, or overwritten. The first
    two can be read once the recorder is closed, the last at any time. No vCPU waits for it: events that the log dropped
    before they were written are counted as lost, and so are those above ``limit``, which bounds the file. If the file
    cannot be written, the run in progress ends as "stopped" and ``close`` raises the error.

    Raises OSError, and ValueError for another name.
    """

    def __new__(cls, vm: Vm, path: str | PathLike[str], *, limit: int | None = None) -> Self: ...
    @property
    def written(self) -> int:
        """Events that are in the file; 0 until it is closed."""
    @property
    def lost(self) -> int:
        """Events that are not in the file: dropped by the log, or above ``limit``. 0 until it is closed."""
    def close(self) -> None:
        """Writes the remaining events and closes the file; a second call does nothing. Raises OSError."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...
