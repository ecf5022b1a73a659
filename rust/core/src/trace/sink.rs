//! The file that a trace is written to. It may be a pipe that nobody reads, so nothing here waits for ever: the caller is
//! asked in between.

use std::fs::File;
use std::io::{Error, ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use crate::error::Failure;

/// How long a pipe is waited for between two calls of the watch.
const SLICE: Duration = Duration::from_millis(50);

/// Called again and again while a pipe's reader is waited for, with the time for which it has read nothing. A failure ends
/// that: what is left is not written.
pub type Waiting<'a> = dyn FnMut(Duration) -> Result<(), Failure> + Send + 'a;

/// A failure of [`Waiting`]: a reader has not read for longer than its caller waits.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads it")]
pub(super) struct Stalled;

/// A failure of [`Waiting`], on its way through those that only know errors of the system.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct GivenUp(pub(super) Failure);

pub(super) struct Sink<'a> {
    file: File,
    waiting: Box<Waiting<'a>>,
    given_up: bool,
}

impl<'a> Sink<'a> {
    /// Creates or truncates the file. A pipe that has no reader yet is waited for.
    pub(super) fn create(path: &Path, mut waiting: Box<Waiting<'a>>) -> std::io::Result<Self> {
        let mut options = File::options();
        options.write(true).create(true).truncate(true);
        options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let begun = Instant::now();
        loop {
            match options.open(path) {
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) && is_pipe(path) => {
                    waiting(begun.elapsed()).map_err(given_up)?;
                    std::thread::sleep(SLICE);
                }
                file => {
                    return Ok(Self {
                        file: file?,
                        waiting,
                        given_up: false,
                    });
                }
            }
        }
    }

    /// Waits for room for at least one more byte.
    fn wait(&mut self, begun: Instant) -> std::io::Result<()> {
        let slice = Timespec {
            tv_sec: 0,
            tv_nsec: SLICE.as_nanos() as _,
        };
        match poll(&mut [PollFd::new(&self.file, PollFlags::OUT)], Some(&slice)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        (self.waiting)(begun.elapsed()).map_err(|failure| {
            self.given_up = true;
            given_up(failure)
        })
    }
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let begun = Instant::now();
        // A buffer above this one writes again when it is dropped.
        while !self.given_up {
            match self.file.write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(begun)?,
                done => return done,
            }
        }
        Err(Error::from(ErrorKind::BrokenPipe))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn given_up(failure: Failure) -> Error {
    Error::other(GivenUp(failure))
}

fn is_pipe(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo())
}
