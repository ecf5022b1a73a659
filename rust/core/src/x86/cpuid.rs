//! The CPUID that a guest gets: what KVM supports, with each vCPU's own ids and the machine's topology.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::errno::Errno;

/// EAX is the last basic leaf.
const BASIC: u32 = 0;
/// EBX\[31:24\] is the initial APIC id, EBX\[23:16\] the number of ids.
const FEATURES: u32 = 1;
/// Intel's cache topology: EAX\[31:26\] is the number of cores, less 1.
const CACHES: u32 = 4;
/// EDX is the x2APIC id; a subleaf for each level.
const TOPOLOGY: u32 = 0xb;
/// As [`TOPOLOGY`], with more levels.
const TOPOLOGY_V2: u32 = 0x1f;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
/// EAX\[7:0\] is the width of a guest-physical address. AMD: ECX\[7:0\] is the number of cores, less 1, and
/// ECX\[15:12\] the width of an APIC id.
const ADDRESS_SIZES: u32 = 0x8000_0008;
/// AMD: EAX is the APIC id, EBX\[7:0\] the core's, EBX\[15:8\] the threads of a core, less 1.
const EXTENDED_TOPOLOGY: u32 = 0x8000_001e;
/// The width that KVM assumes where there is no such leaf.
const DEFAULT_PHYSICAL_BITS: u32 = 36;

/// EXTENDED_FEATURES, EDX: pages of 1 GiB.
const GIB_PAGES: u32 = 1 << 26;
/// FEATURES, ECX: x2APIC, and that this is a virtual machine.
const X2APIC: u32 = 1 << 21;
const HYPERVISOR: u32 = 1 << 31;
/// FEATURES, ECX: the local APIC's timer takes a value of the TSC. Not offered: where KVM itself runs on an emulated CPU
/// such a timer hardly ever fires, and Linux does as well with the timer's other modes.
const TSC_DEADLINE: u32 = 1 << 24;
/// FEATURES, EDX: EBX\[23:16\] is valid.
const SEVERAL_IDS: u32 = 1 << 28;
/// TOPOLOGY, ECX\[15:8\]: the kind of a level.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// The width of a guest-physical address in bits (MAXPHYADDR).
pub fn physical_bits(cpuid: &CpuId) -> u32 {
    let sizes = cpuid.as_slice().iter().find(|entry| entry.function == ADDRESS_SIZES);
    sizes.map_or(DEFAULT_PHYSICAL_BITS, |entry| entry.eax & 0xff)
}

/// Whether page tables can map a GiB as one page.
pub fn gib_pages(cpuid: &CpuId) -> bool {
    let features = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == EXTENDED_FEATURES);
    features.is_some_and(|entry| entry.edx & GIB_PAGES != 0)
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
        EXTENDED_TOPOLOGY => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// The CPUID of a PC with one socket of `vcpus` cores, without the vCPUs' own ids.
///
/// # Errors
/// ENOMEM if it has more leaves than KVM takes.
pub fn of_pc(supported: &CpuId, vcpus: u32) -> Result<CpuId, Errno> {
    let id_bits = vcpus.next_power_of_two().trailing_zeros();
    let is_level = |entry: &kvm_cpuid_entry2| matches!(entry.function, TOPOLOGY | TOPOLOGY_V2);
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !is_level(entry))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            BASIC => entry.eax = entry.eax.max(TOPOLOGY),
            FEATURES => {
                entry.ecx = (entry.ecx | X2APIC | HYPERVISOR) & !TSC_DEADLINE;
                entry.ebx = (entry.ebx & 0xff00_ffff) | (vcpus.min(0xff) << 16);
                entry.edx = (entry.edx & !SEVERAL_IDS) | if vcpus > 1 { SEVERAL_IDS } else { 0 };
            }
            CACHES if entry.eax & 0x1f != 0 => entry.eax = (entry.eax & 0x03ff_ffff) | ((vcpus - 1).min(0x3f) << 26),
            ADDRESS_SIZES => entry.ecx = (entry.ecx & !0xf0ff) | (vcpus - 1).min(0xff) | (id_bits << 12),
            _ => {}
        }
    }
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind,
        ..Default::default()
    };
    entries.push(level(0, 0, 1, LEVEL_THREAD));
    entries.push(level(1, id_bits, vcpus, LEVEL_CORE));
    CpuId::from_entries(&entries).map_err(|_| Errno(libc::ENOMEM))
}

/// The same with `leaf` added, or changed where there is one.
///
/// # Errors
/// As [`of_pc`].
pub(crate) fn with_leaf(
    cpuid: &CpuId,
    function: u32,
    change: impl FnOnce(&mut kvm_cpuid_entry2),
) -> Result<CpuId, Errno> {
    let mut entries = cpuid.as_slice().to_vec();
    match entries.iter_mut().find(|entry| entry.function == function) {
        Some(entry) => change(entry),
        None => {
            let mut entry = kvm_cpuid_entry2 {
                function,
                ..Default::default()
            };
            change(&mut entry);
            entries.push(entry);
        }
    }
    CpuId::from_entries(&entries).map_err(|_| Errno(libc::ENOMEM))
}
