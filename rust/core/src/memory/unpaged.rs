//! Accesses without paging. In a SEV guest they are private, and so are page walks, whether the tables have C-bits or not:
//! they use a page's plain address, which is its shared view here, and mean its private bytes.
//!
//! So such a page is opened for a time: its shared view shows its private side, too. KVM knows one set of mappings for
//! all vCPUs, so meanwhile every vCPU sees the private bytes through the shared view. It is closed as soon as the vCPU
//! that it was opened for is seen with paging and a C-bit in CR3, before the page becomes shared, or when too many are open.

use std::sync::atomic::Ordering;

use super::address::{Range, State};
use super::enforcement::NotEnforced;
use super::guest_memory::GuestMemory;
use super::open_pages::Open;
use crate::errno::Errno;

impl GuestMemory {
    /// Opens a page for a vCPU without paging. Returns what was opened: nothing if the page is not private any more or is
    /// open already, and more than a page under memslots.
    ///
    /// # Errors
    /// Those of mmap(2), KVM_SET_MEMORY_ATTRIBUTES and KVM_SET_USER_MEMORY_REGION2; ENOSPC without a free memslot.
    pub(crate) fn open_unpaged(&self, page: Range, vcpu: u32) -> Result<Vec<Range>, Errno> {
        while self.unpaged.is_full() {
            if let Some(oldest) = self.unpaged.find(|_| true) {
                self.close(oldest)?;
            }
        }
        let wanted = self.enforcement.unpaged_range(page);
        let (_held, states) = self.states.hold_and_access(wanted);
        let runs = states.runs_in(wanted);
        drop(states);
        let mut opened = Vec::new();
        let private = runs.into_iter().filter(|run| run.state == State::Private);
        for range in private.map(|run| run.range) {
            if self.unpaged.find(|one| one.range.overlaps(&range)).is_none() {
                self.known(self.enforcement.open_unpaged(range))?;
                self.unpaged.add(Open { range, vcpu });
                opened.push(range);
            }
        }
        Ok(opened)
    }

    /// Closes what is open for this vCPU.
    ///
    /// # Errors
    /// As [`GuestMemory::open_unpaged`].
    pub(crate) fn close_unpaged(&self, vcpu: u32) -> Result<(), Errno> {
        while let Some(open) = self.unpaged.find(|open| open.vcpu == vcpu) {
            self.close(open)?;
        }
        Ok(())
    }

    /// What was open for this vCPU and was closed since the last call, by whomever.
    pub(crate) fn take_closed(&self, vcpu: u32) -> Vec<Range> {
        self.unpaged.take_closed(vcpu)
    }

    /// Whether the shared view of these private pages is open.
    pub(crate) fn is_open(&self, pages: Range) -> bool {
        self.unpaged.covers(pages)
    }

    fn close(&self, open: Open) -> Result<(), Errno> {
        let _held = self.states.hold(open.range);
        match self.unpaged.find(|one| *one == open) {
            Some(open) => self.close_part(open, open.range),
            None => Ok(()),
        }
    }

    /// Closes pages that are about to be converted, and are held.
    pub(super) fn close_before_conversion(&self, range: Range) -> Result<(), Errno> {
        while let Some(open) = self.unpaged.find(|open| open.range.overlaps(&range)) {
            self.close_part(open, open.range.intersect(&range).unwrap_or(open.range))?;
        }
        Ok(())
    }

    /// Closes a part of what is open; the rest of it stays.
    fn close_part(&self, open: Open, part: Range) -> Result<(), Errno> {
        let closed = self.enforcement.close_unpaged(part);
        self.known(closed)?;
        self.unpaged.remove(open);
        let before = Range::new(open.range.gpa(), part.gpa() - open.range.gpa());
        let after = Range::new(part.end(), open.range.end() - part.end());
        for range in before.into_iter().chain(after) {
            self.unpaged.add(Open { range, ..open });
        }
        self.unpaged.note_closed(Open { range: part, ..open });
        Ok(())
    }

    /// The errno of a failure. If it could not be undone, it is not known what KVM enforces, and nothing is converted any
    /// more.
    fn known(&self, done: Result<(), NotEnforced>) -> Result<(), Errno> {
        done.map_err(|failure| match failure {
            NotEnforced::NoSlots(_) => Errno(libc::ENOSPC),
            NotEnforced::Kernel { errno, undo } => {
                if undo.is_err() {
                    self.frozen.store(true, Ordering::SeqCst);
                }
                errno
            }
        })
    }
}
