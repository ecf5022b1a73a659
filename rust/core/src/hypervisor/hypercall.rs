//! Constants of KVM's hypercalls that kvm-bindings does not have (include/uapi/linux/kvm_para.h), and the doorbell's
//! port.

/// RAX of an explicit request. RBX is the gpa, RCX the number of pages, RDX the attributes.
pub const KVM_HC_MAP_GPA_RANGE: u64 = 12;
/// RDX of such a request: the pages are to become private.
pub const KVM_MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;
/// RDX of such a request: the guest's hint at a page size, 0 for 4 KiB, 1 for 2 MiB, 2 for 1 GiB.
pub const KVM_MAP_GPA_RANGE_PAGE_SIZE: u64 = 0xf;
/// The errno, negated in RAX, for a hypercall that KVM does not know.
pub const KVM_ENOSYS: i64 = 1000;
/// The doorbell: `out imm8, al` to this port is the same request with the same registers, for guests that cannot make a
/// hypercall.
pub const DOORBELL_PORT: u16 = 0xe6;
