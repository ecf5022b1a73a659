//! The CPUID that a guest gets.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// EBX[31:24] is the initial APIC id.
const FEATURES: u32 = 1;
/// EDX is the x2APIC id.
const TOPOLOGY: u32 = 0xb;
/// As [`TOPOLOGY`], with more levels.
const TOPOLOGY_V2: u32 = 0x1f;
/// EAX[7:0] is the width of a guest-physical address.
const ADDRESS_SIZES: u32 = 0x8000_0008;
/// The width that KVM assumes where there is no such leaf.
const DEFAULT_PHYSICAL_BITS: u32 = 36;

/// The width of a guest-physical address in bits (MAXPHYADDR).
pub fn physical_bits(cpuid: &CpuId) -> u32 {
    let sizes = cpuid.as_slice().iter().find(|entry| entry.function == ADDRESS_SIZES);
    sizes.map_or(DEFAULT_PHYSICAL_BITS, |entry| entry.eax & 0xff)
}

/// The CPUID of one vCPU: `supported`, with the vCPU's own APIC id.
pub fn of_vcpu(supported: &CpuId, index: u32) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        set_apic_id(entry, index);
    }
    cpuid
}

fn set_apic_id(entry: &mut kvm_cpuid_entry2, id: u32) {
    match entry.function {
        FEATURES => entry.ebx = (entry.ebx & 0x00ff_ffff) | (id << 24),
        TOPOLOGY | TOPOLOGY_V2 => entry.edx = id,
        _ => {}
    }
}
