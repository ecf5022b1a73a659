//! Software SEV: what makes Linux believe that it is a SEV guest. Nothing is encrypted, and the host is trusted.

use kvm_bindings::{CpuId, kvm_sregs};

use super::cpuid::with_leaf;
use super::registers::CR0_PG;
use crate::errno::Errno;

/// EAX is the last extended leaf.
const EXTENDED: u32 = 0x8000_0000;
/// EAX bit 1 says SEV, EBX\[5:0\] is the C-bit's position, EBX\[11:6\] by how much it shortens addresses.
const MEMORY_ENCRYPTION: u32 = 0x8000_001f;
const SEV: u32 = 1 << 1;
/// EAX is what KVM offers its guests.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Without both of these Linux makes no explicit request.
const HC_MAP_GPA_RANGE: u32 = 1 << 16;
const MIGRATION_CONTROL: u32 = 1 << 17;

/// MSR SEV_STATUS.
pub const SEV_STATUS: u32 = 0xc001_0131;
const SEV_ENABLED: u64 = 1;
/// MSR_KVM_MIGRATION_CONTROL, which Linux writes when it has told the host of all its shared pages.
const KVM_MIGRATION_CONTROL: u32 = 0x4b56_4d08;

/// The profile of a guest that believes in SEV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SoftwareSev {
    /// The C-bit: the bit of a guest-physical address that means private.
    pub private_bit: u32,
}

impl SoftwareSev {
    /// Adds SEV to a guest's CPUID.
    ///
    /// # Errors
    /// ENOMEM if it has more leaves than KVM takes.
    pub fn cpuid(self, cpuid: &CpuId) -> Result<CpuId, Errno> {
        let cpuid = with_leaf(cpuid, EXTENDED, |leaf| leaf.eax = leaf.eax.max(MEMORY_ENCRYPTION))?;
        let features = HC_MAP_GPA_RANGE | MIGRATION_CONTROL;
        let cpuid = with_leaf(&cpuid, KVM_FEATURES, |leaf| leaf.eax |= features)?;
        with_leaf(&cpuid, MEMORY_ENCRYPTION, |leaf| {
            leaf.eax = SEV;
            leaf.ebx = self.private_bit | 1 << 6;
            leaf.ecx = 1;
            leaf.edx = 1;
        })
    }

    /// The value of an MSR that KVM leaves to this profile; `None` for one that does not exist.
    pub fn read_msr(self, index: u32) -> Option<u64> {
        (index == SEV_STATUS).then_some(SEV_ENABLED)
    }

    /// Whether a write to an MSR that KVM leaves to this profile is accepted.
    pub fn takes_msr(self, index: u32) -> bool {
        index == KVM_MIGRATION_CONTROL
    }

    /// Whether this vCPU's accesses are what their addresses say. They are private without paging. With a CR3 that has
    /// no C-bit, a loader switches it on or off: its page walks are private, and its tables have no C-bits.
    pub(crate) fn is_paged(self, sregs: &kvm_sregs) -> bool {
        sregs.cr0 & CR0_PG != 0 && sregs.cr3 & (1 << self.private_bit) != 0
    }
}
