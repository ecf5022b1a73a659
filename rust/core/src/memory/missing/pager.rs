//! Where the bytes of missing pages come from.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::errno::Errno;
use crate::error::{Error, Failure};
use crate::hypervisor::mapping::Mapping;
use crate::hypervisor::raw;
use crate::input::open_regular;
use crate::memory::address::{PAGE_SIZE, Range, State};

/// Gives missing pages their bytes. Called by one thread, for one page after the other.
pub trait Pager: Send + Sync {
    /// Gives the bytes of [`page`](Wanted::page), or of more of [`around`](Wanted::around) at once; in `bytes`, if it likes.
    ///
    /// # Errors
    /// A failure ends the run.
    fn missing(&self, wanted: &Wanted, bytes: &mut Vec<u8>) -> Result<Given<'_>, Failure>;
}

/// The pages that a pager gives, and where their bytes are.
pub enum Given<'a> {
    /// In the buffer, in place of what was there.
    Bytes(Range),
    /// In a mapping, at their gpas.
    Mapped(Range, &'a Mapping),
    /// Nobody here has them: this is a child that was forked while the pager was called, and the machine is its parent's.
    Forked,
}

/// A page that somebody touched, and that has no bytes yet.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// It.
    pub page: Range,
    /// The missing pages around it, without a gap, of a block of 2 MiB.
    pub around: Range,
    /// The side that its bytes are on: the page's state.
    pub state: State,
    /// Who touched it.
    pub by: By,
}

/// A page that the pager was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Came {
    /// Its gpa.
    pub gpa: u64,
    /// The side that its bytes are on.
    pub state: State,
    /// Who touched it first.
    pub by: By,
    /// When the pager was asked, in nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Bytes that came with it, its own among them; those of the page if the pager failed.
    pub bytes: u64,
    /// How long the pager took.
    pub nanoseconds: u64,
    /// Whether it failed.
    pub failed: bool,
}

/// Who touches a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// A vCPU, or KVM for it in the same thread.
    Vcpu(u32),
    /// KVM in a thread of the kernel, or in an ioctl.
    Kvm,
    /// A device.
    Device,
    /// Any other thread of this process.
    Host,
}

impl By {
    /// The vCPU's index.
    pub fn vcpu(&self) -> Option<u32> {
        match self {
            By::Vcpu(vcpu) => Some(*vcpu),
            By::Kvm | By::Device | By::Host => None,
        }
    }

    /// What it is, in a word.
    pub fn as_str(&self) -> &'static str {
        match self {
            By::Vcpu(_) => "vcpu",
            By::Kvm => "kvm",
            By::Device => "device",
            By::Host => "host",
        }
    }
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            By::Vcpu(vcpu) => write!(f, "vCPU {vcpu}"),
            By::Kvm => f.write_str("KVM"),
            By::Device => f.write_str("a device"),
            By::Host => f.write_str("the host"),
        }
    }
}

/// How many bytes are read at once for who goes through memory in order, as far as they are missing.
const READ_AHEAD: u64 = 64 << 10;

impl Wanted {
    /// What to read: from here on, or up to here, if memory is being touched in that order, as far as that can be told from
    /// the page before and the one after; else the page.
    fn likely(&self) -> Range {
        let (page, around) = (self.page, self.around);
        let (gpa, end) = match (around.gpa() == page.gpa(), around.end() == page.end()) {
            (true, false) => (page.gpa(), around.end().min(page.gpa() + READ_AHEAD)),
            (false, true) => (around.gpa().max(page.end().saturating_sub(READ_AHEAD)), page.end()),
            (true, true) | (false, false) => return page,
        };
        Range::new(gpa, end - gpa).unwrap_or(page)
    }
}

/// A file for each side, in which a page's offset is its gpa. It is mapped, so that the bytes of several pages are copied once;
/// by the kernel alone, for which a file that was cut off is an errno.
pub struct FilePager {
    files: [Source; 2],
}

struct Source {
    path: PathBuf,
    file: Arc<File>,
    mapping: Mapping,
}

/// A file has no such bytes.
#[derive(Debug, thiserror::Error)]
#[error("{}: reading the guest's memory failed with {errno}", path.display())]
struct NotRead {
    path: PathBuf,
    errno: Errno,
}

impl FilePager {
    /// A file for both sides, which has bytes for all of memory.
    ///
    /// # Errors
    /// `File` where it cannot be opened; `Invalid` for what is no regular file, and for one that is too short.
    pub fn of_one(path: &Path, memory_end: u64) -> Result<Self, Error> {
        let failed = |error: std::io::Error| Error::File {
            path: path.to_path_buf(),
            errno: error.into(),
        };
        let file = open_regular(path)?;
        let size = file.metadata().map_err(failed)?.len();
        if size < memory_end {
            return Err(Error::Invalid(format!(
                "pager: {} has {size:#x} bytes, and memory ends at {memory_end:#x}",
                path.display()
            )));
        }
        let again = file.try_clone().map_err(failed)?;
        let side = |file| (path.to_path_buf(), file);
        Self::new(side(file), side(again), memory_end)
    }

    /// Files of shared and of private bytes, each for all of memory.
    ///
    /// # Errors
    /// `File` where one cannot be mapped.
    pub fn new(shared: (PathBuf, File), private: (PathBuf, File), memory_end: u64) -> Result<Self, Error> {
        let source = |(path, file)| {
            let file = Arc::new(file);
            match Mapping::of_source(&file, memory_end) {
                Ok(mapping) => Ok(Source { path, file, mapping }),
                Err(errno) => Err(Error::File { path, errno }),
            }
        };
        Ok(Self {
            files: [source(shared)?, source(private)?],
        })
    }
}

impl Source {
    /// Reads a page. To map it would take longer: the kernel maps others around it, too.
    fn one(&self, page: Range, bytes: &mut Vec<u8>) -> Result<Given<'_>, Errno> {
        // Of the last one's size, mostly: nothing is cleared for what is overwritten.
        bytes.resize(page.size() as usize, 0);
        match self.file.read_exact_at(bytes, page.gpa()) {
            Ok(()) => Ok(Given::Bytes(page)),
            // It was cut off since.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(Errno(libc::EIO)),
            Err(error) => Err(error.into()),
        }
    }

    /// Has the kernel read pages, here, where it may take as long as it likes: nothing is locked.
    fn several(&self, pages: Range) -> Result<Given<'_>, Errno> {
        raw::populate(&self.mapping, pages.gpa(), pages.size() as usize)?;
        Ok(Given::Mapped(pages, &self.mapping))
    }
}

impl Pager for FilePager {
    fn missing(&self, wanted: &Wanted, bytes: &mut Vec<u8>) -> Result<Given<'_>, Failure> {
        let source = &self.files[wanted.state as usize];
        let likely = wanted.likely();
        let several = match likely.size() {
            PAGE_SIZE => None,
            // Where that fails, the page may be there still.
            _ => source.several(likely).ok(),
        };
        let given = several.map_or_else(|| source.one(wanted.page, bytes), Ok);
        Ok(given.map_err(|errno| NotRead {
            errno,
            path: source.path.clone(),
        })?)
    }
}
