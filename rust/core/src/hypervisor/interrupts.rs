//! What each interrupt number is: a pin of an interrupt controller, or a message.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};

use crate::errno::Errno;

/// The number of the first interrupt that is no pin of an interrupt controller.
pub const PINS: u32 = 24;
/// Pins of each of the two 8259s.
const PIC_PINS: u32 = 8;

/// A message-signalled interrupt: a write of `data` to `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The address.
    pub address: u64,
    /// The data.
    pub data: u32,
}

/// The argument of KVM_SET_GSI_ROUTING: the pins as KVM_CREATE_IRQCHIP routes them, and these messages from [`PINS`] on.
pub(super) fn routing(messages: &[Option<Message>]) -> Result<KvmIrqRouting, Errno> {
    let pins = |first, irqchip, count| (0..count).map(move |pin| pin_entry(first + pin, irqchip, pin));
    let entries: Vec<_> = pins(0, KVM_IRQCHIP_PIC_MASTER, PIC_PINS)
        .chain(pins(PIC_PINS, KVM_IRQCHIP_PIC_SLAVE, PIC_PINS))
        .chain(pins(0, KVM_IRQCHIP_IOAPIC, PINS))
        .chain(
            (PINS..)
                .zip(messages)
                .filter_map(|(gsi, message)| Some(message_entry(gsi, (*message)?))),
        )
        .collect();
    KvmIrqRouting::from_entries(&entries).map_err(|_| Errno(libc::EINVAL))
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

fn message_entry(gsi: u32, Message { address, data }: Message) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: address as u32,
                address_hi: (address >> 32) as u32,
                data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}
