//! Instructions as text.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

/// The longest instruction in bytes.
pub const LONGEST: usize = 15;

/// The instruction at the start of `bytes`, in Intel's syntax; `None` if they are none. `bits`: 16, 32 or 64; `rip`:
/// where they are, for relative operands.
pub fn disassemble(bytes: &[u8], bits: u32, rip: u64) -> Option<String> {
    let mut decoder = Decoder::try_with_ip(bits, bytes, rip, DecoderOptions::NONE).ok()?;
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        return None;
    }
    let mut text = String::new();
    let mut formatter = IntelFormatter::new();
    formatter.options_mut().set_space_after_operand_separator(true);
    formatter.format(&instruction, &mut text);
    Some(text)
}
