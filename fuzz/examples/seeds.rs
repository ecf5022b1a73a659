//! Writes the seeds of the corpora: a few inputs for each target that are accepted, or nearly.
//!
//! `cargo run --manifest-path fuzz/Cargo.toml --example seeds`

use std::fs::{create_dir_all, write};
use std::path::Path;

use pagegate_core::memory::address::State;
use pagegate_core::trace::about::About;
use pagegate_core::trace::data::Trace;
use pagegate_core::trace::synthetic::synthetic;

#[path = "../../rust/core/tests/kernel_file/compressed.rs"]
mod compressed;
#[path = "../../rust/core/tests/kernel_file/elf.rs"]
#[allow(dead_code)]
mod elf;
#[path = "../../rust/core/tests/linux_boot/guest.rs"]
#[allow(dead_code)]
mod guest;
#[path = "../../rust/core/tests/kernel_file/image.rs"]
#[allow(dead_code)]
mod image;
#[path = "../../rust/core/tests/kernel_file/kallsyms_model.rs"]
mod kallsyms_model;

use elf::{EM_X86_64, ET_EXEC, STB_GLOBAL, STT_FUNC, Symbol, TEXT, with_symbols};
use kallsyms_model::{Layout, Order, tables};

type Seed = (String, Vec<u8>);

fn main() {
    put("decode", decode());
    put("map_gpa_range", map_gpa_range());
    put("ranges", ranges());
    put("page_map", page_map());
    put("image", images());
    put("kernel_file", kernel_files());
    put("linux", linux());
    put("virtio_block", virtio_block());
    put("virtio_console", virtio_console());
    put("virtio_net", virtio_net());
    put("virtio_rng", virtio_rng());
    put("virtio_vsock", virtio_vsock());
    put("virtio_registers", virtio_registers());
    traces();
}

fn folder(target: &str) -> std::path::PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    create_dir_all(&folder).expect("the folder can be made");
    folder
}

fn put(target: &str, seeds: Vec<Seed>) {
    for (name, bytes) in seeds {
        write(folder(target).join(name), bytes).expect("the seed can be written");
    }
}

/// A number below `count` as arbitrary's `int_in_range` takes it.
fn below(count: u64, number: u64) -> Vec<u8> {
    let bytes = (u64::BITS - (count - 1).leading_zeros()).div_ceil(8) as usize;
    number.to_be_bytes()[8 - bytes..].to_vec()
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// An errno, and kvm_run from `exit_reason` on: for each exit the words of its union.
fn decode() -> Vec<Seed> {
    let exits: [(&str, u8, u32, &[u64]); 10] = [
        ("io", 0, 2, &[0x1_03f8_0101, 32]),
        ("hypercall", 0, 3, &[12, 0x1000, 1, 0x10]),
        ("halt", 0, 5, &[]),
        ("mmio", 0, 6, &[0xfec0_0000, 1, 4]),
        ("internal_error", 0, 17, &[1]),
        ("system_event", 0, 24, &[1]),
        ("wrmsr", 0, 30, &[0, 0xc001_0131 << 32, 1]),
        ("memory_fault", libc::EFAULT as u8, 39, &[8, 0x1000, 4096]),
        ("poison", libc::EHWPOISON as u8, 39, &[0, 0x1000, 4096]),
        ("bad_backing", libc::EFAULT as u8, 2, &[]),
    ];
    let seed = |(name, errno, reason, union): (&str, u8, u32, &[u64])| {
        let mut bytes = vec![errno];
        bytes.extend(reason.to_le_bytes());
        bytes.resize(1 + 24, 0);
        bytes.extend(words(union));
        bytes.resize(1 + 24 + 64, 0);
        (name.to_owned(), bytes)
    };
    exits.map(seed).into()
}

/// Pages of memory, the shared bit, and the registers.
fn map_gpa_range() -> Vec<Seed> {
    let requests = [
        ("to_private", 0, [0x1000, 4, 0x10]),
        ("to_shared_huge", 0, [0, 512, 1]),
        ("shared_view", 40, [1 << 40 | 0x2000, 1, 0]),
        ("two_to_the_52", 0, [0x1000, 1 << 52, 0x10]),
    ];
    let seed = |(name, bit, registers): (&str, u64, [u64; 3])| {
        let bytes = [below(1 << 32, 1 << 14), below(52, bit), words(&registers)].concat();
        (name.to_owned(), bytes)
    };
    requests.map(seed).into()
}

/// Two ranges, an address, the view bit, the end, the hole, the view with the bit set, and whether there is one.
fn ranges() -> Vec<Seed> {
    let range = |gpa, size| [words(&[gpa, size]), vec![1]].concat();
    let seed = |name: &str, a, b, hole, split| {
        let (bit, end) = (36, 2_u64 << 18);
        let bytes = [
            a,
            b,
            words(&[0x5123]),
            below(40, bit - 12),
            below(1 << (bit - 12), end - 1),
            hole,
            vec![1, split],
        ];
        (name.to_owned(), bytes.concat())
    };
    let gib = 1 << 30;
    vec![
        seed(
            "overlapping",
            range(0x4000, 0x3000),
            range(0x6000, 0x9000),
            range(0, 0),
            1,
        ),
        seed(
            "with_a_hole",
            range(gib / 2, gib),
            range(0x1000, 0x1000),
            range(gib, gib / 2),
            0,
        ),
        seed(
            "at_the_top",
            range(u64::MAX << 13, 0x1000),
            range(1 << 36 | 0x1000, 0x1000),
            range(gib, gib),
            1,
        ),
    ]
}

/// Whether memory is large (0: it is), its pages, the state at first, and changes.
fn page_map() -> Vec<Seed> {
    let (large, small) = (2 * 64 * 512 + 512, 4 * 512);
    let change = |size, first, few: u8, step: u8| [below(size, first), vec![few, step]].concat();
    let in_large = |first, few, step| change(large, first, few, step);
    let seed = |name: &str, flag: u8, size, changes: &[Vec<u8>]| {
        let bytes = [vec![flag], below(size, size - 1), vec![1], changes.concat()];
        (name.to_owned(), bytes.concat())
    };
    let borders = [
        in_large(500, 255, 3),
        in_large(32760, 20, 5),
        in_large(32768, 1, 4),
        in_large(0, 1, 1),
    ];
    let snapshots = [
        in_large(0, 200, 3),
        in_large(0, 1, 0),
        in_large(100, 250, 2),
        in_large(0, 1, 0),
        in_large(0, 9, 3),
    ];
    let many: Vec<_> = (0..64)
        .map(|n| change(small, n * 1231 % small, (n * 37 % 256) as u8 | 1, (n * 5 % 8) as u8))
        .collect();
    vec![
        seed("over_borders", 0, large, &borders),
        seed("snapshots", 0, large, &snapshots),
        seed("many", 1, small, &many),
    ]
}

fn images() -> Vec<Seed> {
    vec![
        (
            "one_segment".to_owned(),
            guest::vmlinux(0x1000, 0x1000, &[0x90; 200], 0x2000),
        ),
        (
            "outside".to_owned(),
            guest::vmlinux(0x1000, 0x20_0000, &[0x90; 16], 0x2000),
        ),
        (
            "two_segments".to_owned(),
            elf::elf(ET_EXEC, EM_X86_64, &[(0x1000, b"code"), (0x3000, &[2; 64])]),
        ),
    ]
}

fn kernel_files() -> Vec<Seed> {
    let packed = |(name, bytes): (&str, Vec<u8>)| {
        let size = compressed::plain().len() as u32;
        (format!("bzimage_{name}"), image::bzimage_of(&bytes, size))
    };
    let mut seeds: Vec<Seed> = compressed::all().into_iter().map(packed).collect();
    let symbol = |name: &'static str, address| Symbol {
        name,
        address,
        kind: STT_FUNC,
        binding: STB_GLOBAL,
    };
    let symbols = [
        symbol("_text", TEXT),
        symbol("panic", TEXT + 16),
        symbol("_etext", TEXT + 64),
    ];
    seeds.push((
        "symbol_table".to_owned(),
        with_symbols(&[(TEXT, &[0x90; 64])], &symbols),
    ));
    for order in [Order::OffsetsFirst, Order::OffsetsLast, Order::SelfRelative] {
        seeds.push((format!("kallsyms_{order:?}"), stripped(order)));
    }
    seeds
}

/// A vmlinux without a symbol table, whose tables for kallsyms come after its code.
fn stripped(order: Order) -> Vec<u8> {
    let layout = Layout {
        order,
        absolute_percpu: order == Order::OffsetsLast,
        wide_markers: false,
        sequence: order != Order::OffsetsFirst,
    };
    let code = 0x1000;
    let mut symbols = vec![(TEXT, 'T', "_text".to_owned())];
    symbols.extend((0..400).map(|index| (TEXT + 8 * index, 't', format!("symbol_{index:03}_on"))));
    symbols.push((TEXT + code, 'T', "_etext".to_owned()));
    let mut segment = vec![0x90; code as usize];
    segment.extend(tables(&symbols, layout, TEXT + code));
    segment.extend([0xcc; 100]);
    elf::elf(ET_EXEC, EM_X86_64, &[(TEXT, &segment)])
}

/// The memory in pages below and above 4 GiB, ranges of it, the initrd's size, the command line's, the private bit, the
/// vCPUs, flags, and the kernel's file.
fn linux() -> Vec<Seed> {
    let seed = |name: &str, private: u64, flags: u8, kernel: Vec<u8>| {
        let bytes = [
            below(64 << 8, (64 << 8) - 1),
            below(256, 200),
            below(2, u64::from(flags >> 1 & 1)),
            5000_u16.to_le_bytes().to_vec(),
            100_u16.to_le_bytes().to_vec(),
            below(64, private),
            2_u16.to_le_bytes().to_vec(),
            vec![flags],
            kernel,
        ];
        (name.to_owned(), bytes.concat())
    };
    let vmlinux = guest::vmlinux(0x100_0000, 0x100_0000, &[0x90; 300], 0x2000);
    vec![
        seed("bzimage", 0, 0, guest::bzimage()),
        seed("bzimage_sev", 51, 6, guest::bzimage()),
        seed("vmlinux", 0, 3, vmlinux),
    ]
}

fn traces() {
    let recorded = synthetic(40, 1, 2, &mut || Ok(())).expect("nothing interrupts it");
    let recorded = recorded.expect("there is memory for 40 events");
    let none = Trace {
        about: About::new(1 << 20, State::Shared).expect("a valid size"),
        events: Vec::new(),
        truncated: false,
    };
    for (name, trace) in [("some", &recorded), ("none", &none)] {
        for format in ["parquet", "arrow", "arrows"] {
            let path = folder("trace").join(format!("{name}.{format}"));
            trace.write(&path, &mut |_| Ok(())).expect("the trace can be written");
        }
    }
}

/// Bytes of memory that the targets of virtio use, and offsets in it: where the input's own bytes are, and after them.
const VIRTIO_MEMORY: u64 = 64 * 4096;
const HEADER: u8 = 0;
const STATUS: u8 = 1;

/// A descriptor in the input's own bytes, in units of 16: its length as the target takes it, its flags and the next.
fn descriptor(at: u8, len: &[u8], flags: u8, next: u8) -> Vec<u8> {
    [&[2, at][..], len, &[flags, next]].concat()
}

/// The same at any place in memory.
fn descriptor_at(gpa: u64, len: &[u8], flags: u8, next: u8) -> Vec<u8> {
    [&[128][..], &below(VIRTIO_MEMORY, gpa), len, &[flags, next]].concat()
}

const SECTOR: [u8; 2] = [1, 9];
const SIXTEEN: [u8; 1] = [64];
const ONE: [u8; 1] = [128];

/// Which pages are private, whether events have indices, a page that is converted meanwhile, the descriptors of a request,
/// entries of a table, and bytes after those.
fn virtio(
    private: u64,
    event_idx: u8,
    converted: Option<u64>,
    chain: &[Vec<u8>],
    table: &[Vec<u8>],
    rest: &[u8],
) -> Vec<u8> {
    let converted = converted.map_or(vec![0], |page| [vec![1], below(64, page)].concat());
    let places = [255; 3];
    [
        private.to_le_bytes().to_vec(),
        // No second mask, a queue of 16, where rings usually are, one request.
        vec![0, 4, event_idx],
        places.to_vec(),
        converted,
        vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, chain.len() as u8],
        chain.concat(),
        vec![table.len() as u8],
        table.concat(),
        rest.to_vec(),
    ]
    .concat()
}

fn virtio_block() -> Vec<Seed> {
    let header = |kind: u32, sector: u64| words(&[kind.into(), sector]);
    let chain = |data: Vec<u8>| vec![descriptor(HEADER, &SIXTEEN, 1, 1), data, descriptor(STATUS, &ONE, 2, 0)];
    let (read, write) = (|at| descriptor(at, &SECTOR, 3, 2), |at| descriptor(at, &SECTOR, 1, 2));
    let seed = |name: &str, bytes: Vec<u8>| (name.to_owned(), bytes);
    let table = [
        descriptor(3, &SIXTEEN, 1, 1),
        descriptor(8, &SECTOR, 3, 2),
        descriptor(7, &ONE, 2, 0),
    ];
    let private = 1 << 20;
    vec![
        seed("read", virtio(0, 0, None, &chain(read(4)), &[], &header(0, 3))),
        seed("write", virtio(0, 1, None, &chain(write(4)), &[], &header(1, 5))),
        seed(
            "flush",
            virtio(
                0,
                0,
                None,
                &[chain(read(4))[0].clone(), descriptor(STATUS, &ONE, 2, 0)],
                &[],
                &header(4, 0),
            ),
        ),
        seed(
            "converted",
            virtio(
                0,
                0,
                Some(20),
                &chain(descriptor_at(20 * 4096, &SECTOR, 3, 2)),
                &[],
                &header(0, 1),
            ),
        ),
        seed(
            "private",
            virtio(
                private,
                0,
                None,
                &chain(descriptor_at(20 * 4096, &SECTOR, 1, 2)),
                &[],
                &header(1, 1),
            ),
        ),
        seed(
            "indirect",
            virtio(0, 0, None, &[descriptor(0, &[255, 3], 4, 0)], &table, &header(0, 1)),
        ),
    ]
}

fn virtio_rng() -> Vec<Seed> {
    let filled = descriptor(4, &SECTOR, 2, 0);
    let private = descriptor_at(20 * 4096, &SECTOR, 2, 0);
    vec![
        ("filled".to_owned(), virtio(0, 0, None, &[filled], &[], &[])),
        ("private".to_owned(), virtio(1 << 20, 1, None, &[private], &[], &[])),
    ]
}

/// A request of one descriptor in a queue of a device with two, with these bytes in it if the device reads it.
fn of_queue(queue: u8, len: &[u8], rest: &[u8]) -> Vec<u8> {
    const DEVICE_WRITES: u8 = 2;
    let flags = if rest.is_empty() { DEVICE_WRITES } else { 0 };
    [
        vec![queue],
        virtio(0, 0, None, &[descriptor(0, len, flags, 0)], &[], rest),
    ]
    .concat()
}

fn virtio_console() -> Vec<Seed> {
    vec![
        ("input".to_owned(), of_queue(0, &SIXTEEN, &[])),
        ("output".to_owned(), of_queue(1, &SIXTEEN, b"printed by Linux")),
    ]
}

fn virtio_net() -> Vec<Seed> {
    vec![
        ("received".to_owned(), of_queue(0, &SECTOR, &[])),
        ("sent".to_owned(), of_queue(1, &SECTOR, &[0x22; 512])),
    ]
}

fn virtio_vsock() -> Vec<Seed> {
    const HEADER: [u8; 2] = [192, 3];
    const WITH_DATA: [u8; 2] = [192, 4];
    let packet = |op: u16, len: u32| {
        [
            words(&[3, 2]),
            [1024, 52, len].map(u32::to_le_bytes).concat(),
            [1, op].map(u16::to_le_bytes).concat(),
            [0, 1 << 16, 0_u32].map(u32::to_le_bytes).concat(),
            vec![0x33; len as usize],
        ]
        .concat()
    };
    let sent = |name: &str, op| (name.to_owned(), of_queue(1, &HEADER, &packet(op, 0)));
    vec![
        sent("request", 1),
        sent("reset", 3),
        sent("shutdown", 4),
        ("data".to_owned(), of_queue(1, &WITH_DATA, &packet(5, 16))),
        ("received".to_owned(), of_queue(0, &WITH_DATA, &[])),
    ]
}

/// Accesses, of which each has its kind and its device first.
fn virtio_registers() -> Vec<Seed> {
    let set = |at: u8, value: u8, len: u8| vec![4, 1, at, 2, value, len];
    let place = |at: u8, page: u64| [vec![4, 1, at, 1], below(VIRTIO_MEMORY + 1, page * 4096), vec![2]].concat();
    let start = [
        [set(0x14, 1, 0), set(0x14, 3, 0)].concat(),
        [set(0x08, 1, 2), set(0x0c, 3, 2), set(0x14, 11, 0)].concat(),
        [
            set(0x18, 8, 1),
            place(0x20, 0),
            place(0x28, 1),
            place(0x30, 2),
            set(0x1c, 1, 1),
        ]
        .concat(),
        [set(0x14, 15, 0), set(0x14, 0, 0)].concat(),
    ];
    let move_bar = [2, 1, 1, 0];
    let config = [[0, 1, 0, 2].to_vec(), vec![1, 1, 0x10, 0, 0xff, 0xff, 0xff, 0xff, 2]].concat();
    vec![
        ("start".to_owned(), start.concat()),
        ("move".to_owned(), [&move_bar[..], &config].concat()),
    ]
}
