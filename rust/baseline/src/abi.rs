//! Constants of KVM's interface that kvm-bindings does not have, and pagegate's doorbell.

/// The hypercall by which a guest asks for pages to become private or shared.
pub(crate) const KVM_HC_MAP_GPA_RANGE: u64 = 12;

/// KVM_MAP_GPA_RANGE_ENCRYPTED, in its third argument: private.
pub(crate) const ENCRYPTED: u64 = 1 << 4;

/// `_IO(KVMIO, 0x80)`.
pub(crate) const KVM_RUN: libc::c_ulong = 0xae80;

/// The capability that says which flags KVM_CREATE_GUEST_MEMFD takes.
pub(crate) const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = 244;

/// GUEST_MEMFD_FLAG_MMAP and GUEST_MEMFD_FLAG_INIT_SHARED: the file can be mapped and accessed by this program.
pub(crate) const GUEST_MEMFD_MAPPED: u64 = 1 | 2;

/// A guest that cannot make a hypercall makes the same request by an OUT to this port, with the same registers.
pub(crate) const DOORBELL_PORT: u16 = 0xe6;
