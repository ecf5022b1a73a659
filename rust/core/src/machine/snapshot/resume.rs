//! Going on from a machine that was put aside.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::manifest::{FORMAT, Manifest, Saved, name};
use super::save::sum;
use crate::allocation::reserve;
use crate::boot::kernel_file::KernelFile;
use crate::boot::running_kernel::RunningKernel;
use crate::error::{Error, Failure};
use crate::input::{Input, InputError, Watch, open_regular};
use crate::machine::assembly::Machine;
use crate::machine::config::Config;
use crate::memory::address::{PAGE_SIZE, Range, State};
use crate::memory::missing::PageBits;
use crate::memory::missing::pager::{FilePager, Pager};
use crate::memory::saved::bytes_of_bits;
use crate::policy::hooks::Policy;
use crate::vcpu::saved::SavedVcpu;

/// The most bytes of the manifest, and of a state: each of 4096 vCPUs has some 30 KiB, as text.
const LARGEST_MANIFEST: u64 = 1 << 20;
const LARGEST_STATE: u64 = 512 << 20;
/// What is read from text takes at most so many times its size: a list of the smallest elements, as it grows.
const OF_TEXT: usize = 8;
/// How many bytes of text are read between two calls of the watch.
const TEXT_AT_ONCE: usize = 64 << 10;
/// The most bytes of a kernel.
const LARGEST_KERNEL: u64 = 2 << 30;

/// How a machine that goes on gets its memory.
pub enum Bytes {
    /// All of it is read first.
    Now,
    /// Each page is read when it is first touched.
    Lazily,
    /// The same, from elsewhere: a pager is asked for each page, also for one of zeroes.
    From(Arc<dyn Pager>),
}

/// The folder of a snapshot, whose manifest and state have been read and checked.
pub struct Snapshot {
    pub(super) folder: PathBuf,
    pub(super) manifest: Manifest,
    pub(super) saved: Saved,
}

impl Snapshot {
    /// Reads what the folder has besides memory.
    ///
    /// # Errors
    /// `File` for what is not there; `Invalid` for what is damaged, with the file's name; `NotSupported` for a snapshot of
    /// another format; `Interrupted` for a failure of `watch`, which is called again and again.
    pub fn open(folder: &Path, watch: &mut Watch<'_>) -> Result<Self, Error> {
        /// What every format begins with.
        #[derive(serde::Deserialize)]
        struct Begin {
            format: u32,
            pagegate: String,
        }
        let bytes = read(folder, name::MANIFEST, LARGEST_MANIFEST, watch)?;
        let begin: Begin = parse(folder, name::MANIFEST, &bytes, watch)?;
        if begin.format != FORMAT {
            return Err(Error::NotSupported(format!(
                "{}: a snapshot of format {}, which pagegate {} has written; this one reads format {FORMAT}",
                folder.display(),
                begin.format,
                begin.pagegate
            )));
        }
        let manifest: Manifest = parse(folder, name::MANIFEST, &bytes, watch)?;
        let bytes = read(folder, name::STATE, LARGEST_STATE, watch)?;
        check(folder, name::STATE, sum(&bytes), manifest.sums.state)?;
        Ok(Self {
            saved: parse(folder, name::STATE, &bytes, watch)?,
            folder: folder.to_path_buf(),
            manifest,
        })
    }

    /// The parameters of the machine that goes on from it, for [`Machine::new`]. Those that the guest cannot tell may be
    /// changed.
    ///
    /// # Errors
    /// `NotSupported` for what this pagegate does not know.
    pub fn config(&self, policy: Arc<dyn Policy>) -> Result<Config, Error> {
        self.manifest.machine.config(policy)
    }

    /// What its devices were called, their types, and whether each of their accesses had an event: as they have to be added
    /// to the machine, in this order.
    pub fn devices(&self) -> Vec<(&str, u16, bool)> {
        let devices = self.saved.pc.iter().flat_map(|pc| &pc.devices);
        let told = devices.map(|device| (device.name.as_str(), device.id, device.logs_accesses));
        told.collect()
    }
}

impl Machine {
    /// Goes on from a snapshot: the next run does. For a machine of [`Snapshot::config`] that has just been made, with the
    /// devices that the snapshot had. After an error it is of no use any more.
    ///
    /// With [`Bytes::Lazily`] a page is read when it is first touched, so that the files have to stay as they are while there is
    /// this machine, and their checksums are not checked.
    ///
    /// # Errors
    /// `Invalid` for what is damaged, with the file's name, and for other devices; `NotSupported` for a feature that this
    /// host lacks, userfaultfd(2) among them where pages come when they are touched; `Busy` for a machine that was used; else
    /// as [`Machine::snapshot`].
    pub fn resume(&self, snapshot: Snapshot, bytes: Bytes, watch: &mut Watch<'_>) -> Result<(), Error> {
        let Snapshot {
            folder,
            manifest,
            saved,
        } = snapshot;
        if self.memory.generation() != 0 || self.made != manifest.machine {
            return Err(Error::Busy(
                "a snapshot is resumed by a new machine that is made with its parameters",
            ));
        }
        let damaged = |why| damaged(&folder, why);
        let _still = self.current.still()?;
        self.check_shape(&saved).map_err(damaged)?;
        let pages = self.private_bits_in(&folder, manifest.sums.pages, watch)?;
        self.memory.set_private_bits(&pages, watch).map_err(damaged)?;
        match bytes {
            Bytes::Lazily => {
                let (pages, pager) = self.missing_in(&folder, watch)?;
                self.begin_missing(pages, Arc::new(pager), None)?;
            }
            Bytes::From(_) if saved.kept => {
                return Err(Error::NotSupported(
                    "a conversion has kept its old side, and a pager is not asked for the bytes of that: resume it lazily"
                        .to_owned(),
                ));
            }
            Bytes::From(pager) => self.begin_all_missing(pager)?,
            Bytes::Now => {
                let sides = [
                    (State::Shared, name::SHARED, manifest.sums.shared),
                    (State::Private, name::PRIVATE, manifest.sums.private),
                ];
                for (state, name, wanted) in sides {
                    let path = folder.join(name);
                    let file = open_regular(&path)?;
                    let found = self.memory.load_side(state, &file, &path, watch).map_err(damaged)?;
                    check(&folder, name, found, wanted)?;
                }
            }
        }
        self.memory.set_kept(saved.kept);
        self.remind_policy(&saved.policy);
        self.bring_for_kvm(&saved, watch)?;
        // Before the interrupt controllers and devices, which may raise an interrupt of a vCPU.
        for (index, saved) in saved.vcpus.iter().enumerate() {
            self.idle_vcpu(index)?.restore(saved)?;
        }
        if let (Some(pc), Some(saved)) = (&self.pc, saved.pc) {
            if let Some(wanted) = manifest.sums.kernel {
                let bytes = read(&folder, name::KERNEL, LARGEST_KERNEL, watch)?;
                check(&folder, name::KERNEL, sum(&bytes), wanted)?;
                let kernel = KernelFile::parse(bytes).map_err(damaged)?;
                *pc.kernel.lock() = Some(Arc::new(RunningKernel::new(kernel)));
            }
            pc.restore(saved)?;
        }
        let what = "set the guest's clock";
        let set = self.hypervisor.set_clock(&saved.clock);
        set.map_err(|errno| Error::Host { what, errno })
    }

    /// Whether a state is that of a machine with as many vCPUs and of this platform.
    pub(super) fn check_shape(&self, saved: &Saved) -> Result<(), Error> {
        match saved.vcpus.len() == self.vcpus.len() && saved.pc.is_some() == self.pc.is_some() {
            true => Ok(()),
            false => Err(of_another()),
        }
    }

    /// The states that a folder has of the pages of this memory.
    pub(super) fn private_bits_in(&self, folder: &Path, wanted: u64, watch: &mut Watch<'_>) -> Result<Vec<u8>, Error> {
        let most = bytes_of_bits(self.memory.views().memory_end()) as u64;
        let pages = read(folder, name::PAGES, most, watch).map_err(|why| damaged(folder, why))?;
        check(folder, name::PAGES, sum(&pages), wanted)?;
        Ok(pages)
    }

    /// The pages of which a folder has bytes, and what reads them.
    pub(super) fn missing_in(&self, folder: &Path, watch: &mut Watch<'_>) -> Result<([PageBits; 2], FilePager), Error> {
        let mut side = |name| {
            let path = folder.join(name);
            let file = open_regular(&path)?;
            let pages = self.memory.pages_in(&file, &path, watch);
            Ok::<_, Error>((pages.map_err(|why| damaged(folder, why))?, (path, file)))
        };
        let ((shared, shared_file), (private, private_file)) = (side(name::SHARED)?, side(name::PRIVATE)?);
        let pager = FilePager::new(shared_file, private_file, self.memory.views().memory_end())?;
        Ok(([shared, private], pager))
    }

    /// Brings what KVM touches while it is given the vCPUs' MSRs: a pager's failure could not end that.
    pub(super) fn bring_for_kvm(&self, saved: &Saved, watch: &mut Watch<'_>) -> Result<(), Error> {
        for gpa in saved.vcpus.iter().flat_map(SavedVcpu::touched_by_kvm) {
            let place = self.memory.views().locate(gpa);
            let page = place.and_then(|place| Range::new(place.page(), PAGE_SIZE));
            page.map_or(Ok(()), |page| self.memory.bring(page, watch))?;
        }
        Ok(())
    }
}

pub(super) fn of_another() -> Error {
    Error::Invalid("its state is that of another machine".to_owned())
}

pub(super) fn damaged(folder: &Path, why: Error) -> Error {
    match why {
        Error::Invalid(why) => Error::Invalid(format!("{}: it is damaged: {why}", folder.display())),
        other => other,
    }
}

fn read(folder: &Path, name: &str, most: u64, watch: &mut Watch<'_>) -> Result<Vec<u8>, Error> {
    let path = folder.join(name);
    let read = Input::open(&path).and_then(|input| input.whole(most, watch));
    read.map_err(|error| match error {
        InputError::System(error) => Error::File {
            errno: error.into(),
            path,
        },
        InputError::Interrupted(failure) => Error::Interrupted(failure),
        InputError::TooLarge(_) | InputError::Device => {
            Error::Invalid(format!("{}: it has more than {most} bytes, or no end", path.display()))
        }
    })
}

/// Text that is read a part at a time, so that the user can end it.
struct Text<'a> {
    rest: &'a [u8],
    watch: &'a mut Watch<'a>,
    failed: &'a mut Option<Failure>,
}

impl Read for Text<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if let Err(failure) = (self.watch)() {
            *self.failed = Some(failure);
            return Err(std::io::ErrorKind::Other.into());
        }
        self.rest.read(into)
    }
}

fn parse<T: DeserializeOwned>(folder: &Path, name: &str, bytes: &[u8], watch: &mut Watch<'_>) -> Result<T, Error> {
    // Where there is no memory for what is read, that must not be found out in the middle.
    let mut room = Vec::<u8>::new();
    let what = "read a snapshot's state";
    reserve(&mut room, bytes.len().saturating_mul(OF_TEXT)).map_err(|errno| Error::Host { what, errno })?;
    drop(room);
    let mut failed = None;
    let text = Text {
        rest: bytes,
        watch: &mut || watch(),
        failed: &mut failed,
    };
    let parsed = serde_json::from_reader(BufReader::with_capacity(TEXT_AT_ONCE, text));
    match (parsed, failed) {
        (Ok(parsed), _) => Ok(parsed),
        (Err(_), Some(failure)) => Err(Error::Interrupted(failure)),
        (Err(error), None) => Err(Error::Invalid(format!(
            "{}: it is damaged: {error}",
            folder.join(name).display()
        ))),
    }
}

fn check(folder: &Path, name: &str, found: u64, wanted: u64) -> Result<(), Error> {
    match found == wanted {
        true => Ok(()),
        false => Err(Error::Invalid(format!(
            "{}: it is damaged: its checksum is {found:016x}, and was {wanted:016x}",
            folder.join(name).display()
        ))),
    }
}
