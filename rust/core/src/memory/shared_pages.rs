//! Shared pages, held for an access of a device.

use std::fs::File;

use vm_memory::VolatileSlice;

use super::address::{Range, State};
use super::guest_memory::GuestMemory;
use super::page_states::{Held, States};
use crate::errno::Errno;
use crate::hypervisor::raw;

/// Why an access cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotShared {
    /// Not all of it is in memory.
    Outside,
    /// It is to a private page, or through the private view.
    Private {
        /// The first byte of it that is private, without the view bit.
        gpa: u64,
        /// Bytes from there to its end.
        left: u64,
    },
}

/// Bytes of shared pages, which stay shared until this is dropped. Whoever has it must not wait for anything.
pub(crate) struct SharedPages<'a> {
    memory: &'a GuestMemory,
    gpa: u64,
    len: u64,
    _held: Held<'a>,
}

/// Bytes of shared pages in several places, which stay shared until this is dropped.
pub(crate) struct SharedParts<'a> {
    slices: Vec<VolatileSlice<'a>>,
    _held: Held<'a>,
}

/// Bytes in memory that a device accesses through the shared view.
struct Part {
    gpa: u64,
    len: u64,
    pages: Range,
}

impl Part {
    /// Whether it is shared.
    fn check(&self, states: &States) -> Result<(), NotShared> {
        let map = states.map();
        if map.uniform(self.pages) == Some(State::Shared) {
            return Ok(());
        }
        let private = map.runs_in(self.pages).find(|run| run.state == State::Private);
        let Some(run) = private else {
            return Ok(());
        };
        let first = run.range.gpa().max(self.gpa);
        Err(NotShared::Private {
            gpa: first,
            left: self.gpa + self.len - first,
        })
    }
}

impl GuestMemory {
    /// Holds the pages of `[gpa, gpa + len)`, of which there is at least one byte, if all of them are shared. A device uses
    /// plain addresses, so a bit that means the private view is wrong here; one that means the shared view says nothing.
    pub(crate) fn hold_shared(&self, gpa: u64, len: u64) -> Result<SharedPages<'_>, NotShared> {
        let part = self.part(gpa, len)?;
        let (held, states) = self.states.hold_and_access(part.pages);
        part.check(&states)?;
        drop(states);
        Ok(SharedPages {
            memory: self,
            gpa: part.gpa,
            len,
            _held: held,
        })
    }

    /// The same for several places, each a gpa and a count of bytes.
    pub(crate) fn hold_all_shared(&self, places: &[(u64, u64)]) -> Result<SharedParts<'_>, NotShared> {
        let parts = places.iter().map(|(gpa, len)| self.part(*gpa, *len));
        let parts: Vec<Part> = parts.collect::<Result<_, _>>()?;
        let pages: Vec<Range> = parts.iter().map(|part| part.pages).collect();
        let (held, states) = self.states.hold_all_and_access(&pages);
        parts.iter().try_for_each(|part| part.check(&states))?;
        drop(states);
        let shared = &self.sides().shared;
        let slices = parts.iter().map(|part| shared.slice(part.gpa, part.len as usize));
        Ok(SharedParts {
            slices: slices.collect::<Option<_>>().ok_or(NotShared::Outside)?,
            _held: held,
        })
    }

    fn part(&self, gpa: u64, len: u64) -> Result<Part, NotShared> {
        let place = self.views().locate(gpa).ok_or(NotShared::Outside)?;
        let through_private_view = gpa != place.gpa && place.view == Some(State::Private);
        let gpa = place.gpa;
        let pages = self.pages(gpa, len).ok_or(NotShared::Outside)?;
        match through_private_view {
            true => Err(NotShared::Private { gpa, left: len }),
            false => Ok(Part { gpa, len, pages }),
        }
    }
}

impl SharedParts<'_> {
    /// Fills them with the bytes of a file from offset `at` on.
    ///
    /// # Errors
    /// Those of preadv(2): EFAULT where a page is poisoned or the host has no memory for it; EIO where the file ends.
    pub(crate) fn fill_from(mut self, file: &File, at: u64) -> Result<(), Errno> {
        self.all(at, |slices, at| raw::read_vectored(file, at, slices))
    }

    /// Writes them to a file from offset `at` on.
    ///
    /// # Errors
    /// Those of pwritev(2), as above.
    pub(crate) fn write_to(mut self, file: &File, at: u64) -> Result<(), Errno> {
        self.all(at, |slices, at| raw::write_vectored(file, at, slices))
    }

    /// Repeats a transfer that ends early with what is left.
    fn all(
        &mut self,
        mut at: u64,
        transfer: impl Fn(&[VolatileSlice<'_>], u64) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        let mut left = &mut self.slices[..];
        while !left.is_empty() {
            let mut done = match transfer(left, at) {
                Ok(0) => return Err(Errno(libc::EIO)),
                Err(Errno(libc::EINTR)) => continue,
                done => done?,
            };
            at += done as u64;
            let whole = left.iter().take_while(|slice| {
                let fits = slice.len() <= done;
                done -= if fits { slice.len() } else { 0 };
                fits
            });
            let whole = whole.count();
            left = &mut left[whole..];
            if let Some(slice) = left.first_mut() {
                *slice = slice.offset(done).map_err(|_| Errno(libc::EINVAL))?;
            }
        }
        Ok(())
    }
}

impl<'a> SharedPages<'a> {
    /// Whether any of them is in this range.
    pub(crate) fn are_in(&self, range: Range) -> bool {
        self.gpa < range.end() && range.gpa() < self.gpa + self.len
    }

    /// Copies the bytes. `false` if a page is poisoned.
    pub(crate) fn read(&self, into: &mut [u8]) -> bool {
        self.memory.sides().shared.read(self.gpa, into).is_ok()
    }

    /// Overwrites the bytes. `false` if a page is poisoned, or the host has no memory for it.
    pub(crate) fn write(&self, from: &[u8]) -> bool {
        self.memory.sides().shared.write(self.gpa, from).is_ok()
    }

    /// The bytes in this process.
    pub(crate) fn slice(&self) -> Option<VolatileSlice<'a>> {
        self.memory.sides().shared.slice(self.gpa, self.len as usize)
    }
}
