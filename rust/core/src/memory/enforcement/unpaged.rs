//! Pages that a vCPU without paging may access at their plain address although they are private, see
//! [`crate::memory::unpaged`].
//!
//! Under traps the shared view's host mapping of such a page is replaced by one of its private side, and its attribute
//! is cleared: no memslot changes. Under memslots it gets a memslot over the private side at its plain address.

use super::slots::UNPAGED_LAYER;
use super::{Enforcement, NotEnforced, SHARED_VIEW};
use crate::errno::Errno;
use crate::hypervisor::host::EnforcementMode;
use crate::memory::address::{Range, State};

/// Under memslots a vCPU without paging gets the private pages of the first MiB, if it touches one: KVM cannot walk page
/// tables that have no memslot, and those with which a vCPU that comes from INIT switches paging on lie there.
const FIRST_MIB: u64 = 1 << 20;

impl Enforcement {
    /// The pages to open for an access to `page`.
    pub(in crate::memory) fn unpaged_range(&self, page: Range) -> Range {
        let low = Range::new(0, FIRST_MIB.min(self.views.memory_end()));
        low.filter(|low| self.mode == EnforcementMode::Memslots && low.overlaps(&page))
            .unwrap_or(page)
    }

    /// Opens the shared view of private pages: both views are their private side then. What was done before a failure is
    /// undone.
    pub(in crate::memory) fn open_unpaged(&self, range: Range) -> Result<(), NotEnforced> {
        if self.mode == EnforcementMode::Memslots {
            return self.slots.change(range, &[(UNPAGED_LAYER, true)]);
        }
        let shared = &self.sides.shared;
        shared.show(&self.sides.private, range).map_err(unchanged)?;
        let opened = self.attributes.call(SHARED_VIEW, range, State::Shared);
        opened.map_err(|errno| NotEnforced::Kernel {
            errno,
            undo: shared.show(shared, range),
        })
    }

    /// Closes it again. After a failure it may be trapped, which does no harm, and closing it can be tried again.
    pub(in crate::memory) fn close_unpaged(&self, range: Range) -> Result<(), NotEnforced> {
        if self.mode == EnforcementMode::Memslots {
            return self.slots.change(range, &[(UNPAGED_LAYER, false)]);
        }
        let trapped = self.attributes.call(SHARED_VIEW, range, State::Private);
        let shared = &self.sides.shared;
        trapped.and_then(|()| shared.show(shared, range)).map_err(unchanged)
    }
}

fn unchanged(errno: Errno) -> NotEnforced {
    NotEnforced::Kernel { errno, undo: Ok(()) }
}
