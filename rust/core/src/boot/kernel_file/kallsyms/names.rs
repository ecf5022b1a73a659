//! The compressed names: a length and that many token numbers for each symbol. The markers after them say where every
//! 256th symbol's name begins, and the number of symbols is before them.
//!
//! Neither has a magic number. The markers are searched for backwards from the token table, as ascending offsets from
//! 0 on; for each such place, the names are where the number before them and all markers fit.

use super::super::table::LONGEST_NAME;
use super::steps::Steps;

/// Symbols from one marker to the next.
const STRIDE: usize = 256;
/// The most token numbers of one name: that of its type, and one for each letter at worst.
const MOST_TOKENS: usize = 1 + LONGEST_NAME;
/// The fewest and the most bytes of one name, with its length.
const SMALLEST: usize = 2;
const LONGEST: usize = 2 + MOST_TOKENS;
/// How far before the token table the markers may begin. In between there can be the order of the names, 3 bytes each.
const FARTHEST: usize = 16 << 20;
/// The most bytes of padding between two tables.
const PADDING: usize = 8;

#[derive(Debug)]
pub(super) struct Names<'a> {
    /// Where the first name begins, in the segment's bytes.
    pub(super) start: usize,
    /// How many there are.
    pub(super) count: usize,
    bytes: &'a [u8],
}

impl<'a> Names<'a> {
    /// The names in `bytes` to which the token table at `tokens` belongs.
    pub(super) fn find(bytes: &'a [u8], tokens: usize, steps: &mut Steps<'_, '_, '_>) -> Option<Self> {
        // Markers have 4 bytes since Linux 4.20; before, they had 8.
        [4, 8].into_iter().find_map(|width| {
            let from = tokens.saturating_sub(FARTHEST).next_multiple_of(4);
            let to = tokens.saturating_sub(2 * width) & !3;
            for at in (from..=to).rev().step_by(4) {
                steps.take()?;
                let markers = markers(bytes, at, tokens, width, steps)?;
                if markers.len() < 2 {
                    continue;
                }
                if let Some(names) = Self::before(bytes, &markers, at, steps) {
                    return Some(names);
                }
            }
            None
        })
    }

    /// Each name as token numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = &'a [u8]> {
        let mut at = self.start;
        (0..self.count).map_while(move |_| {
            let name = name_at(self.bytes, at)?;
            at = name.end;
            self.bytes.get(name)
        })
    }

    /// The names whose markers are at `end`. There may be more `markers` than there really are.
    fn before(bytes: &'a [u8], markers: &[usize], end: usize, steps: &mut Steps<'_, '_, '_>) -> Option<Self> {
        let nearest = end.checked_sub(*markers.get(1)?)? & !3;
        let farthest = end.saturating_sub(*markers.last()? + STRIDE * LONGEST + PADDING).max(8);
        for start in (farthest..=nearest).rev().step_by(4) {
            steps.take()?;
            // Where tables are aligned to 8 bytes, there are zeroes after the number.
            let count = match word(bytes, start - 4)? {
                0 => word(bytes, start - 8)?,
                count => count,
            };
            let Some(&last) = count.div_ceil(STRIDE).checked_sub(1).and_then(|last| markers.get(last)) else {
                continue;
            };
            let fits = (start + last..=start + last + STRIDE * LONGEST + PADDING).contains(&end);
            if fits && count > STRIDE && ends_at(bytes, start, count, markers, end, steps)? {
                return Some(Self { start, count, bytes });
            }
        }
        None
    }
}

/// Whether `count` names from `start` on agree with the markers and end, but for padding, at `end`. `None` if the steps
/// are used up.
fn ends_at(
    bytes: &[u8],
    start: usize,
    count: usize,
    markers: &[usize],
    end: usize,
    steps: &mut Steps<'_, '_, '_>,
) -> Option<bool> {
    let mut at = start;
    for index in 0..count {
        steps.take()?;
        if index.is_multiple_of(STRIDE) && markers.get(index / STRIDE) != Some(&(at - start)) {
            return Some(false);
        }
        match name_at(bytes, at) {
            Some(name) if name.end <= end => at = name.end,
            _ => return Some(false),
        }
    }
    let padding = bytes.get(at..end).unwrap_or_default();
    Some(padding.len() < PADDING && padding.iter().all(|&byte| byte == 0))
}

/// The place of a name's token numbers, whose length is at `at`.
fn name_at(bytes: &[u8], at: usize) -> Option<std::ops::Range<usize>> {
    let low = usize::from(*bytes.get(at)?);
    // Since Linux 6.1 a length above 127 has two bytes.
    let (start, length) = if low < 0x80 {
        (at + 1, low)
    } else {
        (at + 2, (low & 0x7f) | usize::from(*bytes.get(at + 1)?) << 7)
    };
    (1..=MOST_TOKENS).contains(&length).then_some(start..start + length)
}

/// The ascending offsets at `at`, from 0 on, as far as they can be markers. `None` if the steps are used up.
fn markers(bytes: &[u8], at: usize, to: usize, width: usize, steps: &mut Steps<'_, '_, '_>) -> Option<Vec<usize>> {
    let mut markers = Vec::new();
    for at in (at..to).step_by(width) {
        let Some(marker) = word(bytes, at) else { break };
        let high = if width == 8 { word(bytes, at + 4) } else { Some(0) };
        let fits = match markers.last() {
            None => marker == 0,
            Some(last) => (last + STRIDE * SMALLEST..=last + STRIDE * LONGEST).contains(&marker),
        };
        if !fits || high != Some(0) {
            break;
        }
        steps.take()?;
        steps.push(&mut markers, marker)?;
    }
    Some(markers)
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*bytes) as usize)
}
