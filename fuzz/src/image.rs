//! ELF files, loaded into a machine on the fake hypervisor.

use std::sync::Arc;

use pagegate_core::boot::image::Image;
use pagegate_core::hypervisor::fake::FakeVm;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::Config;
use pagegate_core::memory::address::PAGE_SIZE;
use pagegate_core::policy::simple::Allow;

const MEMORY: u64 = 32 * PAGE_SIZE;

/// A file. What the machine says of it does not matter, as long as it does say something.
pub fn run(data: &[u8]) -> bool {
    let Ok(image) = Image::elf(data) else {
        return false;
    };
    assert!(!image.segments.is_empty());
    let inside = data.as_ptr_range();
    for segment in &image.segments {
        let bytes = segment.bytes.as_ptr_range();
        assert!(bytes.is_empty() || inside.start <= bytes.start && bytes.end <= inside.end);
    }
    MACHINE.with(|machine| {
        let loaded = machine.load(&image, &mut || Ok(()));
        let fits = image.segments.iter().all(|segment| {
            let size = segment.bytes.len() as u128 + u128::from(segment.zeroes);
            u128::from(segment.gpa) + size <= u128::from(MEMORY)
        });
        assert_eq!(loaded.is_ok(), fits, "{loaded:?}");
        fits
    })
}

thread_local! {
    static MACHINE: Machine = machine();
}

fn machine() -> Machine {
    let config = Config {
        hypervisor: Some(Arc::new(FakeVm::new(FakeVm::plain(512), Vec::new(), 1))),
        ..Config::new(MEMORY, Arc::new(Allow))
    };
    Machine::new(config).expect("the fake makes a machine")
}
