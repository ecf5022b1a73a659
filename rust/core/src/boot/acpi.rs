//! The ACPI tables of a machine that runs Linux: what hardware-reduced ACPI needs, and nothing else.
//!
//! Linux takes from them the vCPUs and the IO APIC (MADT), how to reboot and power off (FADT and `_S5_`), and the
//! interrupt of COM1 (DSDT). Without ACPI it would use no APIC, and no vCPU but the first.

use acpi_tables::aml::{AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use crate::devices::pci::bus::{ADDRESS_PORT, WINDOW};
use crate::devices::power::Power;
use crate::devices::serial::Serial;
use crate::error::Error;

/// The gpa of the local APIC's registers, where KVM's in-kernel irqchip has them.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// The gpa of the IO APIC's registers, where KVM's in-kernel irqchip has them.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The most vCPUs that the tables can name: APIC ids have 8 bits in the MADT, and 255 is a broadcast.
pub const MAX_VCPUS: u32 = 255;

const OEM_ID: [u8; 6] = *b"PGATE ";
const OEM_TABLE_ID: [u8; 8] = *b"PAGEGATE";
const OEM_REVISION: u32 = 1;

/// The size of the header that every table begins with, in bytes.
const TABLE_HEADER_SIZE: u32 = 36;
/// From revision 2 on, integers in AML have 64 bits.
const DSDT_REVISION: u8 = 2;

/// IAPC_BOOT_ARCH: do not look for VGA at its ISA addresses.
const NO_VGA: u16 = 1 << 2;
/// IAPC_BOOT_ARCH: do not look for a CMOS clock.
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// The alignment of tables in bytes: that of the RSDP, which is found by scanning at multiples of it.
const ALIGNMENT: usize = 16;

/// Builds the tables for `vcpus` vCPUs whose APIC ids are their indices.
///
/// `pci`: there is a PCI bus. The bytes are to be written to gpa `at`, and begin with the RSDP.
///
/// # Errors
/// `Invalid` for no vCPU or more than [`MAX_VCPUS`], and if `at` is not a multiple of 16 below 4 GiB.
pub fn tables(vcpus: u32, at: u64, pci: bool) -> Result<Vec<u8>, Error> {
    if !(1..=MAX_VCPUS).contains(&vcpus) {
        let message = format!("{vcpus} vCPUs: a Linux guest has at least 1 and at most {MAX_VCPUS}");
        return Err(Error::Invalid(message));
    }
    if !at.is_multiple_of(ALIGNMENT as u64) || at > u64::from(u32::MAX) {
        let message = format!("ACPI tables at {at:#x}: they start at a multiple of {ALIGNMENT} below 4 GiB");
        return Err(Error::Invalid(message));
    }
    let mut tables = Tables {
        at,
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = tables.append(&dsdt(pci));
    let fadt = tables.append(&fadt(dsdt));
    let madt = tables.append(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.append(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    Ok(tables.bytes)
}

/// Tables one after the other in memory.
struct Tables {
    /// The gpa of the first byte.
    at: u64,
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table, and returns its gpa.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let gpa = self.at + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        gpa
    }
}

/// A register of one byte at `port`.
fn register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// How to reboot and power off, and that none of the hardware is there that ACPI once required. As the flag for an 8042
/// is clear, Linux looks for none.
fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        // These two say that no fixed register has a button.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = register(Power::RESET);
    fadt.reset_value = Power::RESET_VALUE;
    fadt.sleep_control_reg = register(Power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(Power::SLEEP_STATUS);
    fadt.finalize()
}

/// The vCPUs' local APICs, and the IO APIC, whose pins are the interrupts' numbers.
fn madt(vcpus: u32) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LOCAL_APIC),
    );
    for id in (0..u8::MAX).take(vcpus as usize) {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

/// Bus 0, its ports for configuration, and the addresses that its devices can have. It has no interrupts but messages.
fn host_bridge(aml: &mut Vec<u8>) {
    let ports = IO::new(ADDRESS_PORT, ADDRESS_PORT, 1, 8);
    let buses = aml::AddressSpace::new_bus_number(0u16, 0u16);
    let (first, last) = (WINDOW.start as u32, (WINDOW.end - 1) as u32);
    let window = aml::AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None);
    Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &ports, &window])),
        ],
    )
    .to_aml_bytes(aml);
}

/// Power off; COM1, which Linux would otherwise find without its interrupt; and the PCI bus, if there is one.
fn dsdt(pci: bool) -> Sdt {
    let mut aml = Vec::new();
    Name::new("_S5_".into(), &Package::new(vec![&Power::SLEEP_TYPE_OFF])).to_aml_bytes(&mut aml);
    // The lowest and the highest port that it can start at: it does not move.
    let first = *Serial::PORTS.start();
    let ports = IO::new(first, first, 1, Serial::PORTS.len() as u8);
    let (consumer, edge_triggered, active_low, shared) = (true, true, false, false);
    let interrupt = Interrupt::new(consumer, edge_triggered, active_low, shared, Serial::IRQ);
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(&mut aml);
    if pci {
        host_bridge(&mut aml);
    }
    let mut dsdt = Sdt::new(
        *b"DSDT",
        TABLE_HEADER_SIZE,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&aml);
    dsdt
}
