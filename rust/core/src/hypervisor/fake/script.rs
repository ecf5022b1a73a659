//! Scripts: what the fake's guests do, and the answers that they get.

/// One step of a vCPU's script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// KVM_RUN fails with this errno and leaves kvm_run as it is.
    Fail(i32),
    /// KVM_RUN returns with this errno and fills in kvm_run.
    Exit {
        /// errno, 0 for none.
        errno: i32,
        /// `exit_reason`.
        reason: u32,
        /// The first 24 bytes of the union.
        words: [u64; 3],
    },
    /// An access to `gpa`. The present memslots and attributes say what it is, as in KVM: a memory fault, MMIO, or an
    /// access without an exit. After a fault it executes again.
    Access {
        /// The address.
        gpa: u64,
        /// True for a store, false for a load.
        write: bool,
    },
    /// An instruction that reads 8 bytes at `gpa` and writes them back. Where there is no memslot KVM emulates it: an exit
    /// for the read, and with the answer to it, whatever `immediate_exit` says, one for the write, at which RIP has moved
    /// on. Whoever sets RIP back after that has it executed again.
    Modify {
        /// The address.
        gpa: u64,
        /// Whether the guest can execute it where there is a memslot. If not, KVM emulates it there, too.
        native: bool,
    },
    /// A hypercall with RAX, RBX, RCX, RDX.
    Hypercall([u64; 4]),
    /// `out imm8, al` to the doorbell with RAX, RBX, RCX, RDX.
    Doorbell([u64; 4]),
    /// Port IO.
    Io {
        /// The port.
        port: u16,
        /// True for OUT, false for IN.
        write: bool,
        /// Bytes of one access.
        size: u8,
        /// What an OUT writes. For an IN only its length counts. `size * count` bytes.
        data: Vec<u8>,
    },
    /// A load or store outside of memory.
    Mmio {
        /// The address.
        gpa: u64,
        /// True for a store, false for a load.
        write: bool,
        /// What a store writes. For a load only its length counts, which is the access's: 8 bytes at most.
        data: Vec<u8>,
    },
    /// RDMSR of an MSR that is left to user space.
    ReadMsr(u32),
    /// WRMSR to such an MSR.
    WriteMsr {
        /// The MSR.
        index: u32,
        /// The value.
        data: u64,
    },
    /// KVM_RUN does not return until it is kicked.
    Block,
    /// Executes the steps that [`FakeVm::execute`](super::FakeVm::execute) hands it, until it is kicked.
    Listen,
    /// HLT.
    Halt,
    /// A triple fault.
    Shutdown,
    /// KVM_EXIT_INTERNAL_ERROR with this suberror.
    InternalError(u32),
}

/// The answer that a vCPU got to one step of its script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Index of the step in the script.
    pub step: usize,
    /// RAX of an explicit request; the data of an IN or a load; empty for an OUT or a store; the byte that says whether
    /// the guest gets #GP for an access to an MSR, and after it what it read.
    pub value: Vec<u8>,
}
