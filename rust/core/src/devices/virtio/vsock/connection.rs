//! One stream: between a port of the guest and a Unix socket.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::Timespec;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::packet::{Header, op, shutdown};

/// Bytes that wait in each direction at most.
pub(super) const BUFFER: usize = 64 << 10;
/// The longest line by which a program of the host says which port it wants.
const LONGEST_LINE: usize = 32;

/// The two ends of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub guest: u32,
    pub host: u32,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// A program of the host has connected and not said which port it wants.
    Greeting,
    /// The guest is asked whether it takes it.
    Requested,
    Open,
    /// It failed: the guest is told, and nothing else happens to it.
    Failed,
}

/// A packet to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub op: u16,
    pub flags: u32,
    /// Bytes of data at most.
    pub len: usize,
}

/// A stream.
pub(super) struct Connection {
    pub ports: Ports,
    /// Whether it is among those that have something to send.
    pub queued: bool,
    socket: UnixStream,
    stage: Stage,
    /// The packet that opens it, until it is sent.
    opening: Option<u16>,
    to_guest: VecDeque<u8>,
    to_host: VecDeque<u8>,
    /// Bytes that went to the host, and how many of them the guest knows of.
    forwarded: u32,
    told: u32,
    /// The guest wants to know.
    update: bool,
    /// Bytes that went to the guest, how many it has passed on, and how many it has room for.
    sent: u32,
    taken: u32,
    room: u32,
    /// The guest was asked for room.
    asked: bool,
    /// What the guest will not do any more, what the host will not, and what the guest knows of that.
    guest_shutdown: u32,
    host_shutdown: u32,
    told_shutdown: u32,
    /// Whether the socket's writing side is shut down.
    ended: bool,
    /// What the two epolls wait for.
    watched: [Option<EventFlags>; 2],
}

impl Connection {
    fn new(socket: UnixStream, ports: Ports, stage: Stage, opening: Option<u16>) -> Self {
        Self {
            ports,
            queued: false,
            socket,
            stage,
            opening,
            to_guest: VecDeque::new(),
            to_host: VecDeque::new(),
            forwarded: 0,
            told: 0,
            update: false,
            sent: 0,
            taken: 0,
            room: 0,
            asked: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            ended: false,
            watched: [None; 2],
        }
    }

    /// The guest has connected, with this packet.
    pub(super) fn of_guest(socket: UnixStream, ports: Ports, request: &Header) -> Self {
        let mut connection = Self::new(socket, ports, Stage::Open, Some(op::RESPONSE));
        connection.note_credit(request);
        connection
    }

    /// A program of the host has connected.
    pub(super) fn of_host(socket: UnixStream) -> Self {
        let nowhere = Ports { guest: 0, host: 0 };
        Self::new(socket, nowhere, Stage::Greeting, None)
    }

    pub(super) fn is_greeting(&self) -> bool {
        self.stage == Stage::Greeting
    }

    /// A program of the host has connected, and the guest has not taken it.
    pub(super) fn is_unanswered(&self) -> bool {
        matches!(self.stage, Stage::Greeting | Stage::Requested)
    }

    /// Whether the guest was told of it.
    pub(super) fn is_known(&self) -> bool {
        self.stage != Stage::Greeting && self.opening != Some(op::REQUEST)
    }

    /// Reads the line by which the program says which port it wants. `Ok(None)` as long as it has not.
    pub(super) fn greeting(&mut self) -> Result<Option<u32>, ()> {
        let mut byte = [0];
        // Byte by byte, so that nothing is read that comes after the line.
        while self.to_guest.len() < LONGEST_LINE {
            match rustix::net::recv(&self.socket, &mut byte[..], RecvFlags::DONTWAIT) {
                Ok((1, _)) if byte == *b"\n" => {
                    let line = std::mem::take(&mut self.to_guest);
                    let line = String::from_utf8(line.into()).map_err(drop)?;
                    let port = line.strip_prefix("CONNECT ").ok_or(())?;
                    return port.trim_end().parse().map(Some).map_err(drop);
                }
                Ok((1, _)) => self.to_guest.extend(byte),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                _ => return Err(()),
            }
        }
        Err(())
    }

    /// Asks the guest.
    pub(super) fn request(&mut self, ports: Ports) {
        (self.ports, self.stage, self.opening) = (ports, Stage::Requested, Some(op::REQUEST));
    }

    /// Takes what the host has sent, as far as there is room.
    pub(super) fn read(&mut self) {
        let mut bytes = [0; 16 << 10];
        while self.wants_read() && self.to_guest.len() < BUFFER {
            let most = bytes.len().min(BUFFER - self.to_guest.len());
            match rustix::net::recv(&self.socket, &mut bytes[..most], RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.host_shutdown |= if self.hung_up() { shutdown::BOTH } else { shutdown::SEND },
                Ok((count, _)) => self.to_guest.extend(&bytes[..count.min(most)]),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => self.stage = Stage::Failed,
            }
        }
    }

    /// Whether the socket's other end is closed, and not only for writing.
    fn hung_up(&self) -> bool {
        let mut socket = [PollFd::new(&self.socket, PollFlags::empty())];
        let polled = rustix::event::poll(&mut socket, Some(&Timespec::default()));
        polled.is_ok() && socket[0].revents().contains(PollFlags::HUP)
    }

    /// Passes on to the host what the guest has sent, as far as the socket takes it.
    pub(super) fn write(&mut self) {
        while !self.to_host.is_empty() && self.stage == Stage::Open {
            let (bytes, _) = self.to_host.as_slices();
            match rustix::net::send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.to_host.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => self.stage = Stage::Failed,
            }
        }
        if self.guest_shutdown & shutdown::SEND != 0 && !self.ended {
            self.ended = true;
            // It fails if the other end is closed, which is as good.
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// A packet of the guest, with its data. A connection that it is wrong for has failed.
    pub(super) fn receive(&mut self, header: &Header, data: &[u8]) {
        self.note_credit(header);
        match (header.op, self.stage) {
            (op::RESPONSE, Stage::Requested) => {
                self.stage = Stage::Open;
                let line = format!("OK {}\n", self.ports.host);
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                // It is the first that is written, so there is room.
                if rustix::net::send(&self.socket, line.as_bytes(), flags) != Ok(line.len()) {
                    self.stage = Stage::Failed;
                }
            }
            (op::RW, Stage::Open) => {
                let allowed = self.guest_shutdown & shutdown::SEND == 0 && self.to_host.len() + data.len() <= BUFFER;
                match allowed {
                    true => self.to_host.extend(data),
                    false => self.stage = Stage::Failed,
                }
            }
            (op::SHUTDOWN, Stage::Open) => {
                self.guest_shutdown |= header.flags & shutdown::BOTH;
                if self.guest_shutdown & shutdown::RECEIVE != 0 {
                    self.to_guest.clear();
                }
            }
            (op::CREDIT_UPDATE, Stage::Open) => {}
            (op::CREDIT_REQUEST, Stage::Open) => self.update = true,
            _ => self.stage = Stage::Failed,
        }
        self.write();
    }

    /// Something is wrong with what the guest sent.
    pub(super) fn fail(&mut self) {
        self.stage = Stage::Failed;
    }

    fn note_credit(&mut self, header: &Header) {
        (self.room, self.taken, self.asked) = (header.buf_alloc, header.fwd_cnt, false);
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.taken);
        self.room.saturating_sub(under_way) as usize
    }

    /// What is to be sent to the guest next.
    pub(super) fn next(&self) -> Option<Outgoing> {
        let packet = |op, flags, len| Some(Outgoing { op, flags, len });
        if let Some(op) = self.opening {
            return packet(op, 0, 0);
        }
        if self.stage != Stage::Open {
            return None;
        }
        let credit = self.credit();
        let untold = self.host_shutdown & !self.told_shutdown;
        match self.to_guest.len() {
            _ if self.update || self.forwarded.wrapping_sub(self.told) as usize >= BUFFER / 2 => {
                packet(op::CREDIT_UPDATE, 0, 0)
            }
            0 if untold != 0 => packet(op::SHUTDOWN, self.host_shutdown, 0),
            0 => None,
            _ if credit == 0 && self.asked => None,
            _ if credit == 0 => packet(op::CREDIT_REQUEST, 0, 0),
            len => packet(op::RW, 0, len.min(credit)),
        }
    }

    /// The packet's header, but for the context IDs.
    pub(super) fn header(&self, packet: Outgoing, len: usize) -> Header {
        Header {
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: len as u32,
            op: packet.op,
            flags: packet.flags,
            buf_alloc: BUFFER as u32,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }

    /// The first bytes for the guest.
    pub(super) fn data(&mut self, len: usize) -> &[u8] {
        let bytes = self.to_guest.make_contiguous();
        &bytes[..len.min(bytes.len())]
    }

    /// The guest has this packet, with `len` bytes of data.
    pub(super) fn sent(&mut self, packet: Outgoing, len: usize) {
        match packet.op {
            op::RW => {
                self.to_guest.drain(..len);
                self.sent = self.sent.wrapping_add(len as u32);
            }
            op::SHUTDOWN => self.told_shutdown |= packet.flags,
            op::CREDIT_REQUEST => self.asked = true,
            op::REQUEST | op::RESPONSE => self.opening = None,
            _ => {}
        }
        // Every packet says it.
        (self.told, self.update) = (self.forwarded, false);
    }

    /// Whether the guest is to be told that it is over. All that it had sent before it closed it has been passed on.
    pub(super) fn is_over(&self) -> bool {
        let closed = self.guest_shutdown == shutdown::BOTH && self.to_host.is_empty();
        self.stage == Stage::Failed || closed
    }

    fn wants_read(&self) -> bool {
        match self.stage {
            Stage::Greeting => true,
            Stage::Open => self.host_shutdown & shutdown::SEND == 0 && self.guest_shutdown & shutdown::RECEIVE == 0,
            Stage::Requested | Stage::Failed => false,
        }
    }

    /// Has the epolls watch the socket for what it is waited for, and only that: they always report an error or a hang-up
    /// of a socket that they have. For nothing else is it watched until the guest answers.
    pub(super) fn watch(&mut self, id: u64, reads: impl AsFd, writes: impl AsFd) -> Result<(), Errno> {
        let read = match self.stage {
            Stage::Requested => Some(EventFlags::empty()),
            _ if self.wants_read() && (self.is_greeting() || self.to_guest.is_empty()) => Some(EventFlags::IN),
            _ => None,
        };
        let write = (!self.to_host.is_empty()).then_some(EventFlags::OUT);
        let wanted = [(read, reads.as_fd()), (write, writes.as_fd())];
        for ((wanted, epoll), watched) in wanted.into_iter().zip(&mut self.watched) {
            let data = EventData::new_u64(id);
            match (wanted, *watched) {
                (Some(flags), None) => epoll::add(epoll, &self.socket, data, flags)?,
                (Some(flags), Some(before)) if flags != before => epoll::modify(epoll, &self.socket, data, flags)?,
                (None, Some(_)) => epoll::delete(epoll, &self.socket)?,
                _ => {}
            }
            *watched = wanted;
        }
        Ok(())
    }
}
