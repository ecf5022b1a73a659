//! What a guest that opens and closes streams without end makes the device keep.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use rustix::event::epoll::CreateFlags;
use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};

use super::*;

const GUEST: u32 = 3;
const PORT: u32 = 52;
const ROUNDS: usize = 2000;

fn header(op: u16, port: u32) -> Header {
    Header {
        src_cid: GUEST.into(),
        dst_cid: HOST,
        src_port: port,
        dst_port: PORT,
        kind: STREAM,
        op,
        buf_alloc: 1 << 16,
        ..Header::default()
    }
}

#[test]
#[cfg_attr(miri, ignore = "Miri has neither sockets nor epoll")]
fn streams_that_are_closed_leave_nothing() {
    let folder = std::env::temp_dir().join(format!("pagegate-streams-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("vsock");
    let program = UnixListener::bind(folder.join(format!("vsock_{PORT}"))).unwrap();
    let (reads, writes) = (
        epoll::create(CreateFlags::CLOEXEC).unwrap(),
        epoll::create(CreateFlags::CLOEXEC).unwrap(),
    );
    let epolls = Epolls {
        reads: reads.as_fd(),
        writes: writes.as_fd(),
    };
    let retry = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK).unwrap();
    let mut streams = Streams::new(GUEST, path.clone(), UnixListener::bind(&path).unwrap(), retry);
    // The guest gives no buffers, so that this waits at the front, and one stream stays open.
    streams.receive(&header(op::RW, 1), Some(&[]), epolls).unwrap();
    streams.receive(&header(op::REQUEST, 2), Some(&[]), epolls).unwrap();
    for _ in 0..ROUNDS {
        for op in [op::REQUEST, op::RST] {
            streams.receive(&header(op, 3), Some(&[]), epolls).unwrap();
        }
        drop(program.accept().unwrap());
        assert!(streams.next().is_some());
    }
    assert_eq!(
        (streams.connections.len(), streams.ids.len(), streams.turns.len()),
        (1, 1, 1)
    );
    assert_eq!(streams.refusals.len(), 1);
    std::fs::remove_dir_all(&folder).unwrap();
}
