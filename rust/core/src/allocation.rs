//! Memory for what a guest, a file or the machine's size makes large: ENOMEM where there is none. Allocations that cannot
//! fail end the process.

use std::hint::black_box;

use crate::errno::Errno;

/// Makes room for so many more, and not for others that may follow.
///
/// # Errors
/// ENOMEM.
pub(crate) fn reserve<T>(list: &mut Vec<T>, more: usize) -> Result<(), Errno> {
    list.try_reserve_exact(more).map_err(|_| Errno(libc::ENOMEM))
}

/// Adds one to a list that grows.
///
/// # Errors
/// ENOMEM.
#[inline]
pub(crate) fn push<T>(list: &mut Vec<T>, value: T) -> Result<(), Errno> {
    list.try_reserve(1).map_err(|_| Errno(libc::ENOMEM))?;
    list.push(value);
    Ok(())
}

/// Checks that so many bytes can be allocated, for code that allocates them itself and cannot fail. Another thread may be
/// faster.
///
/// # Errors
/// ENOMEM.
pub(crate) fn check_room(bytes: u64) -> Result<(), Errno> {
    let mut list = Vec::<u8>::new();
    reserve(&mut list, usize::try_from(bytes).unwrap_or(usize::MAX))?;
    // An allocation that nobody looks at would not be made.
    black_box(list.as_mut_ptr());
    Ok(())
}
