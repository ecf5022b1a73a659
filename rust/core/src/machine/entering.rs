//! A run between the call of `run` and the first entry of a vCPU: what ends it is looked at then, too.

use std::time::Instant;

use super::current::Current;
use crate::error::{Error, Failure};

pub(super) struct Entering<'a> {
    current: &'a Current,
    deadline: Option<Instant>,
    interrupt: &'a mut dyn FnMut() -> Result<(), Failure>,
    end: Option<Result<String, Error>>,
}

impl<'a> Entering<'a> {
    pub(super) fn new(
        current: &'a Current,
        deadline: Option<Instant>,
        interrupt: &'a mut dyn FnMut() -> Result<(), Failure>,
    ) -> Self {
        Self {
            current,
            deadline,
            interrupt,
            end: None,
        }
    }

    /// Looks whether something ends the run. To be called some forty times a second.
    pub(super) fn goes_on(&mut self) -> bool {
        if self.end.is_none() {
            self.end = match (self.interrupt)() {
                Err(failure) => Some(Err(Error::Interrupted(failure))),
                Ok(()) => self.stopped().map(Ok),
            };
        }
        self.end.is_none()
    }

    /// Whether it has been seen to end, or was stopped.
    pub(super) fn has_ended(&mut self) -> bool {
        if self.end.is_none() {
            self.end = self.current.end().map(Ok);
        }
        self.end.is_some()
    }

    /// How it ends, if it does.
    pub(super) fn end(self) -> Option<Result<String, Error>> {
        self.end
    }

    fn stopped(&self) -> Option<String> {
        let late = || self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        self.current.end().or_else(|| late().then(|| "timeout".to_owned()))
    }
}
