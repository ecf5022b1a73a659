//! The symbols of a Linux kernel and its code, at the addresses that it is linked at.
//!
//! A kernel that runs elsewhere (KASLR) is displaced by [`Symbols::slide`]: subtract that from an address of the guest
//! before asking for it.

use std::fmt;

use super::kallsyms;
use super::pace::Pace;
use super::symtab;
use super::table::Table;
use super::vmlinux::{self, Loaded};
use crate::error::Error;
use crate::input::Watch;

/// KASLR moves the kernel by a multiple of this (CONFIG_PHYSICAL_ALIGN), and by less than `KASLR_RANGE`.
const KASLR_STEP: u64 = 2 << 20;
const KASLR_RANGE: u64 = 1 << 30;

/// Where code is: the names of the symbols at its start and end.
const TEXTS: [([&str; 2], &str); 2] = [
    (["_text", "_stext"], "_etext"),
    (["_sinittext", "_sinittext"], "_einittext"),
];

/// The symbols of a kernel with their link-time addresses, and its code.
#[derive(Clone)]
pub struct Symbols {
    table: Table,
    texts: Vec<Text>,
}

/// A part of the kernel that holds code.
#[derive(Clone)]
struct Text {
    start: u64,
    end: u64,
    /// From `start` on; fewer than to `end` where the file has no more.
    bytes: Vec<u8>,
}

impl Symbols {
    /// The symbols of an ELF vmlinux: from its symbol table, or from the kallsyms tables of a stripped one.
    ///
    /// It keeps the names and the code, some 20 MiB for a distribution's kernel, and not the rest of `vmlinux`.
    ///
    /// While it reads, it takes at most eight times the file's size. `watch` is called again and again.
    ///
    /// # Errors
    /// `Invalid` if the file is damaged, the kernel was built without CONFIG_KALLSYMS, or keeps its symbols in a way that is
    /// not known; `Interrupted` for a failure of `watch`; `Host` if there is no memory.
    pub fn read(vmlinux: &[u8], watch: &mut Watch<'_>) -> Result<Self, Error> {
        let pace = &mut Pace::new(watch);
        pace.look()?;
        let segments = vmlinux::segments(vmlinux)?;
        let mut table = match symtab::read(vmlinux, pace)? {
            Some(table) => table,
            None => kallsyms::read(vmlinux, &segments, pace)?,
        };
        table.shrink();
        let mut texts = Vec::new();
        for (starts, end) in TEXTS {
            pace.look()?;
            let Some(start) = starts.iter().find_map(|name| table.address(name)) else {
                continue;
            };
            if let Some(end) = table.address(end) {
                texts.extend(Text::new(start, end, &segments, pace)?);
            }
        }
        if texts.is_empty() {
            let why = "the kernel's symbols do not say where its code is: there is no _text and _etext";
            return Err(Error::Invalid(why.to_owned()));
        }
        Ok(Self { table, texts })
    }

    /// How many symbols there are.
    pub fn count(&self) -> usize {
        self.table.count()
    }

    /// The symbol that the code at `address` (link-time) belongs to, and the offset from it in bytes. `None` if the
    /// kernel has no code there.
    pub fn find(&self, address: u64) -> Option<(&str, u64)> {
        self.text(address)?;
        let (name, start) = self.table.at_or_below(address)?;
        Some((name, address - start))
    }

    /// The link-time address of a symbol, code or data; of several with this name the lowest. It compares every name.
    pub fn address(&self, name: &str) -> Option<u64> {
        self.table.address(name)
    }

    /// `length` bytes of code at `address` (link-time), as they are in the file: the running kernel patches itself.
    /// `None` if they do not all lie in the kernel's code.
    pub fn code(&self, address: u64, length: usize) -> Option<&[u8]> {
        let text = self.text(address)?;
        let skip = usize::try_from(address - text.start).ok()?;
        text.bytes.get(skip..skip.checked_add(length)?)
    }

    /// How far above its link-time addresses the kernel runs: 0 without KASLR.
    ///
    /// `anchors`: names of symbols, and the addresses at which they may be in the guest. The first decides whose
    /// displacement is possible, that is a multiple of 2 MiB below 1 GiB. `None` if there is none.
    pub fn slide(&self, anchors: &[(&str, u64)]) -> Option<u64> {
        anchors.iter().find_map(|&(name, address)| {
            let slide = address.checked_sub(self.address(name)?)?;
            (slide < KASLR_RANGE && slide.is_multiple_of(KASLR_STEP)).then_some(slide)
        })
    }

    fn text(&self, address: u64) -> Option<&Text> {
        self.texts.iter().find(|text| (text.start..text.end).contains(&address))
    }
}

impl fmt::Debug for Symbols {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Symbols")
            .field("count", &self.count())
            .finish_non_exhaustive()
    }
}

impl Text {
    fn new(start: u64, end: u64, segments: &[Loaded<'_>], pace: &mut Pace<'_, '_>) -> Result<Option<Self>, Error> {
        let Some(bytes) = segments.iter().find_map(|segment| segment.part(start, end)) else {
            return Ok(None);
        };
        let bytes = pace.copy(bytes)?;
        Ok(Some(Self { start, end, bytes }))
    }
}
