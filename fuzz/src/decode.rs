//! Decoding of kvm_run, against the model of the core's tests.

use arbitrary::Unstructured;
use pagegate_core::errno::Errno;
use pagegate_core::hypervisor::exit::{Exit, decode};

#[path = "../../rust/core/tests/decode/model.rs"]
mod model;

/// An errno, 0 for a KVM_RUN that succeeded, and kvm_run from `exit_reason` on.
pub fn run(data: &[u8]) -> bool {
    let mut data = Unstructured::new(data);
    let errno = i32::from(data.arbitrary::<u8>().unwrap_or_default());
    let kvm_run = data.take_rest();
    let result = if errno == 0 { Ok(()) } else { Err(Errno(errno)) };
    let exit = decode(result, kvm_run);
    assert_eq!(exit, model::expected(errno, kvm_run));
    !matches!(exit, Exit::Unknown { .. } | Exit::Failed(_))
}
