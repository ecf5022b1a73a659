//! The loop of a vCPU: KVM_RUN, and handling its exit.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kvm_bindings::{
    KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO,
    KVM_MAX_CPUID_ENTRIES, kvm_regs,
};
use kvm_ioctls::{SyncReg, VcpuFd};
use vm_memory::VolatileMemory;

use crate::abi::{DOORBELL_PORT, ENCRYPTED, KVM_HC_MAP_GPA_RANGE, KVM_RUN};
use crate::convert::unexpected;
use crate::pages::{PAGE_SIZE, Pages};
use crate::plan::{END, Span, Start};
use crate::vm::BareVm;

/// RFLAGS' bit 1, which is always set.
const RFLAGS: u64 = 2;

pub(crate) struct BareVcpu<'a> {
    vm: &'a BareVm,
    fd: VcpuFd,
    requests: u64,
    port_io: u64,
    /// How many marks the guest has made.
    marks: u32,
    /// The mark of the beginning: when it came, and `requests` and `port_io` by then.
    begin: Option<(Instant, u64, u64)>,
    span: Option<Span>,
}

impl<'a> BareVcpu<'a> {
    pub(crate) fn new(vm: &'a BareVm, index: usize, start: &Start) -> io::Result<Self> {
        let mut fd = vm.fd.create_vcpu(index as u64)?;
        let mut cpuid = vm.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | ((index as u32) << 24),
                0xb | 0x1f => entry.edx = index as u32,
                _ => {}
            }
        }
        fd.set_cpuid2(&cpuid)?;
        if vm.plan.doorbell {
            fd.set_sync_valid_reg(SyncReg::Register);
        }
        fd.set_sregs(&vm.long_mode.sregs(&fd.get_sregs()?))?;
        vm.load(start.at, &start.image)?;
        fd.set_regs(&kvm_regs {
            rip: vm.views.address(start.at, false),
            rdi: vm.views.address(start.argument, false),
            rflags: RFLAGS,
            ..Default::default()
        })?;
        Ok(Self {
            vm,
            fd,
            requests: 0,
            port_io: 0,
            marks: 0,
            begin: None,
            span: None,
        })
    }

    /// Runs until HLT, an error, or until `leave` is set. After an error sets `leave` for the others.
    pub(crate) fn run(&mut self, leave: &AtomicBool) -> io::Result<Option<Span>> {
        let done = self.run_loop(leave);
        if done.is_err() {
            leave.store(true, Ordering::SeqCst);
        }
        done.map(|()| self.span)
    }

    fn run_loop(&mut self, leave: &AtomicBool) -> io::Result<()> {
        loop {
            // SAFETY: the ioctl takes no pointer, and there is no reference to kvm_run, which it writes.
            let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN, 0) };
            let reason = self.fd.get_kvm_run().exit_reason;
            if result < 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN) if leave.load(Ordering::SeqCst) => return Ok(()),
                    Some(libc::EINTR | libc::EAGAIN) => {}
                    Some(libc::EFAULT) if reason == KVM_EXIT_MEMORY_FAULT => self.memory_fault()?,
                    _ => return Err(error),
                }
                continue;
            }
            match reason {
                KVM_EXIT_HYPERCALL => self.hypercall()?,
                KVM_EXIT_IO => self.io()?,
                KVM_EXIT_MMIO => self.mmio()?,
                KVM_EXIT_HLT => return Ok(()),
                reason => return Err(unexpected(&format!("exit reason {reason}"))),
            }
        }
    }

    fn hypercall(&mut self) -> io::Result<()> {
        // SAFETY: by the exit reason, KVM wrote this member of the union. All bytes are valid for it.
        let call = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.hypercall };
        self.map_gpa_range(call.nr, call.args[0], call.args[1], call.args[2])?;
        self.fd.get_kvm_run().__bindgen_anon_1.hypercall.ret = 0;
        Ok(())
    }

    fn map_gpa_range(&mut self, nr: u64, gpa: u64, pages: u64, attributes: u64) -> io::Result<()> {
        if nr != KVM_HC_MAP_GPA_RANGE {
            return Err(unexpected("hypercalls but KVM_HC_MAP_GPA_RANGE"));
        }
        self.requests += 1;
        let pages = Pages::new(gpa, pages * PAGE_SIZE)?;
        self.vm.convert(pages, attributes & ENCRYPTED != 0)
    }

    fn io(&mut self) -> io::Result<()> {
        let run = self.fd.get_kvm_run();
        // SAFETY: by the exit reason, KVM wrote this member of the union. All bytes are valid for it.
        let io = unsafe { run.__bindgen_anon_1.io };
        if io.count != 1 {
            return Err(unexpected("string IO"));
        }
        self.port_io += 1;
        let write = u32::from(io.direction) == KVM_EXIT_IO_OUT;
        if write && io.port == DOORBELL_PORT {
            let regs = self.fd.sync_regs().regs;
            self.map_gpa_range(regs.rax, regs.rbx, regs.rcx, regs.rdx)?;
            self.fd.sync_regs_mut().regs.rax = 0;
            self.fd.set_sync_dirty_reg(SyncReg::Register);
            return Ok(());
        }
        let base = (&raw mut *run).cast::<u8>();
        // SAFETY: the data is in the same mapping as kvm_run, which is at its start.
        let data = unsafe { base.add(io.data_offset as usize) };
        if write {
            // SAFETY: an OUT has at least one byte of data there.
            let value = unsafe { data.read() };
            if io.port == self.vm.plan.marks {
                self.mark(value);
            }
            return Ok(());
        }
        let answer = match io.port == self.vm.plan.marks {
            true => self.marks.to_le_bytes(),
            false => [0xff; 4],
        };
        let len = usize::from(io.size).min(answer.len());
        // SAFETY: an IN has room for `io.size` bytes there, and `answer` does not overlap it.
        unsafe { data.copy_from_nonoverlapping(answer.as_ptr(), len) };
        Ok(())
    }

    fn mark(&mut self, value: u8) {
        let now = Instant::now();
        self.marks += 1;
        match (value, self.begin) {
            (END, Some((begin, requests, port_io))) => {
                self.span = Some(Span {
                    begin,
                    end: now,
                    requests: self.requests - requests,
                    // Without the exit of this mark.
                    port_io: self.port_io - port_io - 1,
                });
            }
            _ => self.begin = Some((now, self.requests, self.port_io)),
        }
    }

    /// An access to a page in the wrong state. KVM executes it again.
    fn memory_fault(&mut self) -> io::Result<()> {
        // SAFETY: by the exit reason, KVM wrote this member of the union. All bytes are valid for it.
        let fault = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.memory_fault };
        self.convert_touched(fault.gpa)?;
        Ok(())
    }

    /// Converts the page's block to the state of the view that `address` is in. Returns the gpa without the shared bit,
    /// and whether that is the private view.
    fn convert_touched(&mut self, address: u64) -> io::Result<(u64, bool)> {
        let located = self.vm.views.locate(address);
        let (gpa, private) = located.ok_or_else(|| unexpected("an access without two views, or outside of memory"))?;
        let block = self.vm.plan.block;
        self.requests += 1;
        self.vm.convert(Pages::new(gpa - gpa % block, block)?, private)?;
        Ok((gpa, private))
    }

    /// An access to a view without a memslot. KVM does not execute it again, so it is carried out here.
    fn mmio(&mut self) -> io::Result<()> {
        // SAFETY: by the exit reason, KVM wrote this member of the union. All bytes are valid for it.
        let mut mmio = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.mmio };
        let (gpa, private) = self.convert_touched(mmio.phys_addr)?;
        let side = self.vm.side(private);
        let data = mmio
            .data
            .get_mut(..mmio.len as usize)
            .ok_or(io::ErrorKind::InvalidData)?;
        let write = mmio.is_write != 0;
        match (side.guest_memfd, write) {
            (false, true) => side.file.write_all_at(data, gpa)?,
            (false, false) => side.file.read_exact_at(data, gpa)?,
            (true, _) => {
                let slice = side
                    .mapping
                    .get_slice(gpa as usize, data.len())
                    .map_err(io::Error::other)?;
                if write {
                    slice.copy_from(data);
                } else {
                    slice.copy_to(data);
                }
            }
        }
        if !write {
            self.fd.get_kvm_run().__bindgen_anon_1.mmio.data = mmio.data;
        }
        Ok(())
    }
}
