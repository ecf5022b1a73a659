//! What the guests of the fake do, and what they are answered.

/// What a vCPU does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// KVM_RUN fails with this errno and writes nothing.
    Fail(i32),
    /// KVM_RUN ends so: errno (0 for success), `exit_reason`, and what else the union holds.
    Exit {
        /// errno, 0 for none.
        errno: i32,
        /// `exit_reason`.
        reason: u32,
        /// The first words of the union.
        words: [u64; 3],
    },
    /// An access to `gpa`, as KVM would treat it with the slots and attributes there are: it faults, becomes MMIO,
    /// or goes through. Executes again after a fault.
    Access {
        /// The address.
        gpa: u64,
        /// A store, not a load.
        write: bool,
    },
    /// A hypercall with RAX, RBX, RCX, RDX.
    Hypercall([u64; 4]),
    /// `out imm8, al` to the doorbell with RAX, RBX, RCX, RDX.
    Doorbell([u64; 4]),
    /// Port IO; `data` is what is written, or as many bytes as are read.
    Io {
        /// The port.
        port: u16,
        /// OUT, not IN.
        write: bool,
        /// Bytes of one access.
        size: u8,
        /// `size * count` bytes.
        data: Vec<u8>,
    },
    /// KVM_RUN does not return until it is kicked.
    Block,
    /// HLT.
    Halt,
    /// A triple fault.
    Shutdown,
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalError(u32),
}

/// What a vCPU was answered to one step of its script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Index of the step in the script.
    pub step: usize,
    /// RAX of a request; the data of a read.
    pub value: Vec<u8>,
}
