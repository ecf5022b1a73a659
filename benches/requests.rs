//! Requests on the fake hypervisor, from exit to resume: what the core itself costs.
#![allow(clippy::expect_used, missing_docs)]

use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pagegate_core::boot::start::CpuMode;
use pagegate_core::errno::{EINVAL, Errno};
use pagegate_core::error::Failure;
use pagegate_core::hypervisor::fake::{FakeVm, Step};
use pagegate_core::hypervisor::hypercall::KVM_HC_MAP_GPA_RANGE;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::Config;
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::policy::align::Align;
use pagegate_core::policy::decision::{Decision, Region, RegionDecision};
use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::map_gpa_range::attributes;
use pagegate_core::policy::quota::Quota;
use pagegate_core::policy::remember::Remember;
use pagegate_core::policy::request::ExplicitRequest;
use pagegate_core::policy::simple::Allow;
use pagegate_core::policy::simple::DenyAll;

const MEMORY: u64 = 1 << 30;
const CYCLES: u64 = 5_000;

/// Says once that everything is to be converted.
struct Teacher;

impl Policy for Teacher {
    fn map_gpa_range(&self, _: &ExplicitRequest) -> Result<Decision, Failure> {
        let decision = Decision::as_asked();
        let region = |range| Region {
            range,
            uses: None,
            nanoseconds: None,
        };
        Ok(match Range::new(0, MEMORY).map(region) {
            Some(region) => Decision::Remember(Box::new(RegionDecision { decision, region })),
            None => decision,
        })
    }
}

/// Each vCPU asks for a page of its own part of memory to become private, and shared again.
fn machine(policy: Arc<dyn Policy>, vcpus: u64, events: usize) -> Machine {
    let script = |vcpu: u64| {
        [State::Private, State::Shared].map(|to| {
            let attributes = attributes(to, PAGE_SIZE).expect("a page size");
            Step::Hypercall([KVM_HC_MAP_GPA_RANGE, MEMORY / vcpus * vcpu, 1, attributes])
        })
    };
    let scripts = (0..vcpus).map(|vcpu| script(vcpu).to_vec()).collect();
    let machine = Machine::new(Config {
        vcpus: vcpus as u32,
        events,
        hypervisor: Some(Arc::new(FakeVm::new(FakeVm::protected(32764), scripts, CYCLES))),
        ..Config::new(MEMORY, policy)
    });
    let machine = machine.expect("a machine on the fake");
    for vcpu in 0..vcpus {
        let started = machine.start(vcpu as usize, CpuMode::Real, &[], &mut || Ok(()));
        started.expect("a vCPU that does not run");
    }
    machine
}

fn requests(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("requests");
    group.measurement_time(Duration::from_secs(3)).sample_size(50);
    let mut bench = |name: &str, vcpus: u64, events: usize, policy: &dyn Fn() -> Arc<dyn Policy>| {
        group.throughput(Throughput::Elements(2 * CYCLES * vcpus));
        group.bench_function(name, |bencher| {
            // What it returns is dropped when the time was taken.
            let run = |machine: Machine| (machine.run(None, &mut || Ok(())), machine);
            bencher.iter_batched(|| machine(policy(), vcpus, events), run, BatchSize::PerIteration);
        });
    };
    let allow = || Arc::new(Allow) as Arc<dyn Policy>;
    bench("allowed", 1, 65536, &allow);
    bench("allowed, no events", 1, 0, &allow);
    bench("allowed, two vCPUs", 2, 65536, &allow);
    bench("denied", 1, 65536, &|| Arc::new(DenyAll { errno: Errno(EINVAL) }));
    bench("under a learned rule", 1, 65536, &|| Arc::new(Remember::new(Teacher)));
    bench("under a quota", 1, 65536, &|| {
        Arc::new(Quota {
            max_shared: MEMORY,
            then: Arc::new(Allow),
        })
    });
    bench("widened to 2 MiB", 1, 65536, &|| {
        Arc::new(Align::new(2 << 20, Arc::new(Allow)).expect("a power of two"))
    });
    group.finish();
}

criterion_group!(all, requests);
criterion_main!(all);
