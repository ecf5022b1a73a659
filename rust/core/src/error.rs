//! Errors: each says what happened, where in the guest, and what to do about it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::errno::Errno;

/// A failure of code that the machine calls: an exception in a hook, or a return value that is not a decision.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Where in the guest something happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// The vCPU's index.
    pub vcpu: u32,
    /// The page, or the address of the access.
    pub gpa: Option<u64>,
    /// The page's state: "private", "shared", or "mixed" for a range.
    pub state: Option<&'static str>,
    /// The guest's instruction pointer.
    pub rip: u64,
    /// The function that it is in, and the offset, if a kernel was booted whose symbols are known.
    pub symbol: Option<String>,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}", self.vcpu)?;
        if let Some(gpa) = self.gpa {
            write!(f, ", gpa {gpa:#x}")?;
        }
        if let Some(state) = self.state {
            write!(f, ", state {state}")?;
        }
        write!(f, ", rip {:#x}", self.rip)?;
        match &self.symbol {
            Some(symbol) => write!(f, " ({symbol})"),
            None => Ok(()),
        }
    }
}

/// What a vCPU was executing; it goes on after a [`Site`] in a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Executing {
    /// The instruction, if its bytes can be had.
    pub instruction: Option<String>,
    /// CR2: the linear address of its last page fault.
    pub cr2: Option<u64>,
}

impl fmt::Display for Executing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(instruction) = &self.instruction {
            write!(f, ", {instruction}")?;
        }
        match self.cr2 {
            Some(cr2) => write!(f, ", cr2 {cr2:#x}"),
            None => Ok(()),
        }
    }
}

/// Why a machine could not be made, or a call or a run failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no usable /dev/kvm.
    #[error("{0}")]
    KvmUnavailable(String),
    /// This host or this VM type cannot do it.
    #[error("{0}")]
    NotSupported(String),
    /// An argument is out of its range.
    #[error("{0}")]
    Invalid(String),
    /// The machine is in a state in which this cannot be done.
    #[error("{0}")]
    Busy(&'static str),
    /// An access outside of guest memory.
    #[error("{size:#x} bytes at {gpa:#x} do not lie in the guest's {memory:#x} bytes")]
    Outside {
        /// Start.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// Bytes of guest memory.
        memory: u64,
    },
    /// A system call failed.
    #[error("cannot {what}: {errno}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Its errno.
        errno: Errno,
    },
    /// A file or folder cannot be read or written.
    #[error("{}: {errno}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The errno.
        errno: Errno,
    },
    /// The host tried to read or write a private page.
    #[error("page {gpa:#x} is private: the host cannot {what} it, and converting it to shared would zero it")]
    PrivateMemory {
        /// The first private page in the range.
        gpa: u64,
        /// "read" or "write".
        what: &'static str,
    },
    /// KVM could not fault in the host memory of a memslot.
    #[error(
        "{site}: KVM_RUN failed with EFAULT and no memory fault, so the host memory of {slot} cannot be reached \
         (unmapped, PROT_NONE, or out of memory); this is not a conversion and nothing was converted"
    )]
    BadBacking {
        /// Where.
        site: Site,
        /// The memslots that it may be, as text: KVM does not say which.
        slot: String,
    },
    /// The same fault repeats although the page already is in the state that the access needs.
    #[error(
        "livelock: {site}{executing}: the same {access} access faulted {repeats} times with no change in between, and the page \
         already is {access}; no conversion can satisfy it (there is no memslot, it has no guest_memfd, or the \
         file was closed){history}"
    )]
    Livelock {
        /// Where.
        site: Site,
        /// What the vCPU was executing.
        executing: Box<Executing>,
        /// "private" or "shared".
        access: &'static str,
        /// How many faults in a row.
        repeats: u32,
        /// The last events on this page, a line each.
        history: Box<str>,
    },
    /// A conversion failed in the kernel.
    #[error("{site}: {source}")]
    Conversion {
        /// Where the request came from.
        site: Site,
        /// What went wrong.
        source: ConvertError,
    },
    /// A conversion that the host asked for failed.
    #[error(transparent)]
    HostConversion(#[from] ConvertError),
    /// KVM_RUN returned an exit or an errno after which the run cannot go on.
    #[error("{site}: {what}")]
    Exit {
        /// Where.
        site: Site,
        /// The exit or the errno, in words.
        what: String,
    },
    /// A hook failed, or returned something that is not a decision.
    #[error("{site}: {failure}")]
    Hook {
        /// The request.
        site: Site,
        /// What it raised.
        failure: Failure,
    },
    /// A device's own code failed.
    #[error("device {device}: {failure}")]
    Device {
        /// Its name.
        device: Arc<str>,
        /// What it raised.
        failure: Failure,
    },
    /// The policy failed to judge a device's access to a page that is not shared, or answered with no decision about it.
    #[error("{access}: {failure}")]
    DeviceHook {
        /// The access, which was not carried out: which device wanted what.
        access: String,
        /// What it raised.
        failure: Failure,
    },
    /// A missing page's bytes could not be had.
    #[error("page {gpa:#x} has no bytes yet, {by} touched it, and its pager failed: {failure}")]
    Pager {
        /// The page.
        gpa: u64,
        /// Who touched it.
        by: String,
        /// If that was a vCPU, its index.
        vcpu: Option<u32>,
        /// What the pager said.
        failure: Failure,
    },
    /// A page that was needed did not come, and what needed it went on without its bytes.
    #[error("this machine is lost: {0}; make another one, or put it back with reset_to if it was resumed lazily")]
    Lost(Arc<str>),
    /// The `interrupt` callback of a run failed: its caller wants it to end.
    #[error("interrupted: {0}")]
    Interrupted(Failure),
}

impl Error {
    /// Where in the guest it happened, for those that have such a place.
    pub(crate) fn site_mut(&mut self) -> Option<&mut Site> {
        match self {
            Error::BadBacking { site, .. }
            | Error::Livelock { site, .. }
            | Error::Conversion { site, .. }
            | Error::Exit { site, .. }
            | Error::Hook { site, .. } => Some(site),
            Error::KvmUnavailable(_)
            | Error::NotSupported(_)
            | Error::Invalid(_)
            | Error::Busy(_)
            | Error::Outside { .. }
            | Error::Host { .. }
            | Error::File { .. }
            | Error::PrivateMemory { .. }
            | Error::HostConversion(_)
            | Error::Device { .. }
            | Error::DeviceHook { .. }
            | Error::Pager { .. }
            | Error::Lost(_)
            | Error::Interrupted(_) => None,
        }
    }
}

/// Why a conversion failed. What was changed all the same, the variant says.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The range does not lie in the guest's memory.
    #[error("range {gpa:#x} + {size:#x} is not a page-aligned, non-empty part of the guest's {memory:#x} bytes")]
    Range {
        /// Start.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// Bytes of guest memory.
        memory: u64,
    },
    /// It takes more memslots than KVM has left (KVM_CAP_NR_MEMSLOTS).
    #[error(
        "out of memslots: converting {} needs {needed} and {available} are free; nothing was changed. Convert \
         larger or neighbouring ranges (policies.Align), or use enforcement=\"attributes\"",
        addresses(*gpa, *size)
    )]
    NoSlots {
        /// What was to be converted: start.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// Memslots that the conversion creates.
        needed: usize,
        /// Memslots that can be created, counting those that it deletes.
        available: usize,
    },
    /// A system call failed, and what had been done was undone.
    #[error("converting {} failed with {errno}; what had been changed was undone", addresses(*gpa, *size))]
    Undone {
        /// What was to be converted: start.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// The errno of the call that failed.
        errno: Errno,
    },
    /// A system call failed, and so did one that was to undo what had been done: what KVM enforces is not known any
    /// more.
    #[error(
        "converting {} failed with {errno} and undoing it with {undo}: what KVM enforces there is unknown, so \
         this machine converts nothing any more; close it",
        addresses(*gpa, *size)
    )]
    Inconsistent {
        /// What was to be converted: start.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// The errno of the call that failed.
        errno: Errno,
        /// The errno of the call that was to undo it.
        undo: Errno,
    },
    /// More bytes would be shared than the decision allows.
    #[error("sharing {} would take the shared bytes above {max:#x}; nothing was changed", addresses(*gpa, *size))]
    OverQuota {
        /// What was to be converted: start.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// Bytes that may be shared.
        max: u64,
    },
    /// A listener refused a conversion to private.
    #[error("a listener refused to let {} become private; nothing was changed", addresses(*gpa, *size))]
    Refused {
        /// The pages that it refused: start.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// A listener failed.
    #[error("a listener failed: {0}")]
    Listener(Failure),
    /// The machine is closed.
    #[error("this machine is closed")]
    Closed,
    /// The state was changed, but the old side could not be discarded.
    #[error(
        "{} was converted, but discarding its old side failed with {errno}: old bytes may come back",
        addresses(*gpa, *size)
    )]
    Discard {
        /// What was converted: start.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// The errno of the call that failed.
        errno: Errno,
    },
    /// It failed after pages had been converted, which stay so: in a later part of a large range, or in what follows the
    /// conversion of a part.
    #[error("{source}; {}", what_stays(*gpa, *size, *changed))]
    Partly {
        /// What was converted: start.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// Of these, the bytes whose state changed.
        changed: u64,
        /// Why no more was.
        source: Box<ConvertError>,
    },
}

impl ConvertError {
    /// Whether a listener refused, so that the guest may try again.
    pub fn is_refusal(&self) -> bool {
        match self {
            ConvertError::Refused { .. } => true,
            ConvertError::Partly { source, .. } => source.is_refusal(),
            _ => false,
        }
    }

    /// The listener's own failure, if that is why, and what was converted before it, in words.
    ///
    /// # Errors
    /// Itself, if it has another cause.
    pub fn into_listeners(self) -> Result<(Failure, Option<String>), Self> {
        match self {
            ConvertError::Listener(failure) => Ok((failure, None)),
            ConvertError::Partly {
                gpa,
                size,
                changed,
                source,
            } => match source.into_listeners() {
                Ok((failure, _)) => Ok((failure, Some(what_stays(gpa, size, changed)))),
                Err(source) => Err(ConvertError::Partly {
                    gpa,
                    size,
                    changed,
                    source: Box::new(source),
                }),
            },
            error => Err(error),
        }
    }

    /// The errno that the guest gets in RAX for an explicit request, as a positive number; `None` where the run has to end.
    pub fn guest_errno(&self) -> Option<Errno> {
        match self {
            ConvertError::Range { .. } | ConvertError::OverQuota { .. } => Some(Errno(libc::EINVAL)),
            ConvertError::NoSlots { .. } => Some(Errno(libc::ENOSPC)),
            ConvertError::Undone { errno, .. } => Some(*errno),
            // The listener still uses the page. The guest may ask again once it does not.
            ConvertError::Refused { .. } => Some(Errno(libc::EAGAIN)),
            // The only answer after which a guest asks again for what it did not get.
            ConvertError::Partly { source, .. } => source.guest_errno().map(|_| Errno(libc::EAGAIN)),
            ConvertError::Inconsistent { .. }
            | ConvertError::Discard { .. }
            | ConvertError::Listener(_)
            | ConvertError::Closed => None,
        }
    }
}

/// `[start, end)`.
fn addresses(gpa: u64, size: u64) -> String {
    format!("[{gpa:#x}, {:#x})", gpa.saturating_add(size))
}

fn what_stays(gpa: u64, size: u64, changed: u64) -> String {
    format!(
        "{} has been converted and stays so, {changed:#x} bytes of it changed",
        addresses(gpa, size)
    )
}
