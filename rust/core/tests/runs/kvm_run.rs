//! KVM_RUN that fails, and exits that the core cannot handle.

use pagegate_core::error::Error;
use pagegate_core::hypervisor::fake::Step;
use pagegate_core::memory::address::{PAGE_SIZE, State};

use crate::guest::*;

#[test]
fn exits_that_cannot_be_handled_are_errors() {
    let exit = |errno, reason, words| Step::Exit { errno, reason, words };
    let fault = |flags, gpa, size| exit(libc::EFAULT, EXIT_MEMORY_FAULT, [flags, gpa, size]);
    let memory = PAGES * PAGE_SIZE;
    for step in [
        Step::Fail(libc::EIO),
        Step::Fail(libc::EHWPOISON),
        exit(0, 77, [0; 3]),
        exit(0, EXIT_MEMORY_FAULT, [PRIVATE_FLAG, 0x5000, PAGE_SIZE]),
        exit(0, 9, [1, 0, 0]),
        exit(0, 24, [1, 0, 0]),
        Step::InternalError(1),
        fault(1, 0x5000, PAGE_SIZE),
        fault(PRIVATE_FLAG | 1 << 4, 0x5000, PAGE_SIZE),
        fault(PRIVATE_FLAG, memory, PAGE_SIZE),
        fault(PRIVATE_FLAG, 0x5000, 0),
        fault(PRIVATE_FLAG, memory - PAGE_SIZE, 2 * PAGE_SIZE),
        fault(PRIVATE_FLAG, 0x5008, PAGE_SIZE),
    ] {
        let guest = PLAIN.guest(vec![vec![step.clone()]], Judge::allow());
        assert!(matches!(guest.try_run(), Err(Error::Exit { .. })), "{step:?}");
        assert_eq!(guest.machine.memory().snapshot().generation(), 0);
        assert!(guest.judge.faults.lock().is_empty());
    }
    // kvm_run still holds the memory fault of the exit before: it is not taken for one of this failure.
    let stale = vec![memory_fault(PRIVATE_FLAG, 0x5000), Step::Fail(libc::EFAULT)];
    let guest = PLAIN.guest(vec![stale], Judge::allow());
    assert!(matches!(guest.try_run(), Err(Error::BadBacking { .. })));
    assert_eq!(guest.judge.faults.lock().len(), 1);
}

#[test]
fn kvm_run_is_tried_again_after_eintr_eagain_and_enomem_but_not_for_ever() {
    let mut script = Vec::new();
    for errno in [libc::EINTR, libc::EAGAIN, libc::ENOMEM] {
        script.extend(vec![Step::Fail(errno); 20]);
    }
    script.push(map_gpa_range(0x5000, 1, TO_PRIVATE));
    let guest = PLAIN.guest(vec![script], Judge::allow());
    assert_eq!(guest.run().reason, "halt");
    assert_eq!(guest.state(0x5000), State::Private);
    for errno in [libc::EAGAIN, libc::ENOMEM] {
        let guest = PLAIN.guest(vec![vec![Step::Fail(errno); 3000]], Judge::allow());
        assert!(matches!(guest.try_run(), Err(Error::Exit { .. })));
    }
}

#[test]
fn each_exit_that_is_handled_resets_the_count_of_failures() {
    let failures = || vec![Step::Fail(libc::EAGAIN); 600];
    // The vCPU looks up the handler at its first IO, and remembers it from then on.
    let answered = [
        vec![map_gpa_range(0x5000, 1, TO_PRIVATE)],
        vec![io_write(0x10), io_write(0x10)],
        vec![io_write(0x10)],
    ];
    let mut script = failures();
    for steps in answered {
        script.extend(steps);
        script.extend(failures());
    }
    let guest = PLAIN.guest(vec![script], Judge::allow());
    let quiet = handler(|_| Ok(()));
    quiet.machine.set(&guest);
    guest.machine.on_io(0x10, quiet).unwrap();
    assert_eq!(guest.run().reason, "halt");
}
