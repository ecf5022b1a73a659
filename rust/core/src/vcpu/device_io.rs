//! Port IO and MMIO of devices.

use super::running::{RunningVcpu, hook_failed};
use crate::error::Error;
use crate::hypervisor::exit::{Io, Mmio, offset, put};

/// Port IO. A read of a port without a handler gives all ones; a write to it is ignored.
pub(super) fn port_io(vcpu: &mut RunningVcpu<'_>, io: &Io) -> Result<(), Error> {
    vcpu.state.reply_due = true;
    let data = vcpu.state.hv.kvm_run().get_mut(io.data..io.data + io.len());
    let data = data.unwrap_or_default();
    match vcpu.context.bus.port(io.port, &mut vcpu.port) {
        Some(handler) => {
            if let Err(failure) = handler.io(vcpu.state.index, io, data) {
                return Err(hook_failed(vcpu.site(None), failure));
            }
        }
        None if !io.write => data.fill(0xff),
        None => {}
    }
    Ok(())
}

/// MMIO outside guest memory, answered like port IO.
pub(super) fn mmio(vcpu: &mut RunningVcpu<'_>, mmio: &Mmio) -> Result<(), Error> {
    vcpu.state.reply_due = true;
    let len = usize::from(mmio.len);
    let mut data = mmio.data;
    // A device is reached through either view.
    let mmio = &Mmio {
        gpa: mmio.gpa & !vcpu.context.memory.views().mask(),
        ..*mmio
    };
    match vcpu.context.bus.mmio(mmio.gpa, mmio.len.into()) {
        Some(handler) => {
            if let Err(failure) = handler.mmio(vcpu.state.index, mmio, &mut data[..len]) {
                let mut site = vcpu.site(None);
                site.gpa = Some(mmio.gpa);
                return Err(hook_failed(site, failure));
            }
        }
        None => data.fill(0xff),
    }
    if !mmio.write {
        put(vcpu.state.hv.kvm_run(), offset::MMIO_DATA, &data[..len]);
    }
    Ok(())
}
