"""Implicit and explicit requests of guests on /dev/kvm."""

from __future__ import annotations

import errno
import os
import struct

import pytest
from pagegate import Convert, Deny, PrivateMemoryError, Retry
from pagegate.guests import Script

pytestmark = pytest.mark.kvm

PAGE = 4096
DATA = 0x30_0000
HLT = b"\xf4"
STORE = {1: b"\x88\x07", 2: b"\x66\x89\x07", 4: b"\x89\x07", 8: b"\x48\x89\x07"}  # mov [rdi], rax
LOAD = {1: b"\x8a\x07", 2: b"\x66\x8b\x07", 4: b"\x8b\x07", 8: b"\x48\x8b\x07"}  # mov rax, [rdi]
WORD = 0x8877_6655_4433_2211
OTHER = {"private": "shared", "shared": "private"}
MIB = 1 << 20


def run_code(vm, code, **registers):
    vm.load(code, at=0x1000)
    vm.vcpus[0].start(mode="long", rip=0x1000, **registers)
    return vm.run(timeout=20)


def run_script(vm, script, timeout=20):
    script.start(vm)
    return vm.run(timeout=timeout)


# ---- explicit


def test_explicit_requests_by_doorbell(make, recorder, bit) -> None:
    policy = recorder()
    vm = make(policy=policy, shared_bit=bit)
    script = Script(call="doorbell")
    answers = [script.map(DATA, 4 * PAGE, to="private"), script.map(DATA + PAGE, PAGE, to="shared", page_size_hint=1)]
    report = run_script(vm, script)
    assert [script.result(vm, answer) for answer in answers] == [0, 0]
    assert [(call.vcpu, call.gpa, call.size, call.to, call.state) for call in policy.requests] == [
        (0, DATA, 4 * PAGE, "private", "shared"),
        (0, DATA + PAGE, PAGE, "shared", "private"),
    ]
    assert (report.hypercalls, report.conversions, report.faults) == (2, 2, 0)
    assert vm.attributes.runs(DATA, 4 * PAGE) == [
        (DATA, PAGE, "private"),
        (DATA + PAGE, PAGE, "shared"),
        (DATA + 2 * PAGE, 2 * PAGE, "private"),
    ]


@pytest.mark.parametrize(
    "registers",
    [
        (DATA + 1, 1, 16),
        (DATA, 0, 16),
        (PAGE, 1 << 52, 16),
        ((1 << 64) - PAGE, 2, 16),
        (1 << 30, 1, 16),
        (DATA, 1, 3),
        (DATA, 1, 1 << 5),
    ],
)
def test_malformed_requests_are_answered(make, recorder, registers) -> None:
    policy = recorder()
    vm = make(policy=policy)
    script = Script(call="doorbell")
    answer = script.map_raw(*registers)
    run_script(vm, script)
    assert script.result(vm, answer) == errno.EINVAL
    assert policy.requests == []
    assert vm.attributes.private_bytes == 0


def test_the_guest_gets_the_answer(make, recorder) -> None:
    vm = make(policy=recorder(Deny(errno.EPERM), Retry(), Convert(size=2 * PAGE)))
    script = Script(call="doorbell")
    answers = [script.map(DATA, PAGE, to="private") for _ in range(3)]
    run_script(vm, script)
    assert [script.result(vm, answer) for answer in answers] == [errno.EPERM, errno.EAGAIN, 0]
    assert vm.attributes.private_bytes == 2 * PAGE


def test_a_denied_conversion_leaves_the_bytes(make, recorder) -> None:
    vm = make(policy=recorder(Deny()))
    vm.write(DATA, b"kept")
    script = Script(call="doorbell")
    script.map(DATA, PAGE, to="private")
    run_script(vm, script)
    assert vm.read(DATA, 4) == b"kept"


def test_other_registers_survive_the_doorbell(make) -> None:
    vm = make()
    # mov eax, 12; out 0xe6, al; hlt
    run_code(vm, b"\xb8\x0c\x00\x00\x00\xe6\xe6" + HLT, rbx=DATA, rcx=1, rdx=16, rsi=5, r9=WORD, rsp=0x7000)
    regs = vm.vcpus[0].regs()
    assert [regs[name] for name in ("rax", "rbx", "rcx", "rdx", "rsi", "r9", "rsp")] == [
        0,
        DATA,
        1,
        16,
        5,
        WORD,
        0x7000,
    ]
    assert vm.attributes.is_private(DATA)


def test_neighbours_keep_their_bytes(make) -> None:
    vm = make()
    vm.write(DATA, b"\x11" * (4 * PAGE))
    script = Script(call="doorbell")
    script.map(DATA + PAGE, 2 * PAGE, to="private")
    checks = [
        script.check(DATA, PAGE, 0x11),
        script.check(DATA + PAGE, 2 * PAGE, 0),
        script.check(DATA + 3 * PAGE, PAGE, 0x11),
    ]
    script.fill(DATA + PAGE, 2 * PAGE, 0x22)
    checks.append(script.check(DATA + PAGE, 2 * PAGE, 0x22))
    script.map(DATA + PAGE, 2 * PAGE, to="shared")
    checks.append(script.check(DATA + PAGE, 2 * PAGE, 0))
    run_script(vm, script)
    assert [script.result(vm, check) for check in checks] == [0] * 5
    assert vm.read(DATA, 4 * PAGE) == b"\x11" * PAGE + bytes(2 * PAGE) + b"\x11" * PAGE


# ---- implicit


def test_both_directions_of_implicit_requests(make, recorder, shared_bit) -> None:
    policy = recorder()
    vm = make(policy=policy, shared_bit=shared_bit)
    shared = DATA | 1 << shared_bit
    script = Script()
    script.fill(shared, PAGE, 0x11)
    script.fill(DATA, PAGE, 0x22)
    private = script.check(DATA, PAGE, 0x22)
    again = script.check(shared, PAGE, 0)
    script.fill(shared, PAGE, 0x33)
    report = run_script(vm, script)
    assert script.result(vm, private) == 0
    assert script.result(vm, again) == 0
    assert vm.read(DATA, PAGE) == b"\x33" * PAGE
    told = [(fault.gpa, fault.size, fault.private, fault.state, fault.repeats) for fault in policy.requests]
    assert told == [(DATA, PAGE, True, "shared", 0), (DATA, PAGE, False, "private", 0)]
    assert all(fault.errno == errno.EFAULT and fault.rip & ~(1 << shared_bit) < 0x3000 for fault in policy.requests)
    assert (report.faults, report.bytes_to_private, report.bytes_to_shared) == (2, PAGE, PAGE)


@pytest.mark.parametrize("to", ["private", "shared"])
@pytest.mark.parametrize(
    ("size", "place"),
    [(size, "inside") for size in (1, 2, 4, 8)]
    + [(size, place) for size in (2, 4, 8) for place in ("straddling", "off-centre", "first-only", "second-only")],
)
def test_an_access_is_completed_after_its_request(make, shared_bit, to, size, place) -> None:
    vm = make(shared_bit=shared_bit)
    view = 0 if to == "private" else 1 << shared_bit
    cut = {"inside": 0, "off-centre": 1}.get(place, size // 2)
    gpa = DATA + PAGE - cut if cut else DATA + 0x238
    wrong = {"first-only": [DATA], "second-only": [DATA + PAGE]}.get(place, [DATA, DATA + PAGE])
    vm.convert(DATA, 2 * PAGE, to=to)
    for page in wrong:
        vm.convert(page, PAGE, to=OTHER[to])
    report = run_code(vm, STORE[size] + HLT, rdi=gpa | view, rax=WORD)
    assert report.reason == "halt"
    assert report.faults == (1 if place in ("inside", "first-only", "second-only") else 2)
    value = WORD & ((1 << 8 * size) - 1)
    if to == "shared":
        assert int.from_bytes(vm.read(gpa, size), "little") == value
        assert vm.read(gpa - 8, 8) + vm.read(gpa + size, 8) == bytes(16)
    report = run_code(vm, b"\x31\xc0" + LOAD[size] + HLT, rdi=gpa | view)
    assert report.faults == 0
    assert vm.vcpus[0].regs()["rax"] == value


@pytest.mark.parametrize("to", ["private", "shared"])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("wrong", [0, 1], ids=["first-wrong", "second-wrong"])
def test_a_straddling_load_reads_both_pages(make, shared_bit, to, size, wrong) -> None:
    vm = make(shared_bit=shared_bit)
    view = 0 if to == "private" else 1 << shared_bit
    half = size // 2
    gpa = DATA + PAGE - half
    vm.convert(DATA, 2 * PAGE, to=to)
    run_code(vm, STORE[size] + HLT, rdi=gpa | view, rax=WORD)
    vm.convert(DATA + wrong * PAGE, PAGE, to=OTHER[to])
    report = run_code(vm, b"\x31\xc0" + LOAD[size] + HLT, rdi=gpa | view)
    assert report.faults == 1
    word = struct.pack("<Q", WORD)[:size]
    expected = [bytes(half) + word[half:], word[:half] + bytes(size - half)][wrong]
    assert vm.vcpus[0].regs()["rax"].to_bytes(8, "little")[:size] == expected
    assert vm.attributes.state(DATA, 2 * PAGE) == to


def test_read_modify_write_on_the_other_view(make, shared_bit) -> None:
    vm = make(shared_bit=shared_bit)
    shared = DATA | 1 << shared_bit
    vm.write(DATA, struct.pack("<Q", 5))
    # add [rdi], rax; lock xadd [rdi], rax
    report = run_code(vm, b"\x48\x01\x07\xf0\x48\x0f\xc1\x07" + HLT, rdi=shared, rax=7)
    assert (report.reason, report.faults) == ("halt", 0)
    assert vm.read(DATA, 8) == struct.pack("<Q", 19)
    report = run_code(vm, b"\x48\x01\x07\xf0\x48\x0f\xc1\x07" + HLT, rdi=DATA, rax=7)
    assert (report.reason, report.faults) == ("halt", 1)
    run_code(vm, LOAD[8] + HLT, rdi=DATA)
    assert vm.vcpus[0].regs()["rax"] == 14


def test_code_in_the_other_view_is_a_request_or_ends_the_run(make, recorder, shared_bit) -> None:
    # After the conversion the guest fetches zeroes. What is checked is that the request was made.
    policy = recorder(Deny())
    vm = make(policy=policy, shared_bit=shared_bit)
    vm.load(HLT, at=DATA)
    report = run_code(vm, b"\xff\xe7", rdi=DATA)  # jmp rdi, to the private view
    assert report.reason == "denied"
    assert [(fault.gpa, fault.private) for fault in policy.requests] == [(DATA, True)]
    assert vm.attributes.private_bytes == 0


def test_without_a_shared_bit_no_access_is_a_request(make, recorder) -> None:
    policy = recorder()
    vm = make(policy=policy)
    script = Script()
    script.map(DATA, PAGE, to="private")
    script.fill(DATA, 2 * PAGE, 0x22)
    check = script.check(DATA, 2 * PAGE, 0x22)
    report = run_script(vm, script)
    assert (script.result(vm, check), report.faults, len(policy.requests)) == (0, 0, 1)


# ---- tests that take long

PAGES = 64
# In the testbed each conversion takes milliseconds; tests/testbed/test_faults.py makes ten thousand there.
ROUNDS = 100 if os.environ.get("PAGEGATE_TESTBED") else 1000


def ping_pong_code() -> bytes:
    """RDI, RSI: the shared and the private view. RBP: rounds. RBX: the next value to write, one word for each page.

    R10: the word's offset in each page. It changes with each round, so a word that was not discarded would be found.
    """
    each = b"\x49\x81\xc0\x00\x10\x00\x00\x48\xff\xc3\x48\xff\xc9"  # add r8, 4096; inc rbx; dec rcx
    pages = b"\x48\xc7\xc1" + struct.pack("<I", PAGES)  # mov rcx, PAGES
    shared, private = b"\x4e\x8d\x04\x17", b"\x4e\x8d\x04\x16"  # lea r8, [rdi + r10]; lea r8, [rsi + r10]
    again = b"\x48\x83\xeb" + bytes([PAGES])  # sub rbx, PAGES
    or_fail = b"\x74\x02\x0f\x0b"  # je over ud2, which is a shutdown

    def for_each_page(start: bytes, what: bytes) -> bytes:
        body = what + each
        return pages + start + body + b"\x75" + struct.pack("<b", -len(body) - 2)

    write = b"\x49\x89\x18"  # mov [r8], rbx
    take = b"\x49\x39\x18" + or_fail + b"\x49\xc7\x00" + bytes(4)  # cmp [r8], rbx; mov qword ptr [r8], 0
    # mov r9, rdi; mov rdi, rsi; mov rcx, words; xor eax, eax; repe scasq; mov rdi, r9
    all_zero = b"\x49\x89\xf9\x48\x89\xf7\x48\xc7\xc1" + struct.pack("<I", PAGES * PAGE // 8)
    all_zero += b"\x31\xc0\xf3\x48\xaf" + or_fail + b"\x4c\x89\xcf"
    code = for_each_page(shared, write) + b"\xe6\x80" + for_each_page(private, write)
    # Checks every byte of the private pages: takes the words out, checks that all the rest is zero, puts them back.
    code += again + for_each_page(private, take) + all_zero + again + for_each_page(private, write) + b"\xe6\x81"
    # add r10, 8; and r10d, 4095; dec rbp; jnz
    code += b"\x49\x83\xc2\x08\x41\x81\xe2\xff\x0f\x00\x00\x48\xff\xcd"
    return code + b"\x0f\x85" + struct.pack("<i", -len(code) - 6) + HLT


def test_64_pages_ping_pong_between_the_views_1000_times(make, shared_bit) -> None:
    """Each conversion is followed by a check of every byte: by the host if shared, by the guest if private."""
    vm = make(shared_bit=shared_bit)
    first = 0x1122_3344_0000_0000
    seen = {0x80: 0, 0x81: 0}
    total = vm.memory

    def runs(state):
        if state == "shared":
            return [(0, total, "shared")]
        return [
            (0, DATA, "shared"),
            (DATA, PAGES * PAGE, "private"),
            (DATA + PAGES * PAGE, total - DATA - PAGES * PAGE, "shared"),
        ]

    def shared_now(_io) -> None:
        begin = first + seen[0x80] * 2 * PAGES
        before = seen[0x80] * 8 % PAGE
        seen[0x80] += 1
        words = [struct.pack("<Q", begin + page) for page in range(PAGES)]
        expected = b"".join(bytes(before) + word + bytes(PAGE - 8 - before) for word in words)
        assert vm.read(DATA, PAGES * PAGE) == expected
        assert vm.attributes.runs() == runs("shared")
        vm.write(DATA, b"\x5a" * (PAGES * PAGE))

    def private_now(_io) -> None:
        seen[0x81] += 1
        for page in (0, seen[0x81] % PAGES, PAGES - 1):
            with pytest.raises(PrivateMemoryError):
                vm.read(DATA + page * PAGE, 8)
        assert vm.attributes.runs() == runs("private")

    vm.on_io(0x80, shared_now)
    vm.on_io(0x81, private_now)
    vm.load(ping_pong_code(), at=0x1000)
    vm.vcpus[0].start(mode="long", rip=0x1000, rdi=DATA | 1 << shared_bit, rsi=DATA, rbp=ROUNDS, rbx=first)
    report = vm.run(timeout=240)
    assert report.reason == "halt"
    assert seen == {0x80: ROUNDS, 0x81: ROUNDS}
    assert report.faults == report.conversions == PAGES * (2 * ROUNDS - 1)
    assert report.bytes_to_private == ROUNDS * PAGES * PAGE


def resident(vm, limit):
    """Shared and private bytes in use; checks that together they are at most ``limit``."""
    usage = vm.memory_usage()
    assert usage.shared + usage.private <= limit, usage
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    (shared,) = [link for link in links if os.path.exists(link) and "pagegate-shared" in os.readlink(link)]
    # What the file system says of the shared side.
    assert os.stat(shared).st_blocks * 512 == usage.shared
    return usage


@pytest.mark.parametrize("part", [32 * MIB, 2 * MIB], ids=["at-once", "in-parts"])
def test_memory_does_not_double(make, bit, part) -> None:
    size = 32 * MIB
    limit = size * 105 // 100
    base = 4 * MIB
    vm = make(size + 2 * base, shared_bit=bit)
    shared = 0 if bit is None else 1 << bit
    vm.write(base, b"\x55" * size)
    assert resident(vm, limit).shared >= size
    # mov [rdi], rdi; add rdi, 4096; dec rcx; jnz
    body = b"\x48\x89\x3f\x48\x81\xc7\x00\x10\x00\x00\x48\xff\xc9"
    touch = body + b"\x75" + struct.pack("<b", -len(body) - 2) + HLT
    ask = b"\xb8\x0c\x00\x00\x00\xe6\xe6" + HLT
    for to in ("private", "shared"):
        for start in range(base, base + size, part):
            run_code(vm, ask, rbx=start, rcx=part // PAGE, rdx=16 * (to == "private"))
            assert vm.vcpus[0].regs()["rax"] == 0
            resident(vm, limit)
            view = shared if to == "shared" else 0
            assert run_code(vm, touch, rdi=start | view, rcx=part // PAGE).faults == 0
            resident(vm, limit)
        usage = resident(vm, limit)
        if to == "private":
            assert usage.private >= size
            assert usage.shared <= limit - size
        else:
            assert usage.shared >= size
            assert usage.private == 0
    assert vm.read(base + 5 * PAGE, 16) == struct.pack("<Q", base + 5 * PAGE | shared) + bytes(8)


def put_to_rest(vm, vcpu):
    vm.load(HLT + b"\xeb\xfd", at=0x9000)  # hlt; jmp back
    vm.vcpus[vcpu].start(mode="long", rip=0x9000)


def views_seen(vm, policy, gpa, bit):
    """The address of a page in the view that the guest can access without a request."""
    seen = []
    for state, view in (("private", 0), ("shared", 1 << bit)):
        policy.requests.clear()
        report = run_code(vm, LOAD[8] + HLT, rdi=gpa | view)
        assert (report.reason == "denied") == bool(policy.requests)
        if report.reason == "halt":
            seen.append(state)
    return seen


def opposite(vm, bit, kinds):
    """Two vCPUs in endless loops: one makes the pages private, the other shared."""
    for vcpu, to in enumerate(["private", "shared"]):
        view = 0 if to == "private" or bit is None else 1 << bit
        script = Script(call="doorbell")
        if "explicit" in kinds:
            script.map(DATA, 8 * PAGE, to=to)
            script.map(DATA + 4 * PAGE, 2 * PAGE, to=to)
        if "implicit" in kinds:
            for page in range(8):
                script.write((DATA + page * PAGE + 8 * vcpu) | view, vcpu + 1)
        script.loop(0, 1 << 40)
        script.start(vm, vcpu, at=0x1_0000 * (vcpu + 1))


@pytest.mark.parametrize("kinds", [["explicit"], ["implicit"], ["explicit", "implicit"]], ids="+".join)
def test_opposite_requests_of_two_vcpus_for_5_seconds(make, recorder, shared_bit, kinds) -> None:
    policy = recorder()
    vm = make(vcpus=2, policy=policy, shared_bit=shared_bit)
    opposite(vm, shared_bit, kinds)
    report = vm.run(timeout=5)
    assert report.reason == "timeout"
    assert report.conversions > 100
    assert {request.vcpu for request in policy.requests} == {0, 1}
    assert report.bytes_to_private - report.bytes_to_shared == vm.attributes.private_bytes
    policy.answers = [Deny()]
    put_to_rest(vm, 1)
    for page in range(8):
        gpa = DATA + page * PAGE
        mapped = "private" if vm.attributes.is_private(gpa) else "shared"
        assert views_seen(vm, policy, gpa, shared_bit) == [mapped]


def test_opposite_requests_of_two_vcpus_with_one_view(make) -> None:
    vm = make(vcpus=2)
    opposite(vm, None, ["explicit", "implicit"])
    report = vm.run(timeout=5)
    assert report.reason == "timeout"
    assert report.conversions > 100
    put_to_rest(vm, 1)
    for page in range(8):
        gpa = DATA + page * PAGE
        run_code(vm, STORE[8] + HLT, rdi=gpa, rax=WORD + page)
        run_code(vm, LOAD[8] + HLT, rdi=gpa)
        assert vm.vcpus[0].regs()["rax"] == WORD + page
        if vm.attributes.is_private(gpa):
            vm.convert(gpa, PAGE, to="shared")
            assert vm.read(gpa, 8) == bytes(8)
        else:
            assert vm.read(gpa, 8) == struct.pack("<Q", WORD + page)


def test_conversions_do_not_disturb_other_vcpus(make) -> None:
    # One vCPU counts in shared memory with locked instructions while the other's requests replace the slots around it.
    vm = make(vcpus=2)
    counter = Script()
    counter.add(DATA - 8, 1)
    counter.loop(0, 20_000)
    counter.start(vm, 0, at=0x1_0000)
    swapper = Script(call="doorbell")
    swapper.map(DATA, PAGE, to="private")
    swapper.map(DATA, PAGE, to="shared")
    swapper.loop(0, 300)
    swapper.start(vm, 1, at=0x2_0000)
    report = vm.run(timeout=60)
    assert (report.reason, report.conversions) == ("halt", 600)
    assert vm.read(DATA - 8, 8) == struct.pack("<Q", 20_000)
