//! Guest memory as devices reach it: shared pages only.
//!
//! Each access holds the pages for as long as it lasts, so that no conversion takes one away under it. It waits for nothing
//! meanwhile but a disk's file, so a conversion waits for a copy at most, or until the host has read or written a file.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory as DeviceMemory, GuestMemoryError, GuestMemoryMmap, Permissions, VolatileSlice,
};

use crate::error::Failure;
use crate::memory::address::{Range, State};
use crate::memory::guest_memory::GuestMemory;
use crate::memory::listeners::{Change, Listener};
use crate::memory::shared_pages::{NotShared, SharedPages, SharedParts};

/// Pages of requests that devices work on. A page that becomes private meanwhile has lost its bytes, also if it is shared
/// again when the device gets to it.
#[derive(Default)]
pub(crate) struct InFlight(Mutex<Vec<Arc<Pages>>>);

/// The pages of one request, a part for each of its buffers.
struct Pages(Vec<Part>);

struct Part {
    pages: Range,
    write: bool,
    /// The first of them that became private.
    lost: OnceLock<Range>,
}

/// Keeps a request's pages in the list until it is dropped.
pub(crate) struct Flight {
    list: Arc<InFlight>,
    pages: Arc<Pages>,
}

impl InFlight {
    /// A device takes a request: the pages of each buffer, and whether the device is to write them.
    pub(crate) fn begin(self: &Arc<Self>, buffers: impl Iterator<Item = (Range, bool)>) -> Flight {
        let part = |(pages, write)| Part {
            pages,
            write,
            lost: OnceLock::new(),
        };
        let pages = Arc::new(Pages(buffers.map(part).collect()));
        self.0.lock().push(pages.clone());
        Flight {
            list: self.clone(),
            pages,
        }
    }
}

impl Flight {
    /// The parts that have lost bytes, and the first pages of each that have.
    fn lost(&self) -> impl Iterator<Item = (&Part, Range)> {
        let parts = self.pages.0.iter();
        parts.filter_map(|part| Some((part, *part.lost.get()?)))
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.list.0.lock().retain(|pages| !Arc::ptr_eq(pages, &self.pages));
    }
}

/// Called with the pages held, as every access of a device is made.
impl Listener for InFlight {
    fn prepare(&self, _: &Change) -> Result<bool, Failure> {
        Ok(true)
    }

    fn committed(&self, change: &Change) -> Result<(), Failure> {
        if change.to == State::Private && !change.initial {
            let requests = self.0.lock();
            let parts = requests.iter().flat_map(|pages| &pages.0);
            for part in parts {
                if let Some(lost) = part.pages.intersect(&change.range) {
                    part.lost.get_or_init(|| lost);
                }
            }
        }
        Ok(())
    }

    fn aborted(&self, _: &Change) -> Result<(), Failure> {
        Ok(())
    }
}

/// An access that was refused, or is outside of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub gpa: u64,
    pub size: u64,
    pub write: bool,
    /// `None`: outside of memory.
    pub state: Option<State>,
}

/// Told of each access.
pub(crate) trait Gate {
    /// Called with the pages held.
    fn granted(&self, gpa: u64, size: u64, write: bool);

    fn refused(&self, refused: Refused);
}

/// Shared pages as vm-memory's and virtio-queue's code reads and writes them.
pub(crate) struct Dma<'a, G> {
    pub memory: &'a GuestMemory,
    pub gate: G,
    /// The request that the access is part of, if it is to one's buffers.
    pub flight: Option<&'a Flight>,
}

impl<G: Gate> Dma<'_, G> {
    /// Copies bytes out of shared pages.
    pub(crate) fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), Refused> {
        let len = into.len();
        self.access(gpa, len, false, |pages| pages.read(into))
    }

    /// Copies bytes into shared pages.
    pub(crate) fn write(&self, gpa: u64, from: &[u8]) -> Result<(), Refused> {
        self.access(gpa, from.len(), true, |pages| pages.write(from))
    }

    /// Holds bytes of several places together, each a gpa and a count of bytes.
    pub(crate) fn hold_all(&self, places: &[(u64, u64)], write: bool) -> Result<SharedParts<'_>, Refused> {
        let held = self.memory.hold_all_shared(places).map_err(|why| {
            let (gpa, size) = places.first().copied().unwrap_or_default();
            refused(why, gpa, size, write)
        });
        let held = held.and_then(|parts| self.lost(|_| true).map_or(Ok(parts), Err));
        match &held {
            Ok(_) => (places.iter()).for_each(|(gpa, size)| self.gate.granted(*gpa, *size, write)),
            Err(refused) => self.gate.refused(*refused),
        }
        held
    }

    /// Whether no page of the request has lost its bytes so far.
    pub(crate) fn intact(&self) -> Result<(), Refused> {
        let Some(refused) = self.lost(|_| true) else {
            return Ok(());
        };
        self.gate.refused(refused);
        Err(refused)
    }

    /// The first page that has lost its bytes, of a buffer of the request that `is_it`.
    fn lost(&self, is_it: impl Fn(Range) -> bool) -> Option<Refused> {
        let (part, lost) = self.flight?.lost().find(|(part, _)| is_it(part.pages))?;
        Some(Refused {
            gpa: lost.gpa(),
            size: part.pages.end() - lost.gpa(),
            write: part.write,
            state: Some(self.memory.state(lost.gpa())),
        })
    }

    fn access(
        &self,
        gpa: u64,
        len: usize,
        write: bool,
        copy: impl FnOnce(&SharedPages<'_>) -> bool,
    ) -> Result<(), Refused> {
        if len == 0 {
            return Ok(());
        }
        let refused = match self.hold(gpa, len, write) {
            Ok(pages) if copy(&pages) => return Ok(()),
            // The bytes are poisoned, or the host has no memory left for them.
            Ok(_) => Refused {
                gpa,
                size: len as u64,
                write,
                state: None,
            },
            Err(refused) => refused,
        };
        self.gate.refused(refused);
        Err(refused)
    }

    fn hold(&self, gpa: u64, len: usize, write: bool) -> Result<SharedPages<'_>, Refused> {
        let size = len as u64;
        let held = self.memory.hold_shared(gpa, size);
        let pages = held.map_err(|why| refused(why, gpa, size, write))?;
        match self.lost(|buffer| pages.are_in(buffer)) {
            Some(refused) => Err(refused),
            None => {
                self.gate.granted(gpa, size, write);
                Ok(pages)
            }
        }
    }
}

/// An access of `size` bytes from `gpa` on that cannot be made.
fn refused(why: NotShared, gpa: u64, size: u64, write: bool) -> Refused {
    let (gpa, size, state) = match why {
        NotShared::Outside => (gpa, size, None),
        NotShared::Private { gpa: first, left } => (first, left, Some(State::Private)),
    };
    Refused {
        gpa,
        size,
        write,
        state,
    }
}

impl<G: Gate> DeviceMemory for Dma<'_, G> {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _: Permissions) -> bool {
        self.memory.hold_shared(addr.0, count as u64).is_ok()
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>, GuestMemoryError> {
        let refused = match self.hold(addr.0, count, access.has_write()) {
            Ok(pages) => return Ok(One { pages, given: false }),
            Err(refused) => refused,
        };
        self.gate.refused(refused);
        Err(GuestMemoryError::InvalidGuestAddress(addr))
    }
}

/// The one slice that an access consists of. vm-memory's code uses it up while it has this iterator, which holds the pages.
struct One<'a> {
    pages: SharedPages<'a>,
    given: bool,
}

impl<'a> Iterator for One<'a> {
    type Item = Result<VolatileSlice<'a>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        if std::mem::replace(&mut self.given, true) {
            return None;
        }
        let slice = self.pages.slice();
        Some(slice.ok_or(GuestMemoryError::InvalidBackendAddress))
    }
}

impl std::iter::FusedIterator for One<'_> {}

impl<'a> GuestMemorySliceIterator<'a, ()> for One<'a> {}
