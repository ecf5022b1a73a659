//! The token table: 256 texts, of which the names of symbols are made, and the index that says where each begins.

use std::ops::Range;

use super::super::pace::BYTES;
use super::steps::Steps;
use crate::error::Error;

/// Every digit is in some symbol, so it has a token: itself, and NUL after it.
const DIGITS: &[u8; 20] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
const ZERO: usize = b'0' as usize;
const TOKENS: usize = 256;
/// The longest token, in bytes. Real ones have some 30.
const LONGEST: usize = 256;
/// The most bytes between the table and its index.
const PADDING: usize = 8;

pub(super) struct Tokens<'a> {
    /// Where the token table begins, in the segment's bytes.
    pub(super) start: usize,
    /// Where the index after it ends.
    pub(super) end: usize,
    texts: Vec<&'a [u8]>,
}

/// Where the next digits' tokens begin in `bytes`, from `from` on: there may be a token table around them.
pub(super) fn next(bytes: &[u8], from: usize, steps: &mut Steps<'_, '_, '_>) -> Result<Option<usize>, Error> {
    let finder = memchr::memmem::Finder::new(DIGITS);
    for at in (from..bytes.len()).step_by(BYTES) {
        steps.pace.look()?;
        let part = &bytes[at..bytes.len().min(at + BYTES + DIGITS.len() - 1)];
        if let Some(found) = finder.find(part) {
            return Ok(Some(at + found));
        }
    }
    Ok(None)
}

impl<'a> Tokens<'a> {
    /// The text of a token, without the NUL after it.
    pub(super) fn token(&self, code: u8) -> &'a [u8] {
        self.texts.get(usize::from(code)).copied().unwrap_or_default()
    }

    /// The table whose token '0' is at `digits`.
    pub(super) fn around(bytes: &'a [u8], digits: usize) -> Option<Self> {
        // Where each token from '0' on begins, and where the last one ends.
        let mut starts = vec![digits];
        for _ in ZERO..TOKENS {
            let start = *starts.last()?;
            let rest = bytes.get(start..)?;
            let length = memchr::memchr(0, &rest[..rest.len().min(LONGEST + 1)])?;
            starts.push(start + length + 1);
        }
        let end = starts.pop()?;
        (end..end + PADDING).find_map(|index| {
            let size = 2 * TOKENS;
            let index_range = index..index + size;
            let offsets: Vec<usize> = bytes
                .get(index_range.clone())?
                .chunks_exact(2)
                .map(|pair| usize::from(pair[0]) | usize::from(pair[1]) << 8)
                .collect();
            Self::checked(bytes, &starts, &offsets, end, index_range)
        })
    }

    /// The table if `offsets`, read at `index`, say the same as its texts. `starts` are those from '0' on.
    fn checked(bytes: &'a [u8], starts: &[usize], offsets: &[usize], end: usize, index: Range<usize>) -> Option<Self> {
        let start = starts.first()?.checked_sub(*offsets.get(ZERO)?)?;
        let agree = offsets
            .get(ZERO..)?
            .iter()
            .zip(starts)
            .all(|(&offset, &other)| start + offset == other);
        if !agree || offsets.first() != Some(&0) {
            return None;
        }
        let mut texts = Vec::with_capacity(TOKENS);
        for (code, &offset) in offsets.iter().enumerate() {
            let next = offsets.get(code + 1).map_or(end, |&next| start + next);
            let (&nul, text) = bytes.get(start + offset..next)?.split_last()?;
            if nul != 0 || text.len() > LONGEST || text.contains(&0) {
                return None;
            }
            texts.push(text);
        }
        Some(Self {
            start,
            end: index.end,
            texts,
        })
    }
}
