//! Several vCPUs, and the host, at once; which vCPUs take part in a run.

use std::sync::Arc;
use std::time::Duration;

use pagegate_core::boot::start::CpuMode;
use pagegate_core::error::Error;
use pagegate_core::hypervisor::fake::{FakeVm, Step};
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::Config;
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};

use crate::common::within_patience;
use crate::guest::*;

#[test]
fn vcpus_that_convert_the_same_pages_leave_kvm_and_the_map_in_agreement() {
    for setup in [PLAIN, SPLIT, TRAPS, MEMSLOTS] {
        within_patience(move || {
            let setup = Setup { cycles: 20, ..setup };
            let script = |vcpu: u64| {
                let mut script = Vec::new();
                for i in 0..8 {
                    let gpa = 0x4000 + ((i * 3 + vcpu) % 8) * PAGE_SIZE;
                    match (setup.split, (i + vcpu) % 3) {
                        (true, 0) => script.push(private_view(gpa, true)),
                        (true, 1) => script.push(shared_view(gpa, false)),
                        (_, kind) => script.push(map_gpa_range(
                            gpa,
                            1 + i % 3,
                            [TO_PRIVATE, TO_SHARED, TO_PRIVATE][kind as usize],
                        )),
                    }
                }
                script
            };
            let guest = setup.clone().guest((0..4).map(script).collect(), Judge::allow());
            let report = guest.run();
            assert_eq!(report.reason, "halt");
            let tally = &report.tally;
            // An explicit request whose pages changed meanwhile is put to the policy more than once.
            assert!(guest.judge.calls.lock().len() as u64 >= tally.hypercalls);
            assert_eq!(guest.judge.faults.lock().len() as u64, tally.faults);
            assert_eq!(guest.machine.events().total(), tally.requests());
            let private = guest.machine.memory().snapshot().private_bytes();
            assert_eq!(tally.bytes_to_private - tally.bytes_to_shared, private);
            guest.agrees(&setup);
        });
    }
}

#[test]
fn host_conversions_during_a_run_do_not_wait_for_blocked_vcpus() {
    within_patience(|| {
        let mut script = vec![io_read(0x10, 1)];
        script.extend(vec![Step::Block; 10_000]);
        let guest = MEMSLOTS.guest(vec![script; 2], Judge::allow());
        std::thread::scope(|scope| {
            let run = scope.spawn(|| guest.run());
            guest.wait_for_vcpus_in_kvm_run(2);
            for round in 0..20_u64 {
                let to = if round % 2 == 0 { State::Private } else { State::Shared };
                guest.machine.convert(0x5000, PAGE_SIZE, to).unwrap();
            }
            guest.machine.stop();
            assert_eq!(run.join().unwrap().reason, "stopped");
        });
        guest.agrees(&MEMSLOTS);
    });
}

#[test]
fn vcpus_that_were_not_started_do_not_run() {
    let limits = FakeVm::protected(8);
    let fake = Arc::new(FakeVm::new(
        limits,
        vec![vec![Step::Shutdown], vec![map_gpa_range(0, 1, TO_PRIVATE)]],
        1,
    ));
    let config = Config {
        vcpus: 2,
        events: 10,
        hypervisor: Some(fake),
        ..Config::new(PAGES * PAGE_SIZE, Arc::new(Judge::allow()))
    };
    let machine = Machine::new(config).unwrap();
    assert!(matches!(machine.run(None, &mut || Ok(())), Err(Error::Busy(_))));
    machine.start(1, CpuMode::Real, &[], &mut || Ok(())).unwrap();
    let report = machine.run(Some(Duration::from_secs(20)), &mut || Ok(())).unwrap();
    assert_eq!((report.reason.as_str(), report.tally.hypercalls), ("halt", 1));
    assert_eq!(machine.memory().describe(Range::new(0, PAGE_SIZE).unwrap()), "private");
}

#[test]
fn starting_a_vcpu_again_drops_its_unanswered_request() {
    let judge = Judge::calls(once(Err("no idea")));
    let guest = PLAIN.guest(
        vec![vec![
            map_gpa_range(0x5000, 1, TO_PRIVATE),
            map_gpa_range(0x6000, 1, TO_PRIVATE),
        ]],
        judge,
    );
    assert!(guest.try_run().is_err());
    guest.start(0);
    assert_eq!(guest.run().reason, "halt");
    let asked: Vec<u64> = guest.judge.calls.lock().iter().map(|call| call.range.gpa()).collect();
    assert_eq!(asked, [0x5000, 0x6000]);
    assert_eq!(guest.state(0x5000), State::Shared);
}
