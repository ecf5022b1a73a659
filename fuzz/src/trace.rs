//! Trace files of any format: read, collected again from batches, and put to a policy.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use pagegate_core::policy::simple::Allow;
use pagegate_core::trace::data::Trace;
use pagegate_core::trace::replay::replay;
use rustix::fs::{MemfdFlags, memfd_create};

/// A file.
pub fn run(data: &[u8]) -> bool {
    let Some(trace) = read(data) else {
        return false;
    };
    let batches = trace.batches().map(Ok);
    let again =
        Trace::collect(trace.about.schema(), batches, None, &mut || Ok(())).expect("a trace that was just read");
    assert_eq!((&again.about, &again.events), (&trace.about, &trace.events));
    let replay = replay(&trace, &[Arc::new(Allow)], 4, &mut || Ok(()));
    replay.is_ok_and(|replay| replay.requests > 0)
}

fn read(data: &[u8]) -> Option<Trace> {
    let mut file = File::from(memfd_create("trace", MemfdFlags::CLOEXEC).expect("a file in memory"));
    file.write_all(data).expect("room for the file");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Trace::read(Path::new(&path), None, &mut || Ok(())).ok()
}
