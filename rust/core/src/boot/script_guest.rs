//! The guest program of `pagegate.guests.Script`.
#![allow(unsafe_code)]

std::arch::global_asm!(include_str!("../../guests/script.s"));

unsafe extern "C" {
    static pagegate_guest_script: u8;
    static pagegate_guest_script_end: u8;
}

/// The script guest: position-independent long-mode code, described in `guests/script.s`.
pub fn script() -> &'static [u8] {
    let start = &raw const pagegate_guest_script;
    let end = &raw const pagegate_guest_script_end;
    let len = end as usize - start as usize;
    // SAFETY: the assembly above defines both symbols, in this order, with only read-only bytes of one section in
    // between.
    unsafe { std::slice::from_raw_parts(start, len) }
}
