"""What a guest asked for, and who in its kernel did, as a table and for programs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from pagegate.cli.printing import Rows, printable
from pagegate.units import size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagegate import Event, Vm

_ROWS = 15
_REQUESTS = ("implicit", "explicit", "poison")


class Asked(NamedTuple):
    """What requests have in common that are counted together."""

    kind: str
    to: str
    size: int
    """Bytes of each request."""
    symbol: str | None
    """The kernel's function that asked, without an offset; ``None`` where it is not known."""


def count(vm: Vm, events: Iterable[Event]) -> Counter[Asked]:
    """Counts the requests that were put to the policy. Between runs, because it asks for symbols."""
    counts: Counter[Asked] = Counter()
    symbols: dict[int, str | None] = {}
    for event in events:
        if event.kind not in _REQUESTS:
            continue
        if event.rip not in symbols:
            name = vm.symbol(event.rip)
            symbols[event.rip] = name.partition("+")[0] if name else None
        counts[Asked(event.kind, event.to, event.size, symbols[event.rip])] += 1
    return counts


def table(counts: Counter[Asked]) -> Rows:
    """The most frequent ones, one on a row, and the others as the last row."""
    made = Rows("asked", "to", "size", "times", "by", right=(2, 3))
    ranked = counts.most_common()
    shown = ranked if len(ranked) <= _ROWS else ranked[: _ROWS - 1]
    for asked, times in shown:
        made.add(asked.kind, asked.to, size(asked.size), str(times), printable(asked.symbol or "?"))
    if rest := ranked[len(shown) :]:
        made.add("others", "", "", str(sum(times for _, times in rest)), f"in {len(rest)} more ways")
    return made


def facts(counts: Counter[Asked]) -> list[dict[str, Any]]:
    """The same for JSON, with sizes added up."""
    times: Counter[tuple[str, str, str | None]] = Counter()
    total: Counter[tuple[str, str, str | None]] = Counter()
    for asked, number in counts.items():
        key = (asked.kind, asked.to, asked.symbol)
        times[key] += number
        total[key] += number * asked.size
    return [
        {"kind": key[0], "to": key[1], "symbol": key[2], "count": number, "bytes": total[key]}
        for key, number in times.most_common()
    ]
