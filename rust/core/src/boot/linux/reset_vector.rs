//! The code at the BIOS's entry point, which reboots the guest.
//!
//! On hardware-reduced ACPI Linux expects that there is EFI to reboot with. As there is none it jumps to the BIOS in
//! real mode, and without `reboot=acpi` never writes the reset register of the FADT. So that register is written here.

use crate::devices::power::Power;

/// The code, to be written to [`super::layout::RESET_VECTOR`]. It fits in the 16 bytes up to 1 MiB.
pub(super) fn code() -> Vec<u8> {
    let [low, high] = Power::RESET.to_le_bytes();
    let write_register = [0xba, low, high, 0xb0, Power::RESET_VALUE, 0xee]; // mov dx, port; mov al, value; out dx, al
    let wait = [0xfa, 0xf4, 0xeb, 0xfd]; // cli; hlt; jmp to the hlt
    [&write_register[..], &wait].concat()
}
