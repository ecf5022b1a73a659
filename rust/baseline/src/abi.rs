//! Constants of KVM's interface that kvm-bindings does not have, and the port of pagegate's doorbell.

/// The hypercall by which a guest asks for pages to become private or shared.
pub(crate) const KVM_HC_MAP_GPA_RANGE: u64 = 12;

/// KVM_MAP_GPA_RANGE_ENCRYPTED in its attributes: the pages are to become private.
pub(crate) const ENCRYPTED: u64 = 1 << 4;

/// `_IO(KVMIO, 0x80)`.
pub(crate) const KVM_RUN: libc::c_ulong = 0xae80;

/// The capability whose value is the flags that KVM_CREATE_GUEST_MEMFD takes.
pub(crate) const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = 244;

/// GUEST_MEMFD_FLAG_MMAP and GUEST_MEMFD_FLAG_INIT_SHARED: this process can map and access the file.
pub(crate) const GUEST_MEMFD_MAPPED: u64 = 1 | 2;

/// An OUT to this port is the same request with the same registers, for guests that cannot make a hypercall.
pub(crate) const DOORBELL_PORT: u16 = 0xe6;
