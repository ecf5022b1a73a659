"""Each example, by itself, with the tester, on the fake hypervisor, and once under a guest."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from pagegate import Convert, Deny, Discard, Policy, PolicyError, Region, Retry, Stop, Vm, trace
from pagegate.bundled import GUESTS, SHARED_BIT
from pagegate.guests import PAGE
from pagegate.policies import Quota
from pagegate.script import load
from pagegate.testing import Fake, PolicyTester, Step

EXAMPLES = Path(__file__).parents[1] / "examples"
MIB = 1 << 20
MEMORY = 64 * MIB


def example(name: str, function: str | None = None, **options):
    return load(EXAMPLES / f"{name}.py", function, {key: str(value) for key, value in options.items()})


def module(policy):
    return sys.modules[type(policy).__module__]


ALONE = {
    "audit_log": "halt",
    "explicit_only": "not asked for: vCPU 0 touched 0x3000000",
    "learn_then_lock": "halt",
    "ping_pong_guard": "halt",
    "rate_limit": "halt",
    "shared_quota": "halt",
    "swiotlb_window": "halt",
}
"""Those that need nothing else, and how the demo's guest ends under them."""


def test_every_example_is_tested_and_says_how_to_run_it() -> None:
    files = {file.stem for file in EXAMPLES.glob("*.py")}
    assert files == {*ALONE, "external_service", "record_then_replay"}
    for file in files:
        source = (EXAMPLES / f"{file}.py").read_text()
        assert source.startswith('"""')
        assert f"pagegate run -p examples/{file}.py" in source
        assert "\nAgainst " in source or "\nFor " in source


@pytest.mark.parametrize("name", ALONE)
def test_an_example_under_the_fake(name, fake_vm) -> None:
    fake = Fake([Step.doorbell(24 * MIB, 1, 0), Step.doorbell(24 * MIB, 1, 16), Step.halt()])
    vm = fake_vm(hypervisor=fake, policy=example(name), initial="private")
    report = vm.run(timeout=10)
    assert (report.reason, report.hypercalls, report.conversions) == ("halt", 2, 2)
    assert [reply.value for reply in fake.replies()] == [0, 0]


def under_the_demo(policy):
    with Vm(MEMORY, policy=policy, shared_bit=SHARED_BIT, initial="private") as vm:
        GUESTS["demo"].start(vm, "doorbell")
        return vm.run(timeout=60)


@pytest.mark.kvm
@pytest.mark.parametrize("name", ALONE)
def test_an_example_under_a_guest(name, capfd) -> None:
    report = under_the_demo(example(name))
    assert report.reason.startswith(ALONE[name])
    assert report.conversions > 0


# ---- explicit_only


def test_explicit_only() -> None:
    tester = PolicyTester(example("explicit_only"))
    assert tester.fault(PAGE, vcpu=2, rip=0x1234) == Stop(
        "not asked for: vCPU 2 touched 0x1000 as shared, which is private, by the instruction at 0x1234"
    )
    assert tester.call(PAGE, to="shared") == Convert()
    assert "as private, which is shared" in tester.fault(PAGE).reason
    assert PolicyTester(example("explicit_only", evidence="no")).fault(0) == Deny()


# ---- the built-in ones


def test_swiotlb_window() -> None:
    tester = PolicyTester(example("swiotlb_window", "window", start="1M", size="64K"))
    assert tester.call(MIB, 64 << 10, to="shared") == Convert()
    assert tester.call(MIB - PAGE, 2 * PAGE, to="shared") == Deny()
    assert tester.fault(MIB + (64 << 10)) == Deny()
    assert tester.call(MIB, 64 << 10, to="private") == Convert()
    assert tester.shared_bytes == 0


def test_shared_quota() -> None:
    tester = PolicyTester(example("shared_quota", "quota", max_shared="8K", largest="4K"))
    assert tester.call(0, 2 * PAGE, to="shared") == Deny()
    assert [tester.fault(page * PAGE) for page in range(3)] == [Convert(), Convert(), Deny()]
    assert tester.call(0, MEMORY, to="private") == Convert()
    assert tester.call(5 * PAGE, to="shared") == Convert()
    assert tester.shared_bytes == PAGE


def test_rate_limit() -> None:
    tester = PolicyTester(example("rate_limit", "limit", per_second=10, burst=3))
    decisions = [tester.call(0, to="shared") for _ in range(5)]
    assert decisions == [Convert()] * 3 + [Deny(11)] * 2
    assert tester.fault(PAGE) == Retry()
    tester.advance(0.1)
    assert tester.fault(PAGE) == Convert()


def test_ping_pong_guard() -> None:
    tester = PolicyTester(example("ping_pong_guard", "guard", turns=3, seconds=1))
    *before, last = [tester.fault(0) for _ in range(5)]
    assert before == [Convert()] * 4
    assert last.reason.startswith("ping-pong: 0x0 changed direction 4 times")
    tester = PolicyTester(example("ping_pong_guard"))
    for _ in range(100):
        assert tester.fault(0) == Convert()
        tester.advance(0.5)


# ---- record_then_replay


def recorded(file, vm):
    with trace.Recorder(vm, file):
        vm.run(timeout=60)
    return file


def test_record_then_replay(tmp_path, fake_vm) -> None:
    pages = (4, 5, 9, 4)
    steps = [Step.doorbell(page * PAGE, 1, attributes) for page in pages for attributes in (0, 16)]
    file = recorded(tmp_path / "good.parquet", fake_vm([*steps, Step.doorbell(30 * PAGE, 1, 16)], initial="private"))
    tester = PolicyTester(example("record_then_replay", "learned", trace=file))
    assert [tester.call(page * PAGE, to="shared") for page in (3, 4, 5, 6, 9, 10, 30)] == [
        Deny(),
        Convert(),
        Convert(),
        Deny(),
        Convert(),
        Deny(),
        Deny(),
    ]
    assert tester.call(4 * PAGE, 2 * PAGE, to="shared") == Convert()
    assert tester.call(30 * PAGE, to="private") == Convert()
    tester = PolicyTester(example("record_then_replay", "learned", trace=file, slack="4K"))
    assert tester.call(3 * PAGE, 4 * PAGE, to="shared") == Convert()
    assert tester.fault(2 * PAGE) == Deny()
    assert trace.replay(file, example("record_then_replay", "learned", trace=file)).different == 0
    other = recorded(tmp_path / "other.arrow", fake_vm([Step.doorbell(20 * PAGE, 1, 0)], initial="private"))
    (difference,) = trace.replay(other, example("record_then_replay", "learned", trace=file)).differences
    assert (difference.event.gpa, difference.decisions) == (20 * PAGE, (Deny(),))


@pytest.mark.kvm
def test_record_then_replay_under_a_guest(tmp_path) -> None:
    file = tmp_path / "good.arrows"
    with Vm(MEMORY, shared_bit=SHARED_BIT, initial="private") as vm:
        GUESTS["touch"].start(vm, "doorbell")
        recorded(file, vm)
    policy = example("record_then_replay", "learned", trace=file)
    assert trace.replay(file, policy).different == 0
    for guest, reason in (("touch", "halt"), ("demo", "denied")):
        with Vm(MEMORY, policy=policy, shared_bit=SHARED_BIT, initial="private") as vm:
            GUESTS[guest].start(vm, "doorbell")
            assert vm.run(timeout=60).reason == reason


# ---- learn_then_lock


@pytest.fixture
def learned():
    tester = PolicyTester(example("learn_then_lock", quiet=1.0))
    assert tester.call(8 * PAGE, 4 * PAGE, to="shared") == Convert()
    assert tester.fault(20 * PAGE) == Convert()
    tester.advance(0.9)
    assert tester.call(8 * PAGE, 4 * PAGE, to="private") == Convert()
    return tester


def test_what_was_shared_at_boot_may_be_shared_again(learned) -> None:
    learned.advance(1.0)
    assert learned.fault(9 * PAGE) == Convert()
    assert learned.call(8 * PAGE, 4 * PAGE, to="shared") == Convert()
    assert learned.call(20 * PAGE, to="private") == Convert()
    assert learned.call(20 * PAGE, to="shared") == Convert()


@pytest.mark.parametrize(("page", "pages"), [(0, 1), (7, 2), (11, 2), (8, 13), (21, 1), (0, 64)])
def test_what_was_not_is_locked(learned, page, pages) -> None:
    learned.advance(1.0)
    for _ in range(2):
        assert learned.call(page * PAGE, pages * PAGE, to="shared") == Deny()
    assert learned.call(page * PAGE, pages * PAGE, to="private") == Convert()
    assert learned.fault(30 * PAGE) == Deny()


def test_the_boot_goes_on_while_it_asks_and_ends_for_good(learned) -> None:
    for page in range(100, 110):
        learned.advance(0.99)
        assert learned.fault(page * PAGE) == Convert()
    learned.advance(1.0)
    assert [learned.fault(page * PAGE) for page in (200, 201)] == [Deny(), Deny()]


def test_the_boot_ends_after_so_many_requests() -> None:
    tester = PolicyTester(example("learn_then_lock", requests=3))
    decisions = [tester.fault(page * PAGE) for page in range(5)]
    assert decisions == [Convert()] * 3 + [Deny()] * 2
    tester.call(0, PAGE, to="private")
    assert tester.fault(0) == Convert()


@pytest.mark.parametrize("options", [{"quiet": 0}, {"quiet": -1}, {"quiet": "nan"}, {"requests": 0}])
def test_a_boot_that_cannot_be(options) -> None:
    with pytest.raises(PolicyError, match="must be above 0"):
        example("learn_then_lock", **options)


def test_ranges_meet_and_are_joined() -> None:
    ranges = module(example("learn_then_lock")).Ranges()
    told = set()
    # All orders of meeting: apart, touching, overlapping, inside, around.
    for start, end in [
        (8, 10),
        (2, 4),
        (4, 6),
        (20, 30),
        (22, 24),
        (9, 12),
        (5, 9),
        (40, 41),
        (1, 50),
        (60, 61),
        (0, 1),
    ]:
        ranges.add(start, end)
        told |= set(range(start, end))
        for first in range(64):
            for last in range(first + 1, 64):
                assert ranges.cover(first, last) == (set(range(first, last)) <= told), (first, last)


# ---- audit_log


@pytest.fixture
def audit(tmp_path):
    path = tmp_path / "audit.jsonl"
    policies = []

    def make(inner=None):
        kind = type(example("audit_log"))
        policies.append(kind(path, inner))
        return policies[-1], lambda: [json.loads(line) for line in path.read_text().splitlines()]

    yield make
    for policy in policies:
        policy.close()


def test_audit_log(audit) -> None:
    policy, lines = audit()
    tester = PolicyTester(policy)
    tester.call(PAGE, 2 * PAGE, to="shared", vcpu=1)
    tester.advance(1e-6)
    assert len(lines()) == 1
    tester.fault(PAGE, rip=0x1000)
    tester.poison(PAGE)
    call = {"time": 0, "vcpu": 1, "kind": "explicit", "gpa": "0x1000", "size": 8192, "state": "private", "to": "shared"}
    assert lines()[0] == {**call, "decision": "convert"}
    assert lines()[1] | {"vcpu": 0} == {
        "time": 1000,
        "vcpu": 0,
        "kind": "implicit",
        "gpa": "0x1000",
        "size": PAGE,
        "state": "shared",
        "to": "private",
        "rip": "0x1000",
        "decision": "convert",
    }
    assert lines()[2]["decision"] == "stop"


class Answers(Policy):
    def __init__(self, answer) -> None:
        self.answer = answer

    def memory_fault(self, fault):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    map_gpa_range = memory_poison = memory_fault


@pytest.mark.parametrize(
    ("answer", "logged"),
    [
        (Convert("private", PAGE, 2 * PAGE), {"done_to": "private", "done_gpa": PAGE, "done_size": 2 * PAGE}),
        (Deny(11), {"decision": "deny", "errno": 11}),
        (Retry(), {"decision": "retry"}),
        (Stop("why"), {"decision": "stop", "reason": "why"}),
    ],
)
def test_it_records_what_another_policy_says(audit, answer, logged) -> None:
    policy, lines = audit(Answers(answer))
    tester = PolicyTester(policy)
    assert tester.fault(0) == tester.call(0, to="shared") == answer
    for line in lines():
        assert line.items() >= logged.items()
    policy, lines = audit(Answers(Discard()))
    assert PolicyTester(policy).poison(0) == Discard()
    assert lines()[-1]["decision"] == "discard"


@pytest.mark.parametrize("remembered", [Convert, Deny, Retry])
def test_nothing_is_remembered_off_the_record(audit, remembered) -> None:
    policy, lines = audit(Answers(remembered(remember=Region(0, MEMORY))))
    tester = PolicyTester(policy)
    for _ in range(5):
        tester.call(0, to="shared")
    assert len(lines()) == 5


def test_a_mistake_is_on_record_too(audit) -> None:
    policy, lines = audit(Answers(KeyError("mine")))
    with pytest.raises(KeyError):
        PolicyTester(policy).fault(0)
    policy, lines = audit(Answers(None))
    with pytest.raises(PolicyError):
        PolicyTester(policy).fault(0)
    assert (lines()[0]["raised"], lines()[1]["decision"], lines()[1]["answer"]) == ("KeyError('mine')", "none", "None")


def test_no_record_no_conversion(audit) -> None:
    policy, _ = audit()
    policy.close()
    tester = PolicyTester(policy)
    with pytest.raises(ValueError, match="closed"):
        tester.fault(0)
    assert tester.shared_bytes == 0


def test_the_inner_policy_comes_from_a_file(tmp_path, capsys) -> None:
    policy = example("audit_log", inner=EXAMPLES / "explicit_only.py:ExplicitOnly")
    assert isinstance(PolicyTester(policy).fault(0), Stop)
    assert json.loads(capsys.readouterr().err)["decision"] == "stop"
    with pytest.raises(PolicyError, match="around AuditLog"):
        example("audit_log", inner=EXAMPLES / "shared_quota.py")
    with pytest.raises(PolicyError):
        example("audit_log", path=tmp_path / "no" / "such")
    tester = PolicyTester(Quota(0, example("audit_log")))
    assert tester.fault(0) == Deny(22)


# ---- external_service

LIMIT = 0.3
"""What a service may take; and a busy host some more."""
SLACK = 2.0


@pytest.fixture
def where():
    # A socket's path has 107 bytes at most; pytest's own directories can be longer.
    directory = tempfile.mkdtemp(dir="/tmp")
    yield Path(directory) / "s"
    shutil.rmtree(directory)


@pytest.fixture
def asks(where):
    """A policy that asks the service there."""
    policies = []

    def make(limit=LIMIT):
        policies.append(example("external_service", socket=where, limit=limit))
        return policies[-1]

    yield make
    for policy in policies:
        policy.close()


@pytest.fixture
def serve(where, asks):
    """The reference service, with a rule of the test's."""
    services = []

    def make(rule=None):
        theirs = module(asks())
        service = theirs.Service(where, *([rule] if rule else []))
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        services.append((service, thread))
        return theirs

    yield make
    for service, thread in services:
        service.shutdown()
        service.server_close()
        thread.join(5)


@pytest.fixture
def misbehave(where):
    """A service that does as it is told with each connection."""
    done = threading.Event()
    threads = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def make(behave):
        listener.bind(str(where))
        listener.listen()

        def one(connection):
            with connection, contextlib.suppress(OSError):
                behave(connection, done)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threads.append(threading.Thread(target=one, args=(connection,)))
                    threads[-1].start()

        threads.append(threading.Thread(target=accept))
        threads[-1].start()

    yield make
    done.set()
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def says(*answers):
    """A service that answers each request with these bytes, in turn."""

    def behave(connection, done):
        for answer in answers:
            connection.recv(4096)
            connection.sendall(answer)
        done.wait(10)

    return behave


def never(connection, done):
    done.wait(10)


def trickles(connection, done):
    """Always a bit more, never all of it."""
    connection.recv(4096)
    for byte in b'{"id": 1, "decision": "convert"' + b" " * 200:
        connection.sendall(bytes([byte]))
        if done.wait(0.05):
            return


def hangs_up(connection, done):
    connection.recv(4096)


def hangs_up_at_once(connection, done):
    pass


def closes_half(connection, done):
    connection.shutdown(socket.SHUT_WR)
    done.wait(10)


def floods(connection, done):
    while not done.is_set():
        connection.sendall(b"x" * 65536)


def answers_late(connection, done):
    connection.recv(4096)
    done.wait(2 * LIMIT)
    connection.sendall(b'{"id": 1, "decision": "convert"}\n')
    done.wait(10)


CONVERT = b'{"id": 1, "decision": "convert"}\n'
HOSTILE = {
    "never": never,
    "trickles": trickles,
    "hangs_up": hangs_up,
    "hangs_up_at_once": hangs_up_at_once,
    "closes_half": closes_half,
    "floods": floods,
    "answers_late": answers_late,
    "garbage": says(b"\xff\xfe\x00 garbage\n"),
    "nothing": says(b"\n"),
    "deep": says(b"[" * 4000 + b"\n"),
    "long": says(b" " * 5000 + CONVERT),
    "unfinished": says(CONVERT[:-1]),
    "two": says(CONVERT + b"{}\n"),
    "array": says(b'["convert"]\n'),
    "null": says(b"null\n"),
    "no_id": says(b'{"decision": "convert"}\n'),
    "another_id": says(b'{"id": 2, "decision": "convert"}\n'),
    "text_id": says(b'{"id": "1", "decision": "convert"}\n'),
    "true_id": says(b'{"id": true, "decision": "convert"}\n'),
    "no_decision": says(b'{"id": 1}\n'),
    "another_decision": says(b'{"id": 1, "decision": "CONVERT"}\n'),
    "list_decision": says(b'{"id": 1, "decision": ["convert"]}\n'),
    "errno_0": says(b'{"id": 1, "decision": "deny", "errno": 0}\n'),
    "errno_huge": says(b'{"id": 1, "decision": "deny", "errno": 1e99}\n'),
    "errno_true": says(b'{"id": 1, "decision": "deny", "errno": true}\n'),
}


def within_the_limit(tester) -> None:
    for _ in range(2):  # and again, by a new connection
        before = time.monotonic()
        assert tester.call(PAGE, to="shared") == Deny(11)
        assert time.monotonic() - before < LIMIT + SLACK
    before = time.monotonic()
    decision = tester.fault(PAGE)
    assert time.monotonic() - before < LIMIT + SLACK
    assert isinstance(decision, Stop)
    assert decision.reason.startswith("external service: ")
    assert tester.shared_bytes == 0


@pytest.mark.parametrize("behave", HOSTILE.values(), ids=HOSTILE)
def test_a_service_that_misbehaves_converts_nothing(asks, misbehave, behave) -> None:
    misbehave(behave)
    within_the_limit(PolicyTester(asks()))


def test_no_service_converts_nothing(asks, where) -> None:
    within_the_limit(PolicyTester(asks()))
    # One that is gone left its socket.
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(where))
    within_the_limit(PolicyTester(asks()))


def test_a_service_that_does_not_accept_converts_nothing(asks, where) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(where))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(where))
        within_the_limit(PolicyTester(asks()))


def test_a_late_answer_is_nobodys(asks, misbehave) -> None:
    """The answer to the first request arrives before the second is asked, which gets none."""
    denied, sent = threading.Event(), threading.Event()

    def behave(connection, done):
        connection.recv(4096)
        if not sent.is_set() and denied.wait(10):
            try:
                connection.sendall(CONVERT)
            finally:
                sent.set()
        done.wait(10)

    misbehave(behave)
    tester = PolicyTester(asks())
    assert tester.call(0, to="shared") == Deny(11)
    denied.set()
    assert sent.wait(10)
    assert tester.call(0, to="shared") == Deny(11)


@pytest.mark.parametrize(
    ("answer", "decision"),
    [
        ({"decision": "convert"}, Convert()),
        ({"decision": "deny"}, Deny(22)),
        ({"decision": "deny", "errno": 11}, Deny(11)),
        ({"decision": "retry"}, Retry()),
        ({"decision": "stop", "reason": "enough"}, Stop("the service said: enough")),
    ],
)
def test_a_service_decides(asks, serve, answer, decision) -> None:
    asked = []

    def rule(request):
        asked.append(request)
        return answer

    serve(rule)
    tester = PolicyTester(asks(10.0))
    assert tester.call(PAGE, 2 * PAGE, to="shared", vcpu=1) == decision
    if decision == Convert():
        assert tester.fault(PAGE) == Convert()
        assert (asked[1]["kind"], asked[1]["to"], asked[1]["state"]) == ("implicit", "private", "shared")
    assert asked[0] == {
        "id": 1,
        "kind": "explicit",
        "vcpu": 1,
        "gpa": PAGE,
        "size": 2 * PAGE,
        "to": "shared",
        "state": "private",
        "time": 0,
    }


def test_a_connection_is_used_again_and_made_again(asks, misbehave) -> None:
    made = []

    def behave(connection, done):
        made.append(connection)
        for number in (1, 2):
            connection.recv(4096)
            connection.sendall(CONVERT.replace(b"1", b"%d" % number))

    misbehave(behave)
    tester = PolicyTester(asks(10.0))
    decisions = [tester.call(0, to="shared") for _ in range(5)]
    # The third finds the line dead, and says so; the fourth finds another.
    assert decisions == [Convert(), Convert(), Deny(11), Convert(), Convert()]
    assert len(made) == 2


def test_vcpus_do_not_wait_for_each_other(asks, serve, fake_vm) -> None:
    both = threading.Barrier(2, timeout=10)

    def rule(request):
        both.wait()
        return {"decision": "convert"}

    serve(rule)
    scripts = [[Step.doorbell((vcpu * 8 + each) * PAGE, 1, 0) for each in range(8)] for vcpu in range(2)]
    vm = fake_vm(*scripts, policy=asks(10.0), initial="private")
    report = vm.run(timeout=20)
    assert (report.reason, report.conversions, report.denied) == ("halt", 16, 0)


def test_the_reference_service_refuses_what_its_rule_says(asks, serve) -> None:
    serve()
    tester = PolicyTester(asks(10.0))
    assert tester.call(16 * MIB, MIB, to="shared") == Convert()
    assert tester.call(20 * MIB, MIB + PAGE, to="shared") == Deny()
    assert tester.call(15 * MIB, to="shared") == Deny()
    assert tester.call(0, MIB, to="private") == Convert()


@pytest.mark.parametrize(
    "line", [b"garbage\n", b"[]\n", b"{}\n", b'{"id": 1, "to": "shared", "size": "x"}\n', b"x" * 9000]
)
def test_the_reference_service_hangs_up_on_nonsense(serve, where, line) -> None:
    serve()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(where))
        client.sendall(line)
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""


def test_the_reference_service_as_a_program(asks, where) -> None:
    program = [sys.executable, str(EXAMPLES / "external_service.py"), str(where)]
    service = subprocess.Popen(program)
    try:
        tester = PolicyTester(asks(10.0))
        end = time.monotonic() + 20
        while tester.call(32 * MIB, to="shared") != Convert():
            assert time.monotonic() < end, "the service did not come up"
            time.sleep(0.02)
        assert stat.S_IMODE(where.stat().st_mode) == 0o600
        assert tester.call(0, to="shared") == Deny()
    finally:
        service.kill()
        service.wait(10)
    assert tester.call(33 * MIB, to="shared") == Deny(11)
    assert subprocess.run(program[:2], capture_output=True, timeout=20).returncode == 1


def test_the_reference_service_takes_no_file_for_a_socket(asks, where) -> None:
    where.write_text("mine")
    with pytest.raises(OSError, match="in use"):
        module(asks()).Service(where)
    assert where.read_text() == "mine"


@pytest.mark.parametrize("limit", [0, -1, "nan", "inf"])
def test_a_limit_that_is_none(where, limit) -> None:
    with pytest.raises(PolicyError, match="limit"):
        example("external_service", socket=where, limit=limit)


@pytest.mark.kvm
def test_the_service_under_a_guest(asks, serve) -> None:
    serve()
    report = under_the_demo(asks(10.0))
    assert (report.reason, report.denied > 0, report.conversions > 0) == ("halt", True, True)
