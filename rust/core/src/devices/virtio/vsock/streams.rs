//! All streams: who they belong to, which of them have something to send, and what their sockets are waited for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};

use super::connection::{Connection, Outgoing, Ports};
use super::packet::{HOST, Header, STREAM, op};

/// Streams at a time.
pub(super) const MOST: usize = 256;
/// Of these, programs of the host that the guest has not answered. More wait until they are accepted.
const MOST_UNANSWERED: usize = 64;
/// Refusals that wait for the guest to take them. It loses those that come after them.
const MOST_REFUSALS: usize = 1024;
/// Ports of programs of the host that connect to the guest.
const FIRST_PORT: u32 = 1 << 30;
/// What the listening socket is in the epoll, where streams have numbers from 0 on.
const LISTENER: u64 = u64::MAX;
/// What [`super::Vsock`] adds to it: its own wake, and the timer of [`Streams`].
pub(super) const WAKE: u64 = u64::MAX - 1;
pub(super) const RETRY: u64 = u64::MAX - 2;
/// How long a process without room for one more stream waits before it tries again. That it has room again, nobody says.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// The epolls of sockets that are waited for until they can be read, and until they can be written.
#[derive(Clone, Copy)]
pub(super) struct Epolls<'a> {
    pub reads: BorrowedFd<'a>,
    pub writes: BorrowedFd<'a>,
}

/// A packet for the guest, of which `len` bytes at most are data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packet {
    Refusal(Header),
    Of { id: u64, packet: Outgoing },
}

/// The streams of one device.
pub(super) struct Streams {
    cid: u32,
    path: PathBuf,
    listener: UnixListener,
    listening: bool,
    /// This process had no room for one more, and no stream has ended and [`RETRY_AFTER`] has not passed since.
    crowded: bool,
    /// A timerfd, in the epoll of reads.
    retry: OwnedFd,
    connections: BTreeMap<u64, Connection>,
    ids: BTreeMap<Ports, u64>,
    unanswered: BTreeSet<u64>,
    next_id: u64,
    next_port: u32,
    refusals: VecDeque<Header>,
    /// Those that have something to send, in the order of their turns.
    turns: VecDeque<u64>,
}

impl Streams {
    /// `retry`: a timerfd that does not block, which is [`RETRY`] in the epoll of reads.
    pub(super) fn new(cid: u32, path: PathBuf, listener: UnixListener, retry: OwnedFd) -> Self {
        Self {
            cid,
            path,
            listener,
            listening: false,
            crowded: false,
            retry,
            connections: BTreeMap::new(),
            ids: BTreeMap::new(),
            unanswered: BTreeSet::new(),
            next_id: 0,
            next_port: FIRST_PORT,
            refusals: VecDeque::new(),
            turns: VecDeque::new(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Closes all streams.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.ids.clear();
        self.unanswered.clear();
        self.refusals.clear();
        self.turns.clear();
    }

    /// Takes what programs of the host have sent, and new ones, as far as there is room.
    pub(super) fn read_sockets(&mut self, epolls: Epolls<'_>) -> Result<(), Errno> {
        self.listen(epolls)?;
        for id in ready(epolls.reads)? {
            match (id, self.connections.get_mut(&id)) {
                (LISTENER, _) => self.accept(epolls)?,
                (RETRY, _) => {
                    // It fails only if it has been set again meanwhile.
                    let _ = rustix::io::read(&self.retry, &mut [0; 8]);
                    self.crowded = false;
                    self.listen(epolls)?;
                }
                (_, Some(connection)) if connection.is_greeting() => {
                    match connection.greeting() {
                        Ok(Some(guest)) => self.request(id, guest),
                        Ok(None) => {}
                        Err(()) => self.remove(id),
                    }
                    self.settle(id, epolls)?;
                }
                (_, Some(connection)) if connection.is_unanswered() => {
                    // The program has hung up.
                    self.drop_it(id);
                    self.settle(id, epolls)?;
                }
                (_, Some(connection)) => {
                    connection.read();
                    self.settle(id, epolls)?;
                }
                (_, None) => {}
            }
        }
        Ok(())
    }

    /// Passes on what waits for sockets that can be written now.
    pub(super) fn write_sockets(&mut self, epolls: Epolls<'_>) -> Result<(), Errno> {
        for id in ready(epolls.writes)? {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.write();
                self.settle(id, epolls)?;
            }
        }
        Ok(())
    }

    /// A packet of the guest, with its data. Without data, if they could not be read, the stream fails.
    pub(super) fn receive(&mut self, header: &Header, data: Option<&[u8]>, epolls: Epolls<'_>) -> Result<(), Errno> {
        if header.src_cid != u64::from(self.cid) {
            return Ok(());
        }
        // Others may have closed something meanwhile.
        self.crowded = false;
        let ports = Ports {
            guest: header.src_port,
            host: header.dst_port,
        };
        let to_streams = header.dst_cid == HOST && header.kind == STREAM;
        let id = self.ids.get(&ports).copied().filter(|_| to_streams);
        match (header.op, id) {
            (op::RST, Some(id)) => {
                self.remove(id);
                self.settle(id, epolls)?;
            }
            (op::RST, None) => {}
            (op::REQUEST, None) if to_streams => match self.connect(ports.host) {
                Some(socket) => {
                    let id = self.add(Connection::of_guest(socket, ports, header));
                    self.ids.insert(ports, id);
                    self.settle(id, epolls)?;
                }
                None => self.refuse(header.refused()),
            },
            (_, Some(id)) => {
                match (self.connections.get_mut(&id), data) {
                    (Some(connection), Some(data)) => connection.receive(header, data),
                    (Some(connection), None) => connection.fail(),
                    (None, _) => {}
                }
                self.settle(id, epolls)?;
            }
            (_, None) => self.refuse(header.refused()),
        }
        Ok(())
    }

    /// The packet that is to be sent next.
    pub(super) fn next(&mut self) -> Option<Packet> {
        if let Some(header) = self.refusals.front() {
            return Some(Packet::Refusal(*header));
        }
        while let Some(&id) = self.turns.front() {
            if let Some(connection) = self.connections.get_mut(&id) {
                if let Some(packet) = connection.next() {
                    return Some(Packet::Of { id, packet });
                }
                connection.queued = false;
            }
            self.turns.pop_front();
        }
        None
    }

    /// The header and the data of a packet, with `room` bytes for the latter. `None` if it needs more.
    pub(super) fn contents(&mut self, packet: Packet, room: usize) -> Option<(Header, &[u8])> {
        match packet {
            Packet::Refusal(header) => Some((header, &[])),
            Packet::Of { id, packet } => {
                let connection = self.connections.get_mut(&id)?;
                let len = packet.len.min(room);
                let header = addressed(self.cid, connection.header(packet, len));
                (len > 0 || packet.len == 0).then(|| (header, connection.data(len)))
            }
        }
    }

    /// The guest has it, with `len` bytes of data.
    pub(super) fn sent(&mut self, packet: Packet, len: usize, epolls: Epolls<'_>) -> Result<(), Errno> {
        match packet {
            Packet::Refusal(_) => {
                self.refusals.pop_front();
            }
            Packet::Of { id, packet } => {
                self.turns.pop_front();
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.sent(packet, len);
                    connection.queued = false;
                }
                self.settle(id, epolls)?;
            }
        }
        Ok(())
    }

    /// Does what has to follow a change of a stream.
    fn settle(&mut self, id: u64, epolls: Epolls<'_>) -> Result<(), Errno> {
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.is_over()
        {
            match connection.watch(id, epolls.reads, epolls.writes) {
                // The user that this process is of has no room for one more.
                Err(Errno::NOSPC | Errno::NOMEM) => self.drop_it(id),
                watched => watched?,
            }
        }
        if let Some(connection) = self.connections.get_mut(&id) {
            if !connection.is_unanswered() {
                self.unanswered.remove(&id);
            }
            if connection.is_over() {
                let reset = Outgoing {
                    op: op::RST,
                    flags: 0,
                    len: 0,
                };
                let header = addressed(self.cid, connection.header(reset, 0));
                self.remove(id);
                self.refuse(header);
            } else if !connection.queued && connection.next().is_some() {
                connection.queued = true;
                self.turns.push_back(id);
            }
        }
        self.listen(epolls)
    }

    fn add(&mut self, connection: Connection) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.connections.insert(id, connection);
        id
    }

    /// Gives a stream up, which the guest is told if it knows of it.
    fn drop_it(&mut self, id: u64) {
        match self.connections.get_mut(&id) {
            Some(connection) if connection.is_known() => connection.fail(),
            _ => self.remove(id),
        }
    }

    /// Closes a stream.
    fn remove(&mut self, id: u64) {
        self.connections.remove(&id);
        self.ids.retain(|_, with| *with != id);
        self.unanswered.remove(&id);
        self.turns.retain(|turn| *turn != id);
        self.crowded = false;
    }

    fn refuse(&mut self, refusal: Header) {
        if self.refusals.len() < MOST_REFUSALS {
            self.refusals.push_back(refusal);
        }
    }

    /// Waits for programs of the host to connect only as long as there is room for them.
    fn listen(&mut self, epolls: Epolls<'_>) -> Result<(), Errno> {
        let mut wanted = self.has_room() && !self.crowded;
        match (wanted, self.listening) {
            (true, false) => {
                let data = EventData::new_u64(LISTENER);
                match epoll::add(epolls.reads, &self.listener, data, EventFlags::IN) {
                    Err(Errno::NOSPC | Errno::NOMEM) => {
                        self.wait_for_room()?;
                        wanted = false;
                    }
                    added => added?,
                }
            }
            (false, true) => epoll::delete(epolls.reads, &self.listener)?,
            _ => {}
        }
        self.listening = wanted;
        Ok(())
    }

    /// Accepts nobody until a stream ends, or for a while.
    fn wait_for_room(&mut self) -> Result<(), Errno> {
        self.crowded = true;
        let after = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: 0,
                tv_nsec: RETRY_AFTER.as_nanos() as _,
            },
        };
        timerfd_settime(&self.retry, TimerfdTimerFlags::empty(), &after).map(drop)
    }

    /// Whether one more program of the host can connect.
    fn has_room(&self) -> bool {
        self.connections.len() < MOST && self.unanswered.len() < MOST_UNANSWERED
    }

    fn accept(&mut self, epolls: Epolls<'_>) -> Result<(), Errno> {
        while self.has_room() {
            match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    let id = self.add(Connection::of_host(UnixStream::from(socket)));
                    self.unanswered.insert(id);
                    self.settle(id, epolls)?;
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    self.wait_for_room()?;
                    return self.listen(epolls);
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// A program of the host wants this port of the guest.
    fn request(&mut self, id: u64, guest: u32) {
        let ports = loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_PORT);
            let ports = Ports { guest, host };
            if !self.ids.contains_key(&ports) {
                break ports;
            }
        };
        self.ids.insert(ports, id);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.request(ports);
        }
    }

    /// Connects to the socket of a port of the host. `None` if nobody listens there.
    fn connect(&self, port: u32) -> Option<UnixStream> {
        if self.connections.len() == MOST {
            return None;
        }
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        connect(path).ok()
    }
}

/// Connects to a Unix socket without waiting.
pub(super) fn connect(path: OsString) -> Result<UnixStream, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(socket.as_fd(), &address)?;
    Ok(UnixStream::from(socket))
}

/// A header from the host to the guest.
fn addressed(cid: u32, header: Header) -> Header {
    Header {
        src_cid: HOST,
        dst_cid: cid.into(),
        kind: STREAM,
        ..header
    }
}

/// Which sockets are ready.
fn ready(epoll: BorrowedFd<'_>) -> Result<Vec<u64>, Errno> {
    let mut events = Vec::with_capacity(64);
    match epoll::wait(
        epoll,
        rustix::buffer::spare_capacity(&mut events),
        Some(&Timespec::default()),
    ) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno),
    }
    Ok(events.into_iter().map(|event| event.data.u64()).collect())
}

#[cfg(test)]
mod tests;
