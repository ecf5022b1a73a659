//! Made-up bzImages.

/// Sectors of setup code, the boot sector not among them.
pub const SETUP_SECTS: u8 = 1;
pub const VERSION: &str = "6.9.0-test (somebody@somewhere) #1 SMP";

const SETUP: usize = 1024;
/// Bytes of the decompressor in front of the payload.
const DECOMPRESSOR: usize = 96;
const VERSION_AT: usize = 0x300;

/// A bzImage around `payload`, which ends with its uncompressed size.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; SETUP + DECOMPRESSOR];
    image.extend(payload);
    image.resize(image.len().next_multiple_of(16), 0);
    let size = (image.len() - SETUP) as u32 / 16;
    image[0x1f1] = SETUP_SECTS;
    put(&mut image, 0x1f4, &size.to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020f_u16.to_le_bytes());
    put(&mut image, 0x20e, &(VERSION_AT as u16 - 512).to_le_bytes());
    image[0x211] = 1;
    put(&mut image, 0x236, &0x7f_u16.to_le_bytes());
    put(&mut image, 0x248, &(DECOMPRESSOR as u32).to_le_bytes());
    put(&mut image, 0x24c, &(payload.len() as u32).to_le_bytes());
    put(&mut image, VERSION_AT, VERSION.as_bytes());
    image
}

/// A bzImage around `compressed`, which is said to have `size` bytes uncompressed.
pub fn bzimage_of(compressed: &[u8], size: u32) -> Vec<u8> {
    let mut payload = compressed.to_vec();
    // gzip ends with the size itself.
    if compressed.starts_with(&[0x1f, 0x8b]) {
        payload.truncate(compressed.len() - 4);
    }
    payload.extend(size.to_le_bytes());
    bzimage(&payload)
}

pub fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}
