//! Streams between programs of the guest and of the host, over vsock in the guest and Unix sockets on the host.
//!
//! A guest that connects to port P of context ID 2 is connected to the socket PATH_P. A program of the host that wants port
//! P of the guest connects to PATH, writes "CONNECT P\n", and reads "OK ", the port that it has for the guest, and a newline
//! once the guest has taken it; else its connection is closed.
//!
//! - `packet`: the header of a packet; `connection`: one stream; `streams`: all of them

mod connection;
mod packet;
mod streams;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
use vmm_sys_util::epoll::EventSet;

use self::packet::Header;
use self::streams::{Epolls, RETRY, Streams, WAKE};
use super::device::{Device, Source};
use super::queue::{Queue, Request, total};
use super::wake::Wake;
use crate::error::{Error, Failure};
use crate::process::Process;

/// The most bytes of a Unix socket's path.
const LONGEST_PATH: usize = 107;
const QUEUE: u16 = 128;
/// The queues of packets to the guest, of packets from it, and of events.
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
const EVENTS: usize = 2;
/// The one event: no stream that the driver knows of is left.
const TRANSPORT_RESET: u32 = 0;
/// The most data in a packet of the guest: there is never room for more.
const MOST_DATA: u32 = connection::BUFFER as u32;

/// virtio-vsock.
pub struct Vsock {
    cid: u32,
    /// See [`Epolls`].
    reads: OwnedFd,
    writes: OwnedFd,
    /// There is something to send to the guest.
    wake: Wake,
    state: Mutex<State>,
    process: Process,
    /// The socket's file.
    socket: Option<(u64, u64)>,
}

struct State {
    streams: Streams,
    /// Packets wait for buffers, so that sockets are not read.
    starved: bool,
    /// The driver has to be told that its streams have ended: it is in a machine that was resumed.
    streams_ended: bool,
}

/// Whether there is a Unix socket at `path` that nobody listens at: whoever made it has ended without removing it.
pub fn is_left_over(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    is_socket && matches!(streams::connect(path.as_os_str().to_owned()), Err(Errno::CONNREFUSED))
}

/// Device and inode of a file, if there is one.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = std::fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

impl Vsock {
    /// A guest with this context ID. `listener` is the socket at `path`, which is removed in the end.
    ///
    /// # Errors
    /// `Invalid` for a context ID that is not a guest's; those of epoll_create(2), epoll_ctl(2),
    /// timerfd_create(2) and eventfd(2).
    pub fn new(cid: u32, listener: UnixListener, path: PathBuf) -> Result<Self, Error> {
        if !(3..u32::MAX).contains(&cid) {
            return Err(Error::Invalid(format!(
                "context ID {cid} is not a guest's: those are 3 to {}",
                u32::MAX - 1
            )));
        }
        let longest = path.as_os_str().len() + "_4294967295".len();
        if longest > LONGEST_PATH {
            return Err(Error::Invalid(format!(
                "{} is too long: with the port of a program of the host, as _52, a socket's path has {LONGEST_PATH} bytes at \
                 most",
                path.display()
            )));
        }
        let what = "create a vsock device's epoll and timer";
        let failed = |errno: rustix::io::Errno| Error::Host {
            what,
            errno: errno.into(),
        };
        let epoll = || epoll::create(CreateFlags::CLOEXEC).map_err(failed);
        let (reads, writes, wake) = (epoll()?, epoll()?, Wake::new()?);
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let retry = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(failed)?;
        epoll::add(&reads, &wake, EventData::new_u64(WAKE), EventFlags::IN).map_err(failed)?;
        epoll::add(&reads, &retry, EventData::new_u64(RETRY), EventFlags::IN).map_err(failed)?;
        listener.set_nonblocking(true).map_err(|error| Error::Host {
            what: "have a vsock device's socket not block",
            errno: error.into(),
        })?;
        Ok(Self {
            socket: identity(&path),
            cid,
            reads,
            writes,
            wake,
            state: Mutex::new(State {
                streams: Streams::new(cid, path, listener, retry),
                starved: false,
                streams_ended: false,
            }),
            process: Process::default(),
        })
    }

    fn epolls(&self) -> Epolls<'_> {
        Epolls {
            reads: self.reads.as_fd(),
            writes: self.writes.as_fd(),
        }
    }

    /// Puts packets into the guest's buffers, until one of the two runs out. A packet that could not be written, since the
    /// driver gave memory that is not shared, goes into the next one.
    fn send(&self, queue: &mut Queue) -> Result<(), Failure> {
        self.wake.clear();
        let state = &mut *self.state.lock();
        let streams = &mut state.streams;
        streams.read_sockets(self.epolls()).map_err(std::io::Error::from)?;
        while let Some(packet) = streams.next() {
            let Some(request) = queue.take() else {
                break;
            };
            let room = (total(request.writable()) as usize).checked_sub(packet::SIZE);
            let contents = room.and_then(|room| streams.contents(packet, room));
            let written = contents.and_then(|(header, data)| {
                request.write(packet::SIZE as u64, data).ok()?;
                request.write(0, &header.to_bytes()).ok()?;
                request.intact().ok()?;
                Some(data.len())
            });
            if let Some(len) = written {
                streams.sent(packet, len, self.epolls()).map_err(std::io::Error::from)?;
            }
            queue.complete(request, written.map_or(0, |len| (packet::SIZE + len) as u32));
        }
        state.starved = streams.next().is_some();
        Ok(())
    }

    /// Tells the driver that its streams have ended, once.
    fn tell(&self, queue: &mut Queue) {
        let mut state = self.state.lock();
        while state.streams_ended
            && let Some(request) = queue.take()
        {
            let told = request.write(0, &TRANSPORT_RESET.to_le_bytes());
            state.streams_ended = told.is_err();
            queue.complete(request, told.map_or(0, |()| size_of_val(&TRANSPORT_RESET) as u32));
        }
    }

    /// Takes the guest's packets.
    fn receive(&self, queue: &mut Queue) -> Result<(), Failure> {
        let streams = &mut self.state.lock().streams;
        streams.write_sockets(self.epolls()).map_err(std::io::Error::from)?;
        while let Some(request) = queue.take() {
            if let Some((header, data)) = read_packet(&request) {
                let received = streams.receive(&header, data.as_deref(), self.epolls());
                received.map_err(std::io::Error::from)?;
            }
            queue.complete(request, 0);
        }
        if streams.next().is_some() {
            self.wake.ring();
        }
        Ok(())
    }
}

/// A packet's header and data. No header if it cannot be read, and no data if those cannot.
fn read_packet(request: &Request) -> Option<(Header, Option<Vec<u8>>)> {
    let mut bytes = [0; packet::SIZE];
    request.read(0, &mut bytes).ok()?;
    let header = Header::parse(&bytes);
    let mut data = vec![0; header.len.min(MOST_DATA) as usize];
    let is_read = header.len <= MOST_DATA && request.read(packet::SIZE as u64, &mut data).is_ok();
    Some((header, is_read.then_some(data)))
}

impl Drop for Vsock {
    fn drop(&mut self) {
        let state = self.state.lock();
        // Somebody else may have removed it meanwhile, and made another one.
        if self.process.is_present() && identity(state.streams.path()) == self.socket {
            let _ = std::fs::remove_file(state.streams.path());
        }
    }
}

impl Device for Vsock {
    fn id(&self) -> u16 {
        19
    }

    fn class(&self) -> u16 {
        0x0780
    }

    fn queues(&self) -> &[u16] {
        &[QUEUE; 3]
    }

    fn config(&self) -> Result<Vec<u8>, Failure> {
        Ok(u64::from(self.cid).to_le_bytes().to_vec())
    }

    fn process(&self, queues: &mut Vec<Queue>, index: usize) -> Result<(), Failure> {
        match index {
            TO_GUEST => self.send(&mut queues[index]),
            FROM_GUEST => self.receive(&mut queues[index]),
            _ => {
                self.tell(&mut queues[EVENTS]);
                Ok(())
            }
        }
    }

    fn sources(&self) -> Vec<Source<'_>> {
        let source = |fd, queue| Source {
            fd,
            events: EventSet::IN,
            queue,
        };
        let Epolls { reads, writes } = self.epolls();
        let mut sources = vec![source(writes, FROM_GUEST)];
        if !self.state.lock().starved {
            sources.push(source(reads, TO_GUEST));
        }
        sources
    }

    /// A snapshot has no streams: their other ends are not in it.
    fn restore(&self, _state: &[u8]) -> Result<(), Failure> {
        self.state.lock().streams_ended = true;
        Ok(())
    }

    fn reset(&self) -> Result<(), Failure> {
        let mut state = self.state.lock();
        state.streams.clear();
        (state.starved, state.streams_ended) = (false, false);
        self.wake.clear();
        Ok(())
    }
}
