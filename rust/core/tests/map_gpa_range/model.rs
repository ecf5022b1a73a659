//! The definition of KVM_HC_MAP_GPA_RANGE in arithmetic that cannot overflow.

/// What a request is.
#[derive(Debug)]
pub enum Expected {
    Malformed,
    /// To share what is no memory.
    Nothing,
    /// Start, bytes, private, page size.
    Convert(u64, u64, bool, u64),
}

pub fn expected(gpa: u64, pages: u64, attributes: u64, memory: u64, shared_bit: Option<u32>) -> Expected {
    let stripped = match shared_bit {
        Some(bit) if gpa >> bit & 1 == 1 => gpa - (1 << bit),
        _ => gpa,
    };
    let (start, count) = (u128::from(stripped), u128::from(pages));
    let end = start + count * 4096;
    let page_size = match attributes % 16 {
        0 => 4096,
        1 => 2 * 1024 * 1024,
        2 => 1024 * 1024 * 1024,
        _ => return Expected::Malformed,
    };
    let sane = start % 4096 == 0 && count > 0 && attributes < 32;
    let private = attributes >= 16;
    if sane && end <= u128::from(memory) {
        return Expected::Convert(stripped, (end - start) as u64, private, page_size);
    }
    let meets_memory = [0, shared_bit.map_or(0, |bit| 1 << bit)]
        .into_iter()
        .any(|view| start < view + u128::from(memory) && view < end);
    match sane && !private && end <= 1 << 52 && !meets_memory {
        true => Expected::Nothing,
        false => Expected::Malformed,
    }
}
