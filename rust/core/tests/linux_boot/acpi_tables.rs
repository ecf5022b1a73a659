//! The ACPI tables: found and read as an operating system does it, and disassembled by ACPICA's tools where they are
//! installed.

use std::fs;
use std::path::Path;
use std::process::Command;

use pagegate_core::boot::acpi::{MAX_VCPUS, tables};
use pagegate_core::devices::power::Power;

use crate::guest::{Loaded, MIB, bzimage, guest, load, range};

const HEADER: usize = 36;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(table: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(table[at..at + 4].try_into().unwrap())
}

fn u64_at(table: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
}

/// The table at `gpa`, with its checksum checked.
fn table(loaded: &Loaded, gpa: u64) -> Vec<u8> {
    let size = loaded.u32(gpa + 4) as usize;
    let table = loaded.bytes(gpa, size);
    assert_eq!(
        sum(&table),
        0,
        "the checksum of {:?}",
        String::from_utf8_lossy(&table[..4])
    );
    table
}

/// FADT, MADT and DSDT, found from the RSDP, which is found by scanning where a BIOS has it.
fn found(loaded: &Loaded) -> [Vec<u8>; 3] {
    let bios = loaded.bytes(0xe_0000, 0x2_0000);
    let at = (0..bios.len())
        .step_by(16)
        .find(|at| bios[*at..].starts_with(b"RSD PTR "))
        .unwrap();
    let rsdp = &bios[at..at + 36];
    assert_eq!(
        0xe_0000 + at as u64,
        loaded.u64(loaded.entry.rsi + 0x70),
        "acpi_rsdp_addr"
    );
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
    assert_eq!((rsdp[15], u32_at(rsdp, 20)), (2, 36));
    let xsdt = table(loaded, u64_at(rsdp, 24));
    assert_eq!(xsdt[..4], *b"XSDT");
    let others: Vec<_> = xsdt[HEADER..]
        .chunks(8)
        .map(|entry| table(loaded, u64_at(entry, 0)))
        .collect();
    let named = |name: &[u8]| others.iter().find(|table| table.starts_with(name)).unwrap().clone();
    let fadt = named(b"FACP");
    let dsdt = table(loaded, u64_at(&fadt, 140));
    assert_eq!(dsdt[..4], *b"DSDT");
    [fadt, named(b"APIC"), dsdt]
}

fn with_vcpus(vcpus: u32) -> Loaded {
    let (kernel, ram) = (bzimage(), [range(0, 64 * MIB)]);
    let mut guest = guest(&kernel, &ram);
    guest.vcpus = vcpus;
    load(&guest)
}

/// The generic address of a register of one byte at a port.
fn port(port: u16) -> [u8; 12] {
    let [low, high] = port.to_le_bytes();
    [1, 8, 0, 1, low, high, 0, 0, 0, 0, 0, 0]
}

#[test]
fn the_fadt_says_how_to_reboot_and_power_off() {
    let [fadt, ..] = found(&with_vcpus(1));
    assert_eq!((fadt.len(), fadt[8]), (276, 6));
    let flags = u32_at(&fadt, 112);
    assert_eq!(
        flags & (1 << 20 | 1 << 10),
        1 << 20 | 1 << 10,
        "hardware-reduced, with a reset register"
    );
    let boot_flags = u16::from_le_bytes([fadt[109], fadt[110]]);
    assert_eq!(
        boot_flags,
        1 << 2 | 1 << 5,
        "no VGA, no CMOS clock, and no 8042, which has bit 1"
    );
    assert_eq!(
        (&fadt[116..128], fadt[128]),
        (&port(Power::RESET)[..], Power::RESET_VALUE)
    );
    assert_eq!(fadt[244..256], port(Power::SLEEP_CONTROL));
    assert_eq!(fadt[256..268], port(Power::SLEEP_STATUS));
}

#[test]
fn the_madt_names_each_vcpu_and_the_io_apic() {
    for vcpus in [1, 2, 254, MAX_VCPUS] {
        let [_, madt, _] = found(&with_vcpus(vcpus));
        assert_eq!(u32_at(&madt, 36), 0xfee0_0000);
        let (mut at, mut ids, mut io_apics) = (44, Vec::new(), Vec::new());
        while at < madt.len() {
            let entry = &madt[at..at + usize::from(madt[at + 1])];
            match entry[0] {
                0 => {
                    assert_eq!((entry[2], u32_at(entry, 4)), (entry[3], 1), "enabled");
                    ids.push(u32::from(entry[3]));
                }
                1 => io_apics.push((u32_at(entry, 4), u32_at(entry, 8))),
                other => panic!("an entry of type {other}"),
            }
            at += entry.len();
        }
        assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
        assert_eq!(io_apics, [(0xfec0_0000, 0)]);
    }
}

#[test]
fn the_dsdt_has_power_off_and_com1() {
    let [.., dsdt] = found(&with_vcpus(1));
    let has = |bytes: &[u8]| dsdt.windows(bytes.len()).any(|window| window == bytes);
    // Name (_S5_, Package {5}), with the package's size and its number of elements.
    assert!(has(&[
        0x08,
        b'_',
        b'S',
        b'5',
        b'_',
        0x12,
        4,
        1,
        0x0a,
        Power::SLEEP_TYPE_OFF
    ]));
    // The EISA id PNP0501.
    assert!(has(&[0x0c, 0x41, 0xd0, 0x05, 0x01]));
    // IO (Decode16, 0x3f8, 0x3f8, 1, 8)
    assert!(has(&[0x47, 1, 0xf8, 0x03, 0xf8, 0x03, 1, 8]));
    // Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {4}
    assert!(has(&[0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0]));
}

#[test]
fn tables_are_refused_where_they_cannot_be() {
    for at in [0xe_0008, 1 << 32, u64::MAX - 15, u64::MAX] {
        let message = tables(1, at, false).unwrap_err().to_string();
        assert!(message.contains(&format!("{at:#x}")), "{message}");
    }
    let size = tables(MAX_VCPUS, 0xe_0000, true).unwrap().len();
    assert!(size < 0x1_fff0, "they end below the reset vector");
}

#[test]
fn acpicas_disassembler_reads_them() {
    if Command::new("iasl").arg("-v").output().is_err() {
        println!("skipped: there is no iasl (apt-get install acpica-tools)");
        return;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("acpi-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let tables = found(&with_vcpus(2));
    for (name, table) in ["fadt", "madt", "dsdt"].into_iter().zip(tables) {
        fs::write(folder.join(name).with_extension("aml"), table).unwrap();
        for arguments in [vec!["-d", &format!("{name}.aml")], vec!["-ve", &format!("{name}.dsl")]] {
            let output = Command::new("iasl")
                .args(arguments)
                .current_dir(&folder)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}");
            assert!(
                !text.contains("Invalid") && !text.contains("Incorrect checksum"),
                "{text}"
            );
        }
    }
    let dsdt = fs::read_to_string(folder.join("dsdt.dsl")).unwrap();
    for line in [
        "Name (_S5",
        "Device (_SB.COM1)",
        "EisaId (\"PNP0501\")",
        "0x03F8",
        "Edge, ActiveHigh, Exclusive",
    ] {
        assert!(dsdt.contains(line), "{line:?} is not in: {dsdt}");
    }
    fs::remove_dir_all(&folder).unwrap();
}
