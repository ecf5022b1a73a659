//! What the targets of virtio have in common: a machine that runs for as long as the process, whose driver is the input.

use std::sync::Arc;

use pagegate_core::devices::virtio::device::Device;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::policy::simple::Allow;

use crate::driver::{Host, SECRET};

/// The memory that inputs use.
pub const START: u64 = 0x1_0000;
pub const PAGES: u64 = 64;
pub const SIZE: u64 = PAGES * PAGE_SIZE;

/// So many bytes of [`SECRET`] in a row are from a private page.
const TELLTALE: usize = 8;

/// A machine whose run does not end.
pub fn host(devices: Vec<Arc<dyn Device>>) -> &'static Host {
    let host = Box::leak(Box::new(Host::resting(Arc::new(Allow), devices)));
    host.begin_for(None);
    host
}

/// Fills memory: pages whose bit is set become private, and are secret. `false` if what is shared looks secret.
pub fn fill(host: &Host, shared: &[u8], private: u64) -> bool {
    host.machine
        .convert(START, SIZE, State::Shared)
        .expect("it can be shared");
    host.write(START, shared);
    for page in each(private) {
        host.hide(page, PAGE_SIZE);
    }
    !has_secret(shared)
}

/// Checks that no device has read or written a private page, and frees all of them.
pub fn check(host: &Host, private: u64) {
    assert!(host.machine.running(), "the run ended");
    for page in each(private) {
        host.check_hidden(page, PAGE_SIZE);
    }
    assert!(
        !has_secret(&host.read(START, SIZE as usize)),
        "private bytes were written to shared pages"
    );
    host.machine
        .convert(START, SIZE, State::Private)
        .expect("it can be private");
}

pub fn has_secret(bytes: &[u8]) -> bool {
    bytes
        .chunk_by(|a, b| a == b)
        .any(|run| run[0] == SECRET && run.len() >= TELLTALE)
}

fn each(private: u64) -> impl Iterator<Item = u64> {
    let is_set = move |page: &u64| private >> page & 1 != 0;
    (0..PAGES).filter(is_set).map(|page| START + page * PAGE_SIZE)
}
