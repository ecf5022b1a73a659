//! A device's queues, and the requests in them.
//!
//! The driver may write anything anywhere, at any time. What is read of a request is read once; a request has at most as
//! many buffers as its queue has entries; and all of it is shared memory, or the request fails.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue as Ring, QueueOwnedT, QueueT};

use super::run::{Run, Site};
use crate::devices::dma::{Flight, Refused};
use crate::errno::Errno;
use crate::memory::address::{PAGE_SIZE, Range};
use crate::memory::shared_pages::SharedParts;

/// Offsets in a used ring, and the bytes of an entry.
const USED_INDEX: u64 = 2;
const USED_ENTRIES: u64 = 4;
const USED_ENTRY: u64 = 8;

/// A queue, while the machine runs.
pub struct Queue {
    index: u16,
    ring: Ring,
    site: Arc<Site>,
    /// Requests taken in this turn.
    taken: u32,
    /// Whether requests were completed since the driver was last told.
    pub(super) completed: bool,
    /// One of them was made up: the driver is told, whether it wants to be or not.
    lied: bool,
    /// It was left because others had to have their turn: requests may be in it.
    paused: bool,
    /// The device found no request in it, or had to leave those in it.
    wants_more: bool,
    /// It can no longer be used, and the driver has not been told so.
    pub(super) broken: bool,
}

/// A part of guest memory that a request names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// The first byte.
    pub gpa: u64,
    /// Bytes.
    pub len: u32,
}

/// A request: buffers to read, and then buffers to write.
pub struct Request {
    site: Arc<Site>,
    queue: u16,
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
    flight: Flight,
}

/// A request's bytes could not be accessed: they are not all shared memory. The request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoAccess;

impl From<Refused> for NoAccess {
    fn from(_: Refused) -> Self {
        Self
    }
}

impl From<NoAccess> for Errno {
    fn from(_: NoAccess) -> Self {
        Self(libc::EFAULT)
    }
}

impl Queue {
    pub(super) fn new(index: u16, ring: Ring, site: Arc<Site>) -> Self {
        Self {
            index,
            ring,
            site,
            taken: 0,
            completed: false,
            lied: false,
            paused: false,
            wants_more: false,
            broken: false,
        }
    }

    /// The ring, for the next run.
    pub(super) fn into_ring(self) -> Ring {
        self.ring
    }

    /// Its index.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How many entries it has.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Takes the next request. After one whose descriptors make no sense, or cannot be read, there is none, until the driver
    /// resets the device: it could not be told that the request failed.
    ///
    /// `None`, too, if there is none at present, or if the device has to do something else first. In both cases it has
    /// another turn as soon as there are requests.
    pub fn take(&mut self) -> Option<Request> {
        let request = self.next();
        self.wants_more = request.is_none();
        request
    }

    fn next(&mut self) -> Option<Request> {
        if !self.ring.ready() {
            return None;
        }
        let site = self.site.clone();
        // A driver that adds requests as fast as they are taken must not keep the device from all else.
        if self.taken >= self.ring.size().into() || site.must_pause() {
            self.paused = true;
            return None;
        }
        let memory = site.rings(self.index);
        let chain = match self.ring.iter(&memory) {
            Ok(mut chains) => chains.next(),
            Err(_) => {
                self.fail();
                return None;
            }
        };
        let request = match chain {
            Some(chain) => {
                let head = chain.head_index();
                memory.gate.of_request(head);
                self.taken += 1;
                self.request(head, chain)
            }
            None if memory.gate.any_refused() => None,
            None => return None,
        };
        if request.is_none() {
            self.fail();
        }
        request
    }

    /// Uses it no more: the driver has to reset the device. For a request whose driver cannot be told how it went.
    pub fn fail(&mut self) {
        self.ring.set_ready(false);
        self.broken = true;
    }

    fn request(&self, head: u16, chain: impl Iterator<Item = Descriptor>) -> Option<Request> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut ends = false;
        // Of a chain that is too long, the last of these has another after it.
        for descriptor in chain.take(self.ring.size().into()) {
            let into = match descriptor.is_write_only() {
                true => &mut writable,
                false if writable.is_empty() => &mut readable,
                // What the device reads comes first.
                false => return None,
            };
            into.push(Buffer {
                gpa: descriptor.addr().0,
                len: descriptor.len(),
            });
            ends = !descriptor.has_next();
        }
        if !ends {
            return None;
        }
        let mask = self.site.run.memory.views().mask();
        let pages = |buffer: &Buffer| {
            let start = buffer.gpa & !mask;
            let end = start
                .checked_add(buffer.len.into())?
                .checked_next_multiple_of(PAGE_SIZE)?;
            let start = start - start % PAGE_SIZE;
            Range::new(start, end - start)
        };
        let read = readable.iter().filter_map(pages).map(|pages| (pages, false));
        let written = writable.iter().filter_map(pages).map(|pages| (pages, true));
        let flight = self.site.run.in_flight.begin(read.chain(written));
        Some(Request {
            site: self.site.clone(),
            queue: self.index,
            head,
            readable,
            writable,
            flight,
        })
    }

    /// Gives a request back to the driver, with the count of bytes that were written to it.
    pub fn complete(&mut self, request: Request, written: u32) {
        self.add_used(request.head, written);
    }

    /// Completes a request by its id, the index of its first descriptor, which a device that lies makes up.
    pub fn complete_as(&mut self, id: u32, written: u32) {
        match u16::try_from(id) {
            Ok(head) if head < self.ring.size() => self.add_used(head, written),
            _ => self.add_impossible(id, written),
        }
    }

    fn add_used(&mut self, head: u16, written: u32) {
        if !self.ring.ready() {
            return;
        }
        let rings = self.site.rings(self.index);
        match self.ring.add_used(&rings, head, written) {
            Ok(()) => self.completed = true,
            Err(_) => self.fail(),
        }
    }

    /// What virtio-queue refuses to write: an id that is no descriptor's.
    fn add_impossible(&mut self, id: u32, written: u32) {
        if !self.ring.ready() {
            return;
        }
        let rings = self.site.rings(self.index);
        let next = self.ring.next_used();
        let entry = self.ring.used_ring() + USED_ENTRIES + u64::from(next % self.ring.size()) * USED_ENTRY;
        let words = [id, written].map(u32::to_le_bytes).concat();
        let after = next.wrapping_add(1);
        let added = rings.write(entry, &words);
        let index = self.ring.used_ring() + USED_INDEX;
        match added.and_then(|()| rings.write(index, &after.to_le_bytes())) {
            Ok(()) => {
                self.ring.set_next_used(after);
                (self.completed, self.lied) = (true, true);
            }
            Err(_) => self.fail(),
        }
    }

    /// The device gets to the requests of this queue, if it is `its_turn`, or of another one. It may take requests of any. The
    /// driver need not notify it of those in a queue whose turn it is.
    pub(super) fn begin_turn(&mut self, its_turn: bool) {
        (self.taken, self.paused, self.wants_more) = (0, false, false);
        if !its_turn || !self.ring.ready() {
            return;
        }
        let rings = self.site.rings(self.index);
        if self.ring.disable_notification(&rings).is_err() {
            self.fail();
        }
    }

    /// Asks the driver to notify the device from now on. Whether the queue gets a turn all the same: for requests that came
    /// before that, of which the driver did not tell it, unless the device left them where they are.
    pub(super) fn end_turn(&mut self, its_turn: bool) -> bool {
        if !its_turn || !self.ring.ready() {
            return self.paused && self.ring.ready();
        }
        let rings = self.site.rings(self.index);
        let more = self.ring.enable_notification(&rings);
        if more.is_err() {
            self.fail();
        }
        more.unwrap_or_default() && (self.taken > 0 || self.wants_more)
    }

    /// Whether the driver wants to be told of what was completed.
    pub(super) fn wants_interrupt(&mut self) -> bool {
        if !std::mem::take(&mut self.completed) || !self.ring.ready() {
            return false;
        }
        let rings = self.site.rings(self.index);
        let wants = self.ring.needs_notification(&rings);
        if wants.is_err() {
            self.fail();
        }
        std::mem::take(&mut self.lied) || wants.unwrap_or_default()
    }

    /// Whether there is a request to take.
    pub fn is_empty(&mut self) -> bool {
        let rings = self.site.rings(self.index);
        match self.ring.avail_idx(&rings, Ordering::Acquire) {
            Ok(index) => index.0 == self.ring.next_avail(),
            Err(_) => true,
        }
    }
}

impl Request {
    /// The index of its first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The run in which it was taken.
    pub(super) fn run(&self) -> &Run {
        &self.site.run
    }

    /// Whether its driver waits for the device to let go of it: it has asked for a reset.
    pub fn is_given_up(&self) -> bool {
        self.site.resetting.load(Ordering::SeqCst)
    }

    /// The buffers that the device reads.
    pub fn readable(&self) -> &[Buffer] {
        &self.readable
    }

    /// The buffers that the device writes.
    pub fn writable(&self) -> &[Buffer] {
        &self.writable
    }

    /// Whether all of its pages have stayed shared since it was taken.
    ///
    /// # Errors
    /// [`NoAccess`] if not: the bytes of a page are lost.
    pub fn intact(&self) -> Result<(), NoAccess> {
        Ok(self.site.buffers(self.queue, self.head, &self.flight).intact()?)
    }

    /// Copies bytes out of the readable buffers, from `offset` of all of them on.
    ///
    /// # Errors
    /// [`NoAccess`], also if there are not so many.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), NoAccess> {
        let memory = self.site.buffers(self.queue, self.head, &self.flight);
        let parts = Parts::new(&self.readable, offset, into.len())?;
        parts.each(|gpa, part| Ok(memory.read(gpa, &mut into[part])?))
    }

    /// Copies bytes into the writable buffers, from `offset` of all of them on.
    ///
    /// # Errors
    /// As [`Request::read`].
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), NoAccess> {
        let memory = self.site.buffers(self.queue, self.head, &self.flight);
        let parts = Parts::new(&self.writable, offset, from.len())?;
        parts.each(|gpa, part| Ok(memory.write(gpa, &from[part])?))
    }

    /// Reads a file from offset `at` on into `len` bytes of the writable buffers, from `offset` of all of them on.
    ///
    /// # Errors
    /// EFAULT where [`Request::read`] has [`NoAccess`], or a page is poisoned; those of preadv(2); EIO where the file ends.
    pub fn write_from_file(&self, offset: u64, len: usize, file: &File, at: u64) -> Result<(), Errno> {
        self.held(&self.writable, offset, len, true, |parts| parts.fill_from(file, at))
    }

    /// Writes `len` bytes of the readable buffers, from `offset` of all of them on, to a file from offset `at` on.
    ///
    /// # Errors
    /// As [`Request::write_from_file`], with pwritev(2).
    pub fn read_to_file(&self, offset: u64, len: usize, file: &File, at: u64) -> Result<(), Errno> {
        self.held(&self.readable, offset, len, false, |parts| parts.write_to(file, at))
    }

    fn held(
        &self,
        buffers: &[Buffer],
        offset: u64,
        len: usize,
        write: bool,
        transfer: impl FnOnce(SharedParts<'_>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut places = Vec::new();
        Parts::new(buffers, offset, len)?.each(|gpa, part| {
            places.push((gpa, part.len() as u64));
            Ok(())
        })?;
        let memory = self.site.buffers(self.queue, self.head, &self.flight);
        transfer(memory.hold_all(&places, write).map_err(NoAccess::from)?)
    }
}

/// Bytes of all these buffers together.
pub fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
}

/// A part of some buffers.
struct Parts<'a> {
    buffers: &'a [Buffer],
    offset: u64,
    len: usize,
}

impl<'a> Parts<'a> {
    fn new(buffers: &'a [Buffer], offset: u64, len: usize) -> Result<Self, NoAccess> {
        let end = offset.checked_add(len as u64).ok_or(NoAccess)?;
        match end <= total(buffers) {
            true => Ok(Self { buffers, offset, len }),
            false => Err(NoAccess),
        }
    }

    /// Calls `copy` for each piece of it: its gpa, and which bytes of the part it is.
    fn each(&self, mut copy: impl FnMut(u64, std::ops::Range<usize>) -> Result<(), NoAccess>) -> Result<(), NoAccess> {
        let (mut skip, mut done) = (self.offset, 0);
        for buffer in self.buffers {
            let len = u64::from(buffer.len);
            if skip >= len {
                skip -= len;
                continue;
            }
            let count = ((len - skip) as usize).min(self.len - done);
            if count == 0 {
                break;
            }
            let gpa = buffer.gpa.checked_add(skip).ok_or(NoAccess)?;
            copy(gpa, done..done + count)?;
            (skip, done) = (0, done + count);
        }
        Ok(())
    }
}
