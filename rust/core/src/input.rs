//! Reading a file that a user named. It may be a pipe that nobody writes to, or a device without an end, so nothing here
//! waits or reads for ever: the caller is asked in between, and says how much it takes at most.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use crate::error::{Error, Failure};

/// How many bytes are read between two calls of the watch.
const PART: usize = 4 << 20;
/// How long a pipe is waited for between two calls of the watch.
const WAIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Called again and again by what may take long. Its failure ends that: the user wants no more of it.
pub type Watch<'a> = dyn FnMut() -> Result<(), Failure> + 'a;

/// Why a file could not be read.
#[derive(Debug)]
pub enum InputError {
    /// The system's error.
    System(std::io::Error),
    /// The watch failed.
    Interrupted(Failure),
    /// It has more bytes than this, or no end.
    TooLarge(u64),
    /// It is a character device, such as /dev/zero, which need not have an end.
    Device,
}

/// Opens a regular file. A pipe's writer is not waited for.
///
/// # Errors
/// `File` where that fails; `Invalid` for what is no regular file.
pub(crate) fn open_regular(path: &Path) -> Result<File, Error> {
    let failed = |error: std::io::Error| Error::File {
        path: path.to_path_buf(),
        errno: error.into(),
    };
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(failed)?;
    match file.metadata().map_err(failed)?.is_file() {
        true => Ok(file),
        false => Err(Error::Invalid(format!("{}: it is no regular file", path.display()))),
    }
}

/// A file, and what has been read of it.
pub struct Input {
    file: File,
    regular: bool,
    bytes: Vec<u8>,
}

impl Input {
    /// Opens a file. It does not wait for a pipe's writer.
    ///
    /// # Errors
    /// Those of open(2), and `Device`.
    pub fn open(path: &Path) -> Result<Self, InputError> {
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let file = options.open(path).map_err(InputError::System)?;
        let found = file.metadata().map_err(InputError::System)?.file_type();
        if found.is_char_device() {
            return Err(InputError::Device);
        }
        Ok(Self {
            regular: found.is_file(),
            file,
            bytes: Vec::new(),
        })
    }

    /// Whether it is a regular file, which nobody has to be waited for.
    pub fn is_regular(&self) -> bool {
        self.regular
    }

    /// Reads on until there are `count` bytes, or all that the file has. Returns what was read since it was opened.
    ///
    /// # Errors
    /// Those of reading, ENOMEM among them, and the watch's failure.
    pub fn fill(&mut self, count: u64, watch: &mut Watch<'_>) -> Result<&[u8], InputError> {
        while (self.bytes.len() as u64) < count {
            watch().map_err(InputError::Interrupted)?;
            if !self.regular && !self.is_ready()? {
                continue;
            }
            let part = PART.min((count - self.bytes.len() as u64) as usize);
            self.bytes.try_reserve(part).map_err(|_| no_memory())?;
            match Read::take(&self.file, part as u64).read_to_end(&mut self.bytes) {
                Ok(read) if read < part => break,
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(InputError::System(error)),
                _ => {}
            }
        }
        Ok(&self.bytes)
    }

    /// All of the file, which has at most `most` bytes.
    ///
    /// # Errors
    /// As [`Input::fill`], and `TooLarge`.
    pub fn whole(mut self, most: u64, watch: &mut Watch<'_>) -> Result<Vec<u8>, InputError> {
        let size = self.file.metadata().map_err(InputError::System)?.len();
        if self.regular && size > most {
            return Err(InputError::TooLarge(most));
        }
        let read = self.fill(most + 1, watch)?.len() as u64;
        match read > most {
            true => Err(InputError::TooLarge(most)),
            false => Ok(self.bytes),
        }
    }

    /// Whether there is something to read, or an end. A pipe whose writer has not come yet has neither.
    fn is_ready(&self) -> Result<bool, InputError> {
        let mut file = [PollFd::new(&self.file, PollFlags::IN)];
        match poll(&mut file, Some(&WAIT)) {
            Ok(count) => Ok(count > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(errno) => Err(InputError::System(errno.into())),
        }
    }
}

fn no_memory() -> InputError {
    InputError::System(std::io::Error::from_raw_os_error(libc::ENOMEM))
}
