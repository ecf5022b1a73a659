"""The guests of benchmarks: they make one request after the other, and mark where the measured part begins and ends.

A guest has a few buffers, with a gap of one buffer between them, and asks for all of them private, then for all shared,
and so on. Before the first mark each buffer has been in both states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from pagegate.guests import PAGE, Script

if TYPE_CHECKING:
    from pagegate.guests import Call

Kind: TypeAlias = Literal["explicit", "implicit"]
"""How requests are made: by KVM_HC_MAP_GPA_RANGE, or by touching a page in the wrong state."""

MARKS: Final = 0x0F00
"""The port to which the guest writes BEGIN and END around the measured part."""
BEGIN, END = 1, 2
SHARED_BIT: Final = 35

_CODE = 0x1000
_LEAST_PART = 2 << 20
_BUFFERS = 16
_AREA = 64 << 20
_MAPPED = 1 << 30
"""Bytes that the page tables of mode "long" map."""


@dataclass(frozen=True)
class Workload:
    """The guest of each vCPU, and the machine that they need."""

    kind: Kind
    pages: int
    """Pages of one request."""
    touch: bool
    """Whether the guest writes to each page after it was converted."""
    requests: int
    """Requests between the marks, of all vCPUs."""
    warm_up: int
    """Requests before the first mark, of all vCPUs."""
    memory: int
    memslots: int
    """Memory is divided into this many parts: one for the code, one for each vCPU, and one for the page tables."""
    call: Call
    scripts: tuple[Script, ...]
    two_views: bool
    """Whether each page has a private and a shared view. Implicit requests are made by touching the view of the other
    state, and ``enforcement="traps"`` needs two views for any request."""

    @property
    def vcpus(self) -> int:
        """Number of vCPUs."""
        return len(self.scripts)

    @property
    def shared_bit(self) -> int | None:
        """The shared bit that the machine needs."""
        return SHARED_BIT if self.two_views else None

    @property
    def block(self) -> int:
        """Bytes of the block that a policy has to widen an implicit request to."""
        return self.pages * PAGE if self.kind == "implicit" else PAGE

    def images(self) -> list[tuple[int, bytes, int]]:
        """For each vCPU: the gpa where its image is loaded and entered, the image, and RDI without the shared bit."""
        images, at = [], _CODE
        for script in self.scripts:
            image, table = script.image(at)
            images.append((at, image, table))
            at = _up(at + len(image), PAGE)
        return images


def make(  # noqa: PLR0913 - one for each thing that is varied
    kind: Kind,
    requests: int,
    *,
    pages: int = 1,
    touch: bool = False,
    vcpus: int = 1,
    call: Call,
    rounds: int = 1,
    two_views: bool = False,
) -> Workload:
    """Makes a workload of ``requests`` requests for ``pages`` pages each, of all vCPUs together.

    ``rounds``: how often all buffers are converted to private and to shared before the first mark. ``touch``: the guest
    writes to each page after it was converted. ``two_views``: each page has two views, as for implicit requests always.

    ValueError for one that does not fit the memory that a guest in mode "long" can address.
    """
    if requests < vcpus:
        raise ValueError(f"{requests} requests are too few for {vcpus} vCPUs")
    size = pages * PAGE
    buffers = max(1, min(_BUFFERS, _AREA // (2 * size)))
    # If its size is a power of two, a buffer is aligned to its size.
    part = _up(2 * size * buffers, max(_LEAST_PART, size if size & (size - 1) == 0 else PAGE))
    part = _up(part, _LEAST_PART)
    memory = part * (vcpus + 2)
    if (touch or kind == "implicit") and part * (vcpus + 1) > _MAPPED:
        raise ValueError(f"{pages} pages a request on {vcpus} vCPUs take more than a GiB of memory")
    two_views = two_views or kind == "implicit"
    walk = _Walk(kind, size, buffers, rounds, touch=touch, two_views=two_views, barrier=part - PAGE)
    each, more = divmod(requests, vcpus)
    workload = Workload(
        kind=kind,
        pages=pages,
        touch=touch,
        requests=requests,
        warm_up=2 * buffers * rounds * vcpus,
        memory=memory,
        memslots=vcpus + 2,
        call=call,
        scripts=tuple(
            walk.script(part * (vcpu + 1), each + (vcpu < more), vcpus=vcpus, call=call) for vcpu in range(vcpus)
        ),
        two_views=two_views,
    )
    at, image, _ = workload.images()[-1]
    if at + len(image) > walk.barrier:
        raise ValueError(f"the code of {vcpus} vCPUs does not fit: take fewer vCPUs or requests")
    return workload


def of_script(  # noqa: PLR0913 - one for each thing that is varied
    script: Script,
    memory: int,
    *,
    kind: Kind = "explicit",
    pages: int = 1,
    requests: int = 0,
    two_views: bool = False,
) -> Workload:
    """Makes a workload of one vCPU that executes this script, which has the marks, in one memslot."""
    return Workload(
        kind=kind,
        pages=pages,
        touch=False,
        requests=requests,
        warm_up=0,
        memory=memory,
        memslots=1,
        call="hypercall",
        scripts=(script,),
        two_views=two_views,
    )


@dataclass(frozen=True)
class _Walk:
    kind: Kind
    size: int
    buffers: int
    rounds: int
    touch: bool
    two_views: bool
    barrier: int

    def script(self, area: int, requests: int, *, vcpus: int, call: Call) -> Script:
        script = Script(call=call)
        steps = [(area + i * 2 * self.size, private) for private in (True, False) for i in range(self.buffers)]
        self._append(script, steps)
        script.loop(0, self.rounds)
        script.barrier(self._view(self.barrier, private=False), vcpus)
        script.out(MARKS, BEGIN)
        rounds, rest = divmod(requests, len(steps))
        if rounds:
            first = len(script)
            self._append(script, steps)
            script.loop(first, rounds)
        self._append(script, steps[:rest])
        script.out(MARKS, END)
        return script

    def _append(self, script: Script, steps: list[tuple[int, bool]]) -> None:
        for buffer, private in steps:
            view = self._view(buffer, private=private)
            if self.kind == "explicit":
                script.map(buffer, self.size, to="private" if private else "shared")
            elif not self.touch:
                script.touch(view, 1)
            if self.touch:
                script.dirty(view, self.size // PAGE)

    def _view(self, address: int, *, private: bool) -> int:
        return address | 1 << SHARED_BIT if self.two_views and not private else address


def _up(value: int, to: int) -> int:
    return -(-value // to) * to
