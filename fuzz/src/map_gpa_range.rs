//! Parsing of KVM_HC_MAP_GPA_RANGE, against the model of the core's tests.

use arbitrary::{Result, Unstructured};
use pagegate_core::errno::Errno;
use pagegate_core::hypervisor::exit::Hypercall;
use pagegate_core::hypervisor::hypercall::KVM_HC_MAP_GPA_RANGE;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::memory::views::{ViewBit, Views};
use pagegate_core::policy::map_gpa_range::{attributes, parse};

#[path = "../../rust/core/tests/map_gpa_range/model.rs"]
mod model;

use model::Expected;

/// Pages of memory, the number of the shared bit (0 for none), and the registers.
pub fn run(data: &[u8]) -> bool {
    check(&mut Unstructured::new(data)).unwrap_or(false)
}

fn check(data: &mut Unstructured<'_>) -> Result<bool> {
    let memory = data.int_in_range(1..=1_u64 << 32)? * PAGE_SIZE;
    let bit = Some(data.int_in_range(0..=51_u32)?).filter(|bit| *bit > 0 && memory <= 1 << bit);
    let args: [u64; 3] = data.arbitrary()?;
    let [gpa, pages, raw] = args;
    let set = State::Shared;
    let views = Views::new(memory, None, bit.map(|bit| ViewBit { bit, set }));
    let nr = KVM_HC_MAP_GPA_RANGE;
    let found = parse(&Hypercall { nr, args }, &views);
    let expected = match model::expected(gpa, pages, raw, memory, bit) {
        Expected::Malformed => Err(Errno(libc::EINVAL)),
        Expected::Nothing => Ok(None),
        Expected::Convert(gpa, size, private, page_size) => Ok(Some((gpa, size, private, page_size))),
    };
    let fields = found.map(|found| {
        found.map(|found| {
            assert_eq!((found.raw, attributes(found.to, found.page_size)), (raw, Some(raw)));
            (
                found.range.gpa(),
                found.range.size(),
                found.to == State::Private,
                found.page_size,
            )
        })
    });
    assert_eq!(fields, expected);
    Ok(fields.is_ok())
}
