//! A naive writer of the kernel's symbol tables, in every order that Linux has had.

/// A symbol: its address, the letter of its type, its name.
pub type Symbol = (u64, char, String);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Offsets and base before the names: to Linux 6.3.
    OffsetsFirst,
    /// Offsets and base after the token index: from 6.4.
    OffsetsLast,
    /// Offsets from themselves after the token index, all tables aligned to 4 bytes: 7.3.
    SelfRelative,
}

#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub order: Order,
    /// CONFIG_KALLSYMS_ABSOLUTE_PERCPU.
    pub absolute_percpu: bool,
    /// Whether the markers have 8 bytes, as before Linux 4.20.
    pub wide_markers: bool,
    /// Whether 3 bytes for each symbol come between the markers and the tokens.
    pub sequence: bool,
}

/// Texts that get a code of their own, which no name has as a letter.
const FREQUENT: [&str; 8] = ["sys_", "__", "_init", "symbol", "tT", "er", "on", "Tx"];

/// The tables, to be put at `address`, which is a multiple of 8. The symbols ascend.
pub fn tables(symbols: &[Symbol], layout: Layout, address: u64) -> Vec<u8> {
    let aligned = if layout.order == Order::SelfRelative { 4 } else { 8 };
    let texts: Vec<String> = symbols
        .iter()
        .map(|(_, letter, name)| format!("{letter}{name}"))
        .collect();
    let tokens = token_texts(&texts);
    let usable: Vec<(u8, &str)> = (0..=u8::MAX)
        .zip(tokens.iter().map(String::as_str))
        .filter(|token| !token.1.is_empty())
        .collect();
    let count = symbols.len() as u32;
    let base = symbols
        .iter()
        .map(|symbol| symbol.0)
        .find(|&address| address >> 63 == 1)
        .unwrap();

    let offset = |address: u64, place: u64| match layout.order {
        Order::SelfRelative => address.wrapping_sub(place) as u32,
        _ if !layout.absolute_percpu => (address - base) as u32,
        _ if address >> 63 == 0 => address as u32,
        _ => base.wrapping_sub(address).wrapping_sub(1) as u32,
    };
    let offsets = |out: &mut Vec<u8>| {
        pad(out, aligned);
        for symbol in symbols {
            let place = address + out.len() as u64;
            out.extend(offset(symbol.0, place).to_le_bytes());
        }
        pad(out, aligned);
        if layout.order != Order::SelfRelative {
            out.extend(base.to_le_bytes());
        }
    };

    let mut out = Vec::new();
    if layout.order == Order::OffsetsFirst {
        offsets(&mut out);
    }
    out.extend(count.to_le_bytes());
    pad(&mut out, aligned);
    let names = out.len();
    let mut markers = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        if index % 256 == 0 {
            markers.push((out.len() - names) as u64);
        }
        let codes = encode(text, &usable);
        if codes.len() < 0x80 {
            out.push(codes.len() as u8);
        } else {
            out.extend([codes.len() as u8 & 0x7f | 0x80, (codes.len() >> 7) as u8]);
        }
        out.extend(codes);
    }
    pad(&mut out, aligned);
    for marker in markers {
        out.extend(&marker.to_le_bytes()[..if layout.wide_markers { 8 } else { 4 }]);
    }
    pad(&mut out, aligned);
    if layout.sequence {
        for index in 0..count {
            out.extend(&(count - 1 - index).to_be_bytes()[1..]);
        }
        pad(&mut out, aligned);
    }
    let mut index = Vec::new();
    let table = out.len();
    for token in &tokens {
        index.extend(((out.len() - table) as u16).to_le_bytes());
        out.extend(token.bytes());
        out.push(0);
    }
    pad(&mut out, aligned);
    out.extend(index);
    if layout.order != Order::OffsetsFirst {
        offsets(&mut out);
    }
    out
}

/// Each letter that occurs stands for itself. Frequent texts have the codes that are left, and the rest is empty.
fn token_texts(texts: &[String]) -> Vec<String> {
    let mut frequent = FREQUENT.iter();
    (0..=255_u8)
        .map(|code| match char::from(code) {
            letter if texts.iter().any(|text| text.contains(letter)) => letter.to_string(),
            _ => frequent.next().map(ToString::to_string).unwrap_or_default(),
        })
        .collect()
}

/// With the longest token that fits, from the left.
fn encode(text: &str, tokens: &[(u8, &str)]) -> Vec<u8> {
    let mut codes = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let fitting = tokens.iter().filter(|token| rest.starts_with(token.1));
        let (code, token) = fitting.max_by_key(|token| token.1.len()).unwrap();
        codes.push(*code);
        rest = &rest[token.len()..];
    }
    codes
}

fn pad(out: &mut Vec<u8>, aligned: usize) {
    out.resize(out.len().next_multiple_of(aligned), 0);
}
