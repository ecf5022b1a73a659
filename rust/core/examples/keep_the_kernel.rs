//! A guest under a policy, in Rust alone: `cargo run -p pagegate-core --example keep_the_kernel`.
//!
//! The guest asks for a page of its kernel and for a buffer to become shared, through the doorbell. The policy refuses the
//! first. Needs /dev/kvm.

use std::sync::Arc;
use std::time::Duration;

use pagegate_core::boot::image::Image;
use pagegate_core::boot::start::CpuMode;
use pagegate_core::errno::{EINVAL, Errno};
use pagegate_core::error::{Error, Failure};
use pagegate_core::hypervisor::hypercall::{DOORBELL_PORT, KVM_HC_MAP_GPA_RANGE};
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::Config;
use pagegate_core::memory::address::State;
use pagegate_core::policy::decision::Decision;
use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::request::ExplicitRequest;

const MEMORY: u64 = 64 << 20;
const ENTRY: u64 = 0x1000;
/// Below it is what must stay private.
const KERNEL_END: u64 = 0x100_0000;

struct KeepTheKernelPrivate;

impl Policy for KeepTheKernelPrivate {
    fn map_gpa_range(&self, call: &ExplicitRequest) -> Result<Decision, Failure> {
        Ok(match call.to == State::Shared && call.range.gpa() < KERNEL_END {
            true => Decision::Deny(Errno(EINVAL)),
            false => Decision::as_asked(),
        })
    }
}

/// Asks for one page at `gpa`, which is below 4 GiB, to become shared.
fn ask(gpa: u32) -> Vec<u8> {
    let mut code = vec![0xbb]; // mov ebx, gpa
    code.extend(gpa.to_le_bytes());
    code.extend([0xb9, 1, 0, 0, 0, 0x31, 0xd2]); // mov ecx, 1; xor edx, edx
    code.extend([0xb8, KVM_HC_MAP_GPA_RANGE as u8, 0, 0, 0]); // mov eax, 12
    code.extend([0xe6, DOORBELL_PORT as u8]); // out doorbell, al
    code
}

fn main() -> Result<(), Error> {
    let mut code = ask(0x80_0000);
    code.extend(ask(0x200_0000));
    code.push(0xf4); // hlt

    let mut config = Config::new(MEMORY, Arc::new(KeepTheKernelPrivate));
    config.initial = State::Private;
    config.events = 16;
    let machine = Machine::new(config)?;
    machine.load(&Image::raw(&code, ENTRY), &mut || Ok(()))?;
    machine.start(0, CpuMode::Long, &[("rip".to_owned(), ENTRY)], &mut || Ok(()))?;
    let report = machine.run(Some(Duration::from_secs(10)), &mut || Ok(()))?;

    println!("{}: {} requests", report.reason, report.tally.requests());
    for event in machine.events().since(0) {
        println!(
            "{:#x} + {:#x} to {}: {}",
            event.gpa,
            event.size,
            event.to,
            event.outcome.as_str()
        );
    }
    Ok(())
}
