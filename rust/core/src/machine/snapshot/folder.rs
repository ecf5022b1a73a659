//! The folder of a snapshot: it is whole, or it is not there.

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use rustix::rand::GetRandomFlags;

use crate::errno::Errno;
use crate::error::Error;

fn failed(path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::File {
        path: path.to_path_buf(),
        errno: error.into(),
    }
}

/// A folder that is being written, beside the one that it becomes. Only its owner can read it: it has the guest's memory.
pub(super) struct NewFolder {
    target: PathBuf,
    parent: PathBuf,
    /// Removed, unless it has become the other.
    written: Option<PathBuf>,
}

impl NewFolder {
    /// Makes it.
    ///
    /// # Errors
    /// `Invalid` for a path that is there already or that ends in no name; `Host` where it cannot be made.
    pub(super) fn new(target: &Path) -> Result<Self, Error> {
        let Some(name) = target.file_name() else {
            return Err(Error::Invalid(format!("{}: it has no name", target.display())));
        };
        if target.symlink_metadata().is_ok() {
            return Err(failed(target)(Errno(libc::EEXIST).into()));
        }
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let mut random = [0; 4];
        rustix::rand::getrandom(&mut random, GetRandomFlags::empty()).map_err(|errno| failed(target)(errno.into()))?;
        let mut unfinished = OsString::from(".");
        unfinished.push(name);
        unfinished.push(format!(".{:08x}", u32::from_ne_bytes(random)));
        let written = parent.join(unfinished);
        DirBuilder::new().mode(0o700).create(&written).map_err(failed(target))?;
        Ok(Self {
            target: target.to_path_buf(),
            parent,
            written: Some(written),
        })
    }

    /// The path that a file in it is to have.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.target.join(name)
    }

    /// A new file in it.
    pub(super) fn file(&self, name: &str) -> Result<File, Error> {
        let folder = self.written.as_ref().unwrap_or(&self.target);
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        options.open(folder.join(name)).map_err(failed(&self.path(name)))
    }

    /// A new file in it, with these bytes.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let mut file = self.file(name)?;
        file.write_all(bytes).map_err(failed(&self.path(name)))?;
        self.sync(&file, name)
    }

    /// Has a file's bytes reach the disk.
    pub(super) fn sync(&self, file: &File, name: &str) -> Result<(), Error> {
        file.sync_all().map_err(failed(&self.path(name)))
    }

    /// It is whole: from now on it has its name.
    pub(super) fn finish(mut self) -> Result<(), Error> {
        let Some(written) = &self.written else {
            return Ok(());
        };
        let failed = failed(&self.target);
        let sync = |folder: &Path| File::open(folder).and_then(|folder| folder.sync_all());
        sync(written).map_err(&failed)?;
        let renamed = rustix::fs::renameat_with(CWD, written, CWD, &self.target, RenameFlags::NOREPLACE);
        renamed.map_err(|errno| failed(errno.into()))?;
        self.written = None;
        sync(&self.parent).map_err(failed)
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if let Some(written) = self.written.take() {
            let _ = std::fs::remove_dir_all(written);
        }
    }
}
