//! Port IO as the bus hands it to a device.

use pagegate_core::devices::bus::IoHandler;
use pagegate_core::hypervisor::exit::Io;

/// An OUT, or an OUTS if there is more than one access of `size` bytes in `bytes`.
pub fn write(device: &dyn IoHandler, port: u16, size: u8, bytes: &[u8]) {
    let mut data = bytes.to_vec();
    device.io(0, &io(port, true, size, data.len()), &mut data).unwrap();
    assert_eq!(data, bytes, "a device leaves alone what was written to it");
}

/// An IN, or an INS if there is more than one access of `size` bytes in `len`.
pub fn read(device: &dyn IoHandler, port: u16, size: u8, len: usize) -> Vec<u8> {
    let mut data = vec![0x5a; len];
    device.io(0, &io(port, false, size, len), &mut data).unwrap();
    data
}

fn io(port: u16, write: bool, size: u8, len: usize) -> Io {
    Io {
        port,
        write,
        size,
        count: (len / usize::from(size)).try_into().unwrap(),
        data: 0,
    }
}
