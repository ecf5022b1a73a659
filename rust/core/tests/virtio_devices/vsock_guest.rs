//! The guest and the host's programs of the tests of vsock.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pagegate_core::devices::virtio::vsock::Vsock;

use crate::driver::wait;
use crate::requests::{A_WHILE, Driver, PATIENCE, Part, Sent};

pub const TO_GUEST: usize = 0;
pub const FROM_GUEST: usize = 1;
pub const CID: u32 = 42;
pub const HOST: u64 = 2;
pub const HEADER: usize = 44;
pub const BUFFER: u32 = 64 << 10;

pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RST: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const RW: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;

/// A packet, with the fields that the tests look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    pub src: (u64, u32),
    pub dst: (u64, u32),
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub data: Vec<u8>,
}

impl Packet {
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.src.0.to_le_bytes());
        bytes.extend(self.dst.0.to_le_bytes());
        bytes.extend(self.src.1.to_le_bytes());
        bytes.extend(self.dst.1.to_le_bytes());
        bytes.extend((self.data.len() as u32).to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        assert_eq!(bytes.len(), HEADER);
        bytes.extend(&self.data);
        bytes
    }

    pub fn parse(bytes: &[u8]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(bytes.len() - HEADER, word(24) as usize);
        Self {
            src: (long(0), word(16)),
            dst: (long(8), word(20)),
            kind: word(28) as u16,
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            data: bytes[HEADER..].to_vec(),
        }
    }
}

/// A guest's end of a stream, and its machine.
pub struct Guest {
    pub driver: Driver,
    pub path: PathBuf,
    /// Buffers for packets that wait in the queue.
    pub buffers: VecDeque<(Sent, u32)>,
    /// What the guest says of its own room.
    pub room: u32,
    pub taken: u32,
}

impl Guest {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pagegate-vsock-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let device = Vsock::new(CID, listener, path.clone()).unwrap();
        Self {
            driver: Driver::new(Arc::new(device)),
            path,
            buffers: VecDeque::new(),
            room: 1 << 20,
            taken: 0,
        }
    }

    /// A program of the host that listens at a port.
    pub fn listen(&self, port: u32) -> Listening {
        let path = PathBuf::from(format!("{}_{port}", self.path.display()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        Listening { path, listener }
    }

    pub fn packet(&self, ports: (u32, u32), op: u16) -> Packet {
        Packet {
            src: (CID.into(), ports.0),
            dst: (HOST, ports.1),
            kind: 1,
            op,
            buf_alloc: self.room,
            fwd_cnt: self.taken,
            ..Packet::default()
        }
    }

    pub fn send(&mut self, ports: (u32, u32), op: u16) {
        let packet = self.packet(ports, op);
        self.driver.put(FROM_GUEST, &packet.bytes());
    }

    pub fn send_data(&mut self, ports: (u32, u32), data: &[u8]) {
        let packet = Packet {
            data: data.to_vec(),
            ..self.packet(ports, RW)
        };
        self.driver.put(FROM_GUEST, &packet.bytes());
    }

    pub fn shut_down(&mut self, ports: (u32, u32), flags: u32) {
        let packet = Packet {
            flags,
            ..self.packet(ports, SHUTDOWN)
        };
        self.driver.put(FROM_GUEST, &packet.bytes());
    }

    /// Gives a buffer.
    pub fn offer(&mut self, len: u32) {
        let sent = self.driver.send(TO_GUEST, &[Part::Write(len)]);
        self.buffers.push_back((sent, len));
    }

    /// The next packet for the guest, for which it gives a buffer if there is none.
    pub fn receive(&mut self) -> Packet {
        if self.buffers.is_empty() {
            self.offer(4096);
        }
        let (head, written) = self.driver.wait(TO_GUEST);
        let (sent, _) = self.buffers.pop_front().unwrap();
        assert_eq!(sent.head, head);
        Packet::parse(&self.driver.read(sent.gpas[0], written))
    }

    pub fn expect(&mut self, ports: (u32, u32), op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(
            (packet.src, packet.dst),
            ((HOST, ports.1), (CID.into(), ports.0)),
            "{packet:?}"
        );
        assert_eq!((packet.op, packet.kind), (op, 1), "{packet:?}");
        packet
    }

    /// That there is nothing for the guest, though it has a buffer.
    pub fn expect_nothing(&mut self) {
        if self.buffers.is_empty() {
            self.offer(4096);
        }
        std::thread::sleep(A_WHILE);
        assert_eq!(self.driver.completed(TO_GUEST), None);
    }

    /// A stream that the guest has opened.
    pub fn connect(&mut self, ports: (u32, u32), listening: &Listening) -> UnixStream {
        self.send(ports, REQUEST);
        let response = self.expect(ports, RESPONSE);
        assert_eq!((response.buf_alloc, response.fwd_cnt), (BUFFER, 0));
        listening.accept()
    }

    /// A stream that a program of the host has opened, and the host's port.
    pub fn be_connected(&mut self, port: u32) -> (UnixStream, u32) {
        let mut client = client(&self.path);
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let request = self.receive();
        assert_eq!((request.op, request.dst), (REQUEST, (CID.into(), port)));
        let host = request.src.1;
        self.send((port, host), RESPONSE);
        assert_eq!(read_line(&mut client), format!("OK {host}\n"));
        (client, host)
    }
}

pub struct Listening {
    pub path: PathBuf,
    pub listener: UnixListener,
}

impl Listening {
    pub fn accept(&self) -> UnixStream {
        let mut accepted = None;
        wait("nobody connects", || {
            accepted = self.listener.accept().ok();
            accepted.is_some()
        });
        let (stream, _) = accepted.unwrap();
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).unwrap();
    }
}

pub fn client(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

pub fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

pub fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

pub fn read_exactly(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}
