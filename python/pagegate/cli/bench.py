"""`pagegate bench`: what a request costs on this host, under a policy and in the bare loop."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from pagegate import Convert, Policy, guests, measure, policies, probe, workload
from pagegate.cli.parameters import policy_options
from pagegate.cli.policy_argument import PolicyName, made, one
from pagegate.cli.telling import tell
from pagegate.errors import KvmUnavailable

if TYPE_CHECKING:
    from pagegate import MapGpaRange, MemoryFault
    from pagegate.loading.expression import Expression

_BUILT_IN = ("allow", "python")
_NANO = 1e9
_TURNS = 3
"""How often the policy and the bare loop each run. The fastest counts: disturbances only make runs slower."""


class _Asked(Policy):
    """The smallest Python policy that is asked about every request."""

    def memory_fault(self, fault: MemoryFault) -> Convert:  # noqa: ARG002
        return Convert()

    def map_gpa_range(self, call: MapGpaRange) -> Convert:  # noqa: ARG002
        return Convert()


class _Judge(PolicyName):
    """A policy, or "allow" or "python"."""

    name = "allow|python|POLICY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value in _BUILT_IN else super().convert(value, param, ctx)


def _policy(named: str | Expression, options: dict[str, str]) -> tuple[str, object]:
    if not isinstance(named, str):
        return str(named), made(named, options)
    if options:
        raise click.UsageError(f"--policy {named} takes no -o")
    return named, policies.Allow() if named == "allow" else _Asked()


@click.command(short_help="Measures what a request costs on this host.")
@click.option(
    "-p",
    "--policy",
    "named",
    type=_Judge(),
    multiple=True,
    default=["allow"],
    show_default="allow",
    callback=one,
    help="The policy: Allow(), a Python hook that returns Convert(), or one of yours.",
)
@policy_options
@click.option(
    "--requests", type=click.IntRange(1, 10_000_000), default=2000, show_default=True, help="Of all vCPUs together."
)
@click.option("--pages", type=click.IntRange(1, 1 << 18), default=1, show_default=True, help="Pages of each request.")
@click.option("--touch", is_flag=True, help="The guest writes to each page after it was converted.")
@click.option("--vcpus", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--kind", type=click.Choice(["explicit", "implicit"]), default="explicit", show_default=True)
@click.option(
    "--enforcement",
    type=click.Choice(["auto", "attributes", "traps", "memslots"]),
    default="auto",
    show_default=True,
    help="How page states are enforced. With traps each page has two views, also where requests are explicit.",
)
@click.option("--compare", is_flag=True, help="Run the bare loop too, and print the ratio.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(  # noqa: PLR0913 - one for each option
    *,
    named: str | Expression,
    options: dict[str, str],
    requests: int,
    pages: int,
    touch: bool,
    vcpus: int,
    kind: workload.Kind,
    enforcement: str,
    compare: bool,
    as_json: bool,
) -> int:
    """Measures what requests cost: a guest has pages converted to private and to shared in turn.

    Only requests are timed, with the few guest instructions between them: the guest marks the beginning, after every
    page has been in both states, and the end. An implicit request is for one page; with --pages the policy is wrapped
    in Align(), so that each touch converts a whole block.

    The bare loop (--compare) is a small program around KVM's ioctls. It runs the same guest and makes the kernel do the
    same work, with no policy, checks, page states or records. Both run three times, in turns, and the fastest run of
    each counts. Times differ between hosts and from day to day; the ratio differs less.
    """
    if kind == "implicit" and pages & (pages - 1):
        raise click.UsageError(f"--pages {pages}: for implicit requests it must be a power of two")
    label, judge = _policy(named, options)
    host = probe()
    if host.enforcement is None:
        raise KvmUnavailable("; ".join(host.problems))
    if enforcement == "auto":
        enforcement = host.enforcement
    if compare and enforcement == "memslots" and vcpus > 1 and kind == "implicit":
        raise click.UsageError("--compare: with memslots the bare loop cannot run implicit requests of several vCPUs")
    call: guests.Call = "hypercall" if kind == "explicit" and guests.hypercall_completes() else "doorbell"
    two_views = enforcement == "traps"
    try:
        load = workload.make(kind, requests, pages=pages, touch=touch, vcpus=vcpus, call=call, two_views=two_views)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    fastest = measure.under_policy(load, judge, enforcement=enforcement)
    bare = []
    for turn in range(_TURNS if compare else 0):
        if turn > 0:
            # Loaded again, because a policy may keep state from the run before.
            another = measure.under_policy(load, _policy(named, options)[1], enforcement=enforcement)
            fastest = min(fastest, another, key=lambda measured: measured.seconds)
        bare.append(measure.in_bare_loop(load, enforcement=enforcement)[0])
    facts = _facts(load, label, fastest)
    if compare:
        seconds = min(bare)
        facts["bare"] = {"seconds": seconds, "ns_per_request": seconds * _NANO / requests}
        facts["ratio"] = facts["seconds"] / seconds
    if as_json:
        click.echo(json.dumps(facts))
    else:
        tell(_text(facts), err=False)
    asked = fastest.report.requests
    if fastest.report.conversions != asked:
        tell(
            f"pagegate: {asked - fastest.report.conversions} of {asked} requests converted nothing"
            f"{', and the bare loop converts for each' if compare else ''}"
        )
    return 0


def _facts(load: workload.Workload, policy: str, measured: measure.Measured) -> dict[str, Any]:
    report, seconds, latencies = measured.report, measured.seconds, measured.latencies
    converted = (report.bytes_to_private + report.bytes_to_shared) * load.requests / report.requests
    return {
        "enforcement": measured.enforcement,
        "kind": load.kind,
        "policy": policy,
        "vcpus": load.vcpus,
        "pages": load.pages,
        "touch": load.touch,
        "requests": load.requests,
        "seconds": seconds,
        "ns_per_request": seconds * _NANO / load.requests,
        "requests_per_second": load.requests / seconds,
        "bytes_per_second": converted / seconds,
        "latency": {
            **{f"p{percent}": latencies[(len(latencies) - 1) * percent // 100] for percent in (50, 90, 99)},
            "max": latencies[-1],
        },
    }


def _text(facts: dict[str, Any]) -> str:
    pages = f"{facts['pages']} page{'s' * (facts['pages'] > 1)}{', touched' if facts['touch'] else ''}"
    vcpus = f"{facts['vcpus']} vCPU{'s' * (facts['vcpus'] > 1)}"
    latency = facts["latency"]
    lines = [
        f"{facts['requests']} {facts['kind']} requests of {pages}, {vcpus}, {facts['enforcement']}, {facts['policy']}",
        f"request   {facts['ns_per_request'] / 1000:,.2f} µs, {facts['requests_per_second']:,.0f} a second, "
        f"{facts['bytes_per_second'] / (1 << 20):,.1f} MiB a second",
        f"exit to resume   p50 {latency['p50'] / 1000:,.2f} µs, p99 {latency['p99'] / 1000:,.2f} µs",
    ]
    if "ratio" in facts:
        bare = facts["bare"]["ns_per_request"]
        lines.append(f"bare loop {bare / 1000:,.2f} µs: {facts['ratio']:.3f} times as long under pagegate")
    return "\n".join(lines)
