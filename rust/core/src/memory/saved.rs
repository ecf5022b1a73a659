//! Guest memory in files: both sides and the states of all pages, for a machine that is put aside.
//!
//! A side's file has a byte for each of the side, at its gpa. Pages of zeroes are holes in it, and take no room.

use std::fs::File;
use std::hash::Hasher;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::SeekFrom;
use twox_hash::XxHash3_64;

use super::address::{PAGE_SIZE, Range, State};
use super::backing::{Backing, BackingKind};
use super::guest_memory::GuestMemory;
use super::missing::PageBits;
use super::page_states::Held;
use crate::allocation::reserve;
use crate::errno::Errno;
use crate::error::{ConvertError, Error};
use crate::input::Watch;

/// How much is copied between two calls of the watch.
const PIECE: usize = 1 << 20;
const PAGE: usize = PAGE_SIZE as usize;
static ZEROES: [u8; PAGE] = [0; PAGE];

/// Takes a piece: where it is, and its bytes.
type Piece<'a> = dyn FnMut(u64, &[u8]) -> Result<(), Error> + 'a;

fn failed(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Host { what, errno }
}

fn of_file(path: &Path) -> impl Fn(Errno) -> Error {
    move |errno| Error::File {
        path: path.to_path_buf(),
        errno,
    }
}

/// What the pages with bytes are, and what is in them. Holes do not count, so a copy of a file has the same sum.
struct Sum(XxHash3_64);

impl Sum {
    fn add(&mut self, gpa: u64, page: &[u8]) {
        self.0.write_u64(gpa);
        self.0.write(page);
    }
}

/// Calls `take` for each part of a file that has data, in whole pages. What else the file has are zeroes.
fn each_extent(
    file: &File,
    end: u64,
    failed: &dyn Fn(Errno) -> Error,
    take: &mut dyn FnMut(Range) -> Result<(), Error>,
) -> Result<(), Error> {
    let seek = |to| match rustix::fs::seek(file, to) {
        Ok(at) => Ok(Some(at.min(end))),
        // There is none after this.
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(errno) => Err(failed(errno.into())),
    };
    let mut at = 0;
    while at < end {
        let Some(data) = seek(SeekFrom::Data(at))? else {
            break;
        };
        let hole = seek(SeekFrom::Hole(data))?.unwrap_or(end);
        let data = data - data % PAGE_SIZE;
        at = hole.next_multiple_of(PAGE_SIZE).min(end);
        if let Some(extent) = Range::new(data, at - data) {
            take(extent)?;
        }
    }
    Ok(())
}

/// Calls `copy` for each piece of a file's data: where it is, and its bytes.
fn each_piece(
    file: &File,
    end: u64,
    failed: &dyn Fn(Errno) -> Error,
    watch: &mut Watch<'_>,
    copy: &mut Piece<'_>,
) -> Result<(), Error> {
    let mut buffer = Vec::new();
    reserve(&mut buffer, PIECE).map_err(failed)?;
    buffer.resize(PIECE, 0);
    each_extent(file, end, failed, &mut |extent| {
        let mut at = extent.gpa();
        while at < extent.end() {
            watch().map_err(Error::Interrupted)?;
            let piece = &mut buffer[..(extent.end() - at).min(PIECE as u64) as usize];
            file.read_exact_at(piece, at).map_err(|error| failed(error.into()))?;
            copy(at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    })
}

/// The runs of pages in `piece` that are not all zeroes: their offsets.
fn runs_with_bytes(piece: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (at, page) in (0..).step_by(PAGE).zip(piece.chunks_exact(PAGE)) {
        if page == ZEROES {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.end == at => last.end += PAGE,
            _ => runs.push(at..at + PAGE),
        }
    }
    runs
}

/// All pages, held.
pub(crate) struct AllHeld<'a>(#[expect(dead_code, reason = "it is kept, and dropped")] Option<Held<'a>>);

impl GuestMemory {
    /// Whether the private side's bytes can be put aside at all.
    pub(crate) fn can_be_saved(&self) -> bool {
        self.is_reachable(State::Private)
    }

    /// Keeps all pages as they are until what is returned is dropped: no conversion begins, and those under way are over.
    pub(crate) fn hold_all(&self) -> AllHeld<'_> {
        let all = Range::new(0, self.views().memory_end());
        AllHeld(all.map(|all| self.states.hold(all)))
    }

    /// Writes a side to an empty file. Returns the sum of what it has.
    ///
    /// # Errors
    /// `File` where writing fails, and `Host` where reading does; `Interrupted` for a failure of `watch`.
    pub(crate) fn save_side(
        &self,
        state: State,
        into: &File,
        path: &Path,
        watch: &mut Watch<'_>,
    ) -> Result<u64, Error> {
        let write_failed = of_file(path);
        let end = self.views().memory_end();
        into.set_len(end).map_err(|error| write_failed(error.into()))?;
        let mut sum = Sum(XxHash3_64::new());
        let mut copy = |gpa: u64, piece: &[u8]| {
            for run in runs_with_bytes(piece) {
                let at = gpa + run.start as u64;
                let bytes = &piece[run];
                for (page, gpa) in bytes.chunks_exact(PAGE).zip((at..).step_by(PAGE)) {
                    sum.add(gpa, page);
                }
                into.write_all_at(bytes, at)
                    .map_err(|error| write_failed(error.into()))?;
            }
            Ok(())
        };
        let side = self.sides.of(state);
        match side.kind() {
            BackingKind::Memfd => each_piece(
                side.file(),
                end,
                &failed("read the guest's memory for a snapshot"),
                watch,
                &mut copy,
            )?,
            BackingKind::MappedGuestMemfd | BackingKind::GuestMemfd => {
                self.each_piece_in_state(side, state, watch, &mut copy)?;
            }
        }
        Ok(sum.0.finish())
    }

    /// A guest_memfd does not say where it has data: the pages in its state are read, which fills the holes among them.
    fn each_piece_in_state(
        &self,
        side: &Backing,
        state: State,
        watch: &mut Watch<'_>,
        copy: &mut Piece<'_>,
    ) -> Result<(), Error> {
        let read_failed = failed("read the guest's memory for a snapshot");
        let mut buffer = vec![0; PIECE];
        for run in self.runs().map_err(&read_failed)? {
            let mut at = run.range.gpa();
            while run.state == state && at < run.range.end() {
                watch().map_err(Error::Interrupted)?;
                let piece = &mut buffer[..(run.range.end() - at).min(PIECE as u64) as usize];
                side.read(at, piece).map_err(&read_failed)?;
                copy(at, piece)?;
                at += piece.len() as u64;
            }
        }
        Ok(())
    }

    /// Reads a side from a file that [`save_side`](Self::save_side) has written, into memory that has not been used. Returns
    /// the sum of what it has.
    ///
    /// # Errors
    /// `Invalid` for a file of another size, and for bytes where there is no memory; else as `save_side`.
    pub(crate) fn load_side(
        &self,
        state: State,
        from: &File,
        path: &Path,
        watch: &mut Watch<'_>,
    ) -> Result<u64, Error> {
        let read_failed = of_file(path);
        let end = self.check_end(from, path)?;
        let side = self.sides.of(state);
        let write_failed = failed("give the guest its memory");
        let mut sum = Sum(XxHash3_64::new());
        each_piece(from, end, &read_failed, watch, &mut |gpa, piece| {
            for run in runs_with_bytes(piece) {
                let at = gpa + run.start as u64;
                let bytes = &piece[run];
                if self.pages(at, bytes.len() as u64).is_none() {
                    return Err(Error::Invalid(format!(
                        "there are bytes at {at:#x}, which is no memory"
                    )));
                }
                for (page, gpa) in bytes.chunks_exact(PAGE).zip((at..).step_by(PAGE)) {
                    sum.add(gpa, page);
                }
                side.write(at, bytes).map_err(&write_failed)?;
            }
            Ok(())
        })?;
        Ok(sum.0.finish())
    }

    /// The pages for which a file that [`save_side`](Self::save_side) has written has bytes: they are missing until they are
    /// read.
    ///
    /// # Errors
    /// As `load_side`.
    pub(crate) fn pages_in(&self, from: &File, path: &Path, watch: &mut Watch<'_>) -> Result<PageBits, Error> {
        let read_failed = of_file(path);
        let end = self.check_end(from, path)?;
        let mut pages = PageBits::new(end).map_err(failed("list the guest's missing pages"))?;
        each_extent(from, end, &read_failed, &mut |extent| {
            watch().map_err(Error::Interrupted)?;
            // A file system may round up what a hole is.
            for part in self.views().ram().iter().filter_map(|ram| ram.intersect(&extent)) {
                pages.insert(part);
            }
            Ok(())
        })?;
        Ok(pages)
    }

    /// Frees all bytes of a side. The caller holds all pages.
    ///
    /// # Errors
    /// `Host` where that fails.
    pub(super) fn discard_all(&self, state: State) -> Result<(), Error> {
        let discard_failed = failed("free the guest's memory");
        let side = self.sides.of(state);
        each_extent(side.file(), self.views().memory_end(), &discard_failed, &mut |extent| {
            self.discard_side(state, extent).map_err(&discard_failed)
        })
    }

    /// The end of memory, which is the file's.
    fn check_end(&self, from: &File, path: &Path) -> Result<u64, Error> {
        let has = from.metadata().map_err(|error| of_file(path)(error.into()))?.len();
        let end = self.views().memory_end();
        match has == end {
            true => Ok(end),
            false => Err(Error::Invalid(format!(
                "a file of the guest's memory has {has:#x} bytes, and the memory ends at {end:#x}"
            ))),
        }
    }

    /// A bit for each page up to memory's end, from bit 0 of the first byte on: whether it is private.
    ///
    /// # Errors
    /// `Host` without memory for them.
    pub(crate) fn private_bits(&self) -> Result<Vec<u8>, Error> {
        let what = "list the private pages for a snapshot";
        let mut bits = Vec::new();
        let bytes = bytes_of_bits(self.views().memory_end());
        reserve(&mut bits, bytes).map_err(failed(what))?;
        bits.resize(bytes, 0);
        let all = Range::new(0, self.views().memory_end());
        let snapshot = self.snapshot();
        let runs = all.into_iter().flat_map(|all| snapshot.runs_in(all));
        for run in runs.filter(|run| run.state == State::Private) {
            for page in run.range.gpa() / PAGE_SIZE..run.range.end() / PAGE_SIZE {
                bits[(page / 8) as usize] |= 1 << (page % 8);
            }
        }
        Ok(bits)
    }

    /// Makes these pages private and all others shared, in memory that has not been used.
    ///
    /// # Errors
    /// `Invalid` for another number of bits and for a private page that is no memory; those of a conversion; `Interrupted`
    /// for a failure of `watch`.
    pub(crate) fn set_private_bits(&self, bits: &[u8], watch: &mut Watch<'_>) -> Result<(), Error> {
        let end = self.views().memory_end();
        if bits.len() != bytes_of_bits(end) {
            return Err(Error::Invalid(format!("it has the states of {} pages", bits.len() * 8)));
        }
        let state = |page: u64| match bits[(page / 8) as usize] >> (page % 8) & 1 {
            0 => State::Shared,
            _ => State::Private,
        };
        let mut page = 0;
        while page < end / PAGE_SIZE {
            let to = state(page);
            let len = (page..end / PAGE_SIZE).take_while(|next| state(*next) == to).count() as u64;
            let range = Range::new(page * PAGE_SIZE, len * PAGE_SIZE);
            for part in self.views().ram().iter().filter_map(|ram| ram.intersect(&range?)) {
                watch().map_err(Error::Interrupted)?;
                self.convert(part.gpa(), part.size(), to, false)
                    .map_err(|error: ConvertError| Error::HostConversion(error))?;
            }
            page += len;
        }
        match (self.views().hole(), self.private_bytes()) {
            (Some(hole), private) if self.private_bits()? != bits => Err(Error::Invalid(format!(
                "a page of the hole at {:#x} is private, besides {private:#x} bytes of memory",
                hole.gpa()
            ))),
            _ => Ok(()),
        }
    }

    /// Makes these pages private and all others shared, in memory in use: converts what differs.
    ///
    /// # Errors
    /// As [`set_private_bits`](Self::set_private_bits).
    pub(crate) fn change_private_bits(&self, bits: &[u8], watch: &mut Watch<'_>) -> Result<(), Error> {
        let present = self.private_bits()?;
        let bit = |bits: &[u8], page: u64| bits[(page / 8) as usize] >> (page % 8) & 1;
        let differing = (0..).zip(present.iter().zip(bits)).filter(|(_, (is, was))| is != was);
        let pages = differing.flat_map(|(byte, _)| byte * 8..byte * 8 + 8);
        let mut pages = pages.filter(|page| bit(&present, *page) != bit(bits, *page)).peekable();
        while let Some(first) = pages.next() {
            let private = bit(bits, first);
            let mut end = first + 1;
            while pages
                .next_if(|page| *page == end && bit(bits, *page) == private)
                .is_some()
            {
                end += 1;
            }
            watch().map_err(Error::Interrupted)?;
            let to = if private == 1 { State::Private } else { State::Shared };
            let range = Range::of_pages(first, end);
            self.convert(range.gpa(), range.size(), to, false)?;
        }
        Ok(())
    }

    /// Whether these can be the private pages of this memory.
    pub(crate) fn can_be_private(&self, bits: &[u8]) -> bool {
        let hole = self.views().hole();
        let mut in_hole = hole
            .into_iter()
            .flat_map(|hole| hole.gpa() / PAGE_SIZE..hole.end() / PAGE_SIZE);
        bits.len() == bytes_of_bits(self.views().memory_end())
            && !in_hole.any(|page| bits[(page / 8) as usize] >> (page % 8) & 1 == 1)
    }

    /// Whether a conversion has kept its old side.
    pub(crate) fn has_kept(&self) -> bool {
        self.kept.load(Ordering::SeqCst)
    }

    /// Says so, for memory that is resumed.
    pub(crate) fn set_kept(&self, kept: bool) {
        self.kept.store(kept, Ordering::SeqCst);
    }
}

/// Bytes of the states of memory, a bit for each page.
pub(crate) fn bytes_of_bits(memory_end: u64) -> usize {
    (memory_end / PAGE_SIZE).div_ceil(8) as usize
}
