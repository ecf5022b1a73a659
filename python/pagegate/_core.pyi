from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias, final

from typing_extensions import Buffer, disjoint_base

_State: TypeAlias = Literal["private", "shared"]

DOORBELL_PORT: Final[int]
"""The port at which ``out imm8, al`` is KVM_HC_MAP_GPA_RANGE: the same registers, the answer in RAX."""

__version__: Final[str]

LIVELOCK_BOUND: Final[int]
"""How often an identical fault may come, with no change of its page in between, before the run ends."""

def probe() -> Host:
    """What this host's KVM offers. Never raises: what is missing is in ``problems``."""

def script_guest() -> bytes:
    """The machine code that ``pagegate.guests.Script`` runs: position-independent, long mode."""

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
    """Runs a guest in a plain program around KVM's ioctls: no policy, no checks, no books, no records.

    ``vcpus``: for each where its image is loaded and entered, the image, and RDI. The guest writes to port ``marks``
    where the measured part begins (1) and ends (2). ``block``: a touched page is converted with its whole block.
    ``work``: "nothing", "enforce", "discard" or "all", how much of each conversion is carried out. The rest as for
    ``Vm``.

    Returns the nanoseconds, requests and port IO exits of the measured part. Raises OSError, and KeyboardInterrupt.
    """

@final
class Marks:
    """A port for ``Vm.on_io`` that notes when it is written, without entering Python.

    Read, it answers how often that was.
    """

    def __new__(cls) -> Self: ...
    @property
    def now(self) -> int:
        """Nanoseconds since this object was made."""
    @property
    def written(self) -> list[tuple[int, int, int]]:
        """Each as ``(vcpu, value, nanoseconds)``, the time since this object was made."""

@final
class Host:
    """What /dev/kvm offers, as far as pagegate uses it."""

    @property
    def vm_types(self) -> list[str]:
        """VM types (KVM_CAP_VM_TYPES): "default", "sw-protected", "sev", "sev-es", "snp", "tdx"."""
    @property
    def memory_attributes(self) -> int:
        """Mask of attributes that KVM_SET_MEMORY_ATTRIBUTES takes on the type with private memory; PRIVATE is 8."""
    @property
    def guest_memfd(self) -> bool:
        """Whether a guest_memfd can be made (KVM_CAP_GUEST_MEMFD)."""
    @property
    def guest_memfd_flags(self) -> int:
        """Flags for it (KVM_CAP_GUEST_MEMFD_FLAGS): MMAP is 1, INIT_SHARED is 2."""
    @property
    def exit_hypercall(self) -> bool:
        """Whether KVM_HC_MAP_GPA_RANGE can exit to user space (KVM_CAP_EXIT_HYPERCALL)."""
    @property
    def pre_fault(self) -> bool:
        """Whether there is KVM_PRE_FAULT_MEMORY."""
    @property
    def max_vcpus(self) -> int:
        """vCPUs a VM can have."""
    @property
    def max_memslots(self) -> int:
        """Memslots a VM can have."""
    @property
    def enforcement(self) -> Literal["attributes", "memslots"] | None:
        """What ``enforcement="auto"`` gives; ``None`` where no VM can be made."""
    @property
    def problems(self) -> list[str]:
        """What is missing: a sentence each, with what to do about it."""

@final
class Region:
    """Where a decision holds for more than one request: it is remembered, and the policy is not asked again.

    It answers requests that lie in the region and are of the same kind: implicit or explicit, to private or to shared.
    ``gpa`` and ``size`` are in bytes, multiples of 4096. ``uses``: how many requests it answers, at least 1.
    ``seconds``: for how long. Without them it holds until ``vm.policy.forget()``, or until later ones have pushed it
    out: at most 4096 are kept, and where two overlap the later one holds. Raises ValueError.
    """

    def __new__(cls, gpa: int, size: int, *, uses: int | None = None, seconds: float | None = None) -> Self: ...
    @property
    def gpa(self) -> int:
        """Start in bytes."""
    @property
    def size(self) -> int:
        """Bytes."""
    @property
    def uses(self) -> int | None:
        """How many requests it answers; ``None``: any number."""
    @property
    def seconds(self) -> float | None:
        """For how long; ``None``: for good."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Convert:
    """Converts: as asked, or to another state, or other pages.

    A page that changes state loses its bytes: it reads as zeroes. So widen only where the neighbours have nothing to
    lose, or where they are in the wanted state already.

    ``gpa`` and ``size`` are in bytes, multiples of 4096, inside memory; else the run ends with PolicyError. The
    conversion is one transaction, or several in a row for more than 256 MiB; what the kernel refuses is undone. Then an
    explicit request finds the errno in RAX, and an implicit one ends the run.
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
        """``None``: as asked."""
    @property
    def gpa(self) -> int | None:
        """``None``: as asked."""
    @property
    def size(self) -> int | None:
        """``None``: as asked."""
    @property
    def discard(self) -> bool:
        """Free the stale side. If not, its bytes come back when the page does, and memory is held twice till then."""
    @property
    def prefault(self) -> bool:
        """Have KVM map the pages before the guest touches them (KVM_PRE_FAULT_MEMORY), where the host can."""
    @property
    def remember(self) -> Region | None:
        """Where else this holds, without asking again."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Deny:
    """Refuses. Explicit: the guest finds ``errno``, positive, in RAX. Implicit: the run ends as "denied".

    ``errno`` is in 1..=4095 (ValueError). SNP and TDX guests accept only EINVAL and EAGAIN.
    """

    def __new__(cls, errno: int = 22, *, remember: Region | None = None) -> Self: ...
    @property
    def errno(self) -> int: ...
    @property
    def remember(self) -> Region | None:
        """Where else this holds, without asking again."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Discard:
    """Frees the poisoned page and lets the guest go on: it reads zeroes. An answer to ``memory_poison`` only."""

    def __new__(cls) -> Self: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Retry:
    """Lets the guest try again: an implicit request re-executes, an explicit one finds EAGAIN in RAX.

    After ``LIVELOCK_BOUND`` identical faults with no change in between the run ends as "livelock".
    """

    def __new__(cls, *, remember: Region | None = None) -> Self: ...
    @property
    def remember(self) -> Region | None:
        """Where else this holds, without asking again."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Stop:
    """Ends the run: ``report.reason`` is ``reason``. Nothing is converted; an explicit request finds EAGAIN."""

    def __new__(cls, reason: str) -> Self: ...
    @property
    def reason(self) -> str: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@disjoint_base
class Builtin:
    """What all built-in policies are."""

    @property
    def hooks(self) -> tuple[Callable[[Any], Any] | None, ...]:
        """The hooks of the Python policy at the end of the chain: memory_fault, map_gpa_range, memory_poison."""

@final
class Allow(Builtin):
    """Converts whatever is asked for. It protects against nothing: the guest decides."""

    def __new__(cls) -> Self: ...

@final
class DenyAll(Builtin):
    """Refuses everything: no page changes hands. ``errno`` is in 1..=4095."""

    def __new__(cls, errno: int = 22) -> Self: ...

@final
class ExplicitOnly(Builtin):
    """Converts what is asked for in so many words, and refuses what is merely touched, which may be a guest bug."""

    def __new__(cls) -> Self: ...

@final
class Align(Builtin):
    """Widens what ``then`` converts to whole blocks of ``size`` bytes, as far as memory goes.

    Against a storm of exits: one for a block in place of one for each page. ``size`` is a power of two from 4096 on.
    Every page of the block that changes state loses its bytes, so this is for guests that use whole blocks alike.
    """

    def __new__(cls, size: int, then: object | None = None) -> Self: ...

@final
class Quota(Builtin):
    """Refuses conversions after which more than ``max_shared`` bytes would be shared.

    Against a guest that exposes itself bit by bit. It is counted with the pages locked, so that no two vCPUs slip
    through together. An explicit request finds EINVAL, an implicit one ends the run as "denied".
    """

    def __new__(cls, max_shared: int, then: object | None = None) -> Self: ...

@final
class Window(Builtin):
    """Lets pages become shared inside ``ranges`` only, ``(gpa, size)`` in bytes; EINVAL elsewhere.

    Against sharing anything but the buffers that are meant for it, such as a swiotlb window.
    """

    def __new__(cls, ranges: Sequence[tuple[int, int]], then: object | None = None) -> Self: ...

@final
class RateLimit(Builtin):
    """Lets ``per_second`` requests through on average and ``burst`` at once.

    Against a guest that keeps the host busy converting. An explicit request above that finds EAGAIN, an implicit one
    waits, which slows down its own vCPU.
    """

    def __new__(cls, per_second: float, burst: int = 1, then: object | None = None) -> Self: ...

@final
class PingPong(Builtin):
    """Ends the run when a page is asked for in alternating states more than ``limit`` times in ``window`` seconds.

    Against two owners that fight over a page. The report's reason is the evidence: which page, how often, how fast.
    """

    def __new__(cls, limit: int, window: float, then: object | None = None) -> Self: ...

@disjoint_base
class MemoryFault:
    """An implicit request: an access met a page that is not in the accessed state (KVM_EXIT_MEMORY_FAULT).

    One can be made, to try a policy on it. ``flags`` are by default those of the access, ``state`` is the opposite of
    what was accessed. ``gpa`` and ``size`` are multiples of 4096. Raises ValueError.
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
        """The page, in bytes, shared bit stripped."""
    @property
    def size(self) -> int:
        """Bytes: 4096 on x86."""
    @property
    def private(self) -> bool:
        """Whether the access was to the private side."""
    @property
    def flags(self) -> int:
        """KVM_MEMORY_EXIT_FLAG_* as KVM reported them; PRIVATE is 8."""
    @property
    def errno(self) -> int:
        """EFAULT; EHWPOISON for poison."""
    @property
    def state(self) -> _State:
        """The page's present state."""
    @property
    def rip(self) -> int:
        """The guest's instruction pointer."""
    @property
    def repeats(self) -> int:
        """How often this very fault came before with no change of its page in between; 0 the first time."""
    @property
    def time(self) -> int:
        """When it came: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``."""

@final
class MemoryPoison(MemoryFault):
    """An access met a poisoned page (EHWPOISON). No conversion repairs that: ``Convert`` is no answer here.

    One can be made, as a ``MemoryFault``; ``state`` is by default what was accessed.
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
    """An explicit request: a well-formed KVM_HC_MAP_GPA_RANGE. Malformed ones find EINVAL and reach no policy.

    One can be made, to try a policy on it. ``raw`` follows from ``to`` and ``page_size`` and must not contradict them;
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
        """Start in bytes, shared bit stripped; a multiple of 4096."""
    @property
    def size(self) -> int:
        """Bytes; a multiple of 4096. The whole range lies in memory."""
    @property
    def to(self) -> _State:
        """What the guest wants the pages to be."""
    @property
    def page_size(self) -> int:
        """The guest's hint: 4096, 2 MiB or 1 GiB."""
    @property
    def raw(self) -> int:
        """RDX: bits 3:0 are the hint, bit 4 is "encrypted"."""
    @property
    def state(self) -> Literal["private", "shared", "mixed"]:
        """The state of the range. If it is another when its turn comes, the policy is asked again, up to 16 times."""
    @property
    def time(self) -> int:
        """When it came: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``."""

@final
class Io:
    """One port IO exit. String IO keeps its access size and count."""

    @property
    def vcpu(self) -> int: ...
    @property
    def port(self) -> int: ...
    @property
    def write(self) -> bool:
        """OUT, not IN."""
    @property
    def size(self) -> int:
        """Bytes of one access: 1, 2 or 4."""
    @property
    def count(self) -> int:
        """Accesses."""
    @property
    def data(self) -> bytes:
        """What was written, ``size * count`` bytes; empty for a read."""

@final
class Mmio:
    """One access to an address outside memory."""

    @property
    def vcpu(self) -> int: ...
    @property
    def gpa(self) -> int: ...
    @property
    def write(self) -> bool:
        """A store, not a load."""
    @property
    def size(self) -> int:
        """Bytes, 1 to 8."""
    @property
    def data(self) -> bytes:
        """What was stored; empty for a load."""

@final
class Latency:
    """Exit to resume of the requests of a run, in nanoseconds, to three digits; 0 where there were none."""

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
        """One of "halt", "shutdown", "timeout", "stopped", "denied", "livelock", or a Stop's own."""
    @property
    def requests(self) -> int:
        """Requests that reached the policy: ``faults + hypercalls``."""
    @property
    def conversions(self) -> int:
        """Requests that ended in a conversion, also where nothing had to change."""
    @property
    def denied(self) -> int: ...
    @property
    def retries(self) -> int: ...
    @property
    def faults(self) -> int:
        """Implicit requests."""
    @property
    def hypercalls(self) -> int:
        """Explicit requests, by hypercall or doorbell."""
    @property
    def poisons(self) -> int:
        """Accesses to poisoned memory."""
    @property
    def malformed(self) -> int:
        """Explicit requests that were refused before any policy saw them."""
    @property
    def stale(self) -> int:
        """Faults that another vCPU's conversion had overtaken: the guest just looked again."""
    @property
    def bytes_prefaulted(self) -> int:
        """Bytes that KVM mapped ahead of the guest, for ``Convert(prefault=True)``."""
    @property
    def bytes_to_private(self) -> int:
        """Bytes whose state really changed."""
    @property
    def bytes_to_shared(self) -> int:
        """Bytes whose state really changed."""
    @property
    def latency(self) -> Latency: ...
    @property
    def seconds(self) -> float: ...

@final
class Event:
    """One request, from exit to resume."""

    @property
    def sequence(self) -> int:
        """Position in the log, from 0: in the order in which requests were over."""
    @property
    def time(self) -> int:
        """When it came: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``; the order of the questions."""
    @property
    def vcpu(self) -> int: ...
    @property
    def kind(self) -> Literal["implicit", "explicit", "poison"]: ...
    @property
    def gpa(self) -> int:
        """What was asked for: start in bytes."""
    @property
    def size(self) -> int:
        """What was asked for: bytes."""
    @property
    def to(self) -> _State:
        """What was asked for: the state."""
    @property
    def state(self) -> Literal["private", "shared", "mixed"]:
        """The state that the pages were in."""
    @property
    def page_size(self) -> int:
        """Explicit: the guest's hint in bytes; else 0."""
    @property
    def raw(self) -> int:
        """Explicit: RDX; else 0."""
    @property
    def flags(self) -> int:
        """Implicit: KVM_MEMORY_EXIT_FLAG_*; else 0."""
    @property
    def rip(self) -> int:
        """Implicit: the guest's instruction pointer; else 0."""
    @property
    def repeats(self) -> int:
        """Implicit: how often this very fault came before, with no change in between; else 0."""
    @property
    def decision(self) -> Literal["convert", "deny", "retry", "discard", "stop", "none"]:
        """What the policy decided; "none" if it failed."""
    @property
    def decision_gpa(self) -> int:
        """What was to be converted: start in bytes; 0 for all decisions but "convert"."""
    @property
    def decision_size(self) -> int:
        """What was to be converted: bytes; 0 for all decisions but "convert"."""
    @property
    def decision_to(self) -> _State:
        """What it was to be converted to."""
    @property
    def decision_prefault(self) -> bool:
        """The decision said ``prefault=True``."""
    @property
    def decision_discard(self) -> bool:
        """The decision did not say ``discard=False``."""
    @property
    def decision_errno(self) -> int:
        """The errno of a "deny"; else 0."""
    @property
    def outcome(self) -> Literal["converted", "denied", "retried", "stopped", "superseded", "failed", "discarded"]: ...
    @property
    def done_gpa(self) -> int:
        """What was converted: start in bytes."""
    @property
    def done_size(self) -> int:
        """What was converted: bytes; 0 for nothing."""
    @property
    def done_to(self) -> _State:
        """What it was converted to."""
    @property
    def changed(self) -> int:
        """Bytes whose state really changed."""
    @property
    def errno(self) -> int:
        """What the guest was told: 0, or a positive errno."""
    @property
    def latency(self) -> int:
        """Exit to resume in nanoseconds."""
    def __eq__(self, other: object, /) -> bool: ...

@final
class Events:
    """The machine's log of requests. It keeps the newest; iterating it gives them oldest first.

    It is an Arrow table too, by ``__arrow_c_stream__``: ``polars.DataFrame(vm.events)``, ``pyarrow.table(vm.events)``,
    ``pandas.DataFrame.from_arrow(vm.events)``. The columns lie in the log's own memory and are not copied. Those of one
    vCPU are in order; with several, sort by ``sequence`` (order of completion) or ``time`` (order of the questions).
    """

    @property
    def total(self) -> int:
        """Events there were, kept or dropped."""
    @property
    def dropped(self) -> int:
        """Events that gave way to newer ones."""
    def since(self, sequence: int) -> list[Event]:
        """The kept events with this sequence number or a higher one."""
    def __arrow_c_stream__(self, requested_schema: object | None = None) -> Any: ...
    def __arrow_c_schema__(self) -> Any: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Event]: ...

@final
class PolicyHandle:
    """Who judges a machine's requests, and what a Python policy taught (``remember=``)."""

    @property
    def current(self) -> object | None:
        """The policy, as it was given; ``None`` for the default."""
    def replace(self, policy: object) -> None:
        """Puts another policy in place, also while the machine runs.

        Each request is judged by one of them: what comes after this has returned by the new one, what is being judged
        meanwhile by the old one. What the old one taught goes with it. Raises PolicyError for an object that is no
        policy; then the old one stays.
        """
    def forget(self, region: Region | None = None) -> None:
        """Forgets what was remembered about a region, or everything: the policy is asked again."""
    @property
    def seen(self) -> int:
        """Requests that the Python policy was asked about."""
    @property
    def spared(self) -> int:
        """Requests that it was spared, because it had said ``remember=``."""

@final
class Change:
    """Pages that change hands, all of them from the one state to the other."""

    @property
    def gpa(self) -> int:
        """Start in bytes, shared bit stripped."""
    @property
    def size(self) -> int:
        """Bytes."""
    @property
    def to(self) -> _State:
        """What they become."""
    @property
    def initial(self) -> bool:
        """They are that already: this is what a listener that joins is told first."""

@final
class Attributes:
    """The state of every page: the only copy, since KVM has no ioctl to read attributes back."""

    def is_private(self, gpa: int) -> bool:
        """Whether the page that holds ``gpa`` is private. IndexError outside memory."""
    def state(self, gpa: int, size: int | None = None) -> Literal["private", "shared", "mixed"]:
        """The state of a range of whole pages, by default of the page at ``gpa``."""
    def runs(self, gpa: int = 0, size: int | None = None) -> list[tuple[int, int, _State]]:
        """Maximal runs of one state as ``(gpa, size, state)`` in bytes, ascending, by default of all memory."""
    @property
    def private_bytes(self) -> int:
        """Bytes that are private."""
    @property
    def generation(self) -> int:
        """Grows by one with every change."""

@final
class MemoryUsage:
    """Resident bytes of guest memory."""

    @property
    def shared(self) -> int: ...
    @property
    def private(self) -> int: ...
    @property
    def exact(self) -> bool:
        """Whether ``private`` was counted (cachestat(2), Linux 6.5 and later, left out of some small kernels).

        Where it could not be, it is the most that may be there: the bytes in state private.
        """

@final
class Vcpu:
    """One vCPU."""

    @property
    def index(self) -> int: ...
    def start(self, *, mode: Literal["real", "protected", "long"] = "long", **registers: int) -> None:
        """Sets all registers for the next run.

        Those not named are 0, but ``rsp`` in mode "long": it has a page for each vCPU, below the tables. Any general
        register can be named; cr0, cr2, cr3, cr4, cr8, efer, fs_base, gs_base; and segments, by selector.

        "real": 16 bits, segments at 0. "protected": 32 bits, flat segments, no paging. "long": 64 bits, ring 0, the
        first GiB and its shared views mapped to themselves by tables in the top six pages of memory, which become
        shared. There is no IDT: an exception ends the run as "shutdown".

        With a shared bit, ``rip`` is taken at the shared view where its page is shared: an instruction cannot be
        fetched from the view that its page is not in.

        Raises TypeError for a register that does not exist, ValueError for a value that does not fit, PagegateError
        while the vCPU runs.
        """
    def regs(self) -> dict[str, int]:
        """The general registers by name, between runs."""

@final
class Vm:
    """A virtual machine whose guest asks before a page changes hands.

    ``memory``: bytes from gpa 0 on, a multiple of 4096. ``policy``: any object with hooks, see ``Policy``; ``None``
    converts as asked. ``vm_type``: "auto", "default" or "sw-protected". ``enforcement``: "auto", "attributes" or
    "memslots". ``shared_bit``: the address bit that selects a page's shared view. ``initial``: the state of all pages
    at first. ``events``: how many the log keeps. ``memslots``: memory is laid out in this many equal parts.
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
    def shared_bit(self) -> int | None: ...
    @property
    def enforcement(self) -> Literal["attributes", "memslots"]: ...
    @property
    def closed(self) -> bool: ...
    @property
    def vcpus(self) -> tuple[Vcpu, ...]: ...
    @property
    def attributes(self) -> Attributes: ...
    @property
    def policy(self) -> PolicyHandle: ...
    @property
    def events(self) -> Events: ...
    def load(self, image: Buffer | str | PathLike[str], at: int = 0x1000) -> int:
        """Puts bytes, a raw file or an ELF file's segments into memory and returns the entry point.

        ``at`` is for what is no ELF file. Private pages that the image covers become shared first: KVM reads code
        through the shared side, and no host can fill the private one.
        """
    def on_io(self, port: int, handler: Callable[[Io], Any] | Marks) -> None:
        """Answers a port. For a read the handler returns ``size * count`` bytes, for a write its result is ignored.

        A port without a handler reads as ones. Raises ValueError for the doorbell and for a port that has a handler.
        """
    def on_mmio(self, gpa: int, size: int, handler: Callable[[Mmio], Any]) -> None:
        """Answers a range outside memory and its views; as ``on_io``."""
    def add_listener(self, listener: object) -> None:
        """Tells an object the present state, and from then on of every conversion; see ``pagegate.Listener``.

        Nothing is lost or doubled in between. PolicyError for an object that is none.
        """
    def remove_listener(self, listener: object) -> None:
        """Tells it nothing more. ValueError for an object that is no listener of this machine."""
    def run(self, timeout: float | None = None) -> Report:
        """Runs every started vCPU, each in a thread of its own, until one ends the run or ``timeout`` seconds passed.

        The first exception of a hook is raised here, once, with notes that say where. ``timeout``, ``stop`` and Ctrl-C
        bring every vCPU out of the guest at once; a hook or handler that is running is Python code, which nothing can
        interrupt, so they wait until it returns.

        After "timeout", "stopped", "denied", "livelock", a Stop or an exception the run can be taken up again, and a
        request that nobody answered is asked again (after a Stop an explicit one finds EAGAIN). After "halt" it goes on
        behind the HLT; after "shutdown" the vCPU has to be started again.

        Raises BadBacking, Livelock, PolicyError, and PagegateError for what KVM reports and nobody can handle.
        """
    def stop(self) -> None:
        """Ends the run in progress as "stopped", from any thread; without one it does nothing."""
    def read(self, gpa: int, n: int) -> bytes:
        """``n`` bytes of shared pages. PrivateMemoryError names the first private page."""
    def write(self, gpa: int, data: Buffer) -> None:
        """Writes to shared pages. PrivateMemoryError names the first private page; then nothing was written."""
    def convert(self, gpa: int, size: int, *, to: _State) -> None:
        """Converts on the host's account: no policy is asked. What was in the pages is gone: they read as zeroes."""
    def memory_usage(self) -> MemoryUsage:
        """Resident bytes of each side."""
    def close(self) -> None:
        """Lets go of the machine, its memory and all descriptors. PagegateError while it runs."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

@final
class Step:
    """What a vCPU of a Fake does next."""

    @staticmethod
    def fail(errno: int) -> Step:
        """KVM_RUN fails and writes nothing."""
    @staticmethod
    def exit(reason: int, words: tuple[int, int, int] = (0, 0, 0), *, errno: int = 0) -> Step:
        """KVM_RUN ends with this exit_reason, these first words of the union, and this errno."""
    @staticmethod
    def memory_fault(gpa: int, *, flags: int = 8, size: int = 4096, errno: int = 14) -> Step:
        """KVM_EXIT_MEMORY_FAULT, once."""
    @staticmethod
    def access(gpa: int, *, write: bool = False) -> Step:
        """An access, as KVM would treat it with its slots and attributes; again after a fault."""
    @staticmethod
    def hypercall(gpa: int, pages: int, attributes: int, *, nr: int = 12) -> Step:
        """KVM_EXIT_HYPERCALL. Reply: RAX."""
    @staticmethod
    def doorbell(gpa: int, pages: int, attributes: int, *, nr: int = 12) -> Step:
        """The same by port. Reply: RAX."""
    @staticmethod
    def io_write(port: int, data: bytes | Sequence[int], *, size: int = 1) -> Step:
        """OUT, or OUTS of several."""
    @staticmethod
    def io_read(port: int, *, size: int = 1, count: int = 1) -> Step:
        """IN, or INS of several. Reply: the data."""
    @staticmethod
    def block() -> Step:
        """KVM_RUN does not return until it is kicked."""
    @staticmethod
    def halt() -> Step: ...
    @staticmethod
    def shutdown() -> Step: ...
    @staticmethod
    def internal_error(suberror: int) -> Step: ...

@final
class Reply:
    """What a vCPU of a Fake found as the answer to a step."""

    @property
    def step(self) -> int:
        """Index of the step."""
    @property
    def data(self) -> bytes: ...
    @property
    def value(self) -> int | None:
        """``data`` as a signed word, where it is eight bytes."""

@final
class Fake:
    """A hypervisor that replays one script a vCPU, ``cycles`` times, and then halts.

    ``private_memory``: like a host with attributes, or like one without. ``memslots``: how many there are.
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
        """Makes a call fail, after ``after`` more that go well; all the later ones too if ``forever``.

        ``half_done``: it does its work on the first half of its range all the same.
        """
    def replies(self, vcpu: int = 0) -> list[Reply]:
        """The answers so far; none are kept with ``cycles`` above 1."""
    def is_private(self, gpa: int) -> bool:
        """Whether the page carries PRIVATE."""
    def slot_at(self, gpa: int) -> bool | None:
        """``None`` without a slot; else whether a guest_memfd is bound to it."""
    @property
    def slots(self) -> int:
        """How many slots there are."""
    def calls(self, call: Literal["set_attributes", "create_memslot", "delete_memslot", "discard", "pre_fault"]) -> int:
        """How many calls were made."""

@final
class Trial:
    """Asks a policy as a machine does, without one, and carries its decisions out on a map of states."""

    def __new__(cls, policy: object | None, memory: int, initial: str) -> Self: ...
    def judge(self, request: MemoryFault | MapGpaRange) -> Convert | Deny | Discard | Retry | Stop:
        """What the policy decides; what it converts is converted here. ValueError for a request outside memory."""
    def state(self, gpa: int, size: int) -> Literal["private", "shared", "mixed"]:
        """The state of a range of whole pages: "private", "shared" or "mixed"."""
    def runs(self) -> list[tuple[int, int, _State]]:
        """Maximal runs of one state as ``(gpa, size, state)``, ascending."""
    @property
    def shared_bytes(self) -> int:
        """Bytes that are shared."""

@final
class Trace:
    """Requests that were recorded, or made up, and the machine they were made in: a sequence, and an Arrow table.

    A table by ``__arrow_c_stream__``, as ``vm.events``.
    """

    @property
    def memory(self) -> int:
        """Bytes of guest memory."""
    @property
    def shared_bytes(self) -> int:
        """Bytes that were shared when the trace began."""
    @property
    def truncated(self) -> bool:
        """It was read from an IPC stream that ends in the middle: whoever wrote it was killed."""
    def write(self, path: str | PathLike[str]) -> None:
        """Writes it to a file: .parquet, .arrow (IPC file) or .arrows (IPC stream).

        Raises OSError, and ValueError for another name.
        """
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Event: ...
    def __iter__(self) -> TraceIterator: ...
    def __arrow_c_stream__(self, requested_schema: object | None = None) -> Any: ...
    def __arrow_c_schema__(self) -> Any: ...

@final
class TraceIterator:
    """One event after the other."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> Event: ...

def read_trace(source: object, *, memory: int | None = None, initial: _State | None = None) -> Trace:
    """Reads a trace: a file of any of the formats, ``vm.events``, or any table that has their columns.

    ``memory`` (bytes) and ``initial`` (the state of all pages at first) are for a table that lost its schema's
    metadata, which tell both. Of an IPC stream that ends in the middle what is there is read, and ``truncated`` says
    so. Raises OSError, and ValueError for what is no trace.
    """

def synthetic_trace(requests: int = 1_000_000, *, seed: int = 0, vcpus: int = 1) -> Trace:
    """A trace of ``requests`` requests that no guest made: a busy guest of 1 GiB that starts out private.

    Each is converted as asked. The same arguments give the same trace. Of a hundred requests about 60 share bounce
    buffers of 256 KiB or take them back (explicit), 25 touch pages of rings (implicit), 10 touch one of eight pages
    privately and shared in turn (implicit), and 5 are for 2 MiB blocks (explicit).
    """

@final
class Judged:
    """What a policy made of all requests of a trace."""

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
        """The most bytes that were shared at any time."""
    @property
    def ping_pongs(self) -> int:
        """Conversions that turned pages back: of which some had been converted before."""
    @property
    def ends(self) -> int | None:
        """The sequence number of the first request at which the run would have ended; ``None`` if at none."""
    @property
    def differences(self) -> int:
        """Decisions that are not the recorded ones."""
    def __eq__(self, other: object, /) -> bool: ...

@final
class Difference:
    """A request on which the policies and the record do not agree."""

    @property
    def event(self) -> Event:
        """The request, with what was decided when it was recorded."""
    @property
    def decisions(self) -> tuple[Convert | Deny | Discard | Retry | Stop, ...]:
        """What each policy decided, in their order."""

@final
class Replay:
    """What a replay found."""

    @property
    def requests(self) -> int:
        """Requests that were put to each policy."""
    @property
    def missing(self) -> int:
        """Requests that the trace lacks, by the sequence numbers of the others."""
    @property
    def recorded(self) -> Judged:
        """What was decided and done when the trace was recorded."""
    @property
    def policies(self) -> tuple[Judged, ...]:
        """What each policy would have decided and done, in their order."""
    @property
    def differences(self) -> tuple[Difference, ...]:
        """Requests on which the policies and the record disagree: the first ones."""
    @property
    def different(self) -> int:
        """How many there are in all."""

def replay(trace: object, *policies: object, keep: int = 1000) -> Replay:
    """Puts the requests of a trace to each of these policies, in the order in which the recorded one was asked.

    No KVM is needed, and a chain of built-in policies never enters Python. ``trace`` is a Trace, or what ``read``
    takes. ``policies`` are as for ``Vm``; each keeps states of its own, and ``remember=`` is remembered. ``keep``: how
    many of the differences are kept. The requests stay as they were, whatever a policy decides: of a guest that is
    refused something, nobody knows what it would have asked next.

    Raises what a hook raises, with notes; PolicyError; ValueError for what is no trace.
    """

@final
class Recorder:
    """Writes a machine's events to a file while it runs, in a thread of its own, from the moment it is made.

    ``path`` ends in .parquet, .arrow (IPC file) or .arrows (IPC stream); it is made, or emptied. The first two can be
    read once this is closed, the last at any time. No vCPU waits for it: what the log drops before it is written is
    counted, and so is what comes after ``limit`` events, for a guest asks as often as it likes. What cannot be written
    ends the run in progress as "stopped", and ``close`` says why. Raises OSError, and ValueError for another name.
    """

    def __new__(cls, vm: Vm, path: str | PathLike[str], *, limit: int | None = None) -> Self: ...
    @property
    def written(self) -> int:
        """Events that are in the file, once it is closed."""
    @property
    def lost(self) -> int:
        """Events that are not in the file: dropped by the log before, or above the limit. Once it is closed."""
    def close(self) -> None:
        """Writes what there is and closes the file. Raises OSError if anything could not be written. Once is enough."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...
