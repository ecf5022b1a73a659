//! Images to load into guest memory: raw bytes, or the segments of an ELF file.

use object::elf;
use object::read::elf::{FileHeader, ProgramHeader};

use crate::error::Error;

/// A contiguous part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// The gpa that it is loaded at.
    pub gpa: u64,
    /// Its content.
    pub bytes: &'a [u8],
    /// How many zero bytes follow it in memory.
    pub zeroes: u64,
}

impl Segment<'_> {
    /// How many bytes of memory it takes.
    pub fn len(&self) -> u64 {
        (self.bytes.len() as u64).saturating_add(self.zeroes)
    }

    /// Whether it takes none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An image: its segments and its entry point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image<'a> {
    /// In the order of the file.
    pub segments: Vec<Segment<'a>>,
    /// The guest-physical address of the first instruction.
    pub entry: u64,
}

impl<'a> Image<'a> {
    /// One segment with these bytes, loaded and entered at gpa `at`.
    pub fn raw(bytes: &'a [u8], at: u64) -> Self {
        let segments = vec![Segment {
            gpa: at,
            bytes,
            zeroes: 0,
        }];
        Self { segments, entry: at }
    }

    /// Whether `bytes` begin with the magic number of ELF.
    pub fn is_elf(bytes: &[u8]) -> bool {
        bytes.starts_with(&elf::ELFMAG)
    }

    /// The loadable segments of an ELF file for x86-64, at their physical addresses (p_paddr).
    ///
    /// # Errors
    /// `Invalid` for any other file, or one that is damaged, has no such segment, or has two for the same address: with
    /// thousands of them, each as large as memory, there would be no end of loading.
    pub fn elf(bytes: &'a [u8]) -> Result<Self, Error> {
        let broken = |error: object::Error| Error::Invalid(format!("not an x86-64 ELF file: {error}"));
        let header = elf::FileHeader64::<object::LittleEndian>::parse(bytes).map_err(broken)?;
        let endian = header.endian().map_err(broken)?;
        if header.e_machine(endian) != elf::EM_X86_64 {
            return Err(Error::Invalid("the ELF file is not for x86-64".to_owned()));
        }
        let mut segments = Vec::new();
        let mut entry = header.e_entry(endian);
        let linked_entry = entry;
        for program in header.program_headers(endian, bytes).map_err(broken)? {
            if program.p_type(endian) != elf::PT_LOAD || program.p_memsz(endian) == 0 {
                continue;
            }
            let outside = |()| Error::Invalid("an ELF segment lies outside the file".to_owned());
            let data = program.data(endian, bytes).map_err(outside)?;
            if data.len() as u64 > program.p_memsz(endian) {
                return Err(Error::Invalid(
                    "an ELF segment is longer in the file than in memory".to_owned(),
                ));
            }
            let offset = linked_entry.wrapping_sub(program.p_vaddr(endian));
            if offset < program.p_memsz(endian) {
                entry = program.p_paddr(endian).wrapping_add(offset);
            }
            segments.push(Segment {
                gpa: program.p_paddr(endian),
                bytes: data,
                zeroes: program.p_memsz(endian) - data.len() as u64,
            });
        }
        if segments.is_empty() {
            return Err(Error::Invalid("the ELF file has no segments to load".to_owned()));
        }
        let mut ranges: Vec<(u64, u64)> = segments.iter().map(|segment| (segment.gpa, segment.len())).collect();
        ranges.sort_unstable();
        let overlap = ranges
            .windows(2)
            .find(|pair| pair[0].0.saturating_add(pair[0].1) > pair[1].0);
        if let Some(pair) = overlap {
            let (first, second) = (pair[0].0, pair[1].0);
            let message = format!("two ELF segments overlap: those that begin at {first:#x} and {second:#x}");
            return Err(Error::Invalid(message));
        }
        Ok(Self { segments, entry })
    }
}
