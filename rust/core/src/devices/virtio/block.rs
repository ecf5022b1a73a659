//! A disk: a file, in sectors of 512 bytes.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use rustix::fs::{FileType, FlockOperation};
use vmm_sys_util::epoll::EventSet;

use super::device::{Device, Source};
use super::helpers::{CarryOut, Done, Helpers};
use super::queue::{NoAccess, Queue, Request, total};
use crate::errno::Errno;
use crate::error::{Error, Failure};

const SECTOR: u64 = 512;
/// Requests that can be in the queue.
const QUEUE: u16 = 256;
/// The most buffers of a request, and bytes of a buffer, that a driver is asked for.
const MOST_BUFFERS: u32 = QUEUE as u32 - 2;
const LARGEST_BUFFER: u32 = 1 << 20;
/// Bytes of the largest request that such a driver makes. A larger one fails: the end of a run waits for those under way.
const LARGEST_REQUEST: u64 = MOST_BUFFERS as u64 * LARGEST_BUFFER as u64;
/// Bytes that are copied at a time, while a conversion of their pages waits.
const PIECE: usize = 1 << 20;

/// Features: [`LARGEST_BUFFER`] holds, [`MOST_BUFFERS`] holds, the disk cannot be written, writes can be flushed.
const SIZE_MAX: u64 = 1 << 1;
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;

/// Types of requests.
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
}

/// The last byte of a request: how it went.
mod status {
    pub const OK: u8 = 0;
    pub const IO_ERROR: u8 = 1;
    pub const UNSUPPORTED: u8 = 2;
}

/// Bytes of the answer to [`kind::GET_ID`].
const ID_SIZE: usize = 20;
/// Bytes at the start of each request: its type, 4 bytes without meaning, its first sector.
const HEADER: usize = 16;

/// virtio-blk over a file. Several requests are under way at a time, and are completed in any order. So a flush covers the
/// writes that were completed before it was taken, as the specification demands: fdatasync(2) begins after that.
pub struct Block {
    helpers: Helpers<Disk>,
}

/// What carries out requests.
struct Disk {
    file: File,
    read_only: bool,
    id: [u8; ID_SIZE],
    sectors: AtomicU64,
    under_way: [AtomicUsize; TRANSFERS.len()],
    /// The driver does not flush, so that what is written has to be on the disk when the request is completed.
    write_through: AtomicBool,
}

/// What a request does with the file, which takes as long as the host takes: how many there are now, see
/// [`Disk::under_way`].
const TRANSFERS: [&str; 3] = ["read", "write", "flush"];

/// One of [`TRANSFERS`], until it is dropped.
struct UnderWay<'a>(&'a AtomicUsize);

impl<'a> UnderWay<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why a request failed.
struct Failed(u8);

impl From<NoAccess> for Failed {
    fn from(_: NoAccess) -> Self {
        Self(status::IO_ERROR)
    }
}

impl From<Errno> for Failed {
    fn from(_: Errno) -> Self {
        Self(status::IO_ERROR)
    }
}

impl From<std::io::Error> for Failed {
    fn from(_: std::io::Error) -> Self {
        Self(status::IO_ERROR)
    }
}

impl Block {
    /// A disk of the file's present size, of which the bytes after the last whole sector are no part. The file is open for
    /// reading, and for writing unless it is `read_only`.
    ///
    /// # Errors
    /// Those of lseek(2); `Invalid` for a file of less than a sector; EBUSY if another disk is that file, unless both are
    /// `read_only`.
    pub fn new(file: File, read_only: bool) -> Result<Self, Error> {
        let sectors = AtomicU64::new(sectors(&file)?);
        lock(&file, read_only)?;
        let disk = Disk {
            id: id(&file)?,
            file,
            read_only,
            sectors,
            under_way: Default::default(),
            write_through: AtomicBool::new(false),
        };
        Ok(Self {
            helpers: Helpers::new(disk)?,
        })
    }

    /// Gives requests that were carried out back to the driver. One to which no status can be written would be one whose
    /// driver takes what is there for the status.
    fn complete(queue: &mut Queue, done: Vec<Done>) {
        for (request, told) in done {
            match told {
                Some(written) => queue.complete(request, written),
                None => queue.fail(),
            }
        }
    }
}

impl Disk {
    /// Does what a request asks for. Returns how many bytes were written to its buffers, without the status.
    fn execute(&self, request: &Request) -> Result<u32, Failed> {
        let mut header = [0; HEADER];
        request.read(0, &mut header)?;
        let [kind, _, low, high] = std::array::from_fn(|at| {
            let word = std::array::from_fn(|byte| header[4 * at + byte]);
            u32::from_le_bytes(word)
        });
        let sector = u64::from(high) << 32 | u64::from(low);
        let out = total(request.readable()) - HEADER as u64;
        let into = total(request.writable()).saturating_sub(1);
        let [read, write, flush] = &self.under_way;
        match kind {
            kind::IN => {
                let at = self.place(sector, into)?;
                let _under_way = UnderWay::new(read);
                in_pieces(request, into, |from, len| {
                    request.write_from_file(from, len, &self.file, at + from)
                })?;
                Ok(into as u32)
            }
            kind::OUT if self.read_only => Err(Failed(status::IO_ERROR)),
            kind::OUT => {
                let at = self.place(sector, out)?;
                let _under_way = UnderWay::new(write);
                in_pieces(request, out, |from, len| {
                    request.read_to_file(HEADER as u64 + from, len, &self.file, at + from)
                })?;
                if self.write_through.load(Ordering::Relaxed) {
                    self.file.sync_data()?;
                }
                Ok(0)
            }
            kind::FLUSH => {
                let _under_way = UnderWay::new(flush);
                self.file.sync_data()?;
                Ok(0)
            }
            kind::GET_ID => {
                let part = &self.id[..ID_SIZE.min(into as usize)];
                request.write(0, part)?;
                Ok(part.len() as u32)
            }
            _ => Err(Failed(status::UNSUPPORTED)),
        }
    }

    /// The offset in the file of `len` bytes from a sector on.
    fn place(&self, sector: u64, len: u64) -> Result<u64, Failed> {
        let end = sector.checked_add(len / SECTOR);
        let sound = len.is_multiple_of(SECTOR) && len <= LARGEST_REQUEST;
        let inside = sound && end.is_some_and(|end| end <= self.sectors.load(Ordering::Relaxed));
        inside.then(|| sector * SECTOR).ok_or(Failed(status::IO_ERROR))
    }
}

impl CarryOut for Disk {
    fn carry_out(&self, request: &Request) -> Option<u32> {
        let done = self.execute(request).and_then(|written| {
            request.intact()?;
            Ok(written)
        });
        let (code, written) = match done {
            Ok(written) => (status::OK, written),
            Err(Failed(code)) => (code, 0),
        };
        // The status is the last byte that the device can write.
        let last = total(request.writable()).checked_sub(1)?;
        request.write(last, &[code]).ok()?;
        Some(written + 1)
    }
}

/// Transfers `len` bytes in parts: `transfer` is told where each begins, and its bytes. It fails once the driver wants a reset.
fn in_pieces(
    request: &Request,
    len: u64,
    mut transfer: impl FnMut(u64, usize) -> Result<(), Errno>,
) -> Result<(), Failed> {
    for from in (0..len).step_by(PIECE) {
        if request.is_given_up() {
            return Err(Failed(status::IO_ERROR));
        }
        transfer(from, PIECE.min((len - from) as usize))?;
    }
    Ok(())
}

/// Two guests that write to one file system destroy it. As with flock(2), only those that ask are kept out.
fn lock(file: &File, read_only: bool) -> Result<(), Error> {
    let kind = match read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    match rustix::fs::flock(file, kind) {
        // The file system has no locks.
        Ok(()) | Err(rustix::io::Errno::NOLCK | rustix::io::Errno::OPNOTSUPP) => Ok(()),
        Err(errno) => Err(Error::Host {
            what: "lock a disk",
            errno: match errno {
                rustix::io::Errno::WOULDBLOCK => Errno(libc::EBUSY),
                other => other.into(),
            },
        }),
    }
}

/// What a disk is called: 8 hexadecimal digits of the device that its file is on, and 12 of its inode. Another one for each file,
/// and the same in each run.
fn id(file: &File) -> Result<[u8; ID_SIZE], Error> {
    let stat = rustix::fs::fstat(file).map_err(|errno| Error::Host {
        what: "find out which file a disk is",
        errno: errno.into(),
    })?;
    let (device, inode) = match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => (stat.st_rdev, 0),
        _ => (stat.st_dev, stat.st_ino),
    };
    let device = rustix::fs::major(device) << 20 | rustix::fs::minor(device) & 0xf_ffff;
    let mut id = [0; ID_SIZE];
    let text = format!("{device:08x}{:012x}", inode & 0xffff_ffff_ffff);
    id.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    Ok(id)
}

fn sectors(file: &File) -> Result<u64, Error> {
    let what = "find out a disk's size";
    // A block device has no size in its status.
    let end = std::io::Seek::seek(&mut &*file, std::io::SeekFrom::End(0));
    let sectors = end.map_err(|error| Error::Host {
        what,
        errno: error.into(),
    })? / SECTOR;
    match sectors {
        0 => Err(Error::Invalid("a disk has at least one sector of 512 bytes".to_owned())),
        _ => Ok(sectors),
    }
}

impl Device for Block {
    fn id(&self) -> u16 {
        2
    }

    fn class(&self) -> u16 {
        0x0180
    }

    fn features(&self) -> u64 {
        SIZE_MAX | SEG_MAX | FLUSH | if self.helpers.task().read_only { READ_ONLY } else { 0 }
    }

    fn queues(&self) -> &[u16] {
        &[QUEUE]
    }

    /// With the file's present size.
    fn config(&self) -> Result<Vec<u8>, Failure> {
        let disk = self.helpers.task();
        let sectors = sectors(&disk.file)?;
        disk.sectors.store(sectors, Ordering::Relaxed);
        let mut config = sectors.to_le_bytes().to_vec();
        config.extend(LARGEST_BUFFER.to_le_bytes());
        config.extend(MOST_BUFFERS.to_le_bytes());
        Ok(config)
    }

    fn activate(&self, features: u64) -> Result<(), Failure> {
        let write_through = features & FLUSH == 0;
        self.helpers
            .task()
            .write_through
            .store(write_through, Ordering::Relaxed);
        Ok(())
    }

    fn process(&self, queues: &mut Vec<Queue>, index: usize) -> Result<(), Failure> {
        let queue = &mut queues[index];
        Self::complete(queue, self.helpers.take_done());
        while self.helpers.has_room()
            && let Some(request) = queue.take()
        {
            self.helpers.hand_over(request);
        }
        Ok(())
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source {
            fd: self.helpers.as_fd(),
            events: EventSet::IN,
            queue: 0,
        }]
    }

    fn under_way(&self) -> Option<&'static str> {
        let counts = TRANSFERS.iter().zip(&self.helpers.task().under_way);
        let mut busy = counts.filter(|(_, count)| count.load(Ordering::Relaxed) > 0);
        busy.next().map(|(what, _)| *what)
    }

    fn settle(&self, queues: &mut Vec<Queue>) {
        Self::complete(&mut queues[0], self.helpers.end());
    }
}
