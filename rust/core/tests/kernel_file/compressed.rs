//! What Linux's build makes of a vmlinux, by the same programs: [`plain`] through each of them.

/// The bytes that all of these decompress to: ELF's magic number, and calls, which xz's x86 filter rewrites.
pub fn plain() -> Vec<u8> {
    let calls = (0..16).flat_map(|call| [0xe8, call, 0, 0, 0, 0x90, 0xc3, call]);
    b"\x7fELF".iter().copied().chain(calls).collect()
}

/// Each format's name and its output.
pub fn all() -> Vec<(&'static str, Vec<u8>)> {
    let known = [
        ("gzip", GZIP),
        ("bzip2", BZIP2),
        ("lzma", LZMA),
        ("xz", XZ),
        ("lz4", LZ4),
        ("zstd", ZSTD),
    ];
    known.into_iter().map(|(name, hex)| (name, bytes(hex))).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex
        .chars()
        .filter_map(|digit| digit.to_digit(16))
        .map(|digit| digit as u8)
        .collect();
    digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// `gzip -n9c`
const GZIP: &str = "
    1f8b08000000000002031dc5471180400004c1cb39a882179eb08027cc8c0ca8ed4fdfc775627ecf6bb0dae2b4c36b4fd081a8234927
    b2ce145da8bad274a3ebced083a9274b2fb6de1fd963d77484000000
";

/// `bzip2 -9c`
const BZIP2: &str = "
    425a6839314159265359acbbed8000002a44a57fff83040000c00008000040200054354fd507a9a03268f7aa8354ffd55000006944ae
    cb6ebf0c72cf4d76df8e7892494e8000001b6dccfd109242491880000007e2ee48a70a1215977db000
";

/// `lzma -9c`
const LZMA: &str = "
    5d00000004ffffffffffffffff003f9145847069ac22aefb8bb9a123fe481863bf6b08e19ca248d13d4b6874be4ae77653081007aa07
    6860fd76442f8ed10bc563cb491a8f7b052eb7b0bfa8bdfff3504000
";

/// `xz --check=crc32 --x86 --lzma2=dict=1MiB -c`
const XZ: &str = "
    fd377a585a0000016922de3602010400210110008b216f49e0008300415d003f9145847069cfe7788f9be425e9a034e2a52995cafdd1
    d4ce5e4fac6e19077eb6f911d9937ecb3ba1ee51aed8b46f1aa8ece5ed249e3e86348772808129a3be1200000000d963d77400015984
    01000000d5fc0e143e300d8b020000000001595a
";

/// `lz4 -l -9 -c`
const LZ4: &str = "
    02214c1869000000e17f454c46e80000000090c300e80108003101e80208003102e80308003103e80408003104e80508003105e80608
    003106e80708003107e80808003108e80908003109e80a0800310ae80b0800310be80c0800310ce80d0800310de80e0800900ee80f00
    000090c30f
";

/// `zstd -22 --ultra -c`
const ZSTD: &str = "
    28b52ffd0488350200b2c30c13d03dc0029830006a0e4020428a9022a49429056d4a556d33f65a2b754a23f4391b732913f2180b7108
    03f0ee3aa5fea08b010fa810ecb101f00d30021f287b09b014073df404
";
