//! The state that a vCPU starts in: 64-bit long mode, with the same page tables, GDT and segments as under pagegate, so
//! that both run the same guest.
//!
//! Nothing else in the baseline uses pagegate-core.

use std::io;

use kvm_bindings::kvm_sregs;
use pagegate_core::boot::long_mode::{Tables, tables};
use pagegate_core::boot::start::{CpuMode, sregs};
use pagegate_core::memory::address::State;
use pagegate_core::memory::views::{ViewBit, Views};

pub(crate) struct LongMode {
    tables: Tables,
    views: Views,
}

impl LongMode {
    pub(crate) fn new(memory: u64, shared_bit: Option<u32>) -> io::Result<Self> {
        let shared_view = |bit| ViewBit {
            bit,
            set: State::Shared,
        };
        let views = Views::new(memory, None, shared_bit.map(shared_view));
        let tables = tables(views, false).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        Ok(Self { tables, views })
    }

    /// The page tables and the GDT, and their gpa.
    pub(crate) fn tables(&self) -> (u64, &[u8]) {
        (self.tables.gpa, &self.tables.bytes)
    }

    /// The special registers to start with, made from those after reset.
    pub(crate) fn sregs(&self, reset: &kvm_sregs) -> kvm_sregs {
        sregs(CpuMode::Long, reset, Some(&self.tables), self.views)
    }
}
