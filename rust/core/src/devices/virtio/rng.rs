//! A source of entropy: the host's.

use rustix::rand::GetRandomFlags;

use super::device::Device;
use super::queue::{Queue, total};
use crate::error::Failure;

/// The most bytes that one request is filled with. A driver takes what there is.
const MOST: u64 = 64 << 10;

/// virtio-rng, with the host's getrandom(2).
#[derive(Debug, Default)]
pub struct Rng;

impl Device for Rng {
    fn id(&self) -> u16 {
        4
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn process(&self, queues: &mut Vec<Queue>, index: usize) -> Result<(), Failure> {
        let queue = &mut queues[index];
        while let Some(request) = queue.take() {
            let mut bytes = vec![0; total(request.writable()).min(MOST) as usize];
            fill(&mut bytes)?;
            let done = request.write(0, &bytes).and_then(|()| request.intact());
            queue.complete(request, done.map_or(0, |()| bytes.len() as u32));
        }
        Ok(())
    }
}

fn fill(bytes: &mut [u8]) -> Result<(), Failure> {
    let mut done = 0;
    while done < bytes.len() {
        done += rustix::rand::getrandom(&mut bytes[done..], GetRandomFlags::empty()).map_err(std::io::Error::from)?;
    }
    Ok(())
}
