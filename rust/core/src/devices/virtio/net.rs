//! A network card: what it sends and receives are frames of a tap, or datagrams of a socket.
//!
//! No offloads are offered, so that the headers of packets say nothing, and none goes to the host's kernel.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;
use rustix::io::Errno as Cause;
use rustix::net::{AddressFamily, SocketType};
use rustix::rand::GetRandomFlags;
use vmm_sys_util::epoll::EventSet;

use super::device::{Device, Source};
use super::queue::{Queue, total};
use crate::errno::Errno;
use crate::error::{Error, Failure};
use crate::hypervisor::raw;

const QUEUE: u16 = 256;
/// The queue of buffers for frames; the other one has the guest's.
const RECEIVE: usize = 0;
/// Feature: the configuration space has the address.
const MAC: u64 = 1 << 5;
/// Feature: the configuration space says whether there is a link.
const STATUS: u64 = 1 << 16;
/// Where it says so, and that there is one.
const STATUS_AT: usize = 6;
const LINK_UP: u8 = 1;
/// A header's bytes, and the one that says that a frame is in one buffer.
const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;
/// Frames have fewer bytes; others are lost.
const TOO_LONG: usize = 64 << 10;

/// virtio-net.
pub struct Net {
    link: OwnedFd,
    /// The configuration space.
    config: [u8; 12],
    received: Mutex<Received>,
    /// The socket was shut down: no frame comes any more.
    is_down: AtomicBool,
    /// The driver has not been told of that.
    went_down: AtomicBool,
}

/// The frame that was received last.
struct Received {
    bytes: Vec<u8>,
    /// How many bytes it has; 0 once the guest has it.
    len: usize,
}

/// A queue of the tap of this name. With `create` one that does not exist is made, and goes with its last queue.
///
/// # Errors
/// ENODEV if there is none, without `create`; such as EPERM without CAP_NET_ADMIN, EBUSY if the tap is in use, and EINVAL for
/// a name that cannot be or is another device's.
pub fn open_tap(name: &str, create: bool) -> Result<OwnedFd, Errno> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return Err(Errno(libc::EINVAL));
    }
    if !create {
        let any = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        rustix::net::netdevice::name_to_index(any, name)?;
    }
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    raw::attach_tap(&tun, name.as_bytes())?;
    Ok(tun.into())
}

/// Another descriptor of a tap's queue or of a socket that this process has open as number `fd`.
///
/// # Errors
/// EBADF if there is none.
pub fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    raw::duplicate(fd)
}

/// Reads an address that is written as "52:54:00:12:34:56".
pub fn parse_address(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<&str> = text.split(':').collect();
    let digits = |byte: &&str| byte.len() == 2 && byte.bytes().all(|digit| digit.is_ascii_hexdigit());
    if !bytes.iter().all(digits) {
        return None;
    }
    let bytes = bytes.iter().map(|byte| u8::from_str_radix(byte, 16).ok());
    bytes.collect::<Option<Vec<u8>>>()?.try_into().ok()
}

impl Net {
    /// A card at `link`, a queue of a tap or a Unix datagram socket, which does not block from now on. `mac` is its address,
    /// by default a random one.
    ///
    /// # Errors
    /// `Invalid` for an address that is not one card's, for a socket of another kind, and for what is neither a socket nor a tap
    /// without a header; those of ioctl(2).
    pub fn new(link: OwnedFd, mac: Option<[u8; 6]>) -> Result<Self, Error> {
        let host = |errno: Cause| Error::Host {
            what: "prepare a network card",
            errno: errno.into(),
        };
        match rustix::net::sockopt::socket_type(&link) {
            Ok(SocketType::DGRAM) => {}
            Err(Cause::NOTSOCK) => check_tap(&link)?,
            Ok(_) => {
                return Err(Error::Invalid(
                    "a network card's socket is a datagram socket: a frame is a datagram".to_owned(),
                ));
            }
            Err(errno) => return Err(host(errno)),
        }
        rustix::io::ioctl_fionbio(&link, true).map_err(host)?;
        let mac = match mac {
            Some(mac) => mac,
            None => random_address().map_err(host)?,
        };
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(Error::Invalid(
                "a network card's address has the lowest bit of its first byte clear, and is not 0".to_owned(),
            ));
        }
        let mut config = [0; 12];
        config[..6].copy_from_slice(&mac);
        Ok(Self {
            link,
            config,
            received: Mutex::new(Received {
                bytes: vec![0; TOO_LONG],
                len: 0,
            }),
            is_down: AtomicBool::new(false),
            went_down: AtomicBool::new(false),
        })
    }

    /// Its address.
    pub fn mac(&self) -> [u8; 6] {
        std::array::from_fn(|at| self.config[at])
    }

    /// Moves frames from the link into the guest's buffers, until one of the two runs out.
    fn receive(&self, queue: &mut Queue) -> Result<(), Failure> {
        let Received { bytes, len } = &mut *self.received.lock();
        let mut came_to_nothing = true;
        for _ in 0..queue.size() {
            if *len == 0 {
                if self.is_down() {
                    return Ok(());
                }
                match rustix::io::read(&self.link, &mut bytes[..]) {
                    // What a socket that was shut down says differs from kind to kind.
                    Ok(0) | Err(Cause::AGAIN) if came_to_nothing && self.is_shut_down()? => {
                        self.is_down.store(true, Ordering::Relaxed);
                        self.went_down.store(true, Ordering::Relaxed);
                        return Ok(());
                    }
                    // An empty datagram, and one that may have been cut off.
                    Ok(0 | TOO_LONG) => continue,
                    Ok(count) => (*len, came_to_nothing) = (count, false),
                    // The last two are of a socket whose other end is closed.
                    Err(Cause::AGAIN | Cause::CONNREFUSED | Cause::CONNRESET) => return Ok(()),
                    Err(Cause::INTR) => continue,
                    Err(errno) => return Err(std::io::Error::from(errno).into()),
                }
            }
            let Some(request) = queue.take() else {
                return Ok(());
            };
            let mut packet = vec![0; HEADER];
            packet[NUM_BUFFERS] = 1;
            packet.extend(&bytes[..*len]);
            // A frame that the buffer has no room for, or whose buffer is not shared, is lost.
            *len = 0;
            let done = request.write(0, &packet).and_then(|()| request.intact());
            queue.complete(request, done.map_or(0, |()| packet.len() as u32));
        }
        Ok(())
    }

    fn is_down(&self) -> bool {
        self.is_down.load(Ordering::Relaxed)
    }

    /// Whether nothing can be received at the socket any more. It is readable for ever then.
    fn is_shut_down(&self) -> Result<bool, Failure> {
        let ends = PollFlags::RDHUP | PollFlags::HUP;
        let mut polled = [PollFd::new(&self.link, ends)];
        match poll(&mut polled, Some(&Timespec::default())) {
            Ok(_) => Ok(polled[0].revents().intersects(ends)),
            Err(Cause::INTR) => Ok(false),
            Err(errno) => Err(std::io::Error::from(errno).into()),
        }
    }

    /// Moves the guest's frames to the link. Those that it does not take are lost, as on any network.
    fn send(&self, queue: &mut Queue) -> Result<(), Failure> {
        let mut frame = Vec::new();
        while let Some(request) = queue.take() {
            let len = total(request.readable()).saturating_sub(HEADER as u64);
            if (1..TOO_LONG as u64).contains(&len) {
                frame.resize(len as usize, 0);
                if request.read(HEADER as u64, &mut frame).is_ok()
                    && let Err(errno @ Cause::BADFD) = rustix::io::write(&self.link, &frame)
                {
                    // A tap that was deleted.
                    return Err(std::io::Error::from(errno).into());
                }
            }
            queue.complete(request, 0);
        }
        Ok(())
    }
}

/// Whether a descriptor is of a tap without headers.
fn check_tap(link: &OwnedFd) -> Result<(), Error> {
    let invalid = |why: &str| Err(Error::Invalid(why.to_owned()));
    let kind = rustix::fs::fstat(link).map(|stat| FileType::from_raw_mode(stat.st_mode));
    let flags = match kind {
        Ok(FileType::CharacterDevice) => raw::tap_flags(link.as_fd()).ok(),
        _ => None,
    };
    match flags {
        None => invalid("the descriptor is no queue of a tap and no socket: a network card needs one of them"),
        Some(flags) if flags & libc::IFF_TAP == 0 => {
            invalid("the descriptor is of a tun, which has no frames: a network card needs a tap (IFF_TAP)")
        }
        Some(flags) if flags & libc::IFF_NO_PI == 0 || flags & libc::IFF_VNET_HDR != 0 => {
            invalid("the tap puts a header before each frame: open it with IFF_NO_PI and without IFF_VNET_HDR")
        }
        Some(_) => Ok(()),
    }
}

/// An address that no manufacturer gives.
fn random_address() -> Result<[u8; 6], Cause> {
    let mut mac = [0; 6];
    // As few bytes as these are never cut off.
    rustix::rand::getrandom(&mut mac, GetRandomFlags::empty())?;
    mac[0] = mac[0] & !1 | 2;
    Ok(mac)
}

impl Device for Net {
    fn id(&self) -> u16 {
        1
    }

    fn class(&self) -> u16 {
        0x0200
    }

    fn features(&self) -> u64 {
        MAC | STATUS
    }

    fn queues(&self) -> &[u16] {
        &[QUEUE; 2]
    }

    fn config(&self) -> Result<Vec<u8>, Failure> {
        let mut config = self.config;
        config[STATUS_AT] = if self.is_down() { 0 } else { LINK_UP };
        Ok(config.to_vec())
    }

    fn config_changed(&self) -> bool {
        self.went_down.swap(false, Ordering::Relaxed)
    }

    fn process(&self, queues: &mut Vec<Queue>, index: usize) -> Result<(), Failure> {
        let queue = &mut queues[index];
        match index {
            RECEIVE => self.receive(queue),
            _ => self.send(queue),
        }
    }

    /// The link, unless a frame waits for a buffer, or none comes any more.
    fn sources(&self) -> Vec<Source<'_>> {
        match self.received.lock().len {
            0 if !self.is_down() => vec![Source {
                fd: self.link.as_fd(),
                events: EventSet::IN,
                queue: RECEIVE,
            }],
            _ => Vec::new(),
        }
    }

    fn reset(&self) -> Result<(), Failure> {
        self.received.lock().len = 0;
        Ok(())
    }
}
