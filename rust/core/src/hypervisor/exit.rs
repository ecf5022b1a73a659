//! What a return of KVM_RUN means: its result and kvm_run are decoded into one owned [`Exit`]. Pure, and total over all
//! bytes.
//!
//! `exit_reason` is not always written (early returns leave the previous value), so the caller writes [`SENTINEL`]
//! before each entry, and kvm_run is ignored unless KVM filled it in, which the errno tells:
//!
//! | result | `exit_reason` | |
//! |---|---|---|
//! | EINTR, EAGAIN, ENOMEM, other errnos | ignored | the errno alone says what happened |
//! | EFAULT | MEMORY_FAULT | a page in the wrong state |
//! | EHWPOISON | MEMORY_FAULT | a poisoned page, never a conversion |
//! | EFAULT | anything else | the host memory of a memslot cannot be faulted in |
//! | EHWPOISON | anything else | an error, as any other errno |
//! | 0 | says which exit | |

use std::mem::offset_of;

use kvm_bindings::kvm_run;

use crate::errno::Errno;

/// Where in kvm_run the slice that [`decode`] takes begins: at `exit_reason`. Other threads may write the bytes before
/// it.
pub const START: usize = offset_of!(kvm_run, exit_reason);
/// `exit_reason` of an access to a page in the wrong state (KVM_EXIT_MEMORY_FAULT).
pub const MEMORY_FAULT: u32 = kvm_bindings::KVM_EXIT_MEMORY_FAULT;
/// The only known flag of such a fault: the access was a private one (KVM_MEMORY_EXIT_FLAG_PRIVATE).
pub const FLAG_PRIVATE: u64 = kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE as u64;
/// What the run loop writes into `exit_reason` before each entry. No exit of KVM has this number.
pub const SENTINEL: u32 = u32::MAX;

/// Offsets into kvm_run, from [`START`] on.
pub(crate) mod offset {
    use std::mem::offset_of;

    use kvm_bindings::{kvm_regs, kvm_run, kvm_run__bindgen_ty_1 as exits, kvm_sync_regs};

    const fn of(offset: usize) -> usize {
        offset - super::START
    }

    pub const EXIT_REASON: usize = 0;
    pub const UNION: usize = of(offset_of!(kvm_run, __bindgen_anon_1));
    pub const IO_DIRECTION: usize = UNION + offset_of!(exits, io.direction);
    pub const IO_PORT: usize = UNION + offset_of!(exits, io.port);
    pub const IO_COUNT: usize = UNION + offset_of!(exits, io.count);
    pub const IO_DATA_OFFSET: usize = UNION + offset_of!(exits, io.data_offset);
    pub const AFTER_IO: usize = IO_DATA_OFFSET + size_of::<u64>();
    pub const MMIO_ADDRESS: usize = UNION + offset_of!(exits, mmio.phys_addr);
    pub const MMIO_DATA: usize = UNION + offset_of!(exits, mmio.data);
    pub const MMIO_LEN: usize = UNION + offset_of!(exits, mmio.len);
    pub const MMIO_IS_WRITE: usize = UNION + offset_of!(exits, mmio.is_write);
    pub const HYPERCALL_NR: usize = UNION + offset_of!(exits, hypercall.nr);
    pub const HYPERCALL_ARGS: usize = UNION + offset_of!(exits, hypercall.args);
    pub const AFTER_HYPERCALL: usize = HYPERCALL_ARGS + 3 * size_of::<u64>();
    pub const HYPERCALL_RET: usize = UNION + offset_of!(exits, hypercall.ret);
    pub const MEMORY_FAULT_FLAGS: usize = UNION + offset_of!(exits, memory_fault.flags);
    pub const MEMORY_FAULT_GPA: usize = UNION + offset_of!(exits, memory_fault.gpa);
    pub const MEMORY_FAULT_SIZE: usize = UNION + offset_of!(exits, memory_fault.size);
    pub const MSR_ERROR: usize = UNION + offset_of!(exits, msr.error);
    pub const MSR_INDEX: usize = UNION + offset_of!(exits, msr.index);
    pub const MSR_DATA: usize = UNION + offset_of!(exits, msr.data);
    pub const INTERNAL_SUBERROR: usize = UNION + offset_of!(exits, internal.suberror);
    pub const FAIL_ENTRY_REASON: usize = UNION + offset_of!(exits, fail_entry.hardware_entry_failure_reason);
    pub const SYSTEM_EVENT_TYPE: usize = UNION + offset_of!(exits, system_event.type_);
    pub const VALID_REGS: usize = of(offset_of!(kvm_run, kvm_valid_regs));
    pub const DIRTY_REGS: usize = of(offset_of!(kvm_run, kvm_dirty_regs));
    pub const REGS: usize = of(offset_of!(kvm_run, s)) + offset_of!(kvm_sync_regs, regs);
    pub const RAX: usize = REGS + offset_of!(kvm_regs, rax);
}

/// Why KVM_RUN came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// EINTR: a signal, or `immediate_exit`. There is nothing to answer.
    Interrupted,
    /// EAGAIN: call KVM_RUN again.
    TryAgain,
    /// ENOMEM. Also where a signal interrupts the creation of KVM's worker thread at the first entry.
    OutOfMemory,
    /// An access to a page in the wrong state (errno EFAULT). The next KVM_RUN executes the instruction again.
    MemoryFault(MemoryFault),
    /// An access to a poisoned page (errno EHWPOISON).
    Poison(MemoryFault),
    /// EFAULT without KVM_EXIT_MEMORY_FAULT: the host memory of a memslot cannot be faulted in.
    BadBacking,
    /// Any other errno.
    Failed(Errno),
    /// Port IO.
    Io(Io),
    /// An access to an address without a memslot.
    Mmio(Mmio),
    /// A hypercall that exits because KVM_CAP_EXIT_HYPERCALL was enabled for it.
    Hypercall(Hypercall),
    /// RDMSR of an MSR that is left to user space.
    ReadMsr {
        /// ECX.
        index: u32,
    },
    /// WRMSR to such an MSR.
    WriteMsr {
        /// ECX.
        index: u32,
        /// EDX:EAX.
        data: u64,
    },
    /// HLT.
    Halt,
    /// A triple fault.
    Shutdown,
    /// KVM_EXIT_INTERNAL_ERROR: KVM's emulation failed, or KVM is in an unexpected state.
    InternalError {
        /// KVM_INTERNAL_ERROR_*: 1 is a failed emulation.
        suberror: u32,
    },
    /// KVM_EXIT_FAIL_ENTRY: the CPU refused to enter the guest.
    FailEntry {
        /// `hardware_entry_failure_reason`.
        reason: u64,
    },
    /// The guest wrote CR8. Without an interrupt controller there is nothing to do about it.
    SetTpr,
    /// KVM_SYSTEM_EVENT_*.
    SystemEvent {
        /// Its number.
        kind: u32,
    },
    /// An exit that this core does not know, or one with a field outside of its range, such as data past the end of
    /// kvm_run.
    Unknown {
        /// `exit_reason`; [`SENTINEL`] where KVM wrote none.
        reason: u32,
    },
}

impl Exit {
    /// Whether the next KVM_RUN completes the instruction with an answer from kvm_run, in place of executing it again.
    pub fn awaits_reply(&self) -> bool {
        matches!(
            self,
            Exit::Io(_) | Exit::Mmio(_) | Exit::Hypercall(_) | Exit::ReadMsr { .. } | Exit::WriteMsr { .. }
        )
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
    /// True for OUT, false for IN.
    pub write: bool,
    /// Bytes of one access: 1, 2 or 4.
    pub size: u8,
    /// Accesses; more than one for string IO.
    pub count: u32,
    /// Where its `size * count` bytes of data are: an offset from [`START`].
    pub data: usize,
}

impl Io {
    /// Bytes of data. All of them are inside of kvm_run.
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
    /// True for a store, false for a load.
    pub write: bool,
    /// Bytes, 1 to 8.
    pub len: u8,
    /// What a store writes: the first `len` bytes.
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

/// Decodes one return of KVM_RUN. `kvm_run` is the structure from [`START`] on.
#[inline]
pub fn decode(result: Result<(), Errno>, kvm_run: &[u8]) -> Exit {
    let reason = u32_at(kvm_run, offset::EXIT_REASON).unwrap_or(SENTINEL);
    match result {
        Ok(()) => dispatch(reason, kvm_run).unwrap_or(Exit::Unknown { reason }),
        Err(errno) => failed(errno, reason, kvm_run),
    }
}

/// The port IO that KVM_RUN came back for, and its data; `None` for any other exit.
#[inline]
pub(crate) fn port_io(result: Result<(), Errno>, kvm_run: &mut [u8]) -> Option<(Io, &mut [u8])> {
    result.ok()?;
    if u32_at(kvm_run, offset::EXIT_REASON)? != kvm_bindings::KVM_EXIT_IO {
        return None;
    }
    let io = io_but_for_data(kvm_run)?;
    let data = kvm_run.get_mut(io.data..)?.get_mut(..io.len())?;
    Some((io, data))
}

/// The hypercall that KVM_RUN came back for; `None` for any other exit.
#[inline]
pub(crate) fn hypercall(result: Result<(), Errno>, kvm_run: &[u8]) -> Option<Hypercall> {
    result.ok()?;
    if u32_at(kvm_run, offset::EXIT_REASON)? != kvm_bindings::KVM_EXIT_HYPERCALL {
        return None;
    }
    call(kvm_run)
}

#[inline]
fn dispatch(reason: u32, kvm_run: &[u8]) -> Option<Exit> {
    Some(match reason {
        kvm_bindings::KVM_EXIT_HYPERCALL => Exit::Hypercall(call(kvm_run)?),
        kvm_bindings::KVM_EXIT_IO => Exit::Io(io(kvm_run)?),
        kvm_bindings::KVM_EXIT_MMIO => Exit::Mmio(mmio(kvm_run)?),
        kvm_bindings::KVM_EXIT_X86_RDMSR => Exit::ReadMsr {
            index: u32_at(kvm_run, offset::MSR_INDEX)?,
        },
        kvm_bindings::KVM_EXIT_X86_WRMSR => Exit::WriteMsr {
            index: u32_at(kvm_run, offset::MSR_INDEX)?,
            data: u64_at(kvm_run, offset::MSR_DATA)?,
        },
        kvm_bindings::KVM_EXIT_HLT => Exit::Halt,
        kvm_bindings::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        kvm_bindings::KVM_EXIT_SET_TPR => Exit::SetTpr,
        kvm_bindings::KVM_EXIT_INTR => Exit::Interrupted,
        kvm_bindings::KVM_EXIT_INTERNAL_ERROR => Exit::InternalError {
            suberror: u32_at(kvm_run, offset::INTERNAL_SUBERROR)?,
        },
        kvm_bindings::KVM_EXIT_FAIL_ENTRY => Exit::FailEntry {
            reason: u64_at(kvm_run, offset::FAIL_ENTRY_REASON)?,
        },
        kvm_bindings::KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent {
            kind: u32_at(kvm_run, offset::SYSTEM_EVENT_TYPE)?,
        },
        _ => return None,
    })
}

fn failed(errno: Errno, reason: u32, kvm_run: &[u8]) -> Exit {
    let fault = || match reason {
        kvm_bindings::KVM_EXIT_MEMORY_FAULT => memory_fault(kvm_run),
        _ => None,
    };
    match errno.0 {
        libc::EINTR => Exit::Interrupted,
        libc::EAGAIN => Exit::TryAgain,
        libc::ENOMEM => Exit::OutOfMemory,
        libc::EFAULT => fault().map_or(Exit::BadBacking, Exit::MemoryFault),
        libc::EHWPOISON => fault().map_or(Exit::Failed(errno), Exit::Poison),
        _ => Exit::Failed(errno),
    }
}

#[inline]
fn call(kvm_run: &[u8]) -> Option<Hypercall> {
    // One check of its length for all fields.
    let kvm_run: &[u8; offset::AFTER_HYPERCALL] = kvm_run.first_chunk()?;
    Some(Hypercall {
        nr: u64_at(kvm_run, offset::HYPERCALL_NR)?,
        args: [
            u64_at(kvm_run, offset::HYPERCALL_ARGS)?,
            u64_at(kvm_run, offset::HYPERCALL_ARGS + 8)?,
            u64_at(kvm_run, offset::HYPERCALL_ARGS + 16)?,
        ],
    })
}

fn memory_fault(kvm_run: &[u8]) -> Option<MemoryFault> {
    Some(MemoryFault {
        flags: u64_at(kvm_run, offset::MEMORY_FAULT_FLAGS)?,
        gpa: u64_at(kvm_run, offset::MEMORY_FAULT_GPA)?,
        size: u64_at(kvm_run, offset::MEMORY_FAULT_SIZE)?,
    })
}

/// `None` for data outside of kvm_run.
fn io(kvm_run: &[u8]) -> Option<Io> {
    let io = io_but_for_data(kvm_run)?;
    kvm_run.get(io.data..)?.get(..io.len())?;
    Some(io)
}

/// `None` for a size that port IO does not have, or no data.
#[inline]
fn io_but_for_data(kvm_run: &[u8]) -> Option<Io> {
    // One check of its length for all fields.
    let kvm_run: &[u8; offset::AFTER_IO] = kvm_run.first_chunk()?;
    let [direction, size] = bytes(kvm_run, offset::IO_DIRECTION)?;
    let io = Io {
        write: direction == kvm_bindings::KVM_EXIT_IO_OUT as u8,
        size,
        port: bytes(kvm_run, offset::IO_PORT).map(u16::from_le_bytes)?,
        count: u32_at(kvm_run, offset::IO_COUNT)?,
        data: usize::try_from(u64_at(kvm_run, offset::IO_DATA_OFFSET)?)
            .ok()?
            .checked_sub(START)?,
    };
    (matches!(size, 1 | 2 | 4) && io.count > 0).then_some(io)
}

/// `None` for a length that is not 1 to 8.
fn mmio(kvm_run: &[u8]) -> Option<Mmio> {
    let len = u32_at(kvm_run, offset::MMIO_LEN)?;
    let mmio = Mmio {
        gpa: u64_at(kvm_run, offset::MMIO_ADDRESS)?,
        data: bytes(kvm_run, offset::MMIO_DATA)?,
        len: u8::try_from(len).ok()?,
        write: *kvm_run.get(offset::MMIO_IS_WRITE)? != 0,
    };
    (1..=8).contains(&mmio.len).then_some(mmio)
}

fn bytes<const N: usize>(kvm_run: &[u8], at: usize) -> Option<[u8; N]> {
    kvm_run.get(at..at.checked_add(N)?)?.try_into().ok()
}

pub(crate) fn u32_at(kvm_run: &[u8], at: usize) -> Option<u32> {
    bytes(kvm_run, at).map(u32::from_le_bytes)
}

pub(crate) fn u64_at(kvm_run: &[u8], at: usize) -> Option<u64> {
    bytes(kvm_run, at).map(u64::from_le_bytes)
}

/// Writes `bytes` into kvm_run; nothing, if they would end past it.
pub(crate) fn put(kvm_run: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = kvm_run.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}
