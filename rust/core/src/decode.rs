//! From KVM_RUN's result and the run page to one owned [`Exit`]: pure and total.
//!
//! `exit_reason` is not always written (early returns leave the previous value), so the caller writes [`SENTINEL`]
//! before each entry, and what the errno says decides whether the page is believed:
//!
//! | result | `exit_reason` | |
//! |---|---|---|
//! | EINTR, EAGAIN | ignored | nothing happened |
//! | EFAULT | MEMORY_FAULT | a page in the wrong state |
//! | EHWPOISON | MEMORY_FAULT | a poisoned page, never a conversion |
//! | EFAULT | anything else | the host memory behind the guest is broken |
//! | 0 | dispatched on | |

use crate::errno::Errno;

/// The byte of `struct kvm_run` at which the slice given to [`decode`] begins (`exit_reason`).
pub const PAGE_START: usize = 8;
/// `exit_reason` of a page in the wrong state (KVM_EXIT_MEMORY_FAULT).
pub const MEMORY_FAULT: u32 = kvm_bindings::KVM_EXIT_MEMORY_FAULT;
/// What the run loop writes into `exit_reason` before each entry. No exit of KVM has this number.
pub const SENTINEL: u32 = u32::MAX;

const UNION: usize = 32 - PAGE_START;

/// `struct kvm_run`, as offsets from [`PAGE_START`].
pub(crate) mod offset {
    use super::{PAGE_START, UNION};

    pub const EXIT_REASON: usize = 0;
    pub const HYPERCALL_RET: usize = UNION + 56;
    pub const MMIO_DATA: usize = UNION + 8;
    pub const VALID_REGS: usize = 288 - PAGE_START;
    pub const DIRTY_REGS: usize = 296 - PAGE_START;
    pub const REGS: usize = 304 - PAGE_START;
}

/// Why KVM_RUN came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A signal, or `immediate_exit`. Nothing is pending.
    Interrupted,
    /// EAGAIN: call again.
    TryAgain,
    /// ENOMEM. Also a signal that hit KVM's worker creation on the first entry.
    OutOfMemory,
    /// An access met a page in the wrong state (errno EFAULT). The instruction will execute again.
    MemoryFault(MemoryFault),
    /// An access met a poisoned page (errno EHWPOISON).
    Poison(MemoryFault),
    /// EFAULT without annotation: the host mapping behind a slot cannot be faulted in.
    BadBacking,
    /// Any other errno.
    Failed(Errno),
    /// Port IO. `data` is where in the page its bytes are, `size * count` of them.
    Io(Io),
    /// An access to an address without a memslot.
    Mmio(Mmio),
    /// A hypercall that was enabled to exit.
    Hypercall(Hypercall),
    /// HLT.
    Halt,
    /// A triple fault.
    Shutdown,
    /// KVM could not go on: emulation failed, or worse.
    InternalError {
        /// KVM_INTERNAL_ERROR_*: 1 is a failed emulation.
        suberror: u32,
    },
    /// The CPU refused to enter the guest.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// The guest wrote CR8, which without an interrupt controller is of no consequence.
    SetTpr,
    /// KVM_SYSTEM_EVENT_*.
    SystemEvent {
        /// The kind of event.
        kind: u32,
    },
    /// An exit this core does not know, or whose fields make no sense.
    Unknown {
        /// The exit reason; [`SENTINEL`] where the kernel wrote none.
        reason: u32,
    },
}

impl Exit {
    /// Whether KVM waits for an answer in the run page, and the instruction will not execute again.
    pub fn awaits_reply(&self) -> bool {
        matches!(self, Exit::Io(_) | Exit::Mmio(_) | Exit::Hypercall(_))
    }
}

/// `kvm_run.memory_fault`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryFault {
    /// KVM_MEMORY_EXIT_FLAG_*; only PRIVATE (1 << 3) is known.
    pub flags: u64,
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes; 4096 on x86.
    pub size: u64,
}

/// `kvm_run.io`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    /// The port.
    pub port: u16,
    /// OUT, not IN.
    pub write: bool,
    /// Bytes of one access: 1, 2 or 4.
    pub size: u8,
    /// Accesses; more than one for string IO.
    pub count: u32,
    /// Offset of the data in the page slice.
    pub data: usize,
}

impl Io {
    /// Bytes of data, at most those of the run page.
    pub fn len(&self) -> usize {
        usize::from(self.size) * self.count as usize
    }

    /// Whether there is no data; never true of a decoded exit.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `kvm_run.mmio`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mmio {
    /// Guest-physical address.
    pub gpa: u64,
    /// A store, not a load.
    pub write: bool,
    /// Bytes, 1 to 8.
    pub len: u8,
    /// What a store stores; the first `len` bytes count.
    pub data: [u8; 8],
}

/// `kvm_run.hypercall`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hypercall {
    /// RAX.
    pub nr: u64,
    /// RBX, RCX, RDX.
    pub args: [u64; 3],
}

/// Decodes one return of KVM_RUN. `page` is the run page from [`PAGE_START`] on.
#[inline]
pub fn decode(result: Result<(), Errno>, page: &[u8]) -> Exit {
    // As all pages of KVM are: then the bounds are checked once.
    match page.first_chunk::<HEAD>() {
        Some(head) => decode_head(result, head, page.len()),
        None => decode_head(result, page, page.len()),
    }
}

/// Bytes that hold all that is read here, but for the data of port IO.
pub(crate) const HEAD: usize = UNION + 256;

#[inline(always)]
fn decode_head(result: Result<(), Errno>, page: &[u8], len: usize) -> Exit {
    let reason = u32_at(page, offset::EXIT_REASON).unwrap_or(SENTINEL);
    match result {
        Ok(()) => dispatch(reason, page, len).unwrap_or(Exit::Unknown { reason }),
        Err(Errno(libc::EINTR)) => Exit::Interrupted,
        Err(Errno(libc::EAGAIN)) => Exit::TryAgain,
        Err(Errno(libc::ENOMEM)) => Exit::OutOfMemory,
        Err(errno @ Errno(libc::EFAULT | libc::EHWPOISON)) => {
            let fault = (reason == kvm_bindings::KVM_EXIT_MEMORY_FAULT)
                .then(|| memory_fault(page))
                .flatten();
            match (fault, errno.0) {
                (Some(fault), libc::EFAULT) => Exit::MemoryFault(fault),
                (Some(fault), _) => Exit::Poison(fault),
                (None, libc::EFAULT) => Exit::BadBacking,
                (None, _) => Exit::Failed(errno),
            }
        }
        Err(errno) => Exit::Failed(errno),
    }
}

#[inline(always)]
fn dispatch(reason: u32, page: &[u8], len: usize) -> Option<Exit> {
    Some(match reason {
        kvm_bindings::KVM_EXIT_IO => Exit::Io(sane_io(page, len)?),
        kvm_bindings::KVM_EXIT_MMIO => Exit::Mmio(mmio(page)?),
        kvm_bindings::KVM_EXIT_HYPERCALL => Exit::Hypercall(registers(page)?),
        kvm_bindings::KVM_EXIT_HLT => Exit::Halt,
        kvm_bindings::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        kvm_bindings::KVM_EXIT_SET_TPR => Exit::SetTpr,
        kvm_bindings::KVM_EXIT_INTR => Exit::Interrupted,
        kvm_bindings::KVM_EXIT_INTERNAL_ERROR => Exit::InternalError {
            suberror: u32_at(page, UNION)?,
        },
        kvm_bindings::KVM_EXIT_FAIL_ENTRY => Exit::FailEntry {
            reason: u64_at(page, UNION)?,
        },
        kvm_bindings::KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent {
            kind: u32_at(page, UNION)?,
        },
        _ => return None,
    })
}

/// The head of a page that KVM_RUN, which returned 0, left for port IO: what is asked first, for it is by far the most
/// frequent exit of a guest with devices.
#[inline(always)]
pub(crate) fn port_io(page: &[u8]) -> Option<&[u8; HEAD]> {
    let head = page.first_chunk::<HEAD>()?;
    (u32_at(head, offset::EXIT_REASON) == Some(kvm_bindings::KVM_EXIT_IO)).then_some(head)
}

/// A hypercall, likewise.
#[inline(always)]
pub(crate) fn hypercall(page: &[u8]) -> Option<Hypercall> {
    let head = page.first_chunk::<HEAD>()?;
    if u32_at(head, offset::EXIT_REASON) != Some(kvm_bindings::KVM_EXIT_HYPERCALL) {
        return None;
    }
    registers(head)
}

#[inline(always)]
fn registers(page: &[u8]) -> Option<Hypercall> {
    Some(Hypercall {
        nr: u64_at(page, UNION)?,
        args: [
            u64_at(page, UNION + 8)?,
            u64_at(page, UNION + 16)?,
            u64_at(page, UNION + 24)?,
        ],
    })
}

/// The data of port IO, if it makes sense.
#[inline(always)]
pub(crate) fn io_data<'a>(page: &'a mut [u8], io: &Io) -> Option<&'a mut [u8]> {
    page.get_mut(io.data..end_of_data(io)?)
}

fn memory_fault(page: &[u8]) -> Option<MemoryFault> {
    Some(MemoryFault {
        flags: u64_at(page, UNION)?,
        gpa: u64_at(page, UNION + 8)?,
        size: u64_at(page, UNION + 16)?,
    })
}

/// Where the data of port IO end, if they are what can be read or written at all.
#[inline(always)]
fn end_of_data(io: &Io) -> Option<usize> {
    if !matches!(io.size, 1 | 2 | 4) || io.count == 0 {
        return None;
    }
    io.data.checked_add(io.len())
}

/// What it says; of what does not make sense there are no [data](io_data).
#[inline(always)]
pub(crate) fn io(head: &[u8; HEAD]) -> Io {
    let what = u64_at(head, UNION).unwrap_or_default();
    let data = u64_at(head, UNION + 8).unwrap_or_default();
    Io {
        write: what as u8 == kvm_bindings::KVM_EXIT_IO_OUT as u8,
        size: (what >> 8) as u8,
        port: (what >> 16) as u16,
        count: (what >> 32) as u32,
        data: (data as usize).wrapping_sub(PAGE_START),
    }
}

fn sane_io(page: &[u8], len: usize) -> Option<Io> {
    let io = io(page.first_chunk()?);
    (end_of_data(&io)? <= len).then_some(io)
}

fn mmio(page: &[u8]) -> Option<Mmio> {
    let len = u32_at(page, UNION + 16)?;
    let mmio = Mmio {
        gpa: u64_at(page, UNION)?,
        data: bytes(page, offset::MMIO_DATA)?,
        len: u8::try_from(len).ok()?,
        write: *page.get(UNION + 20)? != 0,
    };
    (1..=8).contains(&mmio.len).then_some(mmio)
}

fn bytes<const N: usize>(page: &[u8], at: usize) -> Option<[u8; N]> {
    page.get(at..at.checked_add(N)?)?.try_into().ok()
}

pub(crate) fn u32_at(page: &[u8], at: usize) -> Option<u32> {
    bytes(page, at).map(u32::from_le_bytes)
}

pub(crate) fn u64_at(page: &[u8], at: usize) -> Option<u64> {
    bytes(page, at).map(u64::from_le_bytes)
}

/// Writes `bytes` into the page; what does not fit is left out, which no caller's offset allows to happen.
pub(crate) fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(slot) = page.get_mut(at..at + bytes.len()) {
        slot.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests;
