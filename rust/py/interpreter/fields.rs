//! Fields of request objects that are reused: see [`super::reuse`].

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use pagegate_core::memory::address::State;
use pyo3::prelude::*;
use pyo3::types::PyString;

/// A value that fits into a [`Field`].
pub(crate) trait Word: Copy {
    fn from_word(word: u64) -> Self;
    fn to_word(self) -> u64;
}

/// A field of a frozen Python object. It is an atomic, because such an object is written through a shared reference: by
/// the thread that made it, and only while there is no other reference to it.
pub(crate) struct Field<T> {
    word: AtomicU64,
    of: PhantomData<T>,
}

impl<T: Word> Field<T> {
    pub(crate) fn get(&self) -> T {
        T::from_word(self.word.load(Ordering::Relaxed))
    }

    pub(crate) fn set(&self, value: T) {
        self.word.store(value.to_word(), Ordering::Relaxed);
    }
}

impl<T: Word> From<T> for Field<T> {
    fn from(value: T) -> Self {
        Self {
            word: AtomicU64::new(value.to_word()),
            of: PhantomData,
        }
    }
}

impl<'py, T: Word + IntoPyObject<'py>> IntoPyObject<'py> for &Field<T> {
    type Target = T::Target;
    type Output = T::Output;
    type Error = T::Error;

    fn into_pyobject(self, py: Python<'py>) -> Result<Self::Output, Self::Error> {
        self.get().into_pyobject(py)
    }
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Word for $type {
            fn from_word(word: u64) -> Self {
                word as Self
            }

            fn to_word(self) -> u64 {
                self as u64
            }
        }
    )*};
}

integers!(u64, u32, u16, u8, i32);

impl Word for bool {
    fn from_word(word: u64) -> Self {
        word != 0
    }

    fn to_word(self) -> u64 {
        self.into()
    }
}

/// The state of a range. Its words are interned Python strings.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum RangeState {
    Shared,
    Private,
    Mixed,
}

impl RangeState {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            RangeState::Shared => State::Shared.as_str(),
            RangeState::Private => State::Private.as_str(),
            RangeState::Mixed => "mixed",
        }
    }

    /// `None` for a range that is mixed.
    pub(crate) fn state(self) -> Option<State> {
        match self {
            RangeState::Shared => Some(State::Shared),
            RangeState::Private => Some(State::Private),
            RangeState::Mixed => None,
        }
    }
}

impl From<State> for RangeState {
    fn from(state: State) -> Self {
        match state {
            State::Shared => RangeState::Shared,
            State::Private => RangeState::Private,
        }
    }
}

impl From<Option<State>> for RangeState {
    fn from(state: Option<State>) -> Self {
        state.map_or(RangeState::Mixed, RangeState::from)
    }
}

impl Word for RangeState {
    fn from_word(word: u64) -> Self {
        match word {
            0 => RangeState::Shared,
            1 => RangeState::Private,
            _ => RangeState::Mixed,
        }
    }

    fn to_word(self) -> u64 {
        self as u64
    }
}

impl<'py> IntoPyObject<'py> for RangeState {
    type Target = PyString;
    type Output = Bound<'py, PyString>;
    type Error = std::convert::Infallible;

    fn into_pyobject(self, py: Python<'py>) -> Result<Self::Output, Self::Error> {
        let word = match self {
            RangeState::Shared => pyo3::intern!(py, "shared"),
            RangeState::Private => pyo3::intern!(py, "private"),
            RangeState::Mixed => pyo3::intern!(py, "mixed"),
        };
        Ok(word.clone())
    }
}
