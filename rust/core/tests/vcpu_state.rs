//! What a vCPU's state is set to is what is got: through the `Vcpu` trait, on the fake and on /dev/kvm.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write;
use std::ops::RangeInclusive;
use std::path::Path;

use kvm_bindings::{
    CpuId, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, Xsave, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_xsave, kvm_xsave2,
};
use pagegate_core::errno::Errno;
use pagegate_core::hypervisor::fake::FakeVm;
use pagegate_core::hypervisor::kvm::KvmVm;
use pagegate_core::hypervisor::vm::{Hypervisor, Vcpu};

const INVALID: Errno = Errno(libc::EINVAL);
const UD_VECTOR: u8 = 6;

const MSR_TSC: u32 = 0x10;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
/// Not an MSR of any CPU, nor of KVM.
const MSR_UNKNOWN: u32 = 0xdead_beef;

/// Where things are in the XSAVE area, in words of 32 bits: MXCSR, XMM0, and XSTATE_BV, which says what is there.
const MXCSR: usize = 24 / 4;
const XMM0: usize = 160 / 4;
const XSTATE_BV: usize = 512 / 4;
const XSTATE_SSE: u32 = 1 << 1;

/// A CPUID leaf: the first letters of the CPU's brand. KVM does not use it.
const BRAND: u32 = 0x8000_0002;
/// The one CPUID leaf of the fake.
const ADDRESS_SIZES: u32 = 0x8000_0008;

fn fake() -> Box<dyn Vcpu> {
    let vm = FakeVm::new(FakeVm::plain(1), Vec::new(), 1);
    vm.create_vcpu(0).unwrap()
}

/// A VM of KVM without memory. `None` only where there is no /dev/kvm: one that cannot be used is a failure.
fn kvm() -> Option<KvmVm> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                // Not by eprintln, whose output the test harness keeps to itself.
                let message = format!("not tested: this host has no /dev/kvm ({error})\n");
                std::io::stderr().write_all(message.as_bytes()).unwrap();
                return None;
            }
            _ => panic!("/dev/kvm is there and cannot be opened: {error}"),
        }
    }
    Some(KvmVm::new(0, true).unwrap())
}

/// Whether /dev/kvm is one without VMX and SVM, which emulates most of a guest's instructions.
fn software_kvm() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

/// The fake's vCPU, and KVM's where there is KVM.
fn vcpus() -> Vec<Box<dyn Vcpu>> {
    let real = kvm().map(|vm| vm.create_vcpu(0).unwrap());
    std::iter::once(fake()).chain(real).collect()
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn values(msrs: &[kvm_msr_entry]) -> Vec<(u32, u64)> {
    msrs.iter().map(|msr| (msr.index, msr.data)).collect()
}

/// The fixed 4 KiB of the area, and what follows.
fn parts(xsave: &Xsave) -> ([u32; 1024], Vec<u32>) {
    (xsave.as_fam_struct_ref().xsave.region, xsave.as_slice().to_vec())
}

fn from_parts(region: [u32; 1024], more: &[u32]) -> Xsave {
    let header = kvm_xsave2 {
        len: more.len(),
        xsave: kvm_xsave {
            region,
            ..Default::default()
        },
    };
    let mut xsave = Xsave::from_header(header).unwrap();
    xsave.as_mut_slice().copy_from_slice(more);
    xsave
}

/// EAX, EBX, ECX, EDX of a leaf without subleaves.
fn leaf_of(cpuid: &CpuId, function: u32) -> [u32; 4] {
    let entry = cpuid.as_slice().iter().find(|entry| entry.function == function);
    let entry = entry.unwrap_or_else(|| panic!("no CPUID leaf {function:#x}"));
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

#[test]
fn general_registers_are_as_they_were_set() {
    for mut vcpu in vcpus() {
        let mut regs = vcpu.regs().unwrap();
        (regs.rbx, regs.r15, regs.rip) = (0x1122_3344_5566_7788, u64::MAX, 0x1000);
        vcpu.set_regs(&regs).unwrap();
        assert_eq!(vcpu.regs().unwrap(), regs);
    }
}

#[test]
fn special_registers_are_as_they_were_set() {
    for mut vcpu in vcpus() {
        let mut sregs = vcpu.sregs().unwrap();
        (sregs.cr2, sregs.gdt.base, sregs.gdt.limit) = (0xdead_b000, 0x2000, 0x17);
        vcpu.set_sregs(&sregs).unwrap();
        assert_eq!(vcpu.sregs().unwrap(), sregs);
    }
}

#[test]
fn debug_registers_are_as_they_were_set() {
    for mut vcpu in vcpus() {
        let mut regs = vcpu.debug_regs().unwrap();
        regs.db = [0x1000, 0x2008, 0x3010, 0x4018];
        vcpu.set_debug_regs(&regs).unwrap();
        assert_eq!(vcpu.debug_regs().unwrap(), regs);
    }
}

#[test]
fn msrs_are_as_they_were_set_and_in_the_order_that_was_asked_for() {
    for mut vcpu in vcpus() {
        let set = [
            msr(MSR_LSTAR, 0xffff_ffff_8100_0000),
            msr(MSR_KERNEL_GS_BASE, 0xffff_8880_0000_0000),
        ];
        vcpu.set_msrs(&set).unwrap();
        let got = vcpu.msrs(&[MSR_KERNEL_GS_BASE, MSR_LSTAR]).unwrap();
        assert_eq!(
            values(&got),
            [
                (MSR_KERNEL_GS_BASE, 0xffff_8880_0000_0000),
                (MSR_LSTAR, 0xffff_ffff_8100_0000)
            ]
        );
        assert_eq!(vcpu.msrs(&[]).unwrap(), []);
        vcpu.set_msrs(&[]).unwrap();
    }
}

#[test]
fn the_time_stamp_counter_goes_on_from_what_it_was_set_to() {
    const START: u64 = 1 << 50;
    // An hour at 16 GHz.
    const LATER: RangeInclusive<u64> = START..=START + 3600 * 16_000_000_000;
    let Some(vm) = kvm() else { return };
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_msrs(&[msr(MSR_TSC, START)]).unwrap();
    let first = vcpu.msrs(&[MSR_TSC]).unwrap()[0].data;
    let second = vcpu.msrs(&[MSR_TSC]).unwrap()[0].data;
    // A software KVM takes the value and ignores it.
    if !software_kvm() {
        assert!(LATER.contains(&first), "{first:#x}");
    }
    assert!(second >= first, "{first:#x}, then {second:#x}");
}

#[test]
fn msrs_that_kvm_refuses_are_einval_and_those_before_them_are_set() {
    let Some(vm) = kvm() else { return };
    let mut vcpu = vm.create_vcpu(0).unwrap();
    // Not canonical.
    let refused = msr(MSR_KERNEL_GS_BASE, 1 << 62);
    let set = [msr(MSR_LSTAR, 0x1000), refused, msr(MSR_LSTAR, 0x2000)];
    assert_eq!(vcpu.set_msrs(&set), Err(INVALID));
    assert_eq!(
        values(&vcpu.msrs(&[MSR_LSTAR, MSR_KERNEL_GS_BASE]).unwrap()),
        [(MSR_LSTAR, 0x1000), (MSR_KERNEL_GS_BASE, 0)]
    );
    // With this parameter KVM reads MSRs that it does not know as 0.
    let ignored = std::fs::read_to_string("/sys/module/kvm/parameters/ignore_msrs");
    if !ignored.is_ok_and(|value| value.trim() == "Y") {
        assert_eq!(vcpu.msrs(&[MSR_LSTAR, MSR_UNKNOWN]), Err(INVALID));
        assert_eq!(vcpu.set_msrs(&[msr(MSR_UNKNOWN, 1)]), Err(INVALID));
    }
}

#[test]
fn cpuid_is_as_it_was_set() {
    let fake: Box<dyn Hypervisor> = Box::new(FakeVm::new(FakeVm::plain(1), Vec::new(), 1));
    let real = kvm().map(|vm| Box::new(vm) as Box<dyn Hypervisor>);
    for (is_fake, vm) in std::iter::once((true, fake)).chain(real.map(|vm| (false, vm))) {
        let mut vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(vcpu.cpuid().unwrap().as_slice(), [], "before anything was set");
        let mut cpuid = vm.supported_cpuid().unwrap();
        let function = if is_fake { ADDRESS_SIZES } else { BRAND };
        let old = leaf_of(&cpuid, function);
        let changed = u32::from_le_bytes(*b"page");
        assert_ne!(old[0], changed);
        let mut entries = cpuid.as_mut_slice().iter_mut();
        entries.find(|entry| entry.function == function).unwrap().eax = changed;
        vcpu.set_cpuid(&cpuid).unwrap();
        let got = vcpu.cpuid().unwrap();
        assert_eq!(leaf_of(&got, function), [changed, old[1], old[2], old[3]]);
        // Of other leaves KVM keeps some bits up to date by itself, and a host may leave some out.
        let functions = |cpuid: &CpuId| {
            let entries = cpuid.as_slice().iter();
            entries
                .map(|entry| (entry.function, entry.index))
                .collect::<BTreeSet<_>>()
        };
        assert!(functions(&got).is_subset(&functions(&cpuid)));
    }
}

#[test]
fn cpuid_cannot_be_changed_once_the_vcpu_was_in_the_guest() {
    let Some(vm) = kvm() else { return };
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut cpuid = vm.supported_cpuid().unwrap();
    vcpu.set_cpuid(&cpuid).unwrap();
    // It fails at its first instruction, since there is no memory, but was in the guest.
    let _ = vcpu.run();
    let mut entries = cpuid.as_mut_slice().iter_mut();
    entries.find(|entry| entry.function == BRAND).unwrap().eax ^= 1;
    // A software KVM emulates real mode, so that the vCPU was not in the guest yet.
    let expected = if software_kvm() { Ok(()) } else { Err(INVALID) };
    assert_eq!(vcpu.set_cpuid(&cpuid), expected);
}

#[test]
fn the_fpu_and_vector_registers_are_as_they_were_set() {
    let words = [0x1111_2222, 0x3333_4444, 0x5555_6666, 0x7777_8888];
    for mut vcpu in vcpus() {
        let (mut region, more) = parts(&vcpu.xsave().unwrap());
        region[XMM0..XMM0 + 4].copy_from_slice(&words);
        region[MXCSR] = 0x1f80;
        region[XSTATE_BV] |= XSTATE_SSE;
        vcpu.set_xsave(&from_parts(region, &more)).unwrap();
        let (got, more_got) = parts(&vcpu.xsave().unwrap());
        assert_eq!(got[XMM0..XMM0 + 4], words);
        assert_eq!((got[MXCSR], got[XSTATE_BV] & XSTATE_SSE), (0x1f80, XSTATE_SSE));
        assert_eq!(more_got, more);
        // What was got can be set again after a change.
        region[XMM0..XMM0 + 4].fill(7);
        vcpu.set_xsave(&from_parts(region, &more)).unwrap();
        vcpu.set_xsave(&from_parts(got, &more_got)).unwrap();
        assert_eq!(parts(&vcpu.xsave().unwrap()), (got, more_got));
    }
}

#[test]
fn an_xsave_area_that_kvm_cannot_take_is_einval() {
    let Some(vm) = kvm() else { return };
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let (mut region, more) = parts(&vcpu.xsave().unwrap());
    if !more.is_empty() {
        let short = from_parts(region, &more[1..]);
        assert_eq!(vcpu.set_xsave(&short), Err(INVALID), "shorter than what KVM reads");
    }
    // A component that no CPU has: bit 62 of XSTATE_BV.
    region[XSTATE_BV + 1] |= 1 << 30;
    assert_eq!(vcpu.set_xsave(&from_parts(region, &more)), Err(INVALID));
}

#[test]
fn xcr0_is_as_it_was_set() {
    for mut vcpu in vcpus() {
        let xcrs = vcpu.xcrs().unwrap();
        vcpu.set_xcrs(&xcrs).unwrap();
        assert_eq!(vcpu.xcrs().unwrap(), xcrs);
    }
    let Some(vm) = kvm() else { return };
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let cpuid = vm.supported_cpuid().unwrap();
    let mut xcrs = vcpu.xcrs().unwrap();
    assert_eq!(
        (xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value),
        (1, 0, 1),
        "x87 alone"
    );
    vcpu.set_cpuid(&cpuid).unwrap();
    xcrs.xcrs[0].value = 0b11;
    vcpu.set_xcrs(&xcrs).unwrap();
    assert_eq!(vcpu.xcrs().unwrap(), xcrs, "x87 and SSE");
    // x87 is always on.
    xcrs.xcrs[0].value = 0b10;
    assert_eq!(vcpu.set_xcrs(&xcrs), Err(INVALID));
    assert_eq!(vcpu.xcrs().unwrap().xcrs[0].value, 0b11);
}

#[test]
fn pending_events_are_as_they_were_set() {
    for mut vcpu in vcpus() {
        let mut events = vcpu.vcpu_events().unwrap();
        (events.exception.injected, events.exception.nr) = (1, UD_VECTOR);
        events.nmi.masked = 1;
        vcpu.set_vcpu_events(&events).unwrap();
        let got = vcpu.vcpu_events().unwrap();
        assert_eq!((got.exception.injected, got.exception.nr), (1, UD_VECTOR));
        assert_eq!((got.nmi.masked, got.nmi.pending, got.interrupt.injected), (1, 0, 0));
    }
}

#[test]
fn the_fakes_lapic_and_mp_state_are_as_they_were_set() {
    let mut vcpu = fake();
    let mut lapic = vcpu.lapic().unwrap();
    lapic.regs[0x80] = 0x20;
    vcpu.set_lapic(&lapic).unwrap();
    assert_eq!(vcpu.lapic().unwrap(), lapic);
    let halted = kvm_mp_state {
        mp_state: KVM_MP_STATE_HALTED,
    };
    assert_eq!(vcpu.mp_state().unwrap().mp_state, KVM_MP_STATE_RUNNABLE);
    vcpu.set_mp_state(halted).unwrap();
    assert_eq!(vcpu.mp_state().unwrap(), halted);
}

#[test]
fn without_an_irqchip_there_is_no_lapic_and_a_vcpu_is_always_runnable() {
    let Some(vm) = kvm() else { return };
    // Also a vCPU that is not the first: nobody could send it INIT and SIPI.
    for index in 0..2 {
        let mut vcpu = vm.create_vcpu(index).unwrap();
        assert_eq!(vcpu.lapic().map(drop), Err(INVALID));
        assert_eq!(vcpu.set_lapic(&kvm_lapic_state::default()), Err(INVALID));
        let runnable = kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        };
        assert_eq!(vcpu.mp_state().unwrap(), runnable);
        for mp_state in [
            KVM_MP_STATE_UNINITIALIZED,
            KVM_MP_STATE_INIT_RECEIVED,
            KVM_MP_STATE_HALTED,
            KVM_MP_STATE_SIPI_RECEIVED,
        ] {
            assert_eq!(vcpu.set_mp_state(kvm_mp_state { mp_state }), Err(INVALID), "{mp_state}");
        }
        vcpu.set_mp_state(runnable).unwrap();
        assert_eq!(vcpu.mp_state().unwrap(), runnable);
    }
}
