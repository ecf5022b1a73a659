//! Missing pages the way Firecracker has them: memory is anonymous, and a process of its own serves its userfaultfd: for each
//! touch it copies a page from a file that it has mapped.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, uffd_msg, uffdio_api, uffdio_copy, uffdio_range, uffdio_register,
};
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::ioctl_iowr_nr;

use crate::pages::PAGE_SIZE;

const UFFDIO: u32 = 0xaa;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
/// Where a message has the address.
const ADDRESS: std::ops::Range<usize> = 16..24;
/// What the handler says when it has mapped its file.
const READY: u8 = b'\n';

ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, uffdio_api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, uffdio_register);
ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, uffdio_copy);

/// The process that has the pages.
pub(crate) struct Handler(Child);

impl Handler {
    /// Starts `command`, which is to call [`serve`] with the two arguments that are appended: where the memory is, and how
    /// many bytes. Its standard input is the userfaultfd.
    pub(crate) fn start(command: &[String], memory: &MmapRegion) -> io::Result<Self> {
        let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let base = memory.as_ptr() as u64;
        // Else the kernel clears a huge page at the first touch of each 2 MiB, before it sees that it may not use it.
        // SAFETY: the mapping is this machine's, and keeps its bytes.
        done(unsafe { libc::madvise(memory.as_ptr().cast(), memory.size(), libc::MADV_NOHUGEPAGE) })?;
        let userfault = watching(base, memory.size() as u64)?;
        let mut child = Command::new(program)
            .args(arguments)
            .args([base.to_string(), memory.size().to_string()])
            .stdin(userfault)
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = [0];
        let heard = child.stdout.as_mut().map(|stdout| stdout.read_exact(&mut said));
        let handler = Self(child);
        match heard {
            Some(Ok(())) if said == [READY] => Ok(handler),
            Some(Err(error)) => Err(error),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // It has ended already, if either fails.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A userfaultfd for this memory.
fn watching(base: u64, size: u64) -> io::Result<OwnedFd> {
    // SAFETY: the system call takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just created this descriptor, and nothing else owns it.
    let userfault = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut api = uffdio_api {
        api: UFFD_API.into(),
        features: 0,
        ioctls: 0,
    };
    // SAFETY: the opcode takes this argument.
    done(unsafe { libc::ioctl(fd, UFFDIO_API(), &raw mut api) })?;
    let mut register = uffdio_register {
        range: uffdio_range { start: base, len: size },
        mode: UFFDIO_REGISTER_MODE_MISSING,
        ioctls: 0,
    };
    // SAFETY: the opcode takes this argument. That pages appear there without a write is as if the guest had written them.
    done(unsafe { libc::ioctl(fd, UFFDIO_REGISTER(), &raw mut register) })?;
    Ok(userfault)
}

/// Serves the userfaultfd that is the standard input, for `size` bytes of memory at `base` of another process, until it ends
/// or this process is killed.
///
/// # Errors
/// The kernel's.
pub fn serve(base: u64, size: u64, file: &Path) -> io::Result<()> {
    let file = FileOffset::from_arc(Arc::new(File::open(file)?), 0);
    // Before it begins, so that no page fault of its own counts.
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_POPULATE;
    let bytes = MmapRegion::<()>::build(Some(file), size as usize, libc::PROT_READ, flags).map_err(io::Error::other)?;
    let userfault = io::stdin();
    io::stdout().write_all(&[READY])?;
    io::stdout().flush()?;
    let mut message = [0; size_of::<uffd_msg>()];
    loop {
        (&userfault).read_exact(&mut message)?;
        if u32::from(message[0]) != UFFD_EVENT_PAGEFAULT {
            continue;
        }
        let address = message[ADDRESS]
            .iter()
            .rev()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let page = address - address % PAGE_SIZE;
        if !(base..base + size).contains(&page) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut copy = uffdio_copy {
            dst: page,
            src: bytes.as_ptr() as u64 + (page - base),
            len: PAGE_SIZE,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the opcode takes this argument; `bytes` has the page.
        done(unsafe { libc::ioctl(userfault.as_raw_fd(), UFFDIO_COPY(), &raw mut copy) })?;
    }
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
